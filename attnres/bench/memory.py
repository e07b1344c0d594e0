"""Bytes that a forward pass saves for its backward pass, and peak memory of a step."""

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def saved_bytes(forward: Callable[[], torch.Tensor], exclude: Iterable[torch.Tensor]) -> int:
    """Counts the bytes of the tensors that autograd saves in a forward pass.

    Each storage counts once and in full, however many views of it are saved. Tensors that an autograd function keeps
    without `save_for_backward` are not counted, nor are the storages of `exclude`, such as the parameters.
    """
    excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    storages = {}  # keeps the storages alive, so that no address is reused

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for storage in storages.values())
    del result  # only now: it keeps the graph alive
    return total


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Measures the most bytes allocated for tensors while `run` runs, above those allocated before.

    On CUDA this is the statistic of torch's allocator. On a CPU it is the sum of torch's own allocations and releases
    from its profiler, because the resident set of the process includes memory that the C library holds back, and
    differs from run to run.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    changes = [event["args"] for event in events]
    if not changes:
        return 0
    before = changes[0]["Total Allocated"] - changes[0]["Bytes"]  # the profiler's total carries over between runs
    return max(0, *(change["Total Allocated"] - before for change in changes))
