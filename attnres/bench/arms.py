"""The variants that are compared: one backbone, with the same weights, under several ways of mixing over depth."""

import copy
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from importlib import import_module

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .. import AttnResForCausalLM
from ..depth_kernels import DEPTH_IMPLEMENTATIONS
from ..depth_mixer import DepthMixer
from ..messages import one_line
from .oracle import Mixing, mix_over_depth, stack_and_mix
from .settings import check_names

PLAIN = "plain"
CHECK_TOKENS = 32
CHECK_TOLERANCE = 1e-3  # rounding alone reaches 1e-4 in full mode with 28 layers


@dataclass(frozen=True)
class Variant:
    """A way of mixing over depth."""

    description: str  # for the results
    residual_mode: str | None = None  # "standard", "block" or "full"; None: the transformers model itself
    mixing: Callable[[], Mixing] | None = None  # loads what mixes inside the transformers model; None: our own model
    reference: str | None = None  # the variant that must compute the same logits
    implementation: str | None = None  # `depth_implementation` of our own model; None: the default


def _of_fla(module: str, name: str) -> Callable[[], Mixing]:
    def load() -> Mixing:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about a missing GPU, which the results show
                function = getattr(import_module(module), name)
        except Exception as error:  # its dependencies can raise anything
            raise ImportError(f"flash-linear-attention cannot be imported ({one_line(error)})") from error
        return lambda sources, query, gain, eps: function(query, sources, gain, rms_eps=eps)

    return load


ARMS = {
    PLAIN: Variant("the transformers model itself: plain residuals"),
    "standard": Variant(
        "attnres, residual_mode=standard: plain residuals in the package's code", "standard", reference=PLAIN
    ),
    "block": Variant("attnres, residual_mode=block", "block", reference="stacked"),
    "full": Variant("attnres, residual_mode=full", "full", reference="stacked-full"),
    "stacked": Variant(
        "Block AttnRes by the paper's pseudo-code: stack, norm, softmax, sum", "block", mixing=lambda: stack_and_mix
    ),
    "stacked-full": Variant("Full AttnRes by the same pseudo-code", "full", mixing=lambda: stack_and_mix),
    "fla-naive": Variant(
        "Block AttnRes by flash-linear-attention's naive_attnres",
        "block",
        mixing=_of_fla("fla.ops.attnres.naive", "naive_attnres"),
        reference="stacked",
    ),
    "fla-fused": Variant(
        "Block AttnRes by flash-linear-attention's fused_attnres, without its fused output norm",
        "block",
        mixing=_of_fla("fla.ops.attnres", "fused_attnres"),
        reference="stacked",
    ),
}


def select(names: Collection[str], implementations: Collection[str] = ()) -> dict[str, Variant]:
    """Returns the named variants, with block and full repeated for each implementation of the depth mixing."""
    check_names("variant", names, ARMS)
    check_names("implementation", implementations, DEPTH_IMPLEMENTATIONS)
    chosen = {name: variant for name, variant in ARMS.items() if name == PLAIN or name in names}
    for implementation in implementations:
        for mode in ("block", "full"):
            if mode in chosen:
                description = f"{ARMS[mode].description}, depth_implementation={implementation}"
                chosen[f"{mode}:{implementation}"] = replace(
                    ARMS[mode], description=description, implementation=implementation
                )
    return chosen


