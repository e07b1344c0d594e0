"""Log keys of the training dynamics, shared by the code that writes them and the code that reads them."""

import re

OUTPUT_RMS = "output_rms"
GRADIENT_NORM = "gradient_norm"
QUERY_NORM = "query_norm"
ENTROPY = "entropy"

PER_LAYER = (OUTPUT_RMS, GRADIENT_NORM)
PER_MIXTURE = (QUERY_NORM, ENTROPY)
OUTPUT = "output"
SUBLAYERS = ("attention", "mlp")

_NAME = re.compile(
    rf"depth/(?:(?P<layer_measure>{'|'.join(PER_LAYER)})/layer_(?P<layer>[0-9]{{2,4}})"
    rf"|(?P<measure>{'|'.join(PER_MIXTURE)})/(?P<mixture>layer_[0-9]{{2,4}}_(?:{'|'.join(SUBLAYERS)})|{OUTPUT}))"
)


def layer_name(measure: str, layer: int, layers: int) -> str:
    """Such as `depth/output_rms/layer_07`; as many digits as the last of the `layers` needs, so that names sort."""
    return f"depth/{measure}/layer_{layer:0{max(2, len(str(layers - 1)))}d}"


def mixture_names(measure: str, layers: int) -> list[str]:
    """Of all 2 L + 1 mixtures in the order attention, MLP, attention, MLP, ..., output."""
    names = [f"{layer_name(measure, layer, layers)}_{sublayer}" for layer in range(layers) for sublayer in SUBLAYERS]
    return [*names, f"depth/{measure}/{OUTPUT}"]


def parse(name: str) -> tuple[str, int | str] | None:
    """Measure and decoder layer of `layer_name`, measure and place of one of `mixture_names`; or None."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    if match["layer"] is not None:
        return match["layer_measure"], int(match["layer"])
    return match["measure"], match["mixture"]
