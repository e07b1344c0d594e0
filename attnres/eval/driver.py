"""Runs rows one after the other and writes each as it ends. Finished rows are kept and not measured again."""

import errno
import json
import math
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from . import records
from .identity import versions
from .loading import LoadedTask, load_tasks, task_fingerprint
from .mirror import Mirror, MissingData, serving_metrics
from .processes import ProcessLost, join
from .progress import quiet_lm_eval, request_bar
from .results import write_tables
from .scores import row_scores, task_scores
from .subject import Settings, Subject, describe, follow
from .suites import Row, select_rows

FEWSHOT_SEED = 1234  # lm-eval's
NO_CODE = "runs programs that the model wrote: pass --allow-code-execution"


def evaluate(
    model=None,
    suite: str = "paper",
    *,
    out: str | os.PathLike,
    data_dir: str | os.PathLike | None = None,
    tokenizer=None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | None = None,
    batch_size: int | str = 8,
    max_length: int | None = None,
    limit: int | float | None = None,
    seed: int = FEWSHOT_SEED,
    seeds: int | None = None,
    trust_remote_code: bool = False,
    allow_code_execution: bool = False,
    chat_template: bool = False,
    load_in_4bit: bool = False,
    lm=None,
    progress: bool = True,
) -> dict:
    """Measures the rows of a suite and writes `out/<row>/result.json` and `samples.jsonl` as each ends.

    Of several processes (`accelerate launch`) each calls it: they share every row, the first of them writes.

    Args:
        model: folder, hub id, or a causal LM in memory (then with its tokenizer).
        suite: of SUITES, a row, or several joined by commas.
        data_dir: mirror of the hub's data sets; without it they come from the hub.
        tokenizer: folder or hub id, or a tokenizer; by default the model's own.
        batch_size: a number, or "auto". Scores move with it: compare two models at the same number.
        max_length: longest input in tokens, instead of what the configuration says.
        limit: items per task, or a share below 1, to try things out; results are marked as such.
        seed: of the examples that are drawn.
        seeds: orders of the choices where a row averages over several (GPQA-Diamond), instead of eight.
        allow_code_execution: run model-written programs (HumanEval, MBPP); otherwise these rows are skipped.
        chat_template: wrap prompts in the tokenizer's template, examples as turns of a conversation.
        load_in_4bit: quantise the weights while loading (bitsandbytes, NF4).
        lm: a ready lm_eval LM instead of a model. Results are reused only if it has an `identity`.

    Returns:
        `rows`: results by row; `failed` and `skipped`: reasons by row; `reused`: rows that were finished before;
        `writes`: whether this is the process that writes, of several; `missing_fences`: what the kernel does not grant
        the programs that the model wrote.

    Raises:
        ValueError: the user's mistake, before any model is loaded.
        OSError: results cannot be written; what was finished is kept.
    """
    settings = Settings(
        dtype, batch_size, limit, seed, seeds, max_length, chat_template, trust_remote_code,
        device or _device_kind(lm), device_map, load_in_4bit,
    )  # fmt: skip
    team = join(settings.device)
    if team is not None and team.rank != 0:
        return {**follow(model, tokenizer, revision, settings, team), "writes": False}
    say = _speaker(progress)
    with nullcontext() if team is None else team.leading() as end:
        settings = replace(settings, limit=_checked_limit(limit))
        if max_length is not None and max_length < 2:
            raise ValueError(f"--max-length {max_length}: no room for a prompt and an answer; at least 2 tokens")
        rows = select_rows(suite)
        if team is not None and device_map is not None:
            raise ValueError("--device-map spreads one model over all devices: start it without accelerate launch")
        skipped = {row.name: NO_CODE for row in rows if row.code and not allow_code_execution}
        for name, reason in skipped.items():
            say(f"{name}: skipped, it {reason}")
        rows = [row for row in rows if row.name not in skipped]
        _check_writable(Path(out), rows)
        mirror = _mirror(suite, data_dir)
        if mirror is not None and _is_sample(mirror):
            suite = "sample"  # whatever it was called: its items are no benchmark
        missing_fences = _missing_fences(say) if any(row.code for row in rows) else []
        with serving_metrics(mirror is not None, _code_metric if allow_code_execution else None):
            tasks = _load_all(rows, settings, mirror, say)
            subject = describe(model, tokenizer, revision, lm, settings, Path(out), team, say)
            outcome = _run(rows, tasks, subject, settings, mirror, suite, Path(out), skipped, progress, say)
        outcome["missing_fences"] = missing_fences
        if end is not None:
            end(outcome)
    return outcome


