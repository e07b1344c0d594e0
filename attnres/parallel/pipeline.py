"""Pipeline parallelism with the paper's cross-stage caching (section 4.1), on torch.distributed.pipelining.

Every block crosses to a rank at most once: stage c sends to stage c + 1 the sources that were completed since the
previous virtual stage of the receiving rank ended, which keeps what it has in a store that its stages share. Gradients
of cached blocks collect there and go back to their producer the way the blocks came.

Shapes: B rows, T tokens, D hidden size; P ranks, V virtual stages each, M micro-batches.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.loss.loss_utils import ForCausalLMLoss

from ..backbones import load_balancing_loss
from ..configuration_attnres import AttnResConfig
from ..modeling_attnres import AttnResForCausalLM
from . import stage_files, tensor, watch
from .runtime import SCHEDULES, CountedStage, build_schedule, check_schedule, keeps_messages
from .stage import AttnResStage
from .store import BlockStore
from .traffic import Traffic, plan_routes, split_layers
from .watch import PipelineError

IGNORED = -100  # the label of tokens without a loss
_TORCH_LOGGER = logging.getLogger("torch.distributed.pipelining.schedules")


class Pipeline:
    """A model whose decoder layers are spread over the ranks of a process group, trained micro-batch by micro-batch.

    Every rank makes one with the same arguments and calls the same methods. The loss and all gradients are those of
    the whole model in one process: sum over tokens with a label, divided by their number in the whole batch.

    Args:
        model: a checkpoint folder, of which each rank reads its own tensors only; an `AttnResConfig` for a model from
            scratch; or an `AttnResForCausalLM` in memory, the same on every rank, of which the rank's modules are
            used (and the depth mixer's parameters copied), divided in place where the mesh has a dimension "tp".
        mesh: the ranks of the pipeline: a process group, a mesh of one dimension, or a mesh with a dimension "pp".
            That may have a dimension "tp", over which transformers divides every stage by the family's plan, and one
            more, over which replicas of the pipeline average. Default: all ranks.
        schedule: `"gpipe"`, `"1f1b"` or `"interleaved-1f1b"`; with several virtual stages `"1f1b"` is interleaved.
        virtual_stages: V; rank r has the stages r, r + P, r + 2 P, ...
        micro_batches: M; B must be a multiple.
        split: decoder layers of each of the P V stages. Default: as even as they can be.
        caching: `False` sends all complete sources at every crossing, for comparison.
        device: where the rank's stages go. Default: the model's, or the group's.

    Raises:
        ValueError: an argument that does not fit; names the field, the value and the rule.
    """

    def __init__(
        self,
        model: AttnResForCausalLM | AttnResConfig | str | os.PathLike,
        mesh: dist.ProcessGroup | DeviceMesh | None = None,
        *,
        schedule: str = "1f1b",
        virtual_stages: int = 1,
        micro_batches: int,
        split: list[int] | None = None,
        caching: bool = True,
        device: torch.device | str | None = None,
    ):
        self.group, self.replicas, self.tensor_mesh = _dimensions(mesh)
        self.ranks = tuple(dist.get_process_group_ranks(self.group))
        self.rank, size = dist.get_rank(self.group), len(self.ranks)
        self._watched = set(self.ranks)
        if self.replicas is not None:
            self._watched |= set(dist.get_process_group_ranks(self.replicas))
        if self.tensor_mesh is not None:
            self._watched |= set(dist.get_process_group_ranks(self.tensor_mesh.get_group()))
        if size < 2:
            raise ValueError("a pipeline needs at least 2 ranks, got 1; train with one process instead.")
        for name, value in (("virtual_stages", virtual_stages), ("micro_batches", micro_batches)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        check_schedule(schedule, size, virtual_stages, micro_batches)
        self.schedule, self.micro_batches, self.virtual_stages = schedule, micro_batches, virtual_stages

        folder = Path(model) if isinstance(model, str | os.PathLike) else None
        self.config = _config_of(model)
        _check_losses(self.config)
        self.num_stages = size * virtual_stages
        bounds = split_layers(self.config.num_hidden_layers, self.num_stages, split)
        self.routes = plan_routes(self.config, bounds, size, caching)
        self.stage_numbers = range(self.rank, self.num_stages, size)
        self.is_first, self.is_last = self.rank == 0, self.rank == size - 1  # of the ranks

        if device is None and isinstance(model, AttnResForCausalLM):
            device = model.device
        self.device = torch.device(device) if device is not None else _device_of(self.group)
        self.store, self.traffic = BlockStore(), Traffic()
        self._summed: list[nn.Parameter] = []  # whose gradients are a part of each rank of the tensor mesh
        self._watch = watch.current()
        self._generation_config = getattr(model, "generation_config", None)
        with self._watch.guard(self._watched, "the set-up of the pipeline"):
            self.stages, problem = [], None
            try:
                if folder is not None:
                    self._generation_config = stage_files.stored_generation_config(folder)
                self.stages = self._build_stages(model, folder)
            except (ValueError, OSError) as error:
                problem = f"{type(error).__name__}: {error}"
            self._agree(problem, bounds, caching)
            self._start_replicas_alike()
        self._built: tuple | None = None
        self._divisor: torch.Tensor | None = None

    def _build_stages(self, model, folder: Path | None) -> nn.ModuleList:
        whole = model if isinstance(model, AttnResForCausalLM) else stage_files.empty_model(self.config)
        if self.tensor_mesh is not None:
            tensor.check_division(whole, self.tensor_mesh.size())
        stages = nn.ModuleList()
        for number in self.stage_numbers:
            stage = AttnResStage(whole, self.routes[number], number == 0, number == self.num_stages - 1)
            stage.store = self.store
            if folder is not None:
                stage_files.load_stage(stage, folder, self.device)
            elif whole is not model:
                stage_files.fill_stage(stage, self.device)
                if self.tensor_mesh is not None:
                    tensor.start_alike(stage, self.tensor_mesh)
            if self.tensor_mesh is not None:
                self._summed += tensor.divide(stage, whole.tp_plan, self.tensor_mesh)
            stages.append(stage.to(self.device).train(whole is not model or model.training))
        return stages

    def _agree(self, problem: str | None, bounds: list[int], caching: bool):
        """Raises on every rank what one rank has met, or that they were given different things."""
        dtype = self.stages[0].model["embed_tokens"].weight.dtype if self.stages and self.is_first else None
        mine = {
            "configuration": {**self.config.to_dict(), "transformers_version": None},
            "schedule": self.schedule,
            "virtual_stages": self.virtual_stages,
            "micro_batches": self.micro_batches,
            "split": bounds,
            "caching": caching,
        }
        tied = self.stages and self.config.tie_word_embeddings and (self.is_first or self.is_last)
        given = self._of_replica(
            (dist.get_rank(), problem, mine, dtype, tensor.division(self._tied_copy()) if tied else None)
        )
        for rank, found, theirs, _, _ in given:
            if found is not None:
                raise PipelineError(f"rank {rank} cannot build its stages: {found}")
            for name, value in theirs.items():
                if value != given[0][2][name]:
                    raise PipelineError(
                        f"{name} must be the same on all ranks, got another on rank {rank} than on {given[0][0]}."
                    )
        if given[0][4] != given[-1][4]:
            raise PipelineError(
                f"tied embeddings must be divided the same way, the family's plan has {given[0][4]} for the embedding "
                f"and {given[-1][4]} for the head: tensor parallelism in a pipeline cannot train them."
            )
        self.dtype = given[0][3]  # of the embedding, and with it of all sources

    def _start_replicas_alike(self):
        if self.replicas is not None:
            for each in (*self.parameters(), *self.stages.buffers()):
                dist.broadcast(tensor.local(each.detach()), group_src=0, group=self.replicas)
        if self.config.tie_word_embeddings and (self.is_first or self.is_last):
            self._exchange_tied(lambda first, last: first, of_gradients=False)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of this rank's stages."""
        return self.stages.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Of this rank's stages, each under the stage's number and the name that it has in `AttnResForCausalLM`."""
        for number, stage in zip(self.stage_numbers, self.stages, strict=True):
            for name, parameter in stage.named_parameters():
                yield f"{number}.{name}", parameter

    def train(self, mode: bool = True) -> "Pipeline":
        """As of a module: dropout, and checkpointing of activations where that is enabled."""
        self.stages.train(mode)
        return self

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None):
        """As of a transformers model: decoder layers run again in backward; nothing crosses twice."""
        for stage in self.stages:
            # transformers 5.23 renamed it
            enable = getattr(stage, "activation_checkpointing_enable", None) or stage.gradient_checkpointing_enable
            enable(gradient_checkpointing_kwargs)

    def zero_grad(self):
        """As of a module."""
        self.stages.zero_grad()

    def step(
        self,
        input_ids: torch.LongTensor,
        labels: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """Forward and backward over one batch, the same on every rank of the pipeline; gradients add up as in torch.

        Args:
            input_ids: `[B, T]`.
            labels: `[B, T]`, -100 where there is no loss; shifted here.
            attention_mask: `[B, T]`, 1 for tokens and 0 for padding.
            position_ids: `[B, T]`.

        Returns:
            The loss, on every rank: the mean over all tokens with a label, of all micro-batches and replicas.
        """
        self._check_batch(input_ids, labels, attention_mask, position_ids)
        parameters = list(self.parameters())
        earlier = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None  # what is summed over ranks below is of this step alone
        with self._watch.guard(self._watched, "a training step"):
            loss = self._run(input_ids, labels, attention_mask, position_ids, training=True)
            if self.tensor_mesh is not None:
                tensor.settle_gradients(parameters, self._summed, self.tensor_mesh)
            self._sum_gradients(parameters)
        for parameter, before in zip(parameters, earlier, strict=True):
            if before is not None:
                parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)
        return loss

    def evaluate(
        self,
        input_ids: torch.LongTensor,
        labels: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """The loss as `step` returns it, without gradients; dropout as `train` says."""
        self._check_batch(input_ids, labels, attention_mask, position_ids)
        with torch.no_grad(), self._watch.guard(self._watched, "an evaluation"):
            return self._run(input_ids, labels, attention_mask, position_ids, training=False)

    def _run(self, input_ids, labels, attention_mask, position_ids, training: bool) -> torch.Tensor:
        tensors = {"attention_mask": attention_mask, "position_ids": position_ids}
        options = {name: tensor.to(self.device) for name, tensor in tensors.items() if tensor is not None}
        divisor = (labels[:, 1:] != IGNORED).sum().to(self.device)
        if self.replicas is not None:
            dist.all_reduce(divisor, group=self.replicas)
        self._divisor = divisor
        schedule = self._schedule_for(input_ids.shape)
        losses: list[torch.Tensor] = []
        run = schedule.step if training else schedule.eval
        inputs = (input_ids.to(self.device),) if self.is_first else ()
        was_disabled, _TORCH_LOGGER.disabled = _TORCH_LOGGER.disabled, True  # it prints whole schedules; errors say why
        try:
            run(
                *inputs,
                target=labels.to(self.device) if self.is_last else None,
                losses=losses if self.is_last else None,
                return_outputs=False,
                **options,
            )
        except BaseException:
            self.store.clear()  # of what a step that failed has left; a whole one leaves nothing
            raise
        finally:
            _TORCH_LOGGER.disabled = was_disabled
        for counted in self._counted:
            counted.finish()
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        if self.is_last:
            loss = torch.stack([each.detach() for each in losses]).sum().float()
        dist.broadcast(loss, group_src=len(self.ranks) - 1, group=self.group)
        if self.replicas is not None:
            dist.all_reduce(loss, group=self.replicas)
        return loss

    def _check_batch(self, input_ids, labels, attention_mask, position_ids):
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be [B, T], got shape {list(input_ids.shape)}.")
        for name, given in (("labels", labels), ("attention_mask", attention_mask), ("position_ids", position_ids)):
            if given is not None and given.shape != input_ids.shape:
                raise ValueError(
                    f"{name} must have the shape of input_ids, {list(input_ids.shape)}, got {list(given.shape)}."
                )
        if len(input_ids) % self.micro_batches:
            raise ValueError(
                f"the batch's {len(input_ids)} rows must be a multiple of micro_batches={self.micro_batches}."
            )

    def _schedule_for(self, shape: torch.Size):
        """torch's schedule for a shape of batches; made anew when that changes, as messages have a fixed size."""
        rows = shape[0] // self.micro_batches
        if self._built is None or self._built[0] != (rows, shape[1]):
            self._counted = [
                CountedStage(
                    stage,
                    number,
                    self.num_stages,
                    (rows, shape[1]),
                    self.dtype,
                    self.device,
                    self.group,
                    self.traffic,
                    posts_sends=keeps_messages(self.schedule, self.virtual_stages),
                )
                for number, stage in zip(self.stage_numbers, self.stages, strict=True)
            ]
            schedule = build_schedule(self.schedule, self._counted, self.micro_batches, self._loss)
            self._built = ((rows, shape[1]), schedule)
        return self._built[1]

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Of one micro-batch: its tokens' losses summed, divided by the number of labels of the whole batch."""
        return ForCausalLMLoss(logits, labels, self.config.vocab_size, num_items_in_batch=self._divisor)

    def _sum_gradients(self, parameters: list[nn.Parameter]):
        """Over the two copies of tied embeddings, and over replicas."""
        if self.config.tie_word_embeddings and (self.is_first or self.is_last):
            self._exchange_tied(torch.add, of_gradients=True)
        if self.replicas is not None:
            works = []
            for parameter in parameters:
                if parameter.requires_grad:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)  # another replica may have one
                    works.append(dist.all_reduce(tensor.local(parameter.grad), group=self.replicas, async_op=True))
            for work in works:
                work.wait()

    def _exchange_tied(self, combine, of_gradients: bool):
        """Combines what the first and the last rank have of the embedding, in one order: the copies stay equal."""
        own = self._tied_copy()
        if of_gradients and not own.requires_grad:
            return
        if of_gradients and own.grad is None:
            own.grad = torch.zeros_like(own)
        mine = tensor.local(own.grad if of_gradients else own.detach())
        other = torch.empty_like(mine)
        peer = len(self.ranks) - 1 if self.is_first else 0
        sent = dist.P2POp(dist.isend, mine.contiguous(), group=self.group, group_peer=peer)
        received = dist.P2POp(dist.irecv, other, group=self.group, group_peer=peer)
        for work in dist.batch_isend_irecv([sent, received]):
            work.wait()
        first, last = (mine, other) if self.is_first else (other, mine)
        mine.copy_(combine(first, last))

    def _tied_copy(self) -> nn.Parameter:
        """The embedding, on the first rank; the head that is tied to it, on the last."""
        return self.stages[0].model["embed_tokens"].weight if self.is_first else self.stages[-1].lm_head.weight

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """`torch.nn.utils.clip_grad_norm_` over all ranks' parameters, tied embeddings counted once."""
        skipped = self.stages[-1].lm_head.weight if self.is_last and self.config.tie_word_embeddings else None
        whole, divided = [], []
        for each in self.parameters():
            if each.grad is not None and each is not skipped:
                (divided if tensor.is_divided(each) else whole).append(tensor.local(each.grad))
        square, square_of_parts = self._square(whole), self._square(divided)
        with self._watch.guard(self._watched, "clipping gradients"):
            if self.tensor_mesh is not None:
                dist.all_reduce(square_of_parts, group=self.tensor_mesh.get_group())
            square += square_of_parts
            dist.all_reduce(square, group=self.group)
        norm = square.sqrt().to(torch.promote_types(self.dtype, torch.float32))
        foreach = None if self.tensor_mesh is None else False  # torch takes no mixture of divided and whole ones
        nn.utils.clip_grads_with_norm_(self.parameters(), max_norm, norm, foreach=foreach)
        return norm

    def _square(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Of the norm of all of them."""
        square = torch.zeros((), dtype=torch.float64, device=self.device)
        return square + nn.utils.get_total_norm(gradients).double() ** 2 if gradients else square

    def save(self, folder: str | os.PathLike):
        """Writes a folder that `from_pretrained` loads: each stage its own shard, the first rank all else.

        The ranks must see the same file system. Nothing is under the folder's name until all of it is written.
        """
        folder = Path(folder)
        with self._watch.guard(self._watched, "saving"):
            if self.replicas is None or dist.get_rank(self.replicas) == 0:
                self._save(folder)
            if self.replicas is not None:
                dist.barrier(self.replicas)

    def _save(self, folder: Path):
        writes = self.tensor_mesh is None or self.tensor_mesh.get_local_rank() == 0
        leads = writes and self.is_first

        def start():
            return stage_files.start_folder(folder, self.config, self._generation_config) if leads else None

        temporary: Path = self._together(start)[0]
        try:
            shards = []
            for number, stage in zip(self.stage_numbers, self.stages, strict=True):

                def write(number=number, stage=stage):
                    target = temporary if writes else None
                    return stage_files.write_shard(stage, target, number, self.num_stages)

                shards += self._together(write)

            def finish():
                if leads:
                    stage_files.finish_folder(temporary, folder, shards)

            self._together(finish)
        finally:
            if leads:
                shutil.rmtree(temporary, ignore_errors=True)

    def _together(self, action) -> list:
        """Does something on every rank of this replica; what it returned on each, or on each the error of one."""
        try:
            outcome = (dist.get_rank(), None, action())
        except Exception as error:
            outcome = (dist.get_rank(), f"{type(error).__name__}: {error}", None)
        outcomes = self._of_replica(outcome)
        for rank, problem, _ in outcomes:
            if problem is not None:
                raise PipelineError(f"rank {rank}: {problem}")
        return [result for _, _, result in outcomes]

    def _of_replica(self, mine) -> list:
        """What every rank of this replica has: those of the pipeline that writes first, in their order."""
        every = _of_all(mine, self.group)
        if self.tensor_mesh is not None:
            every = [each for some in _of_all(every, self.tensor_mesh.get_group()) for each in some]
        return every


def _of_all(mine, group: dist.ProcessGroup) -> list:
    """What every rank of a group has, in their order."""
    every: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, mine, group=group)
    return every


def _dimensions(mesh) -> tuple[dist.ProcessGroup, dist.ProcessGroup | None, DeviceMesh | None]:
    """The ranks of the pipeline, those that have the same stages in other replicas, and those that divide a stage."""
    if mesh is None:
        return dist.group.WORLD, None, None
    if isinstance(mesh, dist.ProcessGroup):
        return mesh, None, None
    names = mesh.mesh_dim_names or ()
    if mesh.ndim == 1 and "tp" not in names:
        return mesh.get_group(), None, None
    others = [name for name in names if name not in ("pp", "tp")]
    if "pp" not in names or len(others) > 1:
        raise ValueError(
            'mesh must have one dimension, or one named "pp", with or without one named "tp" and one for replicas, '
            f"got {mesh}."
        )
    replicas = mesh.get_group(others[0]) if others else None
    divides = "tp" in names and mesh["tp"].size() > 1
    return mesh.get_group("pp"), replicas, mesh["tp"] if divides else None


def _config_of(model) -> AttnResConfig:
    if isinstance(model, AttnResForCausalLM):
        if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
            raise ValueError(
                "model must be whole on every rank, got one that is divided among ranks: give its checkpoint folder, "
                'and for tensor parallelism a mesh with a dimension "tp".'
            )
        return model.config
    if isinstance(model, AttnResConfig):
        model.check_depth_options()
        return model
    if not isinstance(model, str | os.PathLike):
        raise ValueError(
            f"model must be a checkpoint folder, an AttnResConfig or an AttnResForCausalLM, got {type(model).__name__}."
        )
    if not Path(model, "config.json").is_file():
        raise ValueError(f"model must be a checkpoint folder, {os.fspath(model)} has no config.json.")
    return AttnResConfig.from_pretrained(model)


def _check_losses(config: AttnResConfig):
    if config.depth_variant != "attnres":
        raise ValueError(f"depth_variant must be 'attnres' in a pipeline, got {config.depth_variant!r}.")
    backbone = config.backbone_config
    wanted = getattr(backbone, "output_router_logits", False) and load_balancing_loss(backbone) is not None
    if wanted and backbone.router_aux_loss_coef:
        raise ValueError(
            "output_router_logits=True: the load-balancing loss needs the routers of all stages at once and is not "
            "computed by a pipeline. Set output_router_logits=False, or router_aux_loss_coef=0."
        )


def _device_of(group: dist.ProcessGroup) -> torch.device:
    if dist.get_backend(group) in ("gloo", "mpi"):
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())


__all__ = ["SCHEDULES", "Pipeline", "PipelineError"]
