"""Selects the evaluations that belong on a card: measured on these weights, complete and validated."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from ..eval import records
from ..eval.suites import ROWS

# What a checkpoint's identity is made of. The same weights mixed in other blocks are another model.
PARTS = {
    "weights": "other weights",
    "config": "another configuration or code (.json and .py files)",
    "tokenizer": "another tokenizer",
}


@dataclass(frozen=True)
class Measured:
    """Results by row, in the order of the paper's table.

    Attributes:
        rows: of benchmarks.
        smoke: of the sample suite, which is no benchmark.
    """

    rows: dict[str, dict] = field(default_factory=dict)
    smoke: dict[str, dict] = field(default_factory=dict)


def read_measured(folders: Sequence[str | PathLike], model: str, identity: dict[str, str]) -> Measured:
    """Reads what `attnres eval` wrote.

    Args:
        folders: of evaluations, `DIR/<row>/result.json` in each.
        model: the checkpoint's folder, for messages.
        identity: of the checkpoint, as `eval.identity.checkpoint_identity` says.

    Raises:
        ValueError: no results, damaged ones, limited ones, those of another model, or a row twice.
    """
    found: dict[str, tuple[Path, dict]] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder of results.")
        rows = {name: result for name in ROWS if (result := records.read_result(folder / name)) is not None}
        if not rows:
            raise ValueError(f"{folder}: holds no results of `attnres eval` (<row>/result.json).")
        for name, result in rows.items():
            where = folder / name
            records.check_samples(where, result)
            _check(where, result, model, identity)
            if name in found:
                raise ValueError(f"{where}: {found[name][0]} has the row {name} too; name one of the two.")
            found[name] = (where, result)
    ordered = {name: found[name][1] for name in ROWS if name in found}
    return Measured(
        rows={name: result for name, result in ordered.items() if result["suite"] != "sample"},
        smoke={name: result for name, result in ordered.items() if result["suite"] == "sample"},
    )


def _check(where: Path, result: dict, model: str, identity: dict[str, str]):
    # Also in the settings: one of the places alone is changed by accident.
    if result["limit"] is not None or result["settings"].get("limit") is not None:
        raise ValueError(
            f"{where}: was run with --limit, so it is no result of the benchmark; run `attnres eval` without it."
        )
    measured_on = result["fingerprint"].get("model")
    if not isinstance(measured_on, dict) or not isinstance(measured_on.get("weights"), str):
        raise ValueError(f"{where}: does not say which weights it was measured on; run `attnres eval` again.")
    for part, what in PARTS.items():
        if measured_on.get(part) != identity[part]:
            raise ValueError(
                f"{where}: was measured with {what} than {model} has now (SHA-256 {str(measured_on.get(part))[:12]}, "
                f"not {identity[part][:12]}); run `attnres eval {model}`."
            )
