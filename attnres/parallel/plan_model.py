"""Facts about a model on the meta device: parameters, decoder layers and parallel plans."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import AttnResConfig, AttnResForCausalLM

EMBEDDING, NORM, HEAD, DEPTH_MIXER = "embedding", "final norm", "head", "depth mixer"
KIMI_K3 = "kimi-k3"  # no folder or hub id, which would have a slash
TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_k")

# What a style of transformers' plans does to a parameter of the module that it names: the dimension that is divided
# among the ranks, counted from the end for all but the first one. None: every rank has all of it.
_ROWS, _COLUMNS = -2, -1
SHARDED_DIMENSION = {
    "colwise": _ROWS,
    "colwise_gather_output": _ROWS,
    "colwise_rep": _ROWS,
    "packed_colwise": _ROWS,
    "rowwise": _COLUMNS,
    "rowwise_rep": _COLUMNS,
    "rowwise_split_input": _COLUMNS,
    "packed_rowwise": _COLUMNS,
    "embedding_rowwise": _ROWS,
    "embedding_colwise": _COLUMNS,
    "grouped_gemm": 0,
    "ep_dispatch_experts": None,
    "moe_tp_experts": None,
    "mla_kv_a_proj": None,
    "replicated_with_grad_allreduce": None,
    "all_reduce": None,
    "replicate": None,
}
# These need not divide: the last rank has a shorter slice of the vocabulary.
_UNEVEN_IS_FINE = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")


@dataclass(frozen=True)
class ParameterPlan:
    """One parameter.

    Attributes:
        name: in memory.
        owner: index of its decoder layer, or `EMBEDDING`, `NORM`, `HEAD`, `DEPTH_MIXER`.
        shape: of the whole parameter.
        routed: whether it belongs to the routed experts.
        matrix: whether Muon would update it.
    """

    name: str
    owner: int | str
    shape: tuple[int, ...]
    routed: bool
    matrix: bool

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class PlannedModel:
    """A model without memory for its weights.

    Attributes:
        config: of the model.
        module: on the meta device.
        parameters: each once; those that are tied belong to the embedding.
        layer_kinds: of every decoder layer, such as "full_attention, moe".
        experts: routed experts per layer, 0 without any.
        top_k: experts per token.
    """

    config: AttnResConfig
    module: AttnResForCausalLM
    parameters: list[ParameterPlan]
    layer_kinds: list[str]
    experts: int
    top_k: int

    @property
    def tied(self) -> bool:
        return not any(each.owner == HEAD and each.name.endswith("weight") for each in self.parameters)

    def counts(self) -> dict:
        """Numbers of parameters: in all, active per token, and where they are."""

        def of(*owners) -> int:
            return sum(each.elements for each in self.parameters if each.owner in owners)

        total = sum(each.elements for each in self.parameters)
        routed = sum(each.elements for each in self.parameters if each.routed)
        active = total - routed + (routed * self.top_k // self.experts if self.experts else 0)
        kinds = {}
        for layer, kind in enumerate(self.layer_kinds):
            kinds.setdefault((kind, of(layer)), []).append(layer)
        return {
            "total": total,
            "active": active,
            "embeddings": of(EMBEDDING, HEAD),
            "depth_mixer": of(DEPTH_MIXER),
            "final_norm": of(NORM),
            "routed_experts": routed,
            "layer_kinds": [
                {"kind": kind, "layers": len(layers), "first": layers[0], "parameters_each": each}
                for (kind, each), layers in kinds.items()
            ],
        }


def read_config(source: str | os.PathLike | None, **depth_options) -> AttnResConfig:
    """The configuration of a folder, a config.json or a hub id, or of `"kimi-k3"`; without one the paper's 48B-A3B.

    Args:
        depth_options: `residual_mode`, `layers_per_block`, `num_blocks`; None: as configured.

    Raises:
        ValueError: it cannot be read, or is no configuration of a supported family, in one line.
    """
    options = {name: value for name, value in depth_options.items() if value is not None}
    if source is None:
        config = AttnResConfig()
        return AttnResConfig.from_backbone(config.backbone_config, **options) if options else config
    name = str(source)
    if name == KIMI_K3:
        return AttnResConfig.kimi_k3(**options)
    if not Path(name).exists() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise ValueError(f"CONFIG {name}: no such folder or file; give a folder, a config.json, a hub id or {KIMI_K3}")
    try:
        return AttnResConfig.from_pretrained(name, **options)
    except Exception as error:  # hostile or damaged files can fail anywhere in transformers
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"CONFIG {name}: {reason}") from None


def planned_model(config: AttnResConfig) -> PlannedModel:
    """The model of a configuration on the meta device.

    Raises:
        ValueError: its numbers fit no model.
    """
    try:
        with torch.device("meta"):
            module = AttnResForCausalLM(config)
    except Exception as error:  # numbers that fit no model fail anywhere in transformers or torch
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"CONFIG: its numbers make no {config.backbone_config.model_type} model ({reason})") from None
    matrices = _matrices(module)
    parameters = [
        ParameterPlan(name, _owner(name), tuple(parameter.shape), ".experts." in name, name in matrices)
        for name, parameter in module.named_parameters()
    ]
    routed = [each for each in parameters if each.routed]
    backbone = config.backbone_config
    top_k = next((getattr(backbone, key) for key in TOP_K_KEYS if getattr(backbone, key, None)), 0)
    return PlannedModel(
        config=config,
        module=module,
        parameters=parameters,
        layer_kinds=[_kind(layer) for layer in module.model.layers],
        experts=max((each.shape[0] for each in routed), default=0),
        top_k=top_k if routed else 0,
    )


def parallel_styles(module: AttnResForCausalLM, tensor: int, expert: int) -> dict[str, str]:
    """Style of every module and parameter that the plans of the backbone's own family name.

    As in transformers: without expert parallelism the tensor-parallel plan divides every expert; with it the
    expert-parallel plan holds for what it names, and whole experts are divided among the ranks.

    Raises:
        ValueError: the family has no such plan, or one that is not understood here.
    """
    plan = dict(module.tp_plan) if tensor > 1 else {}
    family = module.config.backbone_config.model_type
    apart = dict(getattr(module, "ep_plan", None) or {})  # the oldest transformers have none of its own
    for name, ranks, own in (("tensor", tensor, module.tp_plan), ("expert", expert, apart)):
        if ranks > 1 and not own:
            raise ValueError(
                f"{name}={ranks}: this transformers has no {name}-parallel plan for {family}; take --{name} 1"
            )
    if expert > 1:
        plan = {key: style for key, style in plan.items() if not _within(key, apart)} | apart
    found = {}
    for path, each in module.named_modules():
        style = plan.get(_wildcard(path))
        if style is not None:
            found[path] = style
        for name, _ in each.named_parameters(prefix=path, recurse=False):
            parameter_style = plan.get(_wildcard(name), style)
            if parameter_style is not None:
                found[name] = parameter_style
    unknown = sorted(set(found.values()) - set(SHARDED_DIMENSION))
    if unknown:
        raise ValueError(
            f"the parallel plan of {family} in this transformers has the style {unknown[0]!r}, whose memory and "
            "traffic are not known here; take --tensor 1 --expert 1"
        )
    return found


def local_shape(name: str, shape: tuple[int, ...], style: str | None, tensor: int, expert: int) -> tuple[int, ...]:
    """Of the first rank, which has the most where a division is uneven."""
    dimension = SHARDED_DIMENSION.get(style)
    ranks = expert if style == "grouped_gemm" else tensor
    if dimension is None or ranks == 1:
        return shape
    if len(shape) == 1:
        if dimension == _COLUMNS:  # the bias of a row-wise layer is added after the sum
            return shape
        dimension = 0
    sizes = list(shape)
    width = sizes[dimension] // 2 if style.startswith("packed_") else sizes[dimension]  # each of the two is divided
    if width % ranks and not name.endswith(_UNEVEN_IS_FINE):
        what = "expert" if style == "grouped_gemm" else "tensor"
        raise ValueError(
            f"{what}={ranks} does not divide {width}, the size of {_wildcard(name)} that the plan of the family "
            f"shards; take a divisor of {width}"
        )
    sizes[dimension] = -(-sizes[dimension] // ranks)
    return tuple(sizes)


def _kind(layer: nn.Module) -> str:
    routed = any(".experts." in f".{name}" for name, _ in layer.named_parameters())
    return f"{layer.layer_type}, {'moe' if routed else 'dense'}"


def _owner(name: str) -> int | str:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    if match:
        return int(match.group(1))
    for prefix, owner in (("model.depth_mixer.", DEPTH_MIXER), ("lm_head.", HEAD), ("model.embed_tokens.", EMBEDDING)):
        if name.startswith(prefix):
            return owner
    return NORM


def _matrices(module: AttnResForCausalLM) -> set[str]:
    """What `attnres train --optimizer muon` gives to Muon: matrices and stacks of them within decoder layers."""
    return {
        name
        for path, each in module.model.layers.named_modules(prefix="model.layers")
        if not isinstance(each, (nn.Embedding, nn.Conv1d))
        for name, parameter in each.named_parameters(prefix=path, recurse=False)
        if parameter.ndim in (2, 3)
    }


def _within(key: str, plan: dict[str, str]) -> bool:
    return any(key == other or key.startswith(f"{other}.") for other in plan)


def _wildcard(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
