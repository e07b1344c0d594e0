"""Reads the training dynamics of finished and running jobs from the state files that Trainer saves."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

from ..folders import check_writable, write_text
from ..messages import one_line
from .dynamics_names import PER_LAYER, PER_MIXTURE, parse
from .text import printable

STATE = "trainer_state.json"
CHECKPOINT = "checkpoint-"
VALIDATION_LOSS = "eval_loss"


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


def read_runs(folders: Sequence[str | PathLike], step: int | None = None) -> list[Dynamics]:
    """Reads the last measurement, or the last one up to `step`, from the newest state in each Trainer's output folder.

    Raises:
        ValueError: a folder has no state, a damaged one, or one without dynamics.
        OSError: a file cannot be read.
    """
    paths = [Path(folder) for folder in folders]
    return [_read_run(path, name, step) for path, name in zip(paths, _names(paths), strict=True)]


def write(runs: Sequence[Dynamics], out: str | PathLike) -> list[Path]:
    """Writes dynamics.json and dynamics.png and returns their paths.

    Raises:
        OSError: the folder cannot be written.
    """
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
    path, history = _newest_state(folder)
    measured: dict[int, dict[tuple[str, int | str], float | None]] = {}
    validation: dict[int, float | None] = {}
    for index, entry in enumerate(history):
        where = f"{path}: log_history[{index}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{where} must be an object, got {_shown(entry)}; the file is damaged.")
        values = {place: _number(entry[key], f"{where}, {key}") for key in entry if (place := parse(key)) is not None}
        if values:
            measured.setdefault(_step(entry.get("step"), where), {}).update(values)
        if VALIDATION_LOSS in entry:
            loss = _number(entry[VALIDATION_LOSS], f"{where}, {VALIDATION_LOSS}")
            validation[_step(entry.get("step"), where)] = loss
    measured = {at: values for at, values in measured.items() if any(measure in PER_LAYER for measure, _ in values)}
    if not measured:
        raise ValueError(
            f"{path}: no depth dynamics were logged; train with Trainer(..., callbacks=[DepthDynamicsCallback()])."
        )
    candidates = [at for at in measured if step is None or at <= step]
    if not candidates:
        raise ValueError(
            f"{path}: nothing was measured up to step {step}; the first measurement is at step {min(measured)}."
        )
    chosen = measured[max(candidates)]
    layers = 1 + max(place for measure, place in chosen if measure in PER_LAYER)
    losses = sorted((at, loss) for at, loss in validation.items() if loss is not None)
    return Dynamics(
        name=name,
        state=printable(str(path)),
        step=max(candidates),
        **{measure: [chosen.get((measure, layer)) for layer in range(layers)] for measure in PER_LAYER},
        **{each: {place: value for (kind, place), value in chosen.items() if kind == each} for each in PER_MIXTURE},
        validation={"steps": [at for at, _ in losses], "loss": [loss for _, loss in losses]},
    )


def _newest_state(folder: Path) -> tuple[Path, list]:
    """Returns path and log of the state with the most steps: the folder's own, or that of its last checkpoint."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder; RUN is the output_dir of a Trainer.")
    checkpoints = {
        int(number): path
        for path in folder.glob(f"{CHECKPOINT}*/{STATE}")
        if (number := path.parent.name.removeprefix(CHECKPOINT)).isdecimal()
    }
    candidates = [checkpoints[max(checkpoints)]] if checkpoints else []
    if (folder / STATE).is_file():
        candidates.append(folder / STATE)
    if not candidates:
        raise ValueError(
            f"{folder}: no {STATE} in it and no {CHECKPOINT}N/{STATE}; let the Trainer save a checkpoint, "
            "or call trainer.save_state()."
        )
    states = [(path, _load(path)) for path in candidates]
    path, state = max(states, key=lambda each: _step(each[1].get("global_step"), f"{each[0]}: global_step"))
    return path, state["log_history"]


def _load(path: Path) -> dict:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a state that Trainer saved ({one_line(error)}).") from None
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise ValueError(f"{path}: not a state that Trainer saved, because it has no list log_history.")
    return state


def _step(value, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise ValueError(f"{where}: the step must be a whole number from 0, got {_shown(value)}; the file is damaged.")
    return value


def _number(value, where: str) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: must be a number, got {_shown(value)}; the file is damaged.")
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _shown(value) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
