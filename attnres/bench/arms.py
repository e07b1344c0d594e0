"""The variants compared: one backbone, with the same weight tensors, under several ways of mixing over depth."""

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .. import AttnResForCausalLM
from ..depth_kernels import DEPTH_IMPLEMENTATIONS
from ..depth_mixer import DepthMixer
from .oracle import Mixing, mix_over_depth, stack_and_mix

PLAIN = "plain"
CHECK_TOKENS = 32
CHECK_TOLERANCE = 1e-3  # rounding alone reaches 1e-4 in full mode with 28 layers


class Unavailable(Exception):
    """A variant that this machine cannot run; says why."""


@dataclass(frozen=True)
class Arm:
    """One way of mixing over depth.

    Attributes:
        description: shown in the results.
        residual_mode: of the package's own model; None for what runs inside the transformers model.
        mixing: makes the function that mixes inside the transformers model; None: its plain residuals.
        full: every sublayer output is a source of its own.
        reference: the variant that must compute the same logits.
        implementation: `depth_implementation` of the package's own model; None: the default.
    """

    description: str
    residual_mode: str | None = None
    mixing: Callable[[], Mixing] | None = None
    full: bool = False
    reference: str | None = None
    implementation: str | None = None


def _of_fla(name: str) -> Callable[[], Mixing]:
    def load() -> Mixing:
        if find_spec("fla") is None:
            raise Unavailable("flash-linear-attention is not installed")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # says that there is no GPU, which the results show
                from fla.ops.attnres import fused_attnres
                from fla.ops.attnres.naive import naive_attnres
        except Exception as error:  # whatever its own dependencies raise
            raise Unavailable(f"flash-linear-attention cannot be imported ({_first_line(error)})") from error
        function = {"naive_attnres": naive_attnres, "fused_attnres": fused_attnres}[name]
        return lambda sources, query, gain, eps: function(query, sources, gain, rms_eps=eps)

    return load


ARMS = {
    PLAIN: Arm("the transformers model itself: plain residuals"),
    "standard": Arm(
        "attnres, residual_mode=standard: plain residuals in the package's code", "standard", reference=PLAIN
    ),
    "block": Arm("attnres, residual_mode=block", "block", reference="stacked"),
    "full": Arm("attnres, residual_mode=full", "full", reference="stacked-full"),
    "stacked": Arm("Block AttnRes by the paper's pseudo-code: stack, norm, softmax, sum", mixing=lambda: stack_and_mix),
    "stacked-full": Arm("Full AttnRes by the same pseudo-code", mixing=lambda: stack_and_mix, full=True),
    "fla-naive": Arm(
        "Block AttnRes by flash-linear-attention's naive_attnres", mixing=_of_fla("naive_attnres"), reference="stacked"
    ),
    "fla-fused": Arm(
        "Block AttnRes by flash-linear-attention's fused_attnres, without its fused output norm",
        mixing=_of_fla("fused_attnres"),
        reference="stacked",
    ),
}


def select(names: Iterable[str], implementations: Iterable[str] = ()) -> dict[str, Arm]:
    """The named variants, and block and full once more for each implementation of the depth mixing.

    Raises:
        ValueError: an unknown name.
    """
    for kind, given, known in (("variant", names, ARMS), ("implementation", implementations, DEPTH_IMPLEMENTATIONS)):
        for name in given:
            if name not in known:
                raise ValueError(f"{kind} must be one of {', '.join(known)}; got {name!r}")
    chosen = {PLAIN: ARMS[PLAIN], **{name: ARMS[name] for name in ARMS if name in set(names)}}
    for implementation in implementations:
        for mode in ("block", "full"):
            if mode in chosen:
                chosen[f"{mode}:{implementation}"] = Arm(
                    f"{ARMS[mode].description}, depth_implementation={implementation}",
                    mode,
                    reference=ARMS[mode].reference,
                    implementation=implementation,
                )
    return chosen


