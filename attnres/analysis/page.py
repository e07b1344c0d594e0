"""Depth weights as a self-contained HTML page: no network, no server, no other file.

Everything that comes from outside (names, tokens) is escaped: in the markup by `html.escape`, in the data block by
writing "<" as \\u003c. The page's Content-Security-Policy allows its own style and script by their hashes, and nothing
else.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape

from .ablation import Ablation
from .depth_weights import DepthWeights, Mixture
from .page_template import COLOURS, PAGE, SCRIPT, STYLE
from .text import printable

DIGITS = 5
SHOWN_IGNORED = 6  # in a list of names
SHOWN_SOURCES = 12  # longer lists wait to be opened
SPACES = {" ": "\u2423", "\n": "\u21b5", "\r": "\u240d", "\t": "\u21e5"}
PANELS = {"attention": "before attention", "mlp": "before MLP", "output": "output"}


def render(found: list[DepthWeights], effects: Sequence[Ablation] = ()) -> str:
    """The page over one or more models, and where they were measured what their sources are worth."""
    both = [(weights, effects[index] if effects else None) for index, weights in enumerate(found)]
    data = {"colours": COLOURS, "models": [_model_data(weights, effect) for weights, effect in both]}
    names = ", ".join(weights.model for weights in found)
    return _fill(
        PAGE,
        script_hash=_hash(SCRIPT),
        style_hash=_hash(STYLE),
        style=STYLE,
        script=SCRIPT,
        title=escape(f"Depth weights: {names}"),
        # A data block ends at the first "</script"; U+2028 and U+2029 are escaped by json.
        data=json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        models="".join(_section(index, *each) for index, each in enumerate(both)),
    )


def visible(text: str) -> str:
    """Text with every character to be seen: spaces and line ends as symbols, what does not print as its code."""
    return "".join(SPACES.get(character) or printable(character) for character in text)


def _fill(template: str, **parts: str) -> str:
    """Each `[[name]]` replaced by its part, in one pass: parts may hold anything."""
    pieces = template.split("[[")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, rest = piece.split("]]", 1)
        filled += [parts[name], rest]
    return "".join(filled)


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _model_data(weights: DepthWeights, effect: Ablation | None) -> dict:
    return {
        "sources": weights.sources,
        "short": weights.short_sources,
        "tokens": [visible(token.text) for token in weights.tokens],
        "rows": [_row_data(index, mixture, effect) for index, mixture in enumerate(weights.mixtures)],
        "tokenWeights": [[_rounded(row) for row in rows] for rows in weights.token_weights],
    }


def _row_data(index: int, mixture: Mixture, effect: Ablation | None) -> dict:
    effects = {}
    if effect is not None and effect.control[index]:
        effects = {"without": _rounded(effect.without[index]), "control": _rounded(effect.control[index])}
    return {
        **effects,
        "kind": mixture.kind,
        "layer": mixture.layer,
        "partial": mixture.partial,
        **{name: _rounded(getattr(mixture, name)) for name in ("mean", "std", "min", "max")},
    }


def _rounded(values: list[float]) -> list[float]:
    return [round(value, DIGITS) for value in values]


def _section(index: int, weights: DepthWeights, effect: Ablation | None) -> str:
    mode = "Full AttnRes" if weights.layers_per_block is None else "Block AttnRes"
    facts = [
        f"{mode} ({weights.family})",
        f"{weights.num_layers} decoder layers",
        *([] if weights.layers_per_block is None else [f"{weights.layers_per_block} decoder layers per block"]),
        f"{weights.num_tokens:,} tokens of {weights.text}, {weights.context:,} at a time",
    ]
    return f"""
<section class="model" data-model="{index}" aria-labelledby="name-{index}">
<h2 id="name-{index}">{escape(weights.model)}</h2>
<p class="facts">{escape("; ".join(facts))}</p>
{_tokens(index, weights)}
<p class="showing" aria-live="polite">Showing the mean over all {weights.num_tokens:,} tokens.</p>
<div class="panels">
{"".join(_panel(index, kind) for kind in PANELS)}
</div>
<p class="readout" aria-live="polite">Point at a cell, or focus a panel and use the arrow keys.</p>
{_summary(weights)}
{"" if effect is None else _effects(weights, effect)}
</section>
"""


def _panel(index: int, kind: str) -> str:
    label = f"{PANELS[kind]}: heatmap of depth weights, a row per mixture, a column per source; arrow keys move"
    return f"""<figure class="panel {kind}"><figcaption>{PANELS[kind]}</figcaption>
<div class="scroll"><canvas data-panel="{kind}" tabindex="0" role="application" aria-roledescription="heatmap"
 aria-label="{escape(label)}"></canvas></div></figure>
