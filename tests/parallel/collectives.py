"""Counts the collectives that a process really issues."""

from collections import Counter

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

# By what an operator's name ends with: kind, and where the tensor is that a collective is about: an argument's index,
# or the output.
OPERATORS = {
    "_c10d_functional::all_reduce": ("all_reduce", 0),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", "output"),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0),
    "_c10d_functional::all_to_all_single": ("all_to_all", 0),
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
}


class Collectives(TorchDispatchMode):
    """How many there were of each kind, and the bytes of their tensors; sizes that are sent first do not count."""

    def __init__(self):
        super().__init__()
        self.calls, self.payload = Counter(), Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # comes back as operators on plain tensors
        output = function(*arguments, **(options or {}))
        kind, where = OPERATORS.get(function.name().removesuffix("_out"), (None, None))
        if kind is not None:
            tensor = output if where == "output" else arguments[where]
            tensor = tensor[0] if isinstance(tensor, (list, tuple)) else tensor
            if tensor.is_floating_point():
                self.calls[kind] += 1
                self.payload[kind] += tensor.numel() * tensor.element_size()
        return output

    def counted(self) -> dict[str, list[int]]:
        return {kind: [self.calls[kind], self.payload[kind]] for kind in sorted(self.calls)}


def counted_step(model, ids: torch.Tensor) -> tuple[dict, dict]:
    """Of a forward and of a backward pass."""
    with Collectives() as forward:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    with Collectives() as backward:
        loss.backward()
    return forward.counted(), backward.counted()
