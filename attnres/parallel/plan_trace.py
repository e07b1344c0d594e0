"""Traces a forward pass on the meta device: the memory it would keep and the messages it would send.

The real model classes run, on torch's fake tensors. Parameters have the shapes of one rank, and where the family's
parallel plan names a module, hooks change shapes as transformers' own hooks do and write down the collectives.
Attention keeps what FlashAttention keeps, linear attention what flash-linear-attention's kernels keep; routing is
balanced. Shapes: B batch, T tokens, H heads, D hidden size.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations import moe

from .. import AttnResForCausalLM
from ..torch_internals import FakeTensorMode, TorchDispatchMode
from .plan_model import EMBEDDING, HEAD, NORM, local_shape, parallel_styles

ATTENTION = "attnres_plan"
CHUNK = 64  # tokens that the kernels of linear attention take at a time

Storages = dict[int, int]  # identity to bytes


@dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
        owner: decoder layer, or `EMBEDDING` or `HEAD`.
        kind: "all_reduce", "all_gather" or "all_to_all".
        group: "tensor" or "expert".
        backward: whether it belongs to the backward pass.
        payload: bytes of the whole tensor; of an all-to-all, those of one rank.
    """

    owner: int | str
    kind: str
    group: str
    backward: bool
    payload: int


@dataclass
class Trace:
    """What one forward pass of a micro-batch keeps on one rank, were all decoder layers there.

    Attributes:
        inside: storages kept for the backward pass within a decoder layer, by its index.
        outside: by the index of the decoder layer after which they were kept; `EMBEDDING` before the first, `NORM` and
            `HEAD` after the last.
        inputs: storages of the hidden states, sources and partial sums with which a decoder layer was called, by its
            index.
        streams: of those, all `[B, T, D]` that decoder layers pass on: block representations and partial sums.
        copies: of weights, that autocast made for a decoder layer, or `EMBEDDING`, `NORM` or `HEAD`, and keeps.
        collectives: of the tensor- and expert-parallel plans.
        logits: number of elements of the logits.
    """

    inside: dict[int, Storages] = field(default_factory=dict)
    outside: dict[int | str, Storages] = field(default_factory=dict)
    inputs: dict[int, Storages] = field(default_factory=dict)
    streams: Storages = field(default_factory=dict)
    copies: dict[int | str, Storages] = field(default_factory=dict)
    collectives: list[Collective] = field(default_factory=list)
    logits: int = 0
    place: Callable[[], int | str] = lambda: EMBEDDING  # where the forward pass is


def trace_training(
    module: AttnResForCausalLM,
    batch: int,
    tokens: int,
    tensor: int = 1,
    expert: int = 1,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    kernels: bool = True,
) -> Trace:
    """A forward pass with labels.

    Args:
        module: on the meta device; it is left alone.
        batch, tokens: of one micro-batch.
        tensor, expert: ranks of the two plans.
        dtype: of the parameters, as they take part in the computation.
        autocast: to bfloat16, as accelerate does under mixed precision.
        kernels: whether attention and linear attention keep what their CUDA kernels keep; otherwise what torch keeps.

    Raises:
        ValueError: the model cannot run with these numbers.
    """
    trace = Trace()
    with _fake(module, tensor, expert, dtype, kernels, trace) as model:
        ids = torch.zeros(batch, tokens, dtype=torch.long)
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        alive = []  # so that no identity is given away twice
        place = _follow(model, trace, alive)
        copied = _WeightCopies(own, trace, alive)

        def pack(saved: torch.Tensor) -> torch.Tensor:
            storage = saved.untyped_storage()
            if storage._cdata not in own and storage._cdata not in copied.found:
                alive.append(storage)
                place()[storage._cdata] = storage.nbytes()
            return saved

        model.train()
        with (
            copied,
            torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
        ):
            output = model(input_ids=ids, labels=ids, use_cache=False, attention_mask=_masks(model))
        trace.logits = output.logits.numel()
    return trace


