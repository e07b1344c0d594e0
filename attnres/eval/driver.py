"""Runs rows one after the other, writes each as it ends, and keeps finished rows."""

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import set_seed

from .. import messages
from ..folders import check_writable
from . import records, sample, sandbox
from .identity import versions
from .loading import LoadedTask, load_tasks, task_fingerprint
from .mirror import Mirror, MissingData, serving_code_eval
from .processes import RESUME, ProcessLost, join
from .results import write_tables
from .scores import row_scores, task_scores
from .subject import Settings, Subject, describe, follow
from .suites import Row, select_rows

FEWSHOT_SEED = 1234  # lm-eval's
NO_CODE = "runs programs that the model writes; pass --allow-code-execution to run them"


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
    """Measures the rows of a suite and writes `out/<row>/result.json` and `samples.jsonl` as each row ends.

    Under `accelerate launch` every process calls it: the processes share every row, and rank 0 writes.

    Args:
        model: folder, hub id, or a causal LM in memory (which needs its tokenizer).
        suite: name of a suite or row, or several joined by commas.
        out: folder of results.
        data_dir: mirror of the hub's data sets; without it they are downloaded from the hub.
        tokenizer: folder, hub id or tokenizer in memory; by default the model's own.
        revision: revision of a model on the hub.
        dtype: dtype of the weights; "auto" is that of the checkpoint.
        device: device of the model; by default a GPU if there is one.
        device_map: device map that spreads one model over several devices, such as "auto".
        batch_size: number of sequences, or "auto". Scores depend on it: compare two models at the same number.
        max_length: longest input in tokens; by default that of the configuration.
        limit: number of items per task, or a share below 1, to try things out; results are marked.
        seed: seed of the examples that are drawn.
        seeds: number of orders of the choices that GPQA-Diamond averages; by default eight.
        trust_remote_code: whether to run code that comes with the checkpoint.
        allow_code_execution: whether to run model-written programs (HumanEval, MBPP); otherwise these rows are skipped.
        chat_template: whether to wrap prompts in the tokenizer's chat template, with examples as turns.
        load_in_4bit: whether to quantise the weights while loading (bitsandbytes, NF4).
        lm: ready lm-eval LM instead of a model; its results are reused only if it has an `identity`, a dict of hashes.
        progress: whether to show progress on stderr.

    Returns:
        A dict with `rows` (results by row), `failed` and `skipped` (reasons by row), `reused` (rows that were finished
        before), `writes` (whether this is rank 0) and `missing_fences` (protections for model-written programs that
        the kernel does not grant).

    Raises:
        ValueError: an argument is wrong or data are missing; raised before a model is loaded.
        OSError: results cannot be written; finished rows are kept.
    """
    if lm is None and device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = Settings(
        dtype, batch_size, limit, seed, seeds, max_length, chat_template, trust_remote_code, device or "", device_map,
        load_in_4bit,
    )  # fmt: skip
    team = join(settings.device)
    if team is not None and team.rank != 0:
        return {**follow(model, tokenizer, revision, settings, team), "writes": False}
    say = messages.say if progress else lambda line: None
    out = Path(out)
    # The arguments are checked inside, so that all processes of a team end with the same error.
    with nullcontext() if team is None else team.leading() as end:
        if limit is not None and (not 0 < limit < math.inf or (limit > 1 and limit != int(limit))):
            raise ValueError(f"limit must be a whole number of items, or a share between 0 and 1, got {limit}")
        if max_length is not None and max_length < 2:
            raise ValueError(f"--max-length {max_length}: must be at least 2, one token each for prompt and answer")
        if team is not None and device_map is not None:
            raise ValueError("--device-map spreads one model over all devices; start it without accelerate launch")
        rows = select_rows(suite)
        skipped = {row.name: NO_CODE for row in rows if row.code and not allow_code_execution}
        for name, reason in skipped.items():
            say(f"{name}: skipped, it {reason}")
        rows = [row for row in rows if row.name not in skipped]
        for folder in (out, *(out / row.name for row in rows)):
            check_writable(folder)
        mirror, suite = _mirror(suite, data_dir)
        missing_fences = _missing_fences(say) if any(row.code for row in rows) else []
        with serving_code_eval(sandbox.SandboxedCodeEval()):
            tasks = _load_all(rows, settings, mirror, say)
            subject = describe(model, tokenizer, revision, lm, settings, out, team, say)
            run = _Run(out, suite, settings, mirror, subject, versions(), say, progress)
            outcome = {**run.measure(rows, tasks, skipped), "missing_fences": missing_fences}
        if end is not None:
            end(outcome)
    return outcome


