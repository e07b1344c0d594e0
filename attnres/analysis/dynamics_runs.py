"""Training dynamics of finished and running jobs, read from the state files that Trainer saves."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

from ..folders import check_writable
from .dynamics_names import PER_LAYER, PER_MIXTURE, parse
from .text import printable

STATE = "trainer_state.json"
CHECKPOINT = "checkpoint-"
VALIDATION_LOSS = "eval_loss"
JSON = "dynamics.json"
FIGURE = "dynamics.png"


@dataclass(frozen=True)
class Dynamics:
    """What one run logged. None where a value is missing or not finite.

    `step` is that of the measurement: `output_rms` and `gradient_norm` have a value per decoder layer, `query_norm`
    and `entropy` one per place, such as `layer_00_attention`. `validation` has `steps` and `loss`.
    """

    name: str
    state: str
    step: int
    output_rms: list[float | None]
    gradient_norm: list[float | None]
    query_norm: dict[str, float | None]
    entropy: dict[str, float | None]
    validation: dict[str, list]


def read_runs(folders: Sequence[str | PathLike], step: int | None = None) -> list[Dynamics]:
    """Of each output folder of a Trainer the newest state's measurement: the last one, or the last up to `step`.

    Raises:
        ValueError: a folder holds no state, a damaged one, or one without dynamics.
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

    out = Path(out)
    check_writable(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_text(out / JSON, json.dumps([asdict(run) for run in runs], indent=1, allow_nan=False) + "\n")
        training_dynamics(out / FIGURE, [asdict(run) for run in runs])
    except OSError as error:
        raise OSError(f"{out}: cannot write the dynamics there, {error.strerror or error}") from None
    return [out / JSON, out / FIGURE]


def as_markdown(runs: Sequence[Dynamics]) -> str:
    """A row per run: what its first and last decoder layer return and receive."""
    rows = [
        "| run | measured at step | validation loss (step) | output RMS, first to last layer | largest "
        "| gradient norm, first to last layer |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for run in runs:
        loss = "none"
        if run.validation["loss"]:
            loss = f"{_shown(run.validation['loss'][-1])} ({run.validation['steps'][-1]})"
        largest = max((value for value in run.output_rms if value is not None), default=None)
        rows.append(
            f"| {run.name} | {run.step} | {loss} | {_ends(run.output_rms)} | {_shown(largest)} "
            f"| {_ends(run.gradient_norm)} |"
        )
    return "\n".join(rows) + "\n"


def _names(paths: Sequence[Path]) -> list[str]:
    """Folder names; of folders with the same name as much of the path as tells them apart."""
    parts = [path.resolve().parts for path in paths]
    return [
        printable(
            next(("/".join(own[-count:]) for count in range(1, len(own)) if _alone(own, parts, count)), str(path))
        )
        for own, path in zip(parts, paths, strict=True)
    ]


def _alone(own: tuple[str, ...], parts: Sequence[tuple[str, ...]], count: int) -> bool:
    return sum(other[-count:] == own[-count:] for other in parts) == 1


def _read_run(folder: Path, name: str, step: int | None) -> Dynamics:
    path, history = _newest_state(folder)
    measured: dict[int, dict[tuple[str, int | str], float | None]] = {}
    validation: dict[int, float | None] = {}
    for index, entry in enumerate(history):
        where = f"{path}: log_history[{index}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{where} must be an object, got {_kind(entry)}; the file is damaged")
        values = {place: entry[key] for key in entry if (place := parse(key)) is not None}
        if not values and VALIDATION_LOSS not in entry:
            continue
        at = _step(entry.get("step"), where)
        measured.setdefault(at, {}).update(
            {place: _number(value, f"{where}, {'/'.join(map(str, place))}") for place, value in values.items()}
        )
        if VALIDATION_LOSS in entry:
            validation[at] = _number(entry[VALIDATION_LOSS], f"{where}, {VALIDATION_LOSS}")
    measured = {at: values for at, values in measured.items() if any(place[0] in PER_LAYER for place in values)}
    if not measured:
        raise ValueError(
            f"{path}: no depth dynamics were logged; train with Trainer(..., callbacks=[DepthDynamicsCallback()])"
        )
    candidates = [at for at in measured if step is None or at <= step]
    if not candidates:
        raise ValueError(f"{path}: nothing was measured up to step {step}; the first measurement is at {min(measured)}")
    chosen = max(candidates)
    losses = sorted((at, loss) for at, loss in validation.items() if loss is not None)
    return Dynamics(
        name=name,
        state=printable(str(path)),
        step=chosen,
        **{measure: _per_layer(measured[chosen], measure) for measure in PER_LAYER},
        **{measure: _per_mixture(measured[chosen], measure) for measure in PER_MIXTURE},
        validation={"steps": [at for at, _ in losses], "loss": [loss for _, loss in losses]},
    )


def _newest_state(folder: Path) -> tuple[Path, list]:
    """The state with the most steps: the one in the folder itself, or that of its last checkpoint."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder; RUN is the output_dir of a Trainer")
    checkpoints = {
        int(number): each / STATE
        for each in folder.glob(f"{CHECKPOINT}*")
        if (number := each.name.removeprefix(CHECKPOINT)).isdecimal() and (each / STATE).is_file()
    }
    candidates = [checkpoints[max(checkpoints)]] if checkpoints else []
    if (folder / STATE).is_file():
        candidates.append(folder / STATE)
    if not candidates:
        raise ValueError(
            f"{folder}: no {STATE} in it and no {CHECKPOINT}N/{STATE}; let the Trainer save a checkpoint, "
            "or call trainer.save_state()"
        )
    states = [(path, _load(path)) for path in candidates]
    path, state = max(states, key=lambda each: _step(each[1].get("global_step"), f"{each[0]}: global_step"))
    return path, state["log_history"]


def _load(path: Path) -> dict:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a state that Trainer saved, {str(error)[:200]}") from None
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise ValueError(f"{path}: not a state that Trainer saved, it has no list log_history")
    return state


def _step(value, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise ValueError(f"{where}: the step must be a whole number from 0, got {_kind(value)}; the file is damaged")
    return value


def _number(value, where: str) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: must be a number, got {_kind(value)}; the file is damaged")
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _kind(value) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _per_layer(values: dict, measure: str) -> list[float | None]:
    count = 1 + max(place for kind, place in values if kind in PER_LAYER)
    return [values.get((measure, layer)) for layer in range(count)]


def _per_mixture(values: dict, measure: str) -> dict[str, float | None]:
    return {place: value for (kind, place), value in values.items() if kind == measure}


def _ends(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{_shown(known[0])} to {_shown(known[-1])}" if known else "none"


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _write_text(path: Path, text: str):
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