def trace_cache(module: AttnResForCausalLM, batch: int, tokens: int, tensor: int, expert: int, dtype: torch.dtype):
    """Bytes of the cache that a prefill leaves on one rank, and the collectives of its forward pass."""
    trace = Trace()
    with _fake(module, tensor, expert, dtype, True, trace) as model, torch.no_grad():
        _follow(model, trace, [])
        ids = torch.zeros(batch, tokens, dtype=torch.long)
        output = model.eval()(input_ids=ids, use_cache=True, logits_to_keep=1, attention_mask=_masks(model))
        storages = {each.untyped_storage()._cdata: each for each in _tensors(output.past_key_values)}
        size = sum(each.untyped_storage().nbytes() for each in storages.values())
    return size, trace.collectives


def _tensors(cache) -> Iterator[torch.Tensor]:
    for layer in cache.layers:
        for value in vars(layer).values():
            values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            yield from (each for each in values if isinstance(each, torch.Tensor))


def _masks(model: AttnResForCausalLM) -> dict[str, None]:
    """Ready-made: full sequences need none, and making them would look at values."""
    return {layer.layer_type: None for layer in model.model.layers}


@contextmanager
def _fake(
    module: AttnResForCausalLM, tensor: int, expert: int, dtype: torch.dtype, kernels: bool, trace: Trace
) -> Iterator[AttnResForCausalLM]:
    """A copy of the model in which every tensor is fake and has the shape that one rank has."""
    styles = parallel_styles(module, tensor, expert)
    config = copy.deepcopy(module.config)
    config._attn_implementation_internal = ATTENTION if kernels else module.config._attn_implementation
    config.depth_implementation = "triton"
    try:
        with ExitStack() as stack:
            for target, name, replacement in _stand_ins(module, kernels):
                stack.enter_context(_replaced(target, name, replacement))
            with torch.device("meta"):
                model = AttnResForCausalLM(config)
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            _materialise(model, styles, tensor, expert, dtype)
            for name, each in model.named_modules():
                if name in styles:
                    _Parallel(trace, tensor, expert, config.backbone_config).install(each, styles[name])
            yield model
    except (RuntimeError, TypeError, IndexError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"a {config.backbone_config.model_type} model with these numbers does not run with tensor={tensor}, "
            f"expert={expert} ({reason})"
        ) from None


