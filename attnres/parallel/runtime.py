"""torch's pipeline stage with counted messages, and with buffers that live only as long as they are needed."""

from collections import deque
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)

from .stage import AttnResStage

if TYPE_CHECKING:
    from .pipeline import Pipeline

# torch's schedules for one stage per rank and for several. Looped BFS is GPipe for several stages: all forward passes,
# then all backward passes.
SCHEDULES = {
    "gpipe": (ScheduleGPipe, ScheduleLoopedBFS),
    "1f1b": (Schedule1F1B, ScheduleInterleaved1F1B),
    "interleaved-1f1b": (ScheduleInterleaved1F1B, ScheduleInterleaved1F1B),
}


def schedule_class(name: str, ranks: int, virtual_stages: int, micro_batches: int) -> type:
    """Returns torch's class for the schedule of a name."""
    if name not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}.")
    schedule = SCHEDULES[name][virtual_stages > 1]
    if schedule is Schedule1F1B and micro_batches < ranks:
        raise ValueError(
            f"schedule={name!r} with one stage per rank needs at least as many micro_batches as ranks={ranks}, "
            f"got {micro_batches}."
        )
    rounds = max(1, micro_batches // ranks)
    if schedule is ScheduleInterleaved1F1B and micro_batches % rounds:
        raise ValueError(
            f"schedule={name!r} runs micro_batches in {rounds} rounds (micro_batches // ranks) of the same size: "
            f"micro_batches={micro_batches} must be a multiple of {rounds}, or fewer than 2 * ranks={2 * ranks}."
        )
    return schedule


class CountedStage(PipelineStage):
    """`PipelineStage` for an `AttnResStage` that counts what it sends and frees the buffers that torch's keeps.

    torch allocates the receive buffers of all micro-batches before the first step and keeps them. Here a buffer is
    made when its message is posted, and autograd owns it once it is read. torch's runtime for several stages per rank
    keeps all sent messages until the end of the step; with `posts_sends`, this stage posts and awaits them itself.
    `shape` is the `[B, T]` of a micro-batch.
    """

    def __init__(
        self, module: AttnResStage, index: int, shape: tuple[int, int], pipeline: "Pipeline", posts_sends: bool
    ):
        route, device = module.route, pipeline.device

        def states(number: int, width: int = module.config.hidden_size) -> tuple[torch.Tensor, ...]:
            options = {"dtype": pipeline.dtype, "device": "meta", "requires_grad": True}
            return tuple(torch.empty(*shape, width, **options) for _ in range(number))

        received = states(len(route.received) + route.partial_received)
        sent = states(len(route.sent) + route.partial_sent)
        if module.is_first:
            received = (torch.empty(shape, dtype=torch.long, device="meta"),)
        if module.is_last:
            sent = states(1, module.config.vocab_size)
        super().__init__(
            module, index, pipeline.num_stages, device, input_args=received, output_args=sent, group=pipeline.group
        )
        self.traffic = pipeline.traffic
        self.posts_sends = posts_sends
        self._forward_sends: dict[int, list[dist.Work]] = {}
        self._backward_sends: deque[list[dist.Work]] = deque()

    def _prepare_forward_infra(self, *args, **kwargs):
        return self._without_buffers(super()._prepare_forward_infra, *args, **kwargs)

    def _create_grad_recv_info(self, *args, **kwargs):
        return self._without_buffers(super()._create_grad_recv_info, *args, **kwargs)

    def _without_buffers(self, prepare, *args, **kwargs):
        """Makes torch create its buffers on the meta device, as placeholders."""
        device, self.device = self.device, torch.device("meta")
        try:
            return prepare(*args, **kwargs)
        finally:
            self.device = device

    def _allocate(self, infos: tuple):
        for info in infos:
            info.buffer = torch.empty_like(info.buffer, device=self.device, requires_grad=False)

    def _take(self, infos: tuple) -> tuple[torch.Tensor, ...]:
        """Returns the received tensors and puts placeholders in their place."""
        received = tuple(info.buffer for info in infos)
        for info in infos:
            info.buffer = torch.empty_like(info.buffer, device="meta")
        return received

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if not self.is_first:
            infos = self.args_recv_info[fwd_chunk_id]
            self._allocate(infos)
            for info in infos[: len(self.submod.route.received)]:
                self.submod.store.watch(info.buffer)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.has_backward and not self.is_last:
            self._allocate(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[torch.Tensor, ...]:
        needed = self.has_backward and torch.is_grad_enabled()
        return tuple(tensor.requires_grad_(needed) for tensor in self._take(self.args_recv_info[fwd_chunk_id]))

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[torch.Tensor, ...]:
        return self._take(self.grad_recv_info[bwd_chunk_id])

    def forward_one_chunk(self, fwd_chunk_id: int, *args, **kwargs):
        self.submod.micro_batch = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, loss: torch.Tensor | None = None, **kwargs):
        # The gradient of what was sent has come back, so the message has arrived.
        _wait(self._forward_sends.pop(bwd_chunk_id, ()))
        super().backward_one_chunk(bwd_chunk_id, loss=loss, **kwargs)
        if loss is not None:
            loss.detach_()  # the schedule keeps the loss, whose graph would keep the received blocks

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        ops = super().get_fwd_send_ops(fwd_chunk_id)
        sent = self.submod.route.sent
        self.traffic.forward += sum(op.tensor.nbytes for op in ops)
        self.traffic.forward_sources += sum(op.tensor.nbytes for op in ops[: len(sent)])
        self.traffic.crossings.update((fwd_chunk_id, index, self.stage_index + 1) for index in sent)
        if not self.posts_sends:
            return ops
        self._forward_sends[fwd_chunk_id] = _post(ops)
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        ops = super().get_bwd_send_ops(bwd_chunk_id)
        self.traffic.backward += sum(op.tensor.nbytes for op in ops)
        if not self.posts_sends:
            return ops
        self._backward_sends.append(_post(ops))
        # The receiver posts its side where its schedule has it, which never depends on what comes after this message.
        if len(self._backward_sends) > self.group_size:
            _wait(self._backward_sends.popleft())
        return []

    def finish(self):
        """Awaits the messages under way at the end of a step and clears what a step without backward has left."""
        for works in (*self._forward_sends.values(), *self._backward_sends):
            _wait(works)
        self._forward_sends.clear()
        self._backward_sends.clear()
        self.clear_runtime_states()


def _post(ops: list[dist.P2POp]) -> list[dist.Work]:
    return [dist.isend(op.tensor, group=op.group, group_dst=op.group_peer) for op in ops]


def _wait(works):
    for work in works:
        work.wait()
