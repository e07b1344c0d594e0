"""All figures, drawn from plain arrays: no model is needed, and one file is written."""

import io
import os
import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import CenteredNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

DPI = 150
# Okabe and Ito's palette, told apart with every kind of colour vision; dashes tell the lines apart in print.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
DASHES = ("-", "--", "-.", ":", "-", "--")
MARKERS = ("o", "s", "^", "D", "v", "P")
COLOUR_MAP = "cividis"


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
        baseline: name of the model that the right panel subtracts.
        step_label: label of the horizontal axis, with its unit.

    Raises:
        ValueError: `baseline` is not among the curves.
    """
    if baseline not in curves:
        raise ValueError(f"baseline {baseline!r} is not among the curves: {', '.join(curves)}")
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    reference = dict(zip(curves[baseline]["held_out_steps"], curves[baseline]["held_out_loss"], strict=True))
    for index, (name, curve) in enumerate(curves.items()):
        style = {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": DASHES[index % len(DASHES)],
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 4,
        }
        left.plot(curve["train_steps"], curve["train_loss"], color=style["color"], linewidth=0.7, alpha=0.3)
        left.plot(curve["held_out_steps"], curve["held_out_loss"], label=name, **style)
        steps = [step for step in curve["held_out_steps"] if step in reference]
        loss = dict(zip(curve["held_out_steps"], curve["held_out_loss"], strict=True))
        right.plot(steps, [loss[step] - reference[step] for step in steps], label=name, **style)
    left.plot([], [], color="0.4", linewidth=0.7, alpha=0.6, label="training batches (thin)")
    left.set_title("Loss on held-out text")
    left.set_ylabel("loss (nats per token)")
    right.set_title(f"Held-out loss relative to {baseline}")
    right.set_ylabel(f"loss minus that of {baseline} (nats per token)")
    right.annotate("below zero: better", (0.02, 0.02), xycoords="axes fraction", color="0.35")
    for axes in (left, right):
        axes.set_xlabel(step_label)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    _save(figure, path)


def depth_weights(
    path: str | PathLike,
    panels: Mapping[str, Sequence[Sequence[float]]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    partial_columns: Sequence[int | None],
):
    """Draws mean depth weights as heatmaps side by side: a row per mixture, a column per source.

    Args:
        path: PNG to write.
        panels: per title one row of weights per mixture; a row may end before the last column; sources count from
            the left.
        row_labels: of the mixtures, from the first sublayer to the output.
        column_labels: of the sources, from the embedding on.
        partial_columns: per row the column whose source is a partial sum, outlined; or None.

    Raises:
        ValueError: a panel has more rows or columns than there are labels.
    """
    height = 1.9 + 0.27 * len(row_labels)
    width = max(7.5, 2.2 + len(panels) * max(4.0, 0.85 * len(column_labels)))
    figure = Figure(figsize=(width, height), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, rows) in zip(all_axes, panels.items(), strict=True):
        image = axes.imshow(
            _matrix(title, rows, row_labels, column_labels), cmap=COLOUR_MAP, vmin=0, vmax=1, aspect="auto"
        )
        for row, weights in enumerate(rows):
            for column, weight in enumerate(weights):
                colour = "black" if weight > 0.5 else "white"
                axes.text(column, row, f"{weight:.2f}", ha="center", va="center", fontsize=7, color=colour)
            if partial_columns[row] is not None:
                axes.add_patch(_outline(row, partial_columns[row]))
        axes.set_title(title)
        axes.set_xticks(range(len(column_labels)), column_labels, fontsize=8)
        axes.set_yticks(range(len(row_labels)), row_labels, fontsize=8)
        axes.set_xlabel("source")
        axes.spines[:].set_visible(False)
    all_axes[0].set_ylabel("sublayer that mixes")
    figure.colorbar(image, ax=all_axes, label="mean depth weight", fraction=0.03)
    figure.suptitle(
        "Which sources each sublayer mixes: depth weights, mean over tokens; each row sums to 1\n"
        "outlined: the partial sum of the sublayer's own block",
        fontsize=10,
    )
    _save(figure, path)


def depth_panels(path: str | PathLike, models: Sequence[Mapping]):
    """Draws mean depth weights as the paper does: a row of figures per model, before attention and before MLP, and the
    output below. Colours follow the square root of the weight, on one scale for all.

    Args:
        path: PNG to write.
        models: each with `title`; `columns`, labels of the sources from the embedding on; `rows`, labels of the decoder
            layers; `attention` and `mlp`, weights per decoder layer, which may end before the last column; `output`,
            the weights of the output.

    Raises:
        ValueError: there is nothing to draw, or weights do not fit the labels.
    """
    if not models:
        raise ValueError("a figure of depth weights needs at least one model")
    inches = [max(2.6, min(9.0, 0.24 * len(model["rows"]))) for model in models]
    figure = Figure(figsize=(13, 0.5 + sum(inches) + 1.9 * len(models)), layout="constrained")
    parts = figure.subfigures(len(models), 1, height_ratios=[height + 1.9 for height in inches], squeeze=False)[:, 0]
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    for part, model, height in zip(parts, models, inches, strict=True):
        all_axes = part.subplot_mosaic(
            [["attention", "mlp"], ["output", "output"]], height_ratios=[height, max(0.3, height / len(model["rows"]))]
        )
        for name, title in (("attention", "before attention"), ("mlp", "before MLP"), ("output", "output")):
            axes = all_axes[name]
            rows, labels = ([model[name]], [""]) if name == "output" else (model[name], model["rows"])
            matrix = _matrix(model["title"], rows, labels, model["columns"])
            image = axes.imshow(matrix, cmap=COLOUR_MAP, norm=norm, aspect="auto", interpolation="nearest")
            axes.patch.set(hatch="////", edgecolor="0.85", facecolor="white")  # sources that are not there yet
            axes.set_title(title, fontsize=10)
            across = -(-len(model["columns"]) // (40 if name == "output" else 18))
            axes.set_xticks(range(0, len(model["columns"]), across), model["columns"][::across], fontsize=8)
            down = -(-len(labels) * 9 // int(72 * height))
            axes.set_yticks(range(0, len(labels), down), labels[::down], fontsize=8)
            axes.spines[:].set_visible(False)
            if len(model["columns"]) <= 18 and height / len(labels) >= 0.16:
                _write_weights(axes, rows)
        all_axes["attention"].set_ylabel("decoder layer")
        all_axes["output"].tick_params(axis="y", length=0)
        all_axes["output"].set_xlabel("source")
        bar = part.colorbar(image, ax=list(all_axes.values()), label="mean depth weight", fraction=0.03, pad=0.01)
        bar.set_ticks([0, 0.05, 0.2, 0.5, 1])
        part.suptitle("\n".join(textwrap.wrap(model["title"], 120)), fontsize=11, parse_math=False)
    _save(figure, path)


def source_effects(path: str | PathLike, effects: Mapping):
    """Draws by how much the loss changes without a source, before attention, before MLP and before the output, and with
    a random source of every token left out beside that. Colours are linear, with white for no change.

    Args:
        path: PNG to write.
        effects: `title`; `columns`, labels of the sources; `rows`, labels of the decoder layers; `attention`, `mlp` and
            `output`, changes in nats per token by row, `None` for the only source; `attention_control`, `mlp_control`
            and `output_control`, one change per row, `None` likewise.
    """
    columns, rows = [*effects["columns"], "", "random"], effects["rows"]
    height = max(2.6, min(9.0, 0.24 * len(rows)))
    figure = Figure(figsize=(13, 2.4 + height), layout="constrained")
    all_axes = figure.subplot_mosaic(
        [["attention", "mlp"], ["output", "output"]], height_ratios=[height, max(0.3, height / len(rows))]
    )
    matrices = {}
    for name in all_axes:
        given = [effects[name]] if name == "output" else effects[name]
        controls = [effects["output_control"]] if name == "output" else effects[f"{name}_control"]
        padded = [
            [*row, *[None] * (len(columns) - 1 - len(row)), control]
            for row, control in zip(given, controls, strict=True)
        ]
        matrices[name] = np.ma.masked_invalid(np.array(padded, dtype=float))
    largest = max(float(np.abs(matrix).max() or 0) for matrix in matrices.values()) or 1.0
    for name, title in (("attention", "before attention"), ("mlp", "before MLP"), ("output", "output")):
        axes, matrix = all_axes[name], matrices[name]
        norm = CenteredNorm(0, largest)
        image = axes.imshow(matrix, cmap="PuOr_r", norm=norm, aspect="auto", interpolation="nearest")
        axes.patch.set(hatch="////", edgecolor="0.85", facecolor="white")
        axes.set_title(title, fontsize=10)
        across = -(-len(columns) // (40 if name == "output" else 18))
        shown = sorted({*range(0, len(columns) - 2, across), len(columns) - 1})
        axes.set_xticks(shown, [columns[place] for place in shown], fontsize=8)
        labels = [""] if name == "output" else rows
        down = -(-len(labels) * 9 // int(72 * height))
        axes.set_yticks(range(0, len(labels), down), labels[::down], fontsize=8)
        axes.spines[:].set_visible(False)
        if len(columns) <= 18 and height / len(rows) >= 0.16:
            for (row, column), change in np.ndenumerate(matrix.filled(np.nan)):
                if not np.isnan(change):
                    colour = "white" if abs(change) > 0.6 * largest else "black"
                    axes.text(column, row, f"{change:+.3f}", ha="center", va="center", fontsize=6.5, color=colour)
    all_axes["attention"].set_ylabel("decoder layer")
    all_axes["output"].tick_params(axis="y", length=0)
    all_axes["output"].set_xlabel("source that is left out")
    figure.colorbar(
        image, ax=list(all_axes.values()), label="change of the loss, nats per token", fraction=0.03, pad=0.01
    )
    figure.suptitle("\n".join(textwrap.wrap(effects["title"], 120)), fontsize=11, parse_math=False)
    _save(figure, path)


def _write_weights(axes, rows: Sequence[Sequence[float]]):
    for row, weights in enumerate(rows):
        for column, weight in enumerate(weights):
            colour = "black" if weight > 0.25 else "white"  # half of the colours, by the square root
            axes.text(column, row, f"{weight:.2f}", ha="center", va="center", fontsize=6.5, color=colour)


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
    """Draws differences with their intervals, a row each from the top, and published differences beside them.

    Args:
        path: PNG to write.
        labels: of the rows.
        differences: in points.
        intervals: 95 % intervals in points.
        published: differences published for the rows, or None; drawn without an interval.
        notes: a short text per row, printed at the right under `note_title`, all in letters of one width.
        title: of the figure.
        warning: printed across the top where the numbers must not be taken for more than they are.

    Raises:
        ValueError: the sequences differ in length or are empty.
    """
    lengths = {len(labels), len(differences), len(intervals), len(published), len(notes)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"a forest plot needs as many of everything as there are rows, got {sorted(lengths)}")
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
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("difference (points); right of zero: the second model is better")
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    for place, note in zip(places, notes, strict=True):
        axes.annotate(
            note, (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=8, family="monospace"
        )
    style = {"va": "bottom", "fontsize": 8, "color": "0.35", "family": "monospace"}
    axes.annotate(note_title, (1.02, 1.01), xycoords="axes fraction", **style)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    lines = [line for text in (title, warning) for line in textwrap.wrap(text, 95)]
    # A folder's name may hold a dollar sign, which would start a formula.
    figure.suptitle("\n".join(lines), fontsize=10, color=COLOURS[0], parse_math=False)
    _save(figure, path)


def overhead(path: str | PathLike, panels: Sequence[Mapping], title: str):
    """Draws overheads over plain residuals, a row of two panels each: against depth, and against the blocks.

    Args:
        path: PNG to write.
        panels: each with `title`; `depth` and `blocks`: per model `x`, `median`, `q1`, `q3`, overheads in per cent;
            `depth_note` and `blocks_note`: what is held in each of the two.
        title: of the figure.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not panels:
        raise ValueError("an overhead plot needs at least one panel")
    figure = Figure(figsize=(12, 1.2 + 3.1 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), 2, squeeze=False)
    names = list(dict.fromkeys(name for panel in panels for kind in ("depth", "blocks") for name in panel[kind]))
    handles = {}
    for axes_of_row, panel in zip(rows, panels, strict=True):
        for axes, kind, label in zip(axes_of_row, ("depth", "blocks"), ("decoder layers", "blocks"), strict=True):
            axes.axhline(0, color="0.4", linewidth=1)
            for name, curve in panel[kind].items():
                index, median = names.index(name), np.asarray(curve["median"])
                reach = np.abs(np.asarray([curve["q1"], curve["q3"]]) - median)
                handles[name] = axes.errorbar(
                    curve["x"],
                    median,
                    yerr=reach,
                    color=COLOURS[index % len(COLOURS)],
                    # Shifted where the colours start again, so that no two lines look the same.
                    linestyle=DASHES[(index + index // len(COLOURS)) % len(DASHES)],
                    marker=MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],
                    markersize=5,
                    capsize=3,
                )
            values = sorted({value for curve in panel[kind].values() for value in curve["x"]})
            axes.set_xticks(values, [str(value) for value in values])
            axes.set_xlabel(label)
            axes.set_title(f"{panel['title']}: {panel[f'{kind}_note']}", fontsize=9)
            axes.grid(color="0.9")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        axes_of_row[0].set_ylabel("overhead (%)")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        f"Time over plain residuals: median and quartiles of the ratios within each round\n{title}",
        fontsize=10,
        parse_math=False,
    )
    _save(figure, path)


