"""Uses of torch's private API, collected in one place; tests/test_torch_internals.py covers them."""

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad


def in_function_transform() -> bool:
    """Returns whether a transform of torch.func, forward-mode differentiation or torch.jit.trace is active.

    Custom operators have no rules for these.
    """
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


def in_dispatch_mode() -> bool:
    """Returns whether something observes every operation: a counter of operations, a recorder, fake tensors."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_fake(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor has a shape but no memory, because a computation is only being planned."""
    return isinstance(tensor, FakeTensor)
