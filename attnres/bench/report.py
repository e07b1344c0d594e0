"""Result files: bench.json, the tables of bench.md, and overhead.png."""

import json
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from .. import plots
from ..folders import write_text
from .arms import PLAIN
from .workloads import WORKLOADS

# Keys that distinguish one measurement from another, and their labels, in the order of the tables.
PARAMETERS = {
    "decoder_layers": "layers",
    "blocks": "blocks",
    "layers_per_block": "layers per block",
    "hidden_size": "D",
    "dtype": "dtype",
    "batch": "batch",
    "tokens": "tokens",
    "context": "context",
    "new_tokens": "new tokens",
    "sublayers": "sublayers",
    "sublayers_per_block": "sublayers per block",
}
MEMORY = {
    "saved_bytes": "saved for backward",
    "peak_bytes_train": "peak of a training step",
    "peak_bytes_prefill": "peak of a prefill",
}


def write(result: dict, out: str | os.PathLike) -> list[Path]:
    """Writes the result of `runner.run` and returns the paths. The figure is left out if no model was timed."""
    written = [Path(out) / "bench.json", Path(out) / "bench.md"]
    write_text(written[0], json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_text(written[1], as_markdown(result))
    panels = overhead_panels(result["timings"])
    if panels:
        written.append(Path(out) / "overhead.png")
        machine = result["machine"]
        plots.overhead(written[-1], panels, f"{machine.get('gpu', machine['cpu'])}, threads: {machine['threads']}")
    return written


def as_markdown(result: dict) -> str:
    """Returns the tables as Markdown: ratios first, then times, then memory."""
    machine, settings, timings = result["machine"], result["settings"], result["timings"]
    variants = [name for name in result["arms"] if name not in result["left_out"]]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        "# attnres bench",
        "",
        f"{machine['gpu'] + ', ' if 'gpu' in machine else ''}{machine['cpu']}, {machine['usable_cpus']} of "
        f"{machine['logical_cpus']} logical CPUs, threads: {machine['threads']}; load average "
        f"{machine['load_average']} at the start, {machine['load_average_at_end']} at the end; {machine['system']}.",
        f"{versions}.",
        f"{settings['rounds']} rounds after {settings['warmup']} for warm-up; interleaved, in rotating order; "
        f"random weights, shared by all variants, and random pseudo-queries (seed {settings['seed']}).",
        "",
        *(f"- `{name}`: {result['arms'][name]}" for name in variants),
        *(f"- `{name}` left out: {reason}" for name, reason in result["left_out"].items()),
    ]
    errors = [error for check in result["check"] for error in check["relative_errors"].values()]
    if errors:
        lines += ["", f"Largest relative error of logits between a variant and its reference: {max(errors):.0e}."]
    others = [name for name in variants if name != PLAIN]
    ratios = "Overhead over plain residuals: median and quartiles of the ratios within each round"
    for title, points, columns, cell in (
        (ratios, timings, others, _ratio),
        ("Time: medians; for decode per step", timings, variants, _duration),
        *((f"Memory: {title}", result["memory"], variants, partial(_bytes, key=key)) for key, title in MEMORY.items()),
    ):
        if points:
            lines += ["", f"## {title}", "", *_table(points, columns, cell)]
    return "\n".join(lines) + "\n"


def overhead_panels(timings: Iterable[dict]) -> list[dict]:
    """Returns the input of `plots.overhead`: per workload the overhead against depth and against the number of blocks.

    The other of the two stays at the first value that was measured.
    """
    kinds = {}
    for timing in timings:
        if timing["workload"] in WORKLOADS:
            names = ("batch", "tokens", "context", "new_tokens", "dtype")
            parameters = ", ".join(_labelled({name: timing[name] for name in names if name in timing}))
            kinds.setdefault(f"{timing['workload']} ({parameters})", []).append(timing)
    panels = []
    for title, points in kinds.items():
        layers = points[0]["decoder_layers"]
        by_depth = list({point["decoder_layers"]: point for point in reversed(points)}.values())
        blocks = sorted({point["blocks"] for point in by_depth})
        panels.append(
            {
                "title": title,
                "depth": _curves(by_depth, "decoder_layers"),
                "blocks": _curves([point for point in points if point["decoder_layers"] == layers], "blocks"),
                "depth_note": f"{' to '.join(map(str, dict.fromkeys((blocks[0], blocks[-1]))))} blocks",
                "blocks_note": f"{layers} decoder layers",
            }
        )
    return panels


def _curves(points: list[dict], key: str) -> dict[str, dict[str, list[float]]]:
    curves = {}
    for point in sorted(points, key=lambda point: point[key]):
        for name, measured in point["arms"].items():
            if name != PLAIN:
                curve = curves.setdefault(name, {"x": [], "median": [], "q1": [], "q3": []})
                curve["x"].append(point[key])
                for statistic, ratio in measured["ratio"].items():
                    curve[statistic].append(100 * (ratio - 1))
    return curves


def _table(points: list[dict], columns: list[str], cell: Callable[[dict, str], str]) -> list[str]:
    """Formats a row per point, with the parameters that all points share above the table."""
    values = {name: {point.get(name) for point in points} for name in PARAMETERS}
    common = {name: points[0][name] for name, each in values.items() if len(each) == 1 and each != {None}}
    lines = [f"All: {', '.join(_labelled(common))}.", "", ["", *columns], ["---"] * (1 + len(columns))]
    for point in points:
        own = {name: point[name] for name in PARAMETERS if name in point and name not in common}
        label = ", ".join([*([point["workload"]] if "workload" in point else []), *_labelled(own)])
        lines.append([label, *(cell(point, name) for name in columns)])
    return [line if isinstance(line, str) else f"| {' | '.join(line)} |" for line in lines]


def _labelled(parameters: dict) -> list[str]:
    return [value if name == "dtype" else f"{PARAMETERS[name]} {value}" for name, value in parameters.items()]


def _ratio(point: dict, name: str) -> str:
    ratio = point["arms"][name]["ratio"]
    low, median, high = (100 * (ratio[statistic] - 1) for statistic in ("q1", "median", "q3"))
    return f"{median:+.1f} % ({low:+.1f} to {high:+.1f})"


def _duration(point: dict, name: str) -> str:
    seconds = point["arms"][name]["seconds"]["median"]
    factor, unit = next((each for each in ((1, "s"), (1e-3, "ms")) if seconds >= each[0]), (1e-6, "us"))
    return f"{seconds / factor:.3g} {unit}"


def _bytes(point: dict, name: str, key: str) -> str:
    value, plain = point["arms"][name][key], point["arms"][PLAIN][key]
    shown = f"{value / 2**20:.1f} MiB"
    return shown if name == PLAIN or not plain else f"{shown} ({100 * (value / plain - 1):+.1f} %)"
