"""Models whose depth mixing matters: with zero pseudo-queries a wiring fault hides behind uniform weights."""

import pytest
import torch
from families import FAMILY_OPTIONS, tiny_config

from attnres import AttnResConfig, AttnResForCausalLM


def short_config(family: str, layers: int = 5, **overrides):
    """A `tiny_config` with fewer decoder layers, cut from the front where the family lists their types."""
    if "layer_types" in FAMILY_OPTIONS[family]:
        overrides.setdefault("layer_types", FAMILY_OPTIONS[family]["layer_types"][:layers])
    return tiny_config(family, **{"num_hidden_layers": layers, **overrides})


def randomise_depth(model, seed: int = 0):
    """Draws pseudo-queries and key-norm gains so that depth weights are far from uniform; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "depth_mixer." not in name:
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            # A normed key has length sqrt(D): these logits have a standard deviation of about 2.
            parameter.copy_(noise * 2 / parameter.shape[-1] ** 0.5 if name.endswith("query") else 1 + 0.3 * noise)
    return model


def random_attnres(
    family: str,
    residual_mode: str = "block",
    layers_per_block: int | None = 2,
    seed: int = 0,
    layers: int = 5,
    attn_implementation: str = "eager",
    **overrides,
) -> AttnResForCausalLM:
    """A tiny AttnRes model in evaluation mode with random pseudo-queries and gains.

    Args:
        family: a key of `families.FAMILY_OPTIONS`.
        residual_mode, layers_per_block: depth options; by default 5 decoder layers in blocks of 2, 2 and 1.
        seed: of all weights.
        layers: decoder layers.
        attn_implementation: as in `from_pretrained`.
        overrides: options of the backbone configuration.
    """
    torch.manual_seed(seed)
    config = AttnResConfig(
        backbone_config=short_config(family, layers, **overrides),
        residual_mode=residual_mode,
        layers_per_block=layers_per_block,
        attn_implementation=attn_implementation,
    )
    return randomise_depth(AttnResForCausalLM(config), seed).eval()


def random_tokens(batch: int, length: int, seed: int = 0, vocab_size: int = 97) -> torch.Tensor:
    """`[batch, length]` token ids, none of them a special token."""
    return torch.randint(3, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference by the norm of what is expected."""
    return ((value - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def compiles(test):
    """Marks a test that runs torch's compiler, whose parts warn of each other's deprecations."""
    for category in ("DeprecationWarning", "FutureWarning", "UserWarning"):
        test = pytest.mark.filterwarnings(f"ignore::{category}")(test)
    return test