def build(
    variants: dict[str, Variant], config: PreTrainedConfig, layers_per_block: int, device: torch.device, seed: int
) -> tuple[dict[str, PreTrainedModel], dict[str, str]]:
    """Builds float32 models that share all backbone weights and have equal random pseudo-queries and gains.

    Returns the models by variant and by reference, and the reasons why some variants could not be built.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        try:
            plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        except Exception as error:  # numbers that fit no model fail anywhere in transformers or torch
            reason = one_line(error)
            raise ValueError(f"model: its configuration makes no {config.model_type} model ({reason})") from None
        depth = DepthMixer(config.num_hidden_layers, config.hidden_size)
    _randomize(depth)
    references = {each.reference: ARMS[each.reference] for each in variants.values() if each.reference}
    models, left_out = {}, {}
    for name, variant in {**variants, **references}.items():
        try:
            models[name] = plain if name == PLAIN else _build_one(variant, plain, depth, layers_per_block)
        except ImportError as error:
            left_out[name] = str(error)
    return models, left_out


def check(
    variants: dict[str, Variant], models: dict[str, PreTrainedModel], seed: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Compares the logits of every variant with those of its reference on a few random tokens.

    Returns the relative errors by variant (norm of the difference over norm of the reference), and the reasons why some
    optional variants cannot run.
    """
    ids = random_ids(next(iter(models.values())), 1, CHECK_TOKENS, seed)
    logits, errors, left_out = {}, {}, {}
    for name, model in models.items():
        try:
            with torch.no_grad():
                logits[name] = model(input_ids=ids, use_cache=False).logits.double()
        except (ValueError, RuntimeError, ImportError, NotImplementedError) as error:
            if not (name.startswith("fla-") or (name in variants and variants[name].implementation)):
                raise  # not an optional variant
            left_out[name] = f"cannot run here ({one_line(error)})"
    for name, variant in variants.items():
        if variant.reference is None or name not in logits:
            continue
        expected = logits[variant.reference]
        errors[name] = ((logits[name] - expected).norm() / expected.norm()).item()
        if not errors[name] <= CHECK_TOLERANCE:
            raise ValueError(
                f"variant {name} does not compute the same as {variant.reference}: the relative error of the logits is "
                f"{errors[name]:.1e}, but at most {CHECK_TOLERANCE:.0e} is allowed; nothing was measured"
            )
    return errors, left_out


def random_ids(model: PreTrainedModel, batch: int, tokens: int, seed: int) -> torch.Tensor:
    """Returns `[B, T]` random token ids on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)


def convert(models: dict[str, PreTrainedModel], dtype: torch.dtype):
    """Converts all parameters to another dtype, in place. Shared parameters stay shared; buffers keep their dtype."""
    converted = {}
    for model in models.values():
        for parameter in model.parameters():
            key = parameter.data_ptr()
            if key not in converted:  # keeps the old tensor alive, so that its address is not reused
                converted[key] = (parameter.data, parameter.data.to(dtype))
            parameter.data = converted[key][1]


def _build_one(variant: Variant, plain: PreTrainedModel, depth: DepthMixer, layers_per_block: int) -> PreTrainedModel:
    per_block = layers_per_block if variant.residual_mode == "block" else None
    if variant.mixing is not None:
        mixing = variant.mixing()
        shared = {id(each): nn.Parameter(each.detach()) for each in plain.parameters()}
        model = copy.deepcopy(plain, shared)  # new parameters with the same data
        mix_over_depth(model, depth, per_block, mixing)
        return model
    options = {"layers_per_block": per_block, "scale_norm_eps": False}  # the latter as in the references
    model = AttnResForCausalLM.from_backbone(plain, residual_mode=variant.residual_mode, **options)
    weights = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.data = weights[name].data
    if model.depth_mixer is not None:
        model.depth_mixer.load_state_dict(depth.state_dict())
    if variant.implementation is not None:
        model.set_depth_implementation(variant.implementation)
    return model


@torch.no_grad()
def _randomize(depth: DepthMixer):
    """Draws pseudo-queries that give far from uniform depth weights, with logits of standard deviation 2.

    Zero pseudo-queries would take as long, but all modes compute the same with them, even if one is wired wrongly.
    """
    for name, parameter in depth.named_parameters():
        noise = torch.randn_like(parameter)
        # A normed key has length sqrt(D).
        parameter.copy_(noise * 2 / parameter.shape[-1] ** 0.5 if name.endswith("query") else 1 + 0.1 * noise)
