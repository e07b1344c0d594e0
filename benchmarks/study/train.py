"""Trains the runs of a grid that have no result yet, and appends one JSON line for each that finishes.

    python -m benchmarks.study.train --minutes 60 --processes 2

One thread per process: operations are too small to gain from more. Every model sees the same batches in the same order
for the same seed, at the learning rate that is best for the plain model of its size, or for itself where the grid has
a sweep of it (plain models of other depths). The held-out text is read once, at the end of a run; sweeps are judged on
validation text and never read it.
"""

import argparse
import hashlib
import json
import multiprocessing
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from math import ceil
from pathlib import Path

import numpy as np
import torch
import yaml
from transformers import LlamaConfig, get_scheduler

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.training.optimizer import MuonWithAdamW, backbone_matrices

from .corpus import cache_folder

HERE = Path(__file__).parent
KEY = ("size", "arm", "seed", "steps", "sweep")


def key(run: dict) -> tuple:
    """What a run is known by; a run outside a sweep has the learning rate that its sweep gave."""
    return tuple(run[name] for name in KEY) + ((run["learning_rate"],) if run["sweep"] else ())


def expand(grid: dict) -> list[dict]:
    """The runs of a grid in order; `learning_rate` is `None` where a sweep has to say."""
    runs = []
    for stage in grid["stages"]:
        for size in stage["sizes"]:
            for budget in stage.get("budgets", [1]):  # multiples of the size's own
                steps = round(budget * grid["sizes"][size]["steps"])
                for seed in stage["seeds"]:
                    for arm in stage["arms"]:
                        for rate in stage.get("learning_rates", [None]):
                            run = {"size": size, "arm": arm, "seed": seed, "steps": steps}
                            runs.append(run | {"sweep": rate is not None, "learning_rate": rate})
    return runs


def tuned_rate(size: str, arm: str, runs: list[dict], results: list[dict]) -> float | None:
    """The learning rate of the lowest validation loss at a size: of the model itself where the grid sweeps it, else of
    the plain one, with scaled initialisation where only that is swept; `None` until the sweep is complete."""
    sweeps = [run for run in runs if run["sweep"] and run["size"] == size]
    swept_arms = {run["arm"] for run in sweeps}
    swept = next((name for name in (arm, "plain", "plain, scaled init") if name in swept_arms), None)
    wanted = {key(run) for run in sweeps if run["arm"] == swept}
    found = [result for result in results if result["sweep"] and key(result) in wanted]
    if not wanted or len(found) < len(wanted):
        return None
    return min(found, key=lambda result: result["curve"][-1]["validation_loss"])["learning_rate"]


def build_model(grid: dict, size: dict, arm: dict, vocabulary: int) -> AttnResForCausalLM:
    arm, width = dict(arm), size["hidden"]
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


def read_results(path: Path) -> list[dict]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line]


def study(grid: dict, results_path: Path, corpus: Path, processes: int, minutes: float):
    """Trains what is missing, in order, until nothing is left or no run may start any more."""
    runs, results, stop = expand(grid), read_results(results_path), time.monotonic() + 60 * minutes
    done = {key(result) for result in results}
    waiting = [run for run in runs if key(run) not in done]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        running = set()
        while running or waiting:
            for run in list(waiting):
                if len(running) >= processes or time.monotonic() > stop:
                    break
                rate = run["learning_rate"] or tuned_rate(run["size"], run["arm"], runs, results)
                if rate is not None:
                    waiting.remove(run)
                    running.add(pool.submit(train, run | {"learning_rate": rate}, grid, str(corpus)))
            if not running:
                break
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                results.append(future.result())
                with results_path.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(results[-1]) + "\n")
                last = results[-1]
                score = last.get("held_out_loss", last["curve"][-1]["validation_loss"])
                print(*key(last), f"loss {score:.4f}, {last['wall_seconds']} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=Path, default=HERE / "grid.yaml", help="the runs")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", help="JSON lines, appended to")
    parser.add_argument(
        "--corpus", type=Path, default=cache_folder() / "corpus", help="made by benchmarks.study.corpus"
    )
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count(), help="of one thread each")
    parser.add_argument("--minutes", type=float, default=1e9, help="after which no run is started")
    options = parser.parse_args()
    if not (options.corpus / "manifest.json").is_file():
        parser.error(f"--corpus {options.corpus} holds no corpus; make it with `python -m benchmarks.study.corpus`.")
    grid = yaml.safe_load(options.grid.read_text(encoding="utf-8"))
    study(grid, options.results, options.corpus, options.processes, options.minutes)


if __name__ == "__main__":
    main()
