"""Depth weights as a self-contained HTML page: no network, no server, no other file.

Everything that comes from outside (names, tokens) is escaped by jinja2, in the markup as HTML and in the data block as
JSON in HTML. The page's Content-Security-Policy allows its own style and script by their hashes, and nothing else.
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from matplotlib import colormaps
from matplotlib.colors import to_hex

from ..plots import COLOUR_MAP
from .ablation import Ablation
from .depth_weights import DepthWeights
from .text import printable

PAGE, STYLE, SCRIPT = (Path(__file__).with_name(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
DIGITS = 5
SPACES = str.maketrans({" ": "\u2423", "\n": "\u21b5", "\r": "\u240d", "\t": "\u21e5"})


def render(found: list[DepthWeights], effects: Sequence[Ablation] = ()) -> str:
    """Returns the page over one or more models, with the ablation of each if there are any."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters["visible"] = visible
    models = [
        {"weights": weights, "summary": weights.summary(), "effect": effects[index] if effects else None}
        for index, weights in enumerate(found)
    ]
    colours = [to_hex(colormaps[COLOUR_MAP](place)) for place in range(256)]
    return environment.from_string(PAGE).render(
        models=models,
        worth=_worth,
        style=STYLE,
        script=SCRIPT,
        style_hash=_hash(STYLE),
        script_hash=_hash(SCRIPT),
        data={"colours": colours, "models": [_data(model["weights"], model["effect"]) for model in models]},
    )


def visible(text: str) -> str:
    """Returns text with symbols for spaces and line ends, and escape codes for characters that cannot be printed."""
    return printable(text.translate(SPACES))


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _data(weights: DepthWeights, effect: Ablation | None) -> dict:
    """Returns what the script needs of a model."""
    mixtures = []
    for index, mixture in enumerate(weights.mixtures):
        row = {"name": mixture.name, "partial": mixture.partial}
        row |= {name: _rounded(getattr(mixture, name)) for name in ("mean", "std", "min", "max")}
        if effect is not None and effect.control[index]:
            row |= {"without": _rounded(effect.without[index]), "control": _rounded(effect.control[index])}
        mixtures.append(row)
    return {
        "sources": weights.sources,
        "mixtures": mixtures,
        "tokenWeights": [[_rounded(row) for row in kept] for kept in weights.token_weights],
    }


def _rounded(values: list) -> list[float]:
    return [round(value, DIGITS) for value in values]


def _worth(weights: DepthWeights, effect: Ablation) -> list[tuple]:
    """Returns (change of the loss, mixture, source, weight, controls) of every cell, the largest change first."""
    cells = [
        (change, mixture.name, source, weight, control)
        for mixture, changes, shares, control in zip(
            weights.mixtures, effect.without, effect.weights, effect.control, strict=True
        )
        for change, source, weight in zip(changes, weights.sources, shares, strict=False)
        if control
    ]
    return sorted(cells, key=lambda cell: -cell[0])
