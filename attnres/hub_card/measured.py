"""Selects the evaluations that belong on a card: complete, undamaged, and measured on these very weights."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from ..eval import records
from ..eval.suites import ROWS

# The parts of a checkpoint's identity. The same weights with another block size are another model.
PARTS = {
    "weights": "other weights",
    "config": "another configuration or code (.json and .py files)",
    "tokenizer": "another tokenizer",
}


def read_measured(
    folders: Sequence[str | PathLike], model: Path, identity: dict[str, str]
) -> tuple[dict[str, dict], dict[str, dict]]:
    """Reads results of `attnres eval` on the checkpoint with an identity from `eval.identity.checkpoint_identity`.

    Returns:
        Benchmark results, and results of the sample suite, which is no benchmark; by row, in the paper's order.
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
    smoke = {name: result for name, result in ordered.items() if result["suite"] == "sample"}
    return {name: result for name, result in ordered.items() if name not in smoke}, smoke


def _check(where: Path, result: dict, model: Path, identity: dict[str, str]):
    # The limit is recorded in two places; editing only one of them does not hide it.
    if result["limit"] is not None or result["settings"].get("limit") is not None:
        raise ValueError(
            f"{where}: was run with --limit, so it is no result of the benchmark; run `attnres eval` without it."
        )
    measured_on = result["fingerprint"].get("model")
    if not isinstance(measured_on, dict):
        raise ValueError(f"{where}: does not say which weights it was measured on; run `attnres eval` again.")
    for part, what in PARTS.items():
        if measured_on.get(part) != identity[part]:
            raise ValueError(
                f"{where}: was measured with {what} than {model} has now (SHA-256 {str(measured_on.get(part))[:12]}, "
                f"not {identity[part][:12]}); run `attnres eval {model}`."
            )
