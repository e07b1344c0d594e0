"""Draws all figures from plain arrays, without a model; each function writes one PNG atomically."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
from matplotlib.colorbar import Colorbar
from matplotlib.colors import CenteredNorm, PowerNorm
from matplotlib.figure import Figure

DPI = 150
# Okabe and Ito's palette, distinct with every kind of colour vision; dashes keep the lines apart in black and white.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
DASHES = ("-", "--", "-.", ":", "-", "--")
MARKERS = ("o", "s", "^", "D", "v", "P")
COLOUR_MAP = "cividis"
# A folder's name may hold a dollar sign, which would start a formula.
TITLE = {"fontsize": 10, "parse_math": False}


def loss_curves(
    path: str | PathLike,
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    baseline: str,
    step_label: str = "optimiser step",
):
    """Draws losses over steps and, beside them, the held-out loss relative to the baseline at the same step.

    Args:
        path: PNG to write, 1800 x 750 pixels.
        curves: per model `train_steps`, `train_loss`, `held_out_steps`, `held_out_loss`; losses in nats per token.
        baseline: name of the model whose loss the right panel subtracts.
        step_label: label of the horizontal axis, with its unit.
    """
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    reference = dict(zip(curves[baseline]["held_out_steps"], curves[baseline]["held_out_loss"], strict=True))
    for index, (name, curve) in enumerate(curves.items()):
        style = _line_style(index)
        left.plot(curve["train_steps"], curve["train_loss"], color=style["color"], linewidth=0.7, alpha=0.3)
        left.plot(curve["held_out_steps"], curve["held_out_loss"], label=name, **style)
        loss = dict(zip(curve["held_out_steps"], curve["held_out_loss"], strict=True))
        steps = [step for step in loss if step in reference]
        right.plot(steps, [loss[step] - reference[step] for step in steps], label=name, **style)
    left.plot([], [], color="0.4", linewidth=0.7, alpha=0.6, label="training batches (thin)")
    left.set(title="Loss on held-out text", ylabel="loss (nats per token)")
    right.set(title=f"Held-out loss relative to {baseline}", ylabel=f"loss minus that of {baseline} (nats per token)")
    right.annotate("below zero: better", (0.02, 0.02), xycoords="axes fraction", color="0.35")
    for axes in (left, right):
        axes.set_xlabel(step_label)
        _tidy(axes)
        axes.legend(frameon=False)
    _save(figure, path)


def depth_panels(path: str | PathLike, models: Sequence[Mapping]):
    """Draws mean depth weights as the paper does: per model, before attention and before MLP, and the output below.

    Colours follow the square root of the weight, on one scale for all models.

    Args:
        path: PNG to write.
        models: each with `title`; `columns`, names of the sources from the embedding on; `rows`, weights of the 2 L + 1
            mixtures (attention, MLP, attention, MLP, ..., output), each of which may end before the last column.
    """
    heights = [_inches(model) for model in models]
    figure = Figure(figsize=(13, 0.5 + sum(heights) + 1.9 * len(models)), layout="constrained")
    parts = figure.subfigures(len(models), 1, height_ratios=[height + 1.9 for height in heights], squeeze=False)[:, 0]
    for part, model in zip(parts, models, strict=True):
        bar = _heatmaps(part, model, {"cmap": COLOUR_MAP, "norm": PowerNorm(0.5, vmin=0, vmax=1)}, "{:.2f}")
        bar.set_label("mean depth weight")
        bar.set_ticks([0, 0.05, 0.2, 0.5, 1])
    _save(figure, path)


def source_effects(path: str | PathLike, effects: Mapping):
    """Draws the change of the loss without each source, before attention, before MLP and before the output.

    Colours are linear, with white for no change.

    Args:
        path: PNG to write.
        effects: as a model of `depth_panels`, with changes in nats per token in place of weights; None for no change
            to draw. The columns after an empty name are no sources but controls.
    """
    largest = max((abs(change) for row in effects["rows"] for change in row if change is not None), default=0) or 1.0
    figure = Figure(figsize=(13, 2.4 + _inches(effects)), layout="constrained")
    bar = _heatmaps(figure, effects, {"cmap": "PuOr_r", "norm": CenteredNorm(0, largest)}, "{:+.3f}")
    bar.set_label("change of the loss, nats per token")
    _save(figure, path)


def forest(
    path: str | PathLike,
    labels: Sequence[str],
    differences: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    published: Sequence[float | None],
    notes: Sequence[str],
    note_title: str,
    title: str,
    warning: str = "",
):
    """Draws a row per difference, from the top, with its interval and the published difference.

    Args:
        path: PNG to write.
        labels, differences, intervals: names of the rows, differences and their 95 % intervals in points.
        published: published difference of each row, or None; drawn without an interval.
        notes: a short text per row, printed in a monospaced font to the right of it.
        note_title, title: heading above the notes; title of the figure.
        warning: printed under the title if the numbers have to be read with care.
    """
    figure = Figure(figsize=(9, 2.0 + 0.36 * len(labels)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(labels))
    values = np.asarray(differences, dtype=float)
    reach = np.abs(values[:, None] - np.asarray(intervals, dtype=float)).T
    axes.axvline(0, color="0.4", linewidth=1)
    style = {"color": COLOURS[1], "markersize": 6, "capsize": 3, "linewidth": 1.6}
    axes.errorbar(values, places, xerr=reach, fmt=MARKERS[0], label="measured, 95 % interval", **style)
    known = [(value, place) for value, place in zip(published, places, strict=True) if value is not None]
    if known:
        style = {"color": COLOURS[2], "marker": MARKERS[3], "facecolors": "none", "zorder": 3, "s": 42}
        axes.scatter(*zip(*known, strict=True), label="paper, one run each", **style)
    axes.set_yticks(places, labels)
    axes.set(ylim=(len(labels) - 0.5, -0.5), xlabel="difference (points); right of zero: the second model is better")
    _tidy(axes, grid="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    style = {"fontsize": 8, "family": "monospace"}
    for place, note in zip(places, notes, strict=True):
        axes.annotate(note, (1.02, place), xycoords=("axes fraction", "data"), va="center", **style)
    axes.annotate(note_title, (1.02, 1.01), xycoords="axes fraction", va="bottom", color="0.35", **style)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    lines = [line for text in (title, warning) for line in textwrap.wrap(text, 95)]
    figure.suptitle("\n".join(lines), **TITLE)
    _save(figure, path)


def overhead(path: str | PathLike, panels: Sequence[Mapping], title: str):
    """Draws overheads over plain residuals, against the number of decoder layers and of blocks side by side.

    Args:
        path: PNG to write.
        panels: each with `title`; `depth` and `blocks`: per model `x`, `median`, `q1`, `q3`, overheads in per cent;
            `depth_note` and `blocks_note`: what is held constant in each of the two.
        title: title of the figure.
    """
    figure = Figure(figsize=(12, 1.2 + 3.1 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), 2, squeeze=False)
    names = list(dict.fromkeys(name for panel in panels for kind in ("depth", "blocks") for name in panel[kind]))
    handles = {}
    for axes_of_row, panel in zip(rows, panels, strict=True):
        for axes, kind, label in zip(axes_of_row, ("depth", "blocks"), ("decoder layers", "blocks"), strict=True):
            axes.axhline(0, color="0.4", linewidth=1)
            for name, curve in panel[kind].items():
                median = np.asarray(curve["median"])
                reach = np.abs(np.asarray([curve["q1"], curve["q3"]]) - median)
                style = {**_line_style(names.index(name)), "markersize": 5, "capsize": 3}
                handles[name] = axes.errorbar(curve["x"], median, yerr=reach, **style)
            values = sorted({value for curve in panel[kind].values() for value in curve["x"]})
            axes.set_xticks(values, [str(value) for value in values])
            axes.set_xlabel(label)
            axes.set_title(f"{panel['title']}: {panel[f'{kind}_note']}", fontsize=9)
            _tidy(axes)
        axes_of_row[0].set_ylabel("overhead (%)")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
    heading = "Time over plain residuals: median and quartiles of the ratios within each round"
    figure.suptitle(f"{heading}\n{title}", **TITLE)
    _save(figure, path)


def training_dynamics(path: str | PathLike, runs: Sequence[Mapping]):
    """Draws runs together: validation loss over steps, output magnitude over depth and gradient norm over depth.

    Args:
        path: PNG to write, 2100 x 750 pixels, taller with many runs.
        runs: each with `name`; `step` of the measurement; `output_rms` and `gradient_norm`, a value or None per decoder
            layer; and `validation` with `steps` and `loss`, which may be empty.
    """
    columns = min(len(runs), 3)
    figure = Figure(figsize=(14, 4.8 + 0.2 * -(-len(runs) // columns)), layout="constrained")
    losses, outputs, gradients = figure.subplots(1, 3)
    handles = []
    for index, run in enumerate(runs):
        handles += losses.plot(run["validation"]["steps"], run["validation"]["loss"], **_line_style(index))
        for axes, name in ((outputs, "output_rms"), (gradients, "gradient_norm")):
            axes.plot(np.asarray(run[name], dtype=float), **_line_style(index))  # None becomes a gap
    if not any(run["validation"]["steps"] for run in runs):
        style = {"ha": "center", "va": "center", "color": "0.35"}
        losses.annotate("no run was evaluated", (0.5, 0.5), xycoords="axes fraction", **style)
        losses.set(xticks=[], yticks=[])
    losses.set(title="Validation loss", xlabel="optimiser step", ylabel="loss (nats per token)")
    outputs.set(title="Output magnitude over depth", ylabel="RMS of the layer's output")
    gradients.set(title="Gradient norm over depth", ylabel="norm of the loss's gradient by that output")
    _tidy(losses)
    for axes in (outputs, gradients):
        _tidy(axes)
        axes.set_xlabel("decoder layer")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
    # matplotlib 3.9 leaves out labels that start with an underscore; a dollar sign would start a formula.
    labels = [f" {run['name']}, measured at step {run['step']}" for run in runs]
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    _save(figure, path)


def _inches(model: Mapping) -> float:
    """Returns the height of a model's heatmaps."""
    return max(2.6, min(9.0, 0.12 * len(model["rows"])))