def build(
    arms: dict[str, Arm],
    config: PreTrainedConfig,
    layers_per_block: int,
    device: torch.device,
    seed: int,
) -> tuple[dict[str, PreTrainedModel], dict[str, str]]:
    """Models in float32 that share all backbone weights and have the same random pseudo-queries and gains.

    Args:
        arms: what `select` chose. The references of its variants are built too.
        config: of the backbone.
        layers_per_block: decoder layers per block, where there are blocks.
        device: to build on.
        seed: of all weights.

    Returns:
        The models, and why some variants could not be built.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        try:
            plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        except Exception as error:  # numbers that fit no model fail anywhere in transformers or torch
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"model: its configuration makes no {config.model_type} model ({reason})") from None
        depth = DepthMixer(config.num_hidden_layers, config.hidden_size)
    _randomise(depth)
    references = {arm.reference: ARMS[arm.reference] for arm in arms.values() if arm.reference}
    models, left_out = {}, {}
    for name, arm in {**arms, **references}.items():
        try:
            models[name] = plain if name == PLAIN else _build_one(arm, plain, depth, layers_per_block)
        except Unavailable as reason:
            left_out[name] = str(reason)
    return models, left_out


def check(
    arms: dict[str, Arm], models: dict[str, PreTrainedModel], seed: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Compares the logits of every variant with those of its reference on a few random tokens, in float32.

    Returns:
        Per variant the error, norm of the difference by norm of the reference; and why some variants cannot run here.

    Raises:
        ValueError: a variant computes something else.
    """
    some = next(iter(models.values()))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(some.config.vocab_size, (1, CHECK_TOKENS), generator=generator).to(some.device)
    logits, errors, left_out = {}, {}, {}
    for name, model in models.items():
        try:
            with torch.no_grad():
                logits[name] = model(input_ids=ids, use_cache=False).logits.double()
        except (ValueError, RuntimeError, ImportError, NotImplementedError) as error:
            if not _is_optional(name, arms):
                raise
            left_out[name] = f"cannot run here ({_first_line(error)})"
    for name, arm in arms.items():
        if arm.reference is None or name not in logits:
            continue
        expected = logits[arm.reference]
        errors[name] = ((logits[name] - expected).norm() / expected.norm()).item()
        if not errors[name] <= CHECK_TOLERANCE:
            raise ValueError(
                f"variant {name} computes something else than {arm.reference}: relative error of the logits "
                f"{errors[name]:.1e}, at most {CHECK_TOLERANCE:.0e} is allowed; nothing was measured"
            )
    return errors, left_out


def convert(models: dict[str, PreTrainedModel], dtype: torch.dtype):
    """Parameters to another dtype, in place; what was shared stays shared. Buffers stay as they are."""
    converted = {}
    for model in models.values():
        for parameter in model.parameters():
            key = parameter.data_ptr()
            if key not in converted:  # the old one is kept alive, so that nothing else gets its address
                converted[key] = (parameter.data, parameter.data.to(dtype))
            parameter.data = converted[key][1]


def _build_one(arm: Arm, plain: PreTrainedModel, depth: DepthMixer, layers_per_block: int) -> PreTrainedModel:
    if arm.residual_mode is None:
        mixing = arm.mixing()
        shared = {id(each): nn.Parameter(each.detach()) for each in plain.parameters()}
        model = copy.deepcopy(plain, shared)  # new parameters with the same data
        mix_over_depth(model, depth, None if arm.full else layers_per_block, mixing)
        return model
    options = {"scale_norm_eps": False}  # as the references mix
    if arm.residual_mode == "block":
        options["layers_per_block"] = layers_per_block
    model = AttnResForCausalLM.from_backbone(plain, residual_mode=arm.residual_mode, **options)
    weights = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.data = weights[name].data
    if model.depth_mixer is not None:
        model.depth_mixer.load_state_dict(depth.state_dict())
    if arm.implementation is not None:
        model.set_depth_implementation(arm.implementation)
    return model


@torch.no_grad()
def _randomise(depth: DepthMixer):
    """Far from uniform weights: a normed key has length sqrt(D), so that logits have a standard deviation of about 2.

    Zero pseudo-queries would be as fast, but all modes compute the same with them, wired rightly or not.
    """
    for name, parameter in depth.named_parameters():
        noise = torch.randn_like(parameter)
        parameter.copy_(noise * 2 / parameter.shape[-1] ** 0.5 if name.endswith("query") else 1 + 0.1 * noise)


def _is_optional(name: str, arms: dict[str, Arm]) -> bool:
    return name.startswith("fla-") or (name in arms and arms[name].implementation is not None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