def _materialise(model: nn.Module, styles: dict[str, str], tensor: int, expert: int, dtype: torch.dtype):
    made = {}  # by identity: what is tied stays tied
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = f"{path}.{name}" if path else name
            shape = local_shape(full, tuple(parameter.shape), styles.get(full), tensor, expert)
            made.setdefault(id(parameter), (parameter, nn.Parameter(torch.empty(shape, dtype=dtype, device="cpu"))))
            module._parameters[name] = made[id(parameter)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # which need not be in a slice of the vocabulary
        if styles.get(path) == "ep_dispatch_experts":
            module.num_experts //= expert


def _follow(model: AttnResForCausalLM, trace: Trace, alive: list) -> Callable[[], Storages]:
    """Keeps track of where in the model the forward pass is; returns where what is saved now belongs."""
    where = {"inside": None, "outside": EMBEDDING}

    def enter(layer: int):
        def hook(module, arguments):
            where["inside"] = layer
            tensors = [each for each in arguments if isinstance(each, torch.Tensor)]  # partial sum and sources
            storages = [each.untyped_storage() for each in tensors]
            alive.extend(storages)
            trace.inputs[layer] = {each._cdata: each.nbytes() for each in storages}
            whole = tensors[-1].shape  # [B, T, D]
            trace.streams |= {
                storage._cdata: storage.nbytes()
                for each, storage in zip(tensors, storages, strict=True)
                if each.shape == whole
            }

        return hook

    last = len(model.model.layers) - 1

    def leave(layer: int):
        def hook(module, arguments, output):
            # A hook on the norm itself would keep it from being fused.
            where.update(inside=None, outside=NORM if layer == last else layer)

        return hook

    def move(to: str):
        def hook(module, arguments):
            where["outside"] = to

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(enter(number))
        layer.register_forward_hook(leave(number))
    model.lm_head.register_forward_pre_hook(move(HEAD))
    trace.place = lambda: where["outside"] if where["inside"] is None else where["inside"]

    def belongs() -> Storages:
        if where["inside"] is None:
            return trace.outside.setdefault(where["outside"], {})
        return trace.inside.setdefault(where["inside"], {})

    return belongs


class _WeightCopies(TorchDispatchMode):
    """Notes which storages are casts of whole parameters: autocast keeps one of each for all micro-batches."""

    def __init__(self, own: set[int], trace: Trace, alive: list):
        super().__init__()
        self.own, self.trace, self.alive, self.found = own, trace, alive, set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        if function is torch.ops.aten._to_copy.default and arguments[0].untyped_storage()._cdata in self.own:
            storage = output.untyped_storage()
            self.alive.append(storage)
            self.found.add(storage._cdata)
            self.trace.copies.setdefault(self.trace.place(), {})[storage._cdata] = storage.nbytes()
        return output


class _Parallel:
    """Hooks of one module that a plan names: the shapes and the collectives of transformers' own."""

    def __init__(self, trace: Trace, tensor: int, expert: int, backbone):
        self.trace, self.tensor, self.expert, self.backbone = trace, tensor, expert, backbone

    def install(self, module: nn.Module, style: str):
        if style == "ep_dispatch_experts":
            module.forward = self._dispatch(module.forward)
            return
        if style == "replicated_with_grad_allreduce":
            module.register_forward_pre_hook(self._sum_parameter_gradients)
            return
        before, after = self._hooks(style)
        if before is not None:
            module.register_forward_pre_hook(before)
        if after is not None:
            module.register_forward_hook(after)

    def _hooks(self, style: str):
        gathers = style in ("colwise_gather_output", "colwise_rep")
        splits = style in ("rowwise_split_input", "rowwise_rep")
        table = {
            "colwise": (self._sum_input_gradient, None),
            "packed_colwise": (self._sum_input_gradient, None),
            "rowwise": (None, self._sum_output),
            "embedding_rowwise": (None, self._sum_output),
            "embedding_colwise": (None, self._gather_output),
            "all_reduce": (None, self._sum_output),
            "moe_tp_experts": (self._sum_expert_gradients, self._sum_output),
            "mla_kv_a_proj": (None, self._sum_rotary_gradient),
        }
        if gathers:
            return self._sum_input_gradient, self._gather_output
        if splits:
            return self._split_input, self._sum_output
        return table.get(style, (None, None))

    def note(self, kind: str, tensor: torch.Tensor, group: str = "tensor", backward: bool = False):
        if backward and not (torch.is_grad_enabled() and tensor.requires_grad):
            return
        payload = tensor.numel() * tensor.element_size()
        self.trace.collectives.append(Collective(self.trace.place(), kind, group, backward, payload))

    def _sum_input_gradient(self, module, arguments):
        self.note("all_reduce", arguments[0], backward=True)

    def _sum_output(self, module, arguments, output):
        self.note("all_reduce", output)
        return output.clone()  # the sum is another tensor

    def _gather_output(self, module, arguments, output):
        size = getattr(module, "out_features", None) or module.embedding_dim
        whole = torch.cat([output] * self.tensor, dim=-1)[..., :size]
        self.note("all_gather", whole)
        return whole

    def _split_input(self, module, arguments):
        self.note("all_gather", arguments[0], backward=True)
        return (arguments[0].chunk(self.tensor, dim=-1)[0], *arguments[1:])

    def _sum_expert_gradients(self, module, arguments):
        hidden_states, _, weights, *_ = arguments
        self.note("all_reduce", hidden_states, backward=True)
        self.note("all_reduce", weights, backward=True)

    def _sum_rotary_gradient(self, module, arguments, output):
        self.note("all_reduce", output[..., -self.backbone.qk_rope_head_dim :], backward=True)

    def _sum_parameter_gradients(self, module, arguments):
        for parameter in module.parameters(recurse=False):
            self.note("all_reduce", parameter, backward=True)

    def _dispatch(self, forward):
        """Token dispatch to whole experts, by all-to-all; where all ranks share a batch and nothing is trained, by the
        sum of what their experts give."""

        def dispatched(hidden_states, index, weights):
            if not torch.is_grad_enabled() and self.tensor == self.expert:
                output = forward(hidden_states, index, weights)
                self.note("all_reduce", output, "expert")
                return output
            width = hidden_states.shape[-1]
            share, chosen, factors = (each.chunk(self.tensor)[0] for each in (hidden_states, index, weights))
            if self.tensor > 1:  # a slice for each rank, whose gradients are gathered
                self.note("all_gather", hidden_states, backward=True)
                self.note("all_gather", weights, backward=True)
            order = torch.argsort(chosen.reshape(-1))
            sent = share[order // chosen.shape[-1]]
            self.note("all_to_all", sent, "expert")
            self.note("all_to_all", sent, "expert", backward=True)
            output = forward(sent, order.new_zeros(len(sent), 1), sent.new_ones(len(sent), 1))
            self.note("all_to_all", output, "expert")
            self.note("all_to_all", output, "expert", backward=True)
            restored = torch.empty_like(output)
            restored[order] = output
            output = (restored.view(*factors.shape, width) * factors.unsqueeze(-1)).sum(dim=1)
            if self.tensor > 1:
                output = torch.cat([output] * self.tensor)[: len(hidden_states)]
                self.note("all_gather", output)
            return output.to(hidden_states.dtype)

        return dispatched


class _KeepAttention(torch.autograd.Function):
    """What FlashAttention keeps: query, key, value, output, and per row the logarithm of the sum."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("a plan runs forward only")


def _attention(module, query, key, value, attention_mask, **kwargs):
    return _KeepAttention.apply(query, key, value), None


AttentionInterface.register(ATTENTION, _attention)


class _KeepLinearAttention(torch.autograd.Function):
    """What flash-linear-attention's chunk kernels keep: normed query and key, value, decay as given and summed up,
    beta, and two matrices per chunk; what is omitted here is a number per token and head."""

    @staticmethod
    def forward(ctx, query, key, value, decay, beta):
        matrices = value.new_empty(*value.shape[:3], 2 * CHUNK)
        summed = torch.empty_like(decay, dtype=torch.float32)
        ctx.save_for_backward(query.clone(), key.clone(), value, decay, summed, beta, matrices)
        return torch.empty_like(value)

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("a plan runs forward only")


def _linear_attention(query, key, value, g, beta, output_final_state=False, **kwargs):
    state = None
    if output_final_state:
        shape = (value.shape[0], value.shape[2], query.shape[-1], value.shape[-1])
        state = torch.empty(shape, dtype=torch.float32, device=value.device)
    return _KeepLinearAttention.apply(query, key, value, g, beta), state


class _KeepConvolution(torch.autograd.Function):
    """What causal_conv1d keeps: its input."""

    @staticmethod
    def forward(ctx, hidden_states, weight):
        ctx.save_for_backward(hidden_states, weight)
        return torch.empty_like(hidden_states)

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("a plan runs forward only")


def _convolution(hidden_states, weight, bias=None, activation=None, **kwargs):
    return _KeepConvolution.apply(hidden_states, weight)


# The functions for which transformers takes a kernel where there is one, by their names in a family's module.
_KERNELS = {
    "chunk_kimi_delta_attention": _linear_attention,
    "torch_chunk_gated_delta_rule": _linear_attention,
    "causal_conv1d_fn": _convolution,
}


@contextmanager
def _replaced(target, name: str, replacement: Callable):
    original = getattr(target, name)
    setattr(target, name, replacement)
    try:
        yield
    finally:
        setattr(target, name, original)


def _stand_ins(module: AttnResForCausalLM, kernels: bool):
    """What is replaced while a model runs: what looks at the machine or at values, and what kernels do otherwise."""
    # Its own operator for grouped products asks nothing of addresses and strides and keeps the same.
    yield moe, "_can_use_grouped_mm", lambda *arguments, **options: False
    if not kernels:
        return
    families = {sys.modules[type(each).__module__] for layer in module.model.layers for each in layer.children()}
    for family in families:
        for name, replacement in _KERNELS.items():
            if hasattr(family, name):
                yield family, name, replacement
