"""Uses of torch's private API, collected in one place; tests/test_torch_internals.py covers them."""

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode


def in_function_transform() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, ...), forward-mode differentiation or a tracer of torch.jit
    is active: custom operators have no rules for them."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


def in_dispatch_mode() -> bool:
    """Whether something looks at every operation: a counter of operations, a recorder, fake tensors."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape and no memory: nothing is computed, only planned."""
    return isinstance(tensor, FakeTensor)


__all__ = ["FakeTensorMode", "TorchDispatchMode", "in_dispatch_mode", "in_function_transform", "is_fake"]
