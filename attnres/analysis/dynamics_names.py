"""Log keys of the training dynamics, shared by the code that writes them and the code that reads them."""

import re

OUTPUT_RMS = "output_rms"
GRADIENT_NORM = "gradient_norm"
QUERY_NORM = "query_norm"
ENTROPY = "entropy"

PER_LAYER = (OUTPUT_RMS, GRADIENT_NORM)
PER_MIXTURE = (QUERY_NORM, ENTROPY)

_LAYER = re.compile(rf"depth/({'|'.join(PER_LAYER)})/layer_([0-9]{{2,4}})")
_MIXTURE = re.compile(rf"depth/({'|'.join(PER_MIXTURE)})/(layer_[0-9]{{2,4}}_(?:attention|mlp)|output)")


def layer_name(measure: str, layer: int, layers: int) -> str:
    """Returns a key such as `depth/output_rms/layer_07`, zero-padded so that the keys of all `layers` sort by depth."""
    return f"depth/{measure}/layer_{layer:0{max(2, len(str(layers - 1)))}d}"


def mixture_names(measure: str, layers: int) -> list[str]:
    """Returns the keys of all 2 L + 1 mixtures in the order attention, MLP, attention, MLP, ..., output."""
    names = [layer_name(measure, layer, layers) for layer in range(layers)]
    return [*(f"{name}_{kind}" for name in names for kind in ("attention", "mlp")), f"depth/{measure}/output"]


def parse(name: str) -> tuple[str, int | str] | None:
    """Splits a key into its measure and its decoder layer or mixture; returns None for any other key."""
    if match := _LAYER.fullmatch(name):
        return match[1], int(match[2])
    if match := _MIXTURE.fullmatch(name):
        return match[1], match[2]
    return None