@dataclass(frozen=True)
class _Run:
    """What all rows of an evaluation share."""

    out: Path
    suite: str
    settings: Settings
    mirror: Mirror | None
    subject: Subject
    packages: dict
    say: Callable[[str], None]
    progress: bool

    def measure(self, rows: list[Row], tasks: dict[str, list[LoadedTask]], skipped: dict) -> dict:
        """Measures the rows that are not finished; returns the outcome of the evaluation."""
        fingerprints = {row.name: self._fingerprint(tasks[row.name]) for row in rows}
        finished = {row.name: self._reusable(row.name, fingerprints[row.name]) for row in rows}
        results = {name: result for name, result in finished.items() if result is not None}
        reused, failed = sorted(results), {}
        for number, row in enumerate(rows, 1):
            where = f"row {number} of {len(rows)}, {row.name}"
            if row.name in results:
                self.say(f"{where}: {_shown(results[row.name])}, measured before")
                continue
            folder = self.out / row.name
            _ = self.subject.lm  # a model that cannot be loaded ends the evaluation, not only the row
            try:
                result, items = self._measure_row(row, tasks[row.name], where)
            except (ProcessLost, BrokenPipeError):  # another process, or the reader of stderr, has ended
                raise
            except Exception as error:  # the other rows go on
                failed[row.name] = f"{type(error).__name__}: {messages.one_line(error, 400)}"
                self.say(f"{where}: failed, {failed[row.name]}")
                with self._writing():
                    records.set_aside(folder)
                    records.write_text(folder / records.FAILURE, traceback.format_exception(error))
                continue
            with self._writing():
                records.set_aside(folder)
                samples = records.write_lines(folder / records.SAMPLES, items)
                results[row.name] = {**result, "fingerprint": fingerprints[row.name], "samples_sha256": samples}
                records.write_json(folder / records.RESULT, results[row.name])
                write_tables(self.out, self.subject.identity)
            self.say(f"{where}: {_shown(result)}")
        with self._writing():
            write_tables(self.out, self.subject.identity, failed, skipped)
        return {"rows": results, "failed": failed, "skipped": skipped, "reused": reused, "writes": True}

    def _measure_row(self, row: Row, tasks: list[LoadedTask], where: str) -> tuple[dict, list[dict]]:
        """Returns the row's result, without its fingerprint, and its items."""
        lm, settings = self.subject.lm, self.settings
        counts = getattr(lm, "counts", {})
        if hasattr(lm, "counts"):
            counts.clear()
            lm.batch_sizes_found.clear()
            lm.bar = partial(tqdm, desc=where, unit="request", file=sys.stderr, leave=False, disable=not self.progress)
        started = time.perf_counter()
        with messages.quiet_lm_eval():
            samples = self._lm_eval(row, tasks, lm)["samples"]
        seconds = time.perf_counter() - started
        items = [item for task in tasks for item in _items(task, samples[task.key])]
        items.sort(key=lambda item: (item["task"], item["seed"] or 0, item["filter"], item["doc_id"]))
        score, secondary = row_scores(row, items)
        tokens = counts.get("tokens")
        result = {
            "row": row.name, "title": row.title, "suite": self.suite, "limit": settings.limit,
            "score": score, "secondary": secondary, "tasks": task_scores(items),
            "shots": row.shots, "protocol": row.protocol, "versions": self.packages,
            "seeds": {"fewshot": settings.seed, "choices": sorted({item["seed"] for item in items} - {None})},
            "settings": asdict(settings),
            "model": {"name": self.subject.name, **self.subject.identity, **self.subject.facts},
            "wall_seconds": round(seconds, 3),
            "tokens": tokens, "tokens_per_second": round(tokens / seconds, 1) if tokens else None,
            "batch_sizes_found": list(getattr(lm, "batch_sizes_found", [])),
            "prompts_cut": counts.get("prompts_cut", 0), "answers_short": counts.get("answers_short", 0),
        }  # fmt: skip
        return result, items

    def _lm_eval(self, row: Row, tasks: list[LoadedTask], lm):
        from lm_eval.evaluator import evaluate as run

        # Seeded before every row, so that a row does not depend on the rows before it.
        set_seed(self.settings.seed)
        for task in tasks:
            task.task.set_fewshot_seed(seed=self.settings.seed)
        return run(
            lm=lm,
            task_dict={"tasks": {task.key: task.task for task in tasks}, "groups": {}},
            limit=self.settings.limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=self.settings.chat_template,
            fewshot_as_multiturn=self.settings.chat_template,
            confirm_run_unsafe_code=row.code,
        )

    def _fingerprint(self, tasks: list[LoadedTask]) -> dict:
        return {
            "model": self.subject.identity,
            "tasks": {task.key: task_fingerprint(task, self.mirror) for task in tasks},
            "packages": self.packages,
            "settings": asdict(self.settings),
        }

    def _reusable(self, name: str, fingerprint: dict) -> dict | None:
        """Returns the row's earlier result if it was measured on the same model, data and settings."""
        folder = self.out / name
        try:
            result = records.read_result(folder)
            if result is None:
                return None
            records.check_samples(folder, result)
        except ValueError as error:
            self.say(f"{error}; measuring {name} again")
            return None
        changed = records.differences(result["fingerprint"], json.loads(json.dumps(fingerprint, default=str)))
        if changed:
            self.say(f"{name}: the earlier result is set aside, because of another {', '.join(changed[:3])}")
            return None
        return result

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(f"{self.out}: cannot be written ({error.strerror or error}); {RESUME}") from None