"""


def _tokens(index: int, weights: DepthWeights) -> str:
    if not weights.tokens:
        return ""
    buttons = "".join(
        f'<button type="button" role="radio" aria-checked="false" tabindex="-1" data-token="{number}" '
        f'title="token {number}, id {token.id}"><bdi>{escape(visible(token.text))}</bdi></button>'
        for number, token in enumerate(weights.tokens)
    )
    return f"""<div class="tokens" role="radiogroup" aria-label="which token's weights to show">
<button type="button" role="radio" aria-checked="true" tabindex="0" data-token="-1" class="all">mean</button>{buttons}
</div>
<p class="hint">The first {len(weights.tokens)} tokens: choose one to see its own weights.</p>
"""


def _summary(weights: DepthWeights) -> str:
    summary = weights.summary()
    head = (
        '<thead><tr><th scope="col">mixture</th><th scope="col">{0}</th><th scope="col">weight on newest source</th>'
        '<th scope="col">on embedding</th><th scope="col">entropy (nats)</th><th scope="col">effective sources</th>'
        '<th scope="col">{1}</th></tr></thead>'
    )
    overall = "".join(
        f'<tr><th scope="row">{PANELS.get(kind, "all")}</th><td>{values["mixtures"]}</td>{_numbers(values)}'
        f"<td>{values['ignoring']} of {values['mixtures']}</td></tr>"
        for kind, values in summary["overall"].items()
    )
    each = "".join(
        f'<tr><th scope="row">{row["name"]}</th><td>{row["sources"]}</td>{_numbers(row)}'
        f"<td>{escape(_listed(row['ignored']))}</td></tr>"
        for row in summary["mixtures"]
    )
    entries = "".join(
        f"<li>{escape(source)}: ignored by {len(entry['by'])} of the {entry['seen_by']} mixtures that see it "
        f"({escape(_listed(entry['by']))})</li>"
        for source, entry in summary["ignored"].items()
    )
    ignored = "<p>No source is ignored.</p>"
    if entries:
        some = f"{len(summary['ignored'])} of {len(weights.sources)} sources are ignored by some mixture"
        state = " open" if len(summary["ignored"]) <= SHOWN_SOURCES else ""
        ignored = f"<details{state}><summary>{some}</summary><ul>{entries}</ul></details>"
    return f"""<h3>Summary</h3>
<div class="scroll"><table>{head.format("how many", "ignoring a source")}<tbody>{overall}</tbody></table></div>
<p class="hint">Means over the mixtures of two sources or more. Entropy: mean over tokens; effective sources:
exp(entropy). A source is ignored: {escape(summary["ignored_rule"])}.</p>
{ignored}
<details><summary>Every mixture</summary>
<div class="scroll tall" tabindex="0" role="region" aria-label="summary of every mixture">
<table>{head.format("sources", "ignored sources")}<tbody>{each}</tbody></table></div></details>
"""


def _effects(weights: DepthWeights, effect: Ablation) -> str:
    """What sources are worth, the most first: all mixtures' sources with their weights, and each mixture's control."""
    rows = sorted(
        (
            (change, mixture, effect.control[index], source, effect.weights[index][place])
            for index, mixture in enumerate(weights.mixtures)
            if effect.control[index]
            for place, (source, change) in enumerate(zip(weights.sources, effect.without[index], strict=False))
        ),
        key=lambda row: -row[0],
    )
    body = "".join(
        f'<tr><th scope="row">{mixture.name}</th><td>{escape(source)}</td><td>{weight:.3f}</td><td>{change:+.4f}</td>'
        f"<td>{sum(control) / len(control):+.4f} ({min(control):+.4f} to {max(control):+.4f})</td></tr>"
        for change, mixture, control, source, weight in rows
    )
    return f"""<h3>What each source is worth</h3>
<p class="hint">Change of the loss, in nats per token, where one source of one mixture is left out and the weights of
the others are renormalised, over {effect.tokens:,} tokens (loss {effect.loss:.4f}); beside it the same mixture without
a source drawn at random for every token. A large weight is not a large effect.</p>
<details><summary>Every source of every mixture</summary>
<div class="scroll tall" tabindex="0" role="region" aria-label="what each source is worth">
<table><thead><tr><th scope="col">mixture</th><th scope="col">source left out</th><th scope="col">mean weight</th>
<th scope="col">change of the loss</th><th scope="col">without a random source</th></tr></thead><tbody>{body}</tbody>
</table></div></details>
"""


def _numbers(values: dict) -> str:
    return "".join(f"<td>{values[name]:.3f}</td>" for name in ("newest", "embedding", "entropy", "effective_sources"))


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN_IGNORED
    return (", ".join(names[:SHOWN_IGNORED]) + (f" and {more} more" if more > 0 else "")) or "none"
