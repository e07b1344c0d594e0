"""Trains the runs of a grid that have no result yet, and appends one JSON line for each that finishes.

    python -m benchmarks.study.train --minutes 60 --processes 2

One thread per process: operations are too small to gain from more. Every model sees the same batches in the same order
for the same seed, at the learning rate that is best for the plain model of its size and, by `rate_of`, of its depth or
initialisation. The held-out text is read once, at the end of a run; sweeps are judged on validation text and never
read it.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from math import ceil, isfinite
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, get_scheduler

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.configuration_attnres import DEPTH_OPTIONS
from attnres.depth_kernels import DEPTH_IMPLEMENTATIONS
from attnres.messages import one_line
from attnres.training.optimizer import MuonWithAdamW, backbone_matrices

from . import files
from .corpus import cache_folder

HERE = Path(__file__).parent
KEY = ("size", "arm", "seed", "steps", "sweep")


def key(run: dict) -> tuple:
    """What a run is known by; a run outside a sweep has the learning rate that its sweep gave."""
    return tuple(run[name] for name in KEY) + ((run["learning_rate"],) if run["sweep"] else ())


SETTINGS = {  # of a grid; a size may replace them
    "sequence_length": files.LENGTH,
    "batch_size": files.WHOLE,
    "initializer_range": files.POSITIVE,
    "weight_decay": ("a number of at least 0", lambda value: value == 0 or files.is_positive(value)),
    "adamw_learning_rate": files.POSITIVE,
    "warmup": ("a share of the steps below 1", lambda value: value == 0 or (files.is_positive(value) and value < 1)),
    "evaluations": files.WHOLE,
    "validation_sequences": files.WHOLE,
    "held_out_sequences": files.WHOLE,
    "depth_implementation": files.one_of(DEPTH_IMPLEMENTATIONS),
}
SCALED = "plain, scaled init"
HEADS = ("a multiple of 8", lambda value: files.is_whole(value) and value % 8 == 0)
LAYERS = ("a whole number from 1 to 1000", lambda value: files.is_whole(value) and value <= 1000)
SIZE = {"layers": LAYERS, "hidden": HEADS, "steps": files.WHOLE}
BOOLEAN = ("true or false", lambda value: isinstance(value, bool))


def read_grid(path: Path) -> dict:
    """Reads a grid, and refuses one that cannot be trained to its end."""
    grid = files.read_yaml(path)
    parts = {"sizes": files.MAPPING, "arms": files.MAPPING, "stages": files.STAGES}
    files.check(grid, SETTINGS | parts, str(path))
    for name, size in grid["sizes"].items():
        files.check(size, SIZE | SETTINGS, f"size {name!r} of {path}", optional=SETTINGS)
    options = dict.fromkeys(DEPTH_OPTIONS, files.ANYTHING)
    options |= {"layers": LAYERS, "scale_outputs": BOOLEAN, "rate_of": files.one_of(grid["arms"])}
    for name, arm in grid["arms"].items():
        files.check(arm, options, f"arm {name!r} of {path}", optional=options)
    lists = {"seeds": files.SEED, "learning_rates": files.POSITIVE, "budgets": files.WHOLE}
    lists |= {"sizes": files.one_of(grid["sizes"]), "arms": files.one_of(grid["arms"])}
    rules = {name: files.each_of(rule) for name, rule in lists.items()}
    for number, stage in enumerate(grid["stages"], 1):
        files.check(stage, rules, f"stage {number} of {path}", optional=("learning_rates", "budgets"))
        if "learning_rates" in stage and "budgets" in stage:
            raise ValueError(
                f"stage {number} of {path} has learning_rates and budgets; sweeps have the size's own steps"
            )
    _check_runs(expand(grid), grid, path)
    return grid


def _check_runs(runs: list[dict], grid: dict, path: Path):
    """Refuses a model that cannot be built, a size without a plain model, and a run that no sweep gives a rate."""
    compared = {(run["size"], run["arm"]) for run in runs if not run["sweep"]}
    for size, arm in dict.fromkeys((run["size"], run["arm"]) for run in runs):
        try:
            with torch.device("meta"):
                build_model(grid | grid["sizes"][size], grid["sizes"][size], grid["arms"][arm], 17)
        except Exception as error:  # numbers that fit no model fail anywhere in transformers or torch
            raise ValueError(f"arm {arm!r} of {path} cannot be built at size {size!r}: {one_line(error)}") from None
        if (size, arm) not in compared:
            continue
        if not {(size, "plain"), (size, SCALED)} & compared:
            raise ValueError(
                f"{path} has no runs of plain at size {size!r}, to which {arm!r} would be compared; add them"
            )
        if swept_arm(size, arm, runs, grid) is None:
            raise ValueError(f"{path} never sweeps the learning rate of plain at size {size!r}; add such a stage")


def expand(grid: dict) -> list[dict]:
    """The runs of a grid in order; `learning_rate` is `None` where a sweep has to say."""
    runs = []
    for stage in grid["stages"]:
        for size in stage["sizes"]:
            for budget in stage.get("budgets", [1]):  # multiples of the size's own
                steps = budget * grid["sizes"][size]["steps"]
                for seed in stage["seeds"]:
                    for arm in stage["arms"]:
                        for rate in stage.get("learning_rates", [None]):
                            run = {"size": size, "arm": arm, "seed": seed, "steps": steps}
                            runs.append(run | {"sweep": rate is not None, "learning_rate": rate})
    return runs


def swept_arm(size: str, arm: str, runs: list[dict], grid: dict) -> str | None:
    """The model whose sweep at a size gives a model its learning rate: itself, its `rate_of`, or a plain one."""
    swept = {run["arm"] for run in runs if run["sweep"] and run["size"] == size}
    names = (arm, grid["arms"][arm].get("rate_of"), "plain", SCALED)
    return next((name for name in names if name in swept), None)


def tuned_rate(size: str, arm: str, runs: list[dict], results: list[dict], grid: dict) -> float | None:
    """The learning rate of the lowest validation loss in the sweep that counts; `None` until that is complete."""
    swept = swept_arm(size, arm, runs, grid)
    wanted = {key(run) for run in runs if run["sweep"] and (run["size"], run["arm"]) == (size, swept)}
    found = {key(result): result for result in results if result["sweep"] and key(result) in wanted}
    losses = {result["learning_rate"]: result["curve"][-1]["validation_loss"] for result in found.values()}
    finite = {rate: loss for rate, loss in losses.items() if isfinite(loss)}
    return min(finite, key=finite.get) if finite and len(found) == len(wanted) else None


def build_model(grid: dict, size: dict, arm: dict, vocabulary: int) -> AttnResForCausalLM:
    arm, width = dict(arm), size["hidden"]
    arm.pop("rate_of", None)
    scale_outputs = arm.pop("scale_outputs", False)
    backbone = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=ceil(8 * width / 3 / 16) * 16,
        num_hidden_layers=arm.pop("layers", size["layers"]),
        num_attention_heads=width // 8,
        num_key_value_heads=width // 8,
        max_position_embeddings=grid["sequence_length"],
        initializer_range=grid["initializer_range"],
        tie_word_embeddings=True,
    )
    options = {"depth_implementation": grid["depth_implementation"], **arm}
    model = AttnResForCausalLM(AttnResConfig(backbone_config=backbone, **options))
    if scale_outputs:  # GPT-2's initialisation: 2 L additions then leave the residual stream as large as one would
        with torch.no_grad():
            for layer in model.model.layers:
                for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                    matrix.mul_((2 * backbone.num_hidden_layers) ** -0.5)
    return model


def build_optimizer(model: torch.nn.Module, grid: dict, learning_rate: float) -> MuonWithAdamW:
    """Muon for the matrices of the decoder layers, which alone decay, and AdamW for embedding, norms and the mixing
    over depth: what the paper's models were trained with."""
    matrices = backbone_matrices(model)
    named = dict(model.named_parameters())
    return MuonWithAdamW(
        [{"params": [named[name] for name in named if name in matrices]}],
        [{"params": [named[name] for name in named if name not in matrices]}],
        muon={"lr": learning_rate, "weight_decay": grid["weight_decay"], "adjust_lr_fn": "match_rms_adamw"},
        adamw={"lr": grid["adamw_learning_rate"], "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True},
    )


@torch.no_grad()
def evaluate(model, tokens: np.ndarray, count: int, length: int, batch: int) -> tuple[float, np.ndarray]:
    """Loss in nats per token over `count` sequences spread evenly over a split, and the tokens it predicts."""
    starts = np.linspace(0, len(tokens) - length - 1, count).astype(int)
    rows = torch.from_numpy(np.stack([tokens[start : start + length] for start in starts]).astype(np.int64))
    model.eval()
    total = sum(
        model(input_ids=part, labels=part, use_cache=False).loss.item() * len(part) for part in rows.split(batch)
    )
    model.train()
    return total / len(rows), rows[:, 1:].numpy()


def train(run: dict, grid: dict, corpus: str) -> dict:
    """Trains one run; what it returns is its line of results."""
    torch.set_num_threads(1)
    torch.manual_seed(run["seed"])
    size = grid["sizes"][run["size"]]
    grid = grid | size
    folder, length, batch, steps = Path(corpus), grid["sequence_length"], grid["batch_size"], run["steps"]
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    text = {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in ("train", "validation")}
    model = build_model(grid, size, grid["arms"][run["arm"]], manifest["vocabulary"]).train()
    warmup = max(1, round(grid["warmup"] * steps))
    optimizer = build_optimizer(model, grid, run["learning_rate"])
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    starts = np.random.default_rng(run["seed"]).integers(0, len(text["train"]) - length, (steps, batch))
    evaluate_at = {round(steps * part / grid["evaluations"]) for part in range(1, grid["evaluations"] + 1)}
    curve, batches, wall, core = [], hashlib.sha256(), 0.0, 0.0
    for step in range(1, steps + 1):
        wall_start, core_start = time.perf_counter(), time.process_time()
        rows = np.stack([text["train"][start : start + length] for start in starts[step - 1]]).astype(np.int64)
        batches.update(rows.tobytes())
        rows = torch.from_numpy(rows)
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        wall, core = wall + time.perf_counter() - wall_start, core + time.process_time() - core_start
        if step in evaluate_at:  # measuring is not training: it is outside both clocks
            loss, _ = evaluate(model, text["validation"], grid["validation_sequences"], length, batch)
            curve.append({"step": step, "core_seconds": round(core, 2), "validation_loss": round(loss, 5)})
    parameters, tokens = sum(p.numel() for p in model.parameters()), steps * batch * length
    result = run | {
        "hidden": size["hidden"],
        "layers": model.config.num_hidden_layers,
        "parameters": parameters,
        "sequence_length": length,
        "tokens": tokens,
        "flops": 6 * parameters * tokens,
        "wall_seconds": round(wall, 2),
        "core_seconds": round(core, 2),
        "tokens_per_second": round(tokens / wall),
        "curve": curve,
        "batches": batches.hexdigest()[:16],
        "corpus": manifest["sha256"][:16],
        "depth_implementation": grid["depth_implementation"],
        "torch": torch.__version__,
    }
    if not run["sweep"]:
        held_out = np.load(folder / "held_out.npy", mmap_mode="r")
        loss, targets = evaluate(model, held_out, grid["held_out_sequences"], length, batch)
        read = np.load(folder / "token_bytes.npy")[targets].sum()
        result |= {"held_out_loss": loss, "bits_per_byte": loss * targets.size / read / np.log(2).item()}
        result["bits_per_byte"] = float(result["bits_per_byte"])
    return result


def end_with_parent():
    """Ends this process when the one that started it has ended, in whatever way."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def study(grid: dict, results_path: Path, corpus: Path, processes: int, minutes: float) -> int:
    """Trains what is missing, in order, until nothing is left or no run may start any more.

    A run that fails does not stop the others. Returns how many failed, or could not start because a sweep failed.
    """
    runs, results, stop = expand(grid), files.read_results(results_path), time.monotonic() + 60 * minutes
    done, failures = {key(result) for result in results}, 0
    waiting = list({key(run): run for run in runs if key(run) not in done}.values())  # stages may name a run again
    running = {}

    def new_pool() -> ProcessPoolExecutor:
        spawn = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(processes, mp_context=spawn, initializer=end_with_parent)

    pool = new_pool()
    try:
        while running or waiting:
            for run in list(waiting):
                if len(running) >= processes or time.monotonic() > stop:
                    break
                rate = run["learning_rate"] or tuned_rate(run["size"], run["arm"], runs, results, grid)
                if rate is not None:
                    waiting.remove(run)
                    running[pool.submit(train, run | {"learning_rate": rate}, grid, str(corpus))] = run
            if not running:
                break
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            broken = False
            for future in finished:
                run = running.pop(future)
                if error := future.exception():
                    failures += 1
                    broken = broken or isinstance(error, BrokenProcessPool)
                    reason = f"{type(error).__name__}: {one_line(error)}"
                    print(*key(run), f"failed and has to be run again: {reason}", file=sys.stderr, flush=True)
                    continue
                last = future.result()
                results.append(last)
                files.append(results_path, last)
                score = last.get("held_out_loss", last["curve"][-1]["validation_loss"])
                print(*key(last), f"loss {score:.4f}, {last['wall_seconds']} s", flush=True)
            if broken:  # one of its processes was killed, and with it go the others
                pool.shutdown()
                pool = new_pool()
    finally:
        pool.shutdown()
    if waiting and time.monotonic() < stop:
        print(f"{len(waiting)} runs were not started, because their sweep is incomplete", file=sys.stderr)
        failures += len(waiting)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=Path, default=HERE / "grid.yaml", help="the runs")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", help="JSON lines, appended to")
    parser.add_argument(
        "--corpus", type=Path, default=cache_folder() / "corpus", help="made by benchmarks.study.corpus"
    )
    cores = multiprocessing.cpu_count()
    parser.add_argument("--processes", type=files.whole, default=cores, help="of one thread each")
    parser.add_argument("--minutes", type=files.positive, default=1e9, help="after which no run is started")
    options = parser.parse_args()
    manifest = options.corpus / "manifest.json"
    if not manifest.is_file():
        parser.error(f"--corpus {options.corpus} holds no corpus; make it with `python -m benchmarks.study.corpus`.")
    try:
        files.check_folder_of(options.results)
        grid = read_grid(options.grid)
        corpora = {
            result["corpus"]
            for result in files.read_results(options.results, (*KEY, "learning_rate", "corpus", "curve"))
        }
    except ValueError as error:
        parser.error(str(error))
    corpus = json.loads(manifest.read_text(encoding="utf-8"))["sha256"][:16]
    if corpora - {corpus}:
        parser.error(
            f"--corpus {options.corpus} is {corpus}, but --results {options.results} has runs on "
            f"{', '.join(sorted(corpora - {corpus}))}; runs on different text cannot be compared: choose another file."
        )
    return 1 if study(grid, options.results, options.corpus, options.processes, options.minutes) else 0


if __name__ == "__main__":
    sys.exit(main())
