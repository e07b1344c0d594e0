"""The private parts of torch that the package uses still behave as expected."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from attnres.torch_internals import in_dispatch_mode, in_function_transform, is_fake


@pytest.mark.filterwarnings("ignore")  # torch.jit warns of itself
def test_function_transforms_forward_differentiation_and_tracers_are_noticed():
    seen = []

    def look(x):
        seen.append(in_function_transform())
        return x.sum()

    assert not in_function_transform()
    value = torch.ones(3)
    torch.func.vmap(look)(torch.ones(2, 3))
    torch.func.grad(look)(value)
    torch.func.jvp(look, (value,), (value,))
    torch.jit.trace(look, value, check_trace=False)
    with torch.autograd.forward_ad.dual_level():
        look(value)
    assert len(seen) >= 5 and all(seen[:5])  # what is traced runs once more by itself
    assert not in_function_transform()


def test_dispatch_modes_are_noticed():
    assert not in_dispatch_mode()
    with TorchDispatchMode():
        seen = in_dispatch_mode()
    assert seen and not in_dispatch_mode()


def test_fake_tensors_are_told_from_real_ones():
    assert not is_fake(torch.ones(1))
    with FakeTensorMode():
        assert is_fake(torch.ones(1))
