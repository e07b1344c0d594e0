"""Pipeline parallelism with the paper's cross-stage caching (section 4.1), on torch.distributed.pipelining.

Every block crosses to a rank at most once: stage c sends to stage c + 1 the sources that were completed since the
previous virtual stage of the receiving rank ended. The receiving rank keeps them in a store that its stages share.
Gradients of cached blocks collect in the store and return to their producer the way the blocks came.

Shapes: B rows, T tokens, D hidden size; P ranks, V virtual stages each, M micro-batches.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from transformers import GenerationConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import GENERATION_CONFIG_NAME

from ..backbones import load_balancing_loss
from ..configuration_attnres import AttnResConfig
from ..messages import one_line
from ..modeling_attnres import AttnResForCausalLM
from . import stage_files, tensor
from .runtime import CountedStage, schedule_class
from .stage import AttnResStage
from .store import BlockStore
from .traffic import Traffic, plan_routes, split_layers


class PipelineError(RuntimeError):
    """A rank cannot build or save its stages, or the ranks were given different arguments; the message names the rank.

    Every rank of the pipeline raises the same line. A rank whose process is lost is reported by torch instead.
    """


class Pipeline:
    """A model whose decoder layers are spread over the ranks of a process group and trained in micro-batches.

    Every rank creates one with the same arguments and calls the same methods. The loss and all gradients are those of
    the whole model in one process: the sum over tokens with a label, divided by their number in the whole batch.

    Args:
        model: a checkpoint folder, of which each rank reads its own tensors only; an `AttnResConfig` for a model from
            scratch; or an `AttnResForCausalLM` in memory, the same on every rank. Of a model in memory, the modules
            are used, not copied (except for the depth mixer's parameters), and divided in place if the mesh has a
            dimension "tp".
        mesh: ranks of the pipeline: a process group, a mesh of one dimension, or a mesh with a dimension "pp". The
            latter may have a dimension "tp", over which transformers divides every stage by the family's plan, and one
            more, over which replicas of the pipeline average. Default: all ranks.
        schedule: `"gpipe"`, `"1f1b"` or `"interleaved-1f1b"`; with several virtual stages `"1f1b"` is interleaved.
        virtual_stages: V; rank r has the stages r, r + P, r + 2 P, ...
        micro_batches: M; B must be a multiple of it.
        split: decoder layers of each of the P V stages. Default: as even as possible.
        caching: `False` sends all complete sources at every crossing, for comparison.
        device: device of the rank's stages. Default: the device of the model, or that of the group.

    Raises:
        ValueError: an argument does not fit; the message names the field, the value and the rule.
        PipelineError: a rank cannot build its stages, or the ranks were given different arguments.
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
        self.rank, self._size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self._size < 2:
            raise ValueError("a pipeline needs at least 2 ranks, got 1; train with one process instead.")
        for name, value in (("virtual_stages", virtual_stages), ("micro_batches", micro_batches)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        self._schedule_class = schedule_class(schedule, self._size, virtual_stages, micro_batches)
        self.schedule, self.micro_batches, self.virtual_stages = schedule, micro_batches, virtual_stages
        self.config = _config_of(model)
        _check_losses(self.config)
        self.num_stages = self._size * virtual_stages
        bounds = split_layers(self.config.num_hidden_layers, self.num_stages, split)
        self.routes = plan_routes(self.config, bounds, self._size, caching)
        self.stage_numbers = range(self.rank, self.num_stages, self._size)
        self.is_first, self.is_last = self.rank == 0, self.rank == self._size - 1  # of the ranks
        self._has_tied_copy = self.config.tie_word_embeddings and (self.is_first or self.is_last)
        self._check_arguments(bounds, caching)

        if device is None and isinstance(model, AttnResForCausalLM):
            device = model.device
        self.device = torch.device(device) if device is not None else _device_of(self.group)
        self.store, self.traffic = BlockStore(), Traffic()
        self.stages = nn.ModuleList()
        self._summed: list[nn.Parameter] = []  # their gradients are parts that differ between the ranks of "tp"
        self._generation_config = getattr(model, "generation_config", None)
        built = self._together("cannot build its stages", self._build_stages, model)
        self.dtype = built[0][0]  # of the embedding, and so of all sources
        embedding, head = built[0][1], built[-1][1]
        if embedding != head:
            raise PipelineError(
                f"tied embeddings must be divided the same way, but the family's plan has {embedding} for the "
                f"embedding and {head} for the head; a pipeline cannot train this model with tensor parallelism."
            )
        if self.replicas is not None:
            tensor.start_alike(self.stages, self.replicas)
        if self._has_tied_copy:
            first, _ = self._exchange_tied(self._tied_copy().detach())
            tensor.local(self._tied_copy().detach()).copy_(first)
        self._built: tuple | None = None
        self._divisor: torch.Tensor | None = None

    def _check_arguments(self, bounds: list[int], caching: bool):
        """Raises PipelineError if the ranks were given different arguments."""
        mine = {
            "configuration": {**self.config.to_dict(), "transformers_version": None},
            "schedule": self.schedule,
            "virtual_stages": self.virtual_stages,
            "micro_batches": self.micro_batches,
            "split": bounds,
            "caching": caching,
        }
        (first, wanted), *others = self._of_replica((dist.get_rank(), mine))
        for rank, theirs in others:
            for name, value in theirs.items():
                if value != wanted[name]:
                    raise PipelineError(f"{name} must be the same on all ranks, but ranks {first} and {rank} differ.")

    def _build_stages(self, model) -> tuple[torch.dtype | None, str | None]:
        """Builds this rank's stages; returns the embedding's dtype and the division of the tied copy where it is."""
        folder = Path(model) if isinstance(model, str | os.PathLike) else None
        if folder is not None and (folder / GENERATION_CONFIG_NAME).is_file():
            self._generation_config = GenerationConfig.from_pretrained(folder)
        whole = model if isinstance(model, AttnResForCausalLM) else stage_files.empty_model(self.config)
        if self.tensor_mesh is not None:
            tensor.check_division(whole, self.tensor_mesh.size())
        for number in self.stage_numbers:
            stage = AttnResStage(whole, self.routes[number], number == 0, number == self.num_stages - 1, self.store)
            if folder is not None:
                stage_files.load_stage(stage, folder, self.device)
            elif whole is not model:
                stage_files.fill_stage(stage, self.device)
                if self.tensor_mesh is not None:
                    tensor.start_alike(stage, self.tensor_mesh.get_group())
            if self.tensor_mesh is not None:
                self._summed += tensor.divide(stage, whole.tp_plan, self.tensor_mesh)
            self.stages.append(stage.to(self.device).train(whole is not model or model.training))
        dtype = self.stages[0].model["embed_tokens"].weight.dtype if self.is_first else None
        return dtype, tensor.division(self._tied_copy()) if self._has_tied_copy else None

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the parameters of this rank's stages."""
        return self.stages.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the parameters of this rank's stages, named by the stage's number and their name in the model."""
        for number, stage in zip(self.stage_numbers, self.stages, strict=True):
            for name, parameter in stage.named_parameters():
                yield f"{number}.{name}", parameter

    def train(self, mode: bool = True) -> "Pipeline":
        """Turns on or off dropout, and activation checkpointing if it is enabled, as `nn.Module.train` does."""
        self.stages.train(mode)
        return self

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None):
        """Makes decoder layers run again in backward, as for a transformers model; nothing crosses twice."""
        for stage in self.stages:
            # transformers 5.23 renamed it
            enable = getattr(stage, "activation_checkpointing_enable", None) or stage.gradient_checkpointing_enable
            enable(gradient_checkpointing_kwargs)

    def zero_grad(self):
        """Clears the gradients of this rank's stages."""
        self.stages.zero_grad()

    def step(
        self,
        input_ids: torch.LongTensor,
        labels: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """Runs forward and backward over one batch and adds to the gradients, as `backward` does in torch.

        Args:
            input_ids: `[B, T]`, the same on every rank of the pipeline.
            labels: `[B, T]`, -100 where there is no loss; shifted here.
            attention_mask: `[B, T]`, 1 for tokens and 0 for padding.
            position_ids: `[B, T]`.

        Returns:
            The loss, on every rank: the mean over all tokens with a label, of all micro-batches and replicas.

        Raises:
            ValueError: a tensor has the wrong shape.
        """
        self._check_batch(input_ids, labels, attention_mask, position_ids)
        parameters = list(self.parameters())
        earlier = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None  # only this step's gradients are summed over the ranks below
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
        """Returns the loss as `step` does, without gradients; `train(False)` turns off dropout."""
        self._check_batch(input_ids, labels, attention_mask, position_ids)
        with torch.no_grad():
            return self._run(input_ids, labels, attention_mask, position_ids, training=False)

    def _run(self, input_ids, labels, attention_mask, position_ids, training: bool) -> torch.Tensor:
        tensors = {"attention_mask": attention_mask, "position_ids": position_ids}
        options = {name: given.to(self.device) for name, given in tensors.items() if given is not None}
        self._divisor = (labels[:, 1:] != -100).sum().to(self.device)
        if self.replicas is not None:
            dist.all_reduce(self._divisor, group=self.replicas)
        schedule, stages = self._schedule_for(input_ids.shape)
        self.store.clear()
        losses: list[torch.Tensor] = []
        run = schedule.step if training else schedule.eval
        run(
            *((input_ids.to(self.device).contiguous(),) if self.is_first else ()),  # torch 2.11 compares strides
            target=labels.to(self.device) if self.is_last else None,
            losses=losses if self.is_last else None,
            return_outputs=False,
            **options,
        )
        for stage in stages:
            stage.finish()
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        if self.is_last:
            loss = torch.stack([each.detach() for each in losses]).sum().float()
        dist.broadcast(loss, group_src=self._size - 1, group=self.group)
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
        """Returns torch's schedule and stages for batches of a shape, on which the size of messages depends."""
        micro_batch = (shape[0] // self.micro_batches, shape[1])
        if self._built is None or self._built[0] != micro_batch:
            single = issubclass(self._schedule_class, PipelineScheduleSingle)
            stages = [
                CountedStage(stage, number, micro_batch, self, posts_sends=not single)
                for number, stage in zip(self.stage_numbers, self.stages, strict=True)
            ]
            schedule = self._schedule_class(  # losses are sums, so gradients are not scaled
                stages[0] if single else stages, self.micro_batches, loss_fn=self._loss, scale_grads=False
            )
            self._built = (micro_batch, schedule, stages)
        return self._built[1:]

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns the sum of a micro-batch's losses, divided by the number of labels of the whole batch."""
        return ForCausalLMLoss(logits, labels, self.config.vocab_size, num_items_in_batch=self._divisor)

    def _sum_gradients(self, parameters: list[nn.Parameter]):
        """Sums the gradients over the two copies of tied embeddings and over replicas."""
        if self._has_tied_copy and self._tied_copy().requires_grad:
            copy = self._tied_copy()
            if copy.grad is None:
                copy.grad = torch.zeros_like(copy)
            first, last = self._exchange_tied(copy.grad)
            tensor.local(copy.grad).copy_(first + last)
        if self.replicas is not None:
            works = []
            for parameter in parameters:
                if parameter.requires_grad:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)  # another replica may have one
                    works.append(dist.all_reduce(tensor.local(parameter.grad), group=self.replicas, async_op=True))
            for work in works:
                work.wait()

    def _exchange_tied(self, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what the first and the last rank have given, in this order, so that both compute the same bits."""
        mine = tensor.local(given).contiguous()
        other = torch.empty_like(mine)
        peer = self._size - 1 if self.is_first else 0
        sent = dist.P2POp(dist.isend, mine, group=self.group, group_peer=peer)
        received = dist.P2POp(dist.irecv, other, group=self.group, group_peer=peer)
        for work in dist.batch_isend_irecv([sent, received]):
            work.wait()
        return (mine, other) if self.is_first else (other, mine)

    def _tied_copy(self) -> nn.Parameter:
        """Returns the embedding on the first rank, and on the last rank the head that is tied to it."""
        return self.stages[0].model["embed_tokens"].weight if self.is_first else self.stages[-1].lm_head.weight

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Clips like `torch.nn.utils.clip_grad_norm_`, by the norm over all ranks; tied embeddings count once."""
        skipped = self._tied_copy() if self.is_last and self._has_tied_copy else None
        whole, divided = [], []
        for each in self.parameters():
            if each.grad is not None and each is not skipped:
                (divided if tensor.is_divided(each) else whole).append(tensor.local(each.grad))
        squares = (nn.utils.get_total_norm(each).to(self.device, torch.float64) ** 2 for each in (whole, divided))
        square, square_of_parts = squares
        if self.tensor_mesh is not None:
            dist.all_reduce(square_of_parts, group=self.tensor_mesh.get_group())
        square += square_of_parts
        dist.all_reduce(square, group=self.group)
        norm = square.sqrt().to(torch.promote_types(self.dtype, torch.float32))
        foreach = None if self.tensor_mesh is None else False  # torch cannot mix divided and whole ones
        nn.utils.clip_grads_with_norm_(self.parameters(), max_norm, norm, foreach=foreach)
        return norm

    def save(self, folder: str | os.PathLike):
        """Writes a folder that `from_pretrained` loads: each stage writes a shard, the first rank everything else.

        The ranks must see the same file system. The folder gets its name when everything is written.

        Raises:
            PipelineError: a rank cannot save its stages.
        """
        if self.replicas is None or dist.get_rank(self.replicas) == 0:
            self._save(Path(folder))
        if self.replicas is not None:
            dist.barrier(self.replicas)

    def _save(self, folder: Path):
        together = partial(self._together, "cannot save its stages")
        writes = self.tensor_mesh is None or self.tensor_mesh.get_local_rank() == 0
        leads = writes and self.is_first
        temporary = folder.with_name(f".{folder.name}.partial")
        try:
            together(stage_files.start_folder if leads else _nothing, temporary, self.config, self._generation_config)
            shards = []
            for number, stage in zip(self.stage_numbers, self.stages, strict=True):
                target = temporary if writes else None
                shards += together(stage_files.write_shard, stage, target, number, self.num_stages)
            together(stage_files.finish_folder if leads else _nothing, temporary, folder, shards)
        finally:
            if leads:
                shutil.rmtree(temporary, ignore_errors=True)

    def _together(self, what: str, action: Callable, *arguments) -> list:
        """Calls `action(*arguments)` on every rank of this replica and returns the results of all ranks.

        Raises:
            PipelineError: the action failed on a rank; all ranks raise it, with `what` the rank cannot do.
        """
        result, failure, problem = None, None, None
        try:
            result = action(*arguments)
        except Exception as error:
            failure, problem = error, f"{type(error).__name__}: {one_line(error, limit=1000)}"
        outcomes = self._of_replica((dist.get_rank(), problem, result))
        for rank, found, _ in outcomes:
            if found is not None:
                raise PipelineError(f"rank {rank} {what}: {found}") from failure
        return [each for _, _, each in outcomes]

    def _of_replica(self, mine) -> list:
        """Returns the objects of all ranks of this replica, those of the pipeline that writes first."""
        every = [mine]
        for group in (self.group,) if self.tensor_mesh is None else (self.group, self.tensor_mesh.get_group()):
            parts: list = [None] * dist.get_world_size(group)
            dist.all_gather_object(parts, every, group=group)
            every = [each for part in parts for each in part]
        return every


def _nothing(*_):
    """Is what ranks do that take no part in an action."""


def _dimensions(mesh) -> tuple[dist.ProcessGroup, dist.ProcessGroup | None, DeviceMesh | None]:
    """Returns the ranks of the pipeline, the ranks with the same stages in other replicas, and those of "tp"."""
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
                "model must be whole on every rank, got one that is divided among ranks; give its checkpoint folder, "
                'and for tensor parallelism a mesh with a dimension "tp".'
            )
        return model.config
    if isinstance(model, AttnResConfig):
        model.check_depth_options()
        return model
    if not Path(model, "config.json").is_file():
        raise ValueError(f"model must be a checkpoint folder, but {os.fspath(model)} has no config.json.")
    return AttnResConfig.from_pretrained(model)


def _check_losses(config: AttnResConfig):
    if config.depth_variant != "attnres":
        raise ValueError(f"depth_variant must be 'attnres' in a pipeline, got {config.depth_variant!r}.")
    backbone = config.backbone_config
    wanted = getattr(backbone, "output_router_logits", False) and load_balancing_loss(backbone) is not None
    if wanted and backbone.router_aux_loss_coef:
        raise ValueError(
            "output_router_logits=True: the load-balancing loss needs the routers of all stages at once, so a pipeline "
            "does not compute it. Set output_router_logits=False, or router_aux_loss_coef=0."
        )


def _device_of(group: dist.ProcessGroup) -> torch.device:
    if dist.get_backend(group) in ("gloo", "mpi"):
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())
