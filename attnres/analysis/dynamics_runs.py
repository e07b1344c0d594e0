"""Reads the training dynamics of finished and running jobs from the state files that Trainer saves.

The log keys are here too, because the callback that writes them imports Trainer, which takes seconds.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

from ..folders import check_writable, write_text
from ..messages import one_line
from .text import printable

OUTPUT_RMS = "output_rms"
GRADIENT_NORM = "gradient_norm"
QUERY_NORM = "query_norm"
ENTROPY = "entropy"
PER_LAYER = (OUTPUT_RMS, GRADIENT_NORM)
PER_MIXTURE = (QUERY_NORM, ENTROPY)

STATE = "trainer_state.json"
VALIDATION_LOSS = "eval_loss"

_KEY = re.compile(rf"depth/(?:({'|'.join(PER_LAYER)})/layer_(\d+)|({'|'.join(PER_MIXTURE)})/(\w+))")


@dataclass(frozen=True)
class Dynamics:
    """What one run logged, with None for values that are missing or not finite."""

    name: str
    state: str  # path of the state file
    step: int  # of the measurement
    output_rms: list[float | None]  # per decoder layer
    gradient_norm: list[float | None]  # per decoder layer
    query_norm: dict[str, float | None]  # by mixture, such as "layer_00_attention"
    entropy: dict[str, float | None]  # by mixture
    validation: dict[str, list]  # "steps" and "loss"


def layer_name(measure: str, layer: int, layers: int) -> str:
    """Returns a key such as `depth/output_rms/layer_07`, zero-padded so that the keys of all `layers` sort by depth."""
    return f"depth/{measure}/layer_{layer:0{max(2, len(str(layers - 1)))}d}"


def mixture_names(measure: str, layers: int) -> list[str]:
    """Returns the keys of all 2 L + 1 mixtures in the order attention, MLP, attention, MLP, ..., output."""
    names = [layer_name(measure, layer, layers) for layer in range(layers)]
    return [*(f"{name}_{kind}" for name in names for kind in ("attention", "mlp")), f"depth/{measure}/output"]


def parse(name: str) -> tuple[str, int | str] | None:
    """Splits a key into its measure and its decoder layer or mixture; returns None for any other key."""
    match = _KEY.fullmatch(name)
    if match is None:
        return None
    return (match[1], int(match[2])) if match[1] else (match[3], match[4])


def read_runs(folders: Sequence[str | PathLike], step: int | None = None) -> list[Dynamics]:
    """Reads the last measurement, or the last up to `step`, from the newest state in each Trainer's output folder."""
    paths = [Path(folder) for folder in folders]
    return [_read_run(path, name, step) for path, name in zip(paths, _names(paths), strict=True)]


def write(runs: Sequence[Dynamics], out: str | PathLike) -> list[Path]:
    """Writes dynamics.json and dynamics.png and returns their paths."""
    from ..plots import training_dynamics

    numbers, figure = Path(out) / "dynamics.json", Path(out) / "dynamics.png"
    check_writable(out)
    write_text(numbers, json.dumps([asdict(run) for run in runs], indent=1, allow_nan=False) + "\n")
    training_dynamics(figure, [asdict(run) for run in runs])
    return [numbers, figure]


def as_markdown(runs: Sequence[Dynamics]) -> str:
    """Returns a table with a row per run: its validation loss, and the values of its first and last decoder layer."""
    rows = [
        "| run | measured at step | validation loss (step) | output RMS, first to last layer | largest "
        "| gradient norm, first to last layer |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for run in runs:
        losses, steps = run.validation["loss"], run.validation["steps"]
        loss = f"{losses[-1]:.4g} ({steps[-1]})" if losses else "none"
        outputs = [value for value in run.output_rms if value is not None]
        gradients = [value for value in run.gradient_norm if value is not None]
        largest = f"{max(outputs):.4g}" if outputs else "none"
        rows.append(f"| {run.name} | {run.step} | {loss} | {_ends(outputs)} | {largest} | {_ends(gradients)} |")
    return "\n".join(rows) + "\n"


def _ends(values: list[float]) -> str:
    return f"{values[0]:.4g} to {values[-1]:.4g}" if values else "none"


def _names(paths: Sequence[Path]) -> list[str]:
    """Returns the folders' names, with as many of their parents as tell all of them apart."""
    parts = [path.resolve().parts for path in paths]
    names: list[str] = []
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return [printable(name) for name in names]


def _read_run(folder: Path, name: str, step: int | None) -> Dynamics:
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder; RUN is the output_dir of a Trainer.")
    states = [path for path in folder.glob(f"checkpoint-*/{STATE}") if path.parent.name[11:].isdecimal()]
    states.sort(key=lambda path: int(path.parent.name[11:]))
    paths = [*folder.glob(STATE), *states[-1:]]  # older ones may be damaged without harm
    if not paths:
        raise ValueError(
            f"{folder}: no {STATE} in it and no checkpoint-N/{STATE}; let the Trainer save a checkpoint, "
            "or call trainer.save_state()."
        )
    (_, measured, validation), path = max(((_load(path), path) for path in paths), key=lambda each: each[0][0])
    if not measured:
        raise ValueError(
            f"{path}: no depth dynamics were logged; train with Trainer(..., callbacks=[DepthDynamicsCallback()])."
        )
    chosen = max((at for at in measured if step is None or at <= step), default=None)
    if chosen is None:
        raise ValueError(
            f"{path}: nothing was measured up to step {step}; the first measurement is at step {min(measured)}."
        )
    values = measured[chosen]
    layers = 1 + max(place for measure, place in values if measure in PER_LAYER)
    losses = {at: loss for at, loss in sorted(validation.items()) if loss is not None}
    return Dynamics(
        name=name,
        state=printable(str(path)),
        step=chosen,
        **{measure: [values.get((measure, layer)) for layer in range(layers)] for measure in PER_LAYER},
        **{each: {place: value for (kind, place), value in values.items() if kind == each} for each in PER_MIXTURE},
        validation={"steps": list(losses), "loss": list(losses.values())},
    )


def _load(path: Path) -> tuple[int, dict[int, dict], dict[int, float | None]]:
    """Returns the step of a state, and by step what was measured over depth and the validation loss."""
    measured: dict[int, dict[tuple[str, int | str], float | None]] = defaultdict(dict)
    validation = {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        for entry in state["log_history"]:
            for key, value in entry.items():
                if (place := parse(key)) is not None:
                    measured[int(entry["step"])][place] = _finite(value)
                elif key == VALIDATION_LOSS:
                    validation[int(entry["step"])] = _finite(value)
        return int(state["global_step"]), measured, validation
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{path}: not a state that Trainer saved, or a damaged one ({reason}).") from None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