def _run(rows, tasks, subject, settings, mirror, suite, out, skipped, progress, say) -> dict:
    packages = versions()
    fingerprints = {row.name: _fingerprint(tasks[row.name], subject, settings, packages, mirror) for row in rows}
    finished = {row.name: _reusable(out / row.name, fingerprints[row.name], say) for row in rows}
    finished = {name: result for name, result in finished.items() if result}
    outcome = {
        "rows": dict(finished),
        "failed": {},
        "skipped": skipped,
        "reused": sorted(finished),
        "writes": True,
    }
    for number, row in enumerate(rows, 1):
        where = f"row {number} of {len(rows)}, {row.name}"
        if row.name in finished:
            say(f"{where}: {shown(finished[row.name])}, measured before")
            continue
        measured = _measure(row, tasks[row.name], subject, settings, where, progress)
        folder = out / row.name
        try:
            records.set_aside(folder)
            if isinstance(measured, Exception):
                outcome["failed"][row.name] = _reason(measured)
                records.write_text(folder / records.FAILURE, traceback.format_exception(measured))
            else:
                items, facts = measured
                result = _result(row, suite, settings, fingerprints[row.name], subject, packages, items, facts)
                result["samples_sha256"] = records.write_lines(folder / records.SAMPLES, items)
                records.write_json(folder / records.RESULT, result)
                outcome["rows"][row.name] = result
                write_tables(out, subject.identity)
        except OSError as error:
            raise _cannot_write(out, error) from None
        failed = row.name in outcome["failed"]
        say(f"{where}: failed, {outcome['failed'][row.name]}" if failed else f"{where}: {shown(result)}")
    try:
        write_tables(out, subject.identity, outcome["failed"], skipped)
    except OSError as error:
        raise _cannot_write(out, error) from None
    return outcome


def shown(result: dict) -> str:
    """One line of a result."""
    score = result["score"]
    error = f" ± {score['stderr']:.2f}" if score["stderr"] is not None else ""
    cut = result["prompts_cut"]
    notes = [f"{cut} prompts longer than the context were cut"] if cut else []
    notes += ["LIMITED RUN"] if result["limit"] is not None else []
    return f"{score['metric']} {score['value']:.2f}{error} on {score['n']} items" + "".join(
        f", {note}" for note in notes
    )


def _measure(row: Row, tasks: list[LoadedTask], subject: Subject, settings: Settings, where: str, progress: bool):
    """The row's items and facts; the exception if it fails."""
    lm = subject.lm  # outside: a model that cannot be loaded fails every row
    counts = getattr(lm, "counts", None)
    if counts is not None:
        counts.clear()
        lm.batch_sizes_found.clear()
    started = time.perf_counter()
    bar = _bar(lm, where, progress)
    try:
        with quiet_lm_eval(), bar:
            results = _lm_eval(row, tasks, lm, settings)
    except (ProcessLost, BrokenPipeError):  # of the progress bar: nobody is there any more
        raise
    except Exception as error:  # whatever it is, the other rows go on
        return error
    seconds = time.perf_counter() - started
    try:
        items = [item for task in tasks for item in _items(task, results["samples"][task.key])]
        items.sort(key=lambda item: (item["task"], item["seed"] or 0, item["filter"], item["doc_id"]))
        scores = row_scores(row, items)
    except (ValueError, KeyError, TypeError) as error:
        return error
    facts = {"scores": scores, "tasks": task_scores(items), "seconds": seconds, "counts": dict(counts or {})}
    facts["batch_sizes_found"] = list(getattr(lm, "batch_sizes_found", []))
    return items, facts


def _lm_eval(row: Row, tasks: list[LoadedTask], lm, settings: Settings):
    import numpy
    import torch
    from lm_eval.evaluator import evaluate as run

    # Before every row, so that a row does not depend on which others ran.
    random.seed(settings.seed)
    numpy.random.seed(settings.seed % 2**32)
    torch.manual_seed(settings.seed)
    for task in tasks:
        task.task.set_fewshot_seed(seed=settings.seed)
    return run(
        lm=lm,
        task_dict={"tasks": {task.key: task.task for task in tasks}, "groups": {}},
        limit=settings.limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=settings.chat_template,
        fewshot_as_multiturn=settings.chat_template,
        confirm_run_unsafe_code=row.code,
    )


def _items(loaded: LoadedTask, samples: list[dict]) -> list[dict]:
    """lm-eval's samples as they are kept: what joins two runs, what was asked and answered, the metrics."""
    return [
        {
            "task": loaded.name,
            "subtask": loaded.name,
            "seed": loaded.seed,
            **{key: sample[key] for key in ("doc_id", "doc_hash", "prompt_hash", "target_hash", "filter")},
            "metrics": {metric: float(sample[metric]) for metric in sample["metrics"] if _is_number(sample[metric])},
            "target": sample["target"],
            "resps": sample["resps"],
            "filtered_resps": sample["filtered_resps"],
        }
        for sample in samples
    ]