def training_dynamics(path: str | PathLike, runs: Sequence[Mapping]):
    """Draws several runs side by side: validation loss over steps, output magnitude and gradient norm over depth.

    Args:
        path: PNG to write, 2100 x 750 pixels, taller with many runs.
        runs: each with `name`; `step`, of its measurement; `output_rms` and `gradient_norm`, a value or None per
            decoder layer; and `validation` with `steps` and `loss`, which may be empty.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not runs:
        raise ValueError("a figure of training dynamics needs at least one run")
    columns = min(len(runs), 3)
    figure = Figure(figsize=(14, 4.8 + 0.2 * -(-len(runs) // columns)), layout="constrained")
    panels = figure.subplots(1, 3)
    handles = []
    for index, run in enumerate(runs):
        style = {
            "color": COLOURS[index % len(COLOURS)],
            # Shifted where the colours start again, so that no two lines look the same.
            "linestyle": DASHES[(index + index // len(COLOURS)) % len(DASHES)],
            "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],
            "markersize": 4,
        }
        handles += panels[0].plot(run["validation"]["steps"], run["validation"]["loss"], **style)
        for axes, name in zip(panels[1:], ("output_rms", "gradient_norm"), strict=True):
            values = np.asarray(run[name], dtype=float)  # None becomes a gap
            axes.plot(np.arange(len(values)), values, **style)
    if not any(run["validation"]["steps"] for run in runs):
        panels[0].annotate(
            "no run was evaluated", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color="0.35"
        )
        panels[0].set(xticks=[], yticks=[])
    for axes, title, across, up in zip(
        panels,
        ("Validation loss", "Output magnitude over depth", "Gradient norm over depth"),
        ("optimiser step", "decoder layer", "decoder layer"),
        ("loss (nats per token)", "RMS of the layer's output", "norm of the loss's gradient by that output"),
        strict=True,
    ):
        axes.set_title(title)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[1:]:
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
    # matplotlib 3.9 leaves out labels that start with an underscore; a dollar sign would start a formula.
    labels = [f" {run['name']}, measured at step {run['step']}" for run in runs]
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    _save(figure, path)


def _matrix(title: str, rows, row_labels: Sequence[str], column_labels: Sequence[str]) -> np.ma.MaskedArray:
    if len(rows) != len(row_labels) or max(map(len, rows)) > len(column_labels):
        raise ValueError(
            f"{title}: {len(rows)} rows of up to {max(map(len, rows))} weights do not fit "
            f"{len(row_labels)} row labels and {len(column_labels)} column labels"
        )
    matrix = np.full((len(rows), len(column_labels)), np.nan)
    for row, weights in enumerate(rows):
        matrix[row, : len(weights)] = weights
    return np.ma.masked_invalid(matrix)


def _outline(row: int, column: int) -> Rectangle:
    return Rectangle((column - 0.46, row - 0.43), 0.92, 0.86, fill=False, edgecolor="#D55E00", linewidth=1.3)


def _save(figure: Figure, path: str | PathLike):
    # A canvas of its own: pyplot's would keep every figure of the process alive.
    drawn = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(drawn, dpi=DPI, format="png")
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(drawn.getvalue())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
