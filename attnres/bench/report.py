"""Result files: bench.json, the tables of bench.md and overhead.png."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from .. import plots
from .arms import PLAIN
from .workloads import WORKLOADS

# What tells one timing from another, in the order in which the tables show it.
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
UNITS = ((1, "s"), (1e-3, "ms"), (1e-6, "us"))


def write(result: dict, out: str | os.PathLike) -> list[Path]:
    """Writes the three files, each whole or not at all, and returns their paths; no figure without timings of models.

    Args:
        result: what `runner.run` returned.
        out: folder to write into; made where it is not there.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "bench.json", out / "bench.md"]
    _write_text(written[0], json.dumps(result, indent=1, allow_nan=False) + "\n")
    _write_text(written[1], as_markdown(result))
    panels = overhead_panels(result["timings"])
    if panels:
        written.append(out / "overhead.png")
        machine = result["machine"]
        plots.overhead(written[-1], panels, f"{machine.get('gpu', machine['cpu'])}, threads: {machine['threads']}")
    return written


def as_markdown(result: dict) -> str:
    """Ratios first, then times, then memory."""
    machine, settings = result["machine"], result["settings"]
    arms = [name for name in result["arms"] if name not in result["left_out"]]
    others = [name for name in arms if name != PLAIN]
    lines = ["# attnres bench", "", *_machine_lines(machine, settings), ""]
    lines += [f"- `{name}`: {result['arms'][name]}" for name in arms]
    lines += [f"- `{name}` left out: {reason}" for name, reason in result["left_out"].items()]
    errors = [error for check in result["check"] for error in check["relative_errors"].values()]
    if errors:
        lines += [
            "",
            f"Every variant computes what its reference does: largest relative error of logits {max(errors):.0e}.",
        ]
    if result["timings"]:
        lines += ["", "## Overhead over plain residuals: median and quartiles of the ratios within each round", ""]
        lines += _timing_table(result["timings"], others, _ratio)
        lines += ["", "## Time: medians; of decode per step", ""]
        lines += _timing_table(result["timings"], arms, lambda arm: _duration(arm["seconds"]["median"]))
    for key, title in MEMORY.items():
        if result["memory"]:
            lines += ["", f"## Memory: {title}", ""]
            lines += _memory_table(result["memory"], arms, key)
    return "\n".join(lines) + "\n"


def overhead_panels(timings: Iterable[dict]) -> list[dict]:
    """What `plots.overhead` draws: per kind of workload the overhead against depth and against the number of blocks.

    The other axis stays at the first value that was measured.
    """
    kinds = {}
    for timing in timings:
        if timing["workload"] in WORKLOADS:
            parameters = {
                name: timing[name] for name in ("batch", "tokens", "context", "new_tokens", "dtype") if name in timing
            }
            label = f"{timing['workload']} ({', '.join(_labelled(parameters))})"
            kinds.setdefault(label, []).append(timing)
    return [
        {
            "title": label,
            "depth": _curves(_first_of_each(points, "decoder_layers"), "decoder_layers"),
            "blocks": _curves([each for each in points if each["decoder_layers"] == first_depth], "blocks"),
            "depth_note": _block_note(_first_of_each(points, "decoder_layers")),
            "blocks_note": f"{first_depth} decoder layers",
        }
        for label, points in kinds.items()
        for first_depth in [points[0]["decoder_layers"]]
    ]


def _first_of_each(points: list[dict], key: str) -> list[dict]:
    return list({point[key]: point for point in reversed(points)}.values())[::-1]


def _block_note(points: list[dict]) -> str:
    blocks = sorted({point["blocks"] for point in points})
    return f"{blocks[0]} blocks" if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]} blocks"


def _curves(points: list[dict], key: str) -> dict[str, dict[str, list[float]]]:
    curves = {}
    for point in sorted(points, key=lambda point: point[key]):
        for name, arm in point["arms"].items():
            if name != PLAIN:
                curve = curves.setdefault(name, {"x": [], "median": [], "q1": [], "q3": []})
                curve["x"].append(point[key])
                for statistic, ratio in arm["ratio"].items():
                    curve[statistic].append(100 * (ratio - 1))
    return curves


def _machine_lines(machine: dict, settings: dict) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    load = f"load average {machine['load_average']} at the start, {machine['load_average_at_end']} at the end"
    device = f"{machine['gpu']}, " if "gpu" in machine else ""
    return [
        f"{device}{machine['cpu']}, {machine['usable_cpus']} of {machine['logical_cpus']} logical CPUs, "
        f"threads: {machine['threads']}; {load}; {machine['system']}.",
        f"{versions}.",
        f"{settings['rounds']} rounds after {settings['warmup']} for warm-up; interleaved, in rotating order; "
        f"random weights, shared by all variants, and random pseudo-queries (seed {settings['seed']}).",
    ]


def _timing_table(timings: list[dict], arms: list[str], cell) -> list[str]:
    return _table(timings, arms, lambda timing, arm: cell(timing["arms"][arm]))


def _memory_table(points: list[dict], arms: list[str], key: str) -> list[str]:
    return _table(points, arms, lambda point, arm: _bytes_cell(point["arms"], arm, key))


def _table(points: list[dict], arms: list[str], cell) -> list[str]:
    """A row per point, named by what tells it from the others; what is the same for all stands above."""
    values = {name: {point.get(name) for point in points} for name in PARAMETERS}
    common = {name: each.copy().pop() for name, each in values.items() if len(each) == 1 and each != {None}}
    rows = [
        [
            ", ".join(
                [
                    *([point["workload"]] if "workload" in point else []),
                    *_labelled({name: point[name] for name in PARAMETERS if name in point and name not in common}),
                ]
            ),
            *(cell(point, arm) for arm in arms),
        ]
        for point in points
    ]
    head = ["", *arms]
    return [f"All: {', '.join(_labelled(common))}.", "", _row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _labelled(parameters: dict) -> list[str]:
    return [value if name == "dtype" else f"{PARAMETERS[name]} {value}" for name, value in parameters.items()]


def _ratio(arm: dict) -> str:
    low, median, high = (100 * (arm["ratio"][name] - 1) for name in ("q1", "median", "q3"))
    return f"{median:+.1f} % ({low:+.1f} to {high:+.1f})"


def _duration(seconds: float) -> str:
    factor, unit = next(((factor, unit) for factor, unit in UNITS if seconds >= factor), UNITS[-1])
    return f"{seconds / factor:.3g} {unit}"


def _bytes_cell(arms: dict, name: str, key: str) -> str:
    value, plain = arms[name][key], arms[PLAIN][key]
    shown = f"{value / 2**20:.1f} MiB"
    return shown if name == PLAIN or not plain else f"{shown} ({100 * (value / plain - 1):+.1f} %)"


def _write_text(path: Path, text: str):
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