def _shown(result: dict) -> str:
    """Returns one line on a result."""
    score = result["score"]
    error = f" ± {score['stderr']:.2f}" if score["stderr"] is not None else ""
    return f"{score['metric']} {score['value']:.2f}{error} on {score['n']} items"


def _items(loaded: LoadedTask, samples: list[dict]) -> list[dict]:
    """Reduces lm-eval's samples to what is written: the keys that join two runs, the answers and the metrics."""
    return [
        {
            "task": loaded.name,
            "subtask": loaded.name,
            "seed": loaded.seed,
            **{key: sample[key] for key in ("doc_id", "doc_hash", "prompt_hash", "target_hash", "filter")},
            "metrics": {name: float(sample[name]) for name in sample["metrics"] if hasattr(sample[name], "__float__")},
            **{key: sample[key] for key in ("target", "resps", "filtered_resps")},
        }
        for sample in samples
    ]


def _load_all(rows: list[Row], settings: Settings, mirror: Mirror | None, say) -> dict[str, list[LoadedTask]]:
    """Loads the tasks of all rows with their data, so that missing data are found before a model is loaded."""
    loaded, missing = {}, {}
    for row in rows:
        try:
            with messages.quiet_lm_eval():
                loaded[row.name] = load_tasks(row, settings.seeds, mirror, settings.chat_template)
        except MissingData as error:
            missing.setdefault(str(error), row.name)
        except (ConnectionError, FileNotFoundError, RuntimeError) as error:
            if mirror is not None:
                raise
            reason = f"cannot be downloaded from the hub ({messages.one_line(error, 160)})"
            missing.setdefault(f"{reason}; --data-dir reads a local mirror", row.name)
    if missing:
        raise MissingData("; ".join(f"{name}: {reason}" for reason, name in missing.items()))
    return loaded


def _mirror(suite: str, data_dir: str | os.PathLike | None) -> tuple[Mirror | None, str]:
    """Returns the mirror to read, None for the hub, and the suite; the sample items make every suite "sample"."""
    if suite == "sample":
        if data_dir is not None:
            raise ValueError("the suite 'sample' brings its own items; leave --data-dir out")
        return Mirror(sample.root()), suite
    if data_dir is None:
        return None, suite
    if not Path(data_dir).is_dir():
        raise MissingData(f"{data_dir}: no such folder; --fetch-only builds it")
    mirror = Mirror(data_dir)
    return mirror, "sample" if (mirror.root / sample.MARK).exists() else suite


def _missing_fences(say) -> list[str]:
    """Shows and returns what the kernel does not grant to model-written programs, before any of them runs."""
    missing = sandbox.run_program("def one():\n    return 1\n", "assert one() == 1\n").missing
    if missing:
        lacking = ", ".join(sandbox.FENCES[name] for name in missing)
        say(f"this kernel does not grant model-written programs {lacking}; use a container or a virtual machine")
    return list(missing)