def _heatmaps(part, model: Mapping, style: Mapping, number: str) -> Colorbar:
    """Draws the heatmaps before attention and before MLP and the row of the output below; returns the colour bar."""
    columns, rows, height = model["columns"], model["rows"], _inches(model)
    mosaic = [["before attention", "before MLP"], ["output", "output"]]
    all_axes = part.subplot_mosaic(mosaic, height_ratios=[height, max(0.3, 2 * height / len(rows))])
    for (title, axes), values in zip(all_axes.items(), (rows[:-1:2], rows[1:-1:2], rows[-1:]), strict=True):
        matrix = np.full((len(values), len(columns)), np.nan)
        for row, each in zip(matrix, values, strict=True):
            row[: len(each)] = each  # None becomes NaN
        image = axes.imshow(np.ma.masked_invalid(matrix), aspect="auto", interpolation="nearest", **style)
        axes.patch.set(hatch="////", edgecolor="0.85", facecolor="white")  # where there is no source yet
        axes.set_title(title, fontsize=10)
        across = -(-len(columns) // (40 if title == "output" else 18))
        sources = columns.index("") if "" in columns else len(columns)
        shown = [*range(0, sources, across), *range(sources + 1, len(columns))]
        axes.set_xticks(shown, [columns[place] for place in shown], fontsize=8)
        axes.set_yticks(range(0, len(values), -(-len(values) * 9 // int(72 * height))))
        axes.tick_params(axis="y", labelsize=8)
        axes.spines[:].set_visible(False)
        if len(columns) <= 18 and height / len(values) >= 0.16:
            for (row, column), value in np.ma.ndenumerate(image.get_array()):
                brightness = np.dot(image.to_rgba(value), [0.3, 0.6, 0.1, 0])
                colour = "black" if brightness > 0.5 else "white"
                axes.text(column, row, number.format(value), ha="center", va="center", fontsize=6.5, color=colour)
    all_axes["before attention"].set_ylabel("decoder layer")
    axes.set(xlabel="source" if "" not in columns else "source that is left out", yticks=[])
    part.suptitle("\n".join(textwrap.wrap(model["title"], 120)), **TITLE)
    return part.colorbar(image, ax=list(all_axes.values()), fraction=0.03, pad=0.01)


def _line_style(index: int) -> dict:
    shifted = index + index // len(COLOURS)  # where the colours start again, so that no two lines look the same
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[shifted % len(DASHES)],
        "marker": MARKERS[shifted % len(MARKERS)],
        "markersize": 4,
    }


def _tidy(axes, grid: str = "both"):
    axes.grid(axis=grid, color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: str | PathLike):
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, dpi=DPI, format="png")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