def _result(row, suite, settings, fingerprint, subject, packages, items, facts) -> dict:
    score, secondary = facts["scores"]
    counts = facts["counts"]
    return {
        "row": row.name,
        "title": row.title,
        "suite": suite,
        "limit": settings.limit,
        "fingerprint": fingerprint,
        "score": score,
        "secondary": secondary,
        "tasks": facts["tasks"],
        "shots": row.shots,
        "protocol": row.protocol,
        "versions": packages,
        "seeds": {"fewshot": settings.seed, "choices": sorted({item["seed"] for item in items} - {None})},
        "settings": asdict(settings),
        "model": {"name": subject.name, **subject.identity, **subject.facts},
        "wall_seconds": round(facts["seconds"], 3),
        "tokens": counts.get("tokens"),
        "tokens_per_second": round(counts["tokens"] / facts["seconds"], 1) if counts.get("tokens") else None,
        "batch_sizes_found": facts["batch_sizes_found"],
        "prompts_cut": counts.get("prompts_cut", 0),
        "answers_short": counts.get("answers_short", 0),
    }


def _fingerprint(tasks: list[LoadedTask], subject: Subject, settings: Settings, packages: dict, mirror) -> dict:
    return {
        "model": subject.identity,
        "tasks": {task.key: task_fingerprint(task, mirror) for task in tasks},
        "packages": packages,
        "settings": asdict(settings),
    }


def _reusable(folder: Path, fingerprint: dict, say) -> dict | None:
    try:
        result = records.read_result(folder)
        if result is None:
            return None
        records.check_samples(folder, result)
    except ValueError as error:
        say(f"{error}; measuring {folder.name} again")
        return None
    changed = records.differences(result["fingerprint"], _as_json(fingerprint))
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        say(f"{folder.name}: earlier result set aside, other {', '.join(changed[:3])}{more}")
        return None
    return result


def _load_all(rows: list[Row], settings: Settings, mirror, say) -> dict[str, list[LoadedTask]]:
    """The tasks of all rows with their data, so that a missing data set shows before any model is loaded."""
    loaded, missing = {}, {}
    for row in rows:
        try:
            with quiet_lm_eval():
                loaded[row.name] = load_tasks(row, settings.seed, settings.seeds, mirror, settings.chat_template)
        except MissingData as error:
            missing.setdefault(str(error), row.name)
        except (ConnectionError, FileNotFoundError, RuntimeError) as error:
            if mirror is not None:
                raise
            reason = " ".join(str(error).split())[:160]
            missing.setdefault(
                f"cannot be downloaded from the hub ({reason}); --data-dir reads a local mirror", row.name
            )
    if missing:
        raise MissingData("; ".join(f"{name}: {reason}" for reason, name in missing.items()))
    return loaded


def _mirror(suite: str, data_dir) -> Mirror | None:
    if suite == "sample":
        if data_dir is not None:
            raise ValueError("the suite 'sample' brings its own items: leave --data-dir out.")
        from .sample import root

        data_dir = root()
    if data_dir is None:
        return None
    if not Path(data_dir).is_dir():
        raise MissingData(f"{data_dir}: no such folder; --fetch-only builds it")
    return Mirror(data_dir)


def _is_sample(mirror: Mirror) -> bool:
    if not mirror.root.name.startswith("sample-"):
        return False
    from .sample import root

    return mirror.root.name == root().name  # which has the digest of the contents in it


def _device_kind(lm) -> str:
    """Of the device that a model is put on by default, the same in all processes; a ready LM keeps its own."""
    if lm is not None:
        return ""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _missing_fences(say) -> list[str]:
    """What this kernel does not grant model-written programs, said before any of them runs."""
    from .sandbox import FENCES, run_program

    missing = run_program("def one():\n    return 1\n", "assert one() == 1\n").missing
    if missing:
        lacking = ", ".join(FENCES[name] for name in missing)
        say(f"this kernel does not grant model-written programs {lacking}: use a container or a virtual machine")
    return list(missing)


def _code_metric():
    from .sandbox import code_eval_metric

    return code_eval_metric()


def _checked_limit(limit):
    if limit is not None and (not 0 < limit < math.inf or (limit >= 1 and limit != int(limit))):
        raise ValueError(f"limit must be a number of items, or a share below 1, got {limit}")
    return int(limit) if limit is not None and limit >= 1 else limit


def _check_writable(out: Path, rows: list[Row]) -> None:
    for folder in (out, *(out / row.name for row in rows)):
        try:
            records.check_writable(folder)
        except OSError as error:
            raise OSError(f"{folder}: cannot write results there, {error.strerror or error}") from None


def _cannot_write(out: Path, error: OSError) -> OSError:
    what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
    return OSError(f"{out}: cannot write, {what}. Finished rows are kept; the same command goes on from there.")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _is_number(value) -> bool:
    return isinstance(value, int | float) or hasattr(value, "__float__")


def _as_json(value):
    return json.loads(json.dumps(value, default=str))


def _speaker(progress: bool) -> Callable[[str], None]:
    stream = sys.stderr

    def say(text: str) -> None:
        if progress:
            print(text, file=stream, flush=True)

    return say


def _bar(lm, where: str, progress: bool):
    """A bar over the row's requests for our own LM; others show none."""
    if not progress or not hasattr(lm, "counts"):
        return nullcontext()
    return request_bar(lm, where, sys.stderr)
