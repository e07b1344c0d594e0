"""torch's pipeline stage with counted messages, and with buffers that live only as long as they are needed."""

from collections import deque

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)

from .stage import AttnResStage
from .store import BlockStore
from .traffic import Traffic

# Each by the schedule for one stage per rank and that for several. Looped BFS is GPipe with several: all forward
# passes, then all backward passes.
SCHEDULES = {
    "gpipe": (ScheduleGPipe, ScheduleLoopedBFS),
    "1f1b": (Schedule1F1B, ScheduleInterleaved1F1B),
    "interleaved-1f1b": (ScheduleInterleaved1F1B, ScheduleInterleaved1F1B),
}


def check_schedule(name: str, ranks: int, virtual_stages: int, micro_batches: int):
    """Raises ValueError where a schedule cannot run that many micro-batches."""
    if name not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}.")
    schedule = schedule_class(name, virtual_stages)
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


def schedule_class(name: str, virtual_stages: int) -> type:
    """torch's schedule of a name, for that many stages per rank."""
    return SCHEDULES[name][virtual_stages > 1]


class CountedStage(PipelineStage):
    """`PipelineStage` for an `AttnResStage`: counts what it sends and frees what torch's keeps for good.

    torch allocates the receive buffers of all micro-batches before the first step and keeps them. Here they are made
    when a message is posted and belong to autograd once it is read. Where torch's runtime for several stages per rank
    would keep all messages sent until the end of the step, this stage posts and awaits them itself.

    Args:
        module: the stage's part of the model, its route and its store.
        index, count: which stage of how many.
        shape: `[B, T]` of a micro-batch.
        dtype: of sources and hidden states.
        device: where the stage runs.
        group: the ranks of the pipeline.
        traffic: where what is sent is counted.
        posts_sends: whether this stage posts its messages itself, not the schedule.
    """

    def __init__(
        self,
        module: AttnResStage,
        index: int,
        count: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        group: dist.ProcessGroup,
        traffic: Traffic,
        posts_sends: bool,
    ):
        route = module.route

        def states(number: int) -> tuple[torch.Tensor, ...]:
            hidden = (*shape, module.config.hidden_size)
            return tuple(torch.empty(hidden, dtype=dtype, device="meta", requires_grad=True) for _ in range(number))

        if module.is_first:
            received = (torch.empty(shape, dtype=torch.long, device="meta"),)
        else:
            received = states(len(route.received) + route.partial_received)
        if module.is_last:
            vocabulary = module.config.vocab_size
            sent = (torch.empty(*shape, vocabulary, dtype=dtype, device="meta", requires_grad=True),)
        else:
            sent = states(len(route.sent) + route.partial_sent)
        super().__init__(module, index, count, device, input_args=received, output_args=sent, group=group)
        self.store: BlockStore = module.store
        self.traffic = traffic
        self.posts_sends = posts_sends
        self._forward_sends: dict[int, list[dist.Work]] = {}
        self._backward_sends: deque[list[dist.Work]] = deque()

    def _prepare_forward_infra(self, *args, **kwargs):
        return self._without_buffers(super()._prepare_forward_infra, *args, **kwargs)

    def _create_grad_recv_info(self, *args, **kwargs):
        return self._without_buffers(super()._create_grad_recv_info, *args, **kwargs)

    def _without_buffers(self, prepare, *args, **kwargs):
        """Lets torch make its buffers on the meta device, as placeholders."""
        device, self.device = self.device, torch.device("meta")
        try:
            return prepare(*args, **kwargs)
        finally:
            self.device = device

    def _allocate(self, infos: tuple):
        for info in infos:
            info.buffer = torch.empty_like(info.buffer, device=self.device, requires_grad=False)

    def _take(self, infos: tuple) -> tuple[torch.Tensor, ...]:
        """The received tensors; placeholders are in their stead again."""
        received = tuple(info.buffer for info in infos)
        for info in infos:
            info.buffer = torch.empty_like(info.buffer, device="meta")
        return received

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if not self.is_first:
            infos = self.args_recv_info[fwd_chunk_id]
            self._allocate(infos)
            for info in infos[: len(self.submod.route.received)]:
                self.store.watch(info.buffer)
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
        # The gradient of what was sent has come back: the message has arrived.
        self._wait(self._forward_sends.pop(bwd_chunk_id, ()))
        super().backward_one_chunk(bwd_chunk_id, loss=loss, **kwargs)
        if loss is not None:
            loss.detach_()  # the schedule keeps it, and its graph would keep the blocks that were received

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        ops = super().get_fwd_send_ops(fwd_chunk_id)
        sent = self.submod.route.sent
        self.traffic.forward += sum(op.tensor.nbytes for op in ops)
        self.traffic.forward_sources += sum(op.tensor.nbytes for op in ops[: len(sent)])
        for index in sent:
            crossing = (fwd_chunk_id, index, self.stage_index + 1)
            self.traffic.crossings[crossing] = self.traffic.crossings.get(crossing, 0) + 1
        if not self.posts_sends:
            return ops
        self._forward_sends[fwd_chunk_id] = self._post(ops)
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        ops = super().get_bwd_send_ops(bwd_chunk_id)
        self.traffic.backward += sum(op.tensor.nbytes for op in ops)
        if not self.posts_sends:
            return ops
        self._backward_sends.append(self._post(ops))
        # The receiver has posted its side where the schedule has it, which never depends on what comes after this.
        if len(self._backward_sends) > self.group_size:
            self._wait(self._backward_sends.popleft())
        return []

    def _post(self, ops: list[dist.P2POp]) -> list[dist.Work]:
        return [dist.isend(op.tensor, group=op.group, group_dst=op.group_peer) for op in ops]

    @staticmethod
    def _wait(works):
        for work in works:
            work.wait()

    def finish(self):
        """Awaits what is under way at the end of a step, and forgets what a step without backward has left."""
        for works in (*self._forward_sends.values(), *self._backward_sends):
            self._wait(works)
        self._forward_sends.clear()
        self._backward_sends.clear()
        self.clear_runtime_states()


def keeps_messages(name: str, virtual_stages: int) -> bool:
    """Whether torch's schedule holds all that it sent until the end of a step, so that the stages do it instead."""
    return not issubclass(schedule_class(name, virtual_stages), PipelineScheduleSingle)


def build_schedule(name: str, stages: list[CountedStage], micro_batches: int, loss_fn):
    """torch's schedule over the stages of this rank; losses are sums, so that it scales no gradients."""
    schedule = schedule_class(name, len(stages))
    single = issubclass(schedule, PipelineScheduleSingle)
    return schedule(stages[0] if single else stages, micro_batches, loss_fn=loss_fn, scale_grads=False)
