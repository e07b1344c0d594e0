"""Continues SmolLM2-135M-Instruct on the study's text: plain, and converted with several ways of mixing.

    python -m benchmarks.study.retrofit --minutes 60

Runs of `retrofit.yaml` that have no result yet, in order; one JSON line for each that finishes. All start from the same
function, or say what their variant makes of it, and see the same batches for the same seed. Learning rates of the
depth mixer are chosen on validation text with seed 0; the held-out text is read once, at the end of other runs.
"""

import argparse
import hashlib
import json
import random
import time
from collections import defaultdict
from math import isfinite
from pathlib import Path

import numpy as np
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from attnres import AttnResForCausalLM
from attnres.demo import smollm2

from .corpus import cache_folder, read_texts, split_of, without_near_duplicates
from .report import mean_difference
from .train import HERE, read_results

TRAINED = {"none": "nothing", "lora": "LoRA", "full": "all weights", "frozen": "the mixer"}
FIELDS = ("arm", "tuning", "seed", "steps", "depth_rate")


def key(run: dict) -> tuple:
    return tuple(run[name] for name in FIELDS)


def expand(grid: dict) -> list[dict]:
    """The runs in order; `depth_rate` is `None` without a depth mixer, and "best" where a sweep has to say."""
    runs = []
    for stage in grid["stages"]:
        for arm in stage["arms"]:
            mixes = grid["arms"][arm] is not None
            for rate in stage.get("depth_rates", ["best"]) if mixes else [None]:
                for seed in stage["seeds"]:
                    run = {"arm": arm, "tuning": stage["tuning"], "seed": seed, "steps": grid["steps"]}
                    runs.append(run | {"depth_rate": rate})
    return runs


def best_rate(run: dict, results: list[dict]) -> float | None:
    """The depth mixer's rate with the lowest validation loss in the arm's own sweep, or in that of block."""
    for arm in (run["arm"], "block"):
        swept = [r for r in results if r["seed"] == 0 and (r["arm"], r["tuning"]) == (arm, run["tuning"])]
        swept = [result for result in swept if isfinite(result["validation_loss"])]
        if swept:
            return min(swept, key=lambda r: r["validation_loss"])["depth_rate"]
    return None


def read_tokens(tokenizer, grid: dict) -> dict[str, torch.Tensor]:
    """`[rows, length]` per split, the same for all runs, from files in random order; kept after the first time."""
    length = grid["sequence_length"]
    wanted = {"train": grid["train_rows"], "validation": grid["rows"], "held_out": grid["rows"]}
    path = cache_folder() / f"smollm2-{length}-{grid['train_rows']}-{grid['rows']}.pt"
    if not path.exists():
        texts = without_near_duplicates(read_texts(cache_folder() / "packages"))
        names, rows = sorted(texts), {}
        random.Random(0).shuffle(names)
        for split, count in wanted.items():
            parts = []
            for name in (name for name in names if split_of(name) == split):
                ids = tokenizer(texts[name][: 16 * length]).input_ids
                parts += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
                if len(parts) >= count:
                    break
            rows[split] = torch.tensor(parts[:count])
        unfinished = path.with_suffix(".unfinished")
        torch.save(rows, unfinished)
        unfinished.rename(path)
    return torch.load(path, weights_only=True)


def build(run: dict, grid: dict, plain: Path):
    """The model of a run, and its parameter groups."""
    torch.manual_seed(run["seed"])
    options, tuning = grid["arms"][run["arm"]], run["tuning"]
    if options is None:
        model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    else:
        model = AttnResForCausalLM.from_backbone(plain, dtype=torch.float32, **options)
    if tuning == "lora":
        saved = None if options is None else ["depth_mixer"]
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, modules_to_save=saved))
    for name, parameter in model.named_parameters():
        if tuning in ("frozen", "none"):
            parameter.requires_grad_(tuning == "frozen" and "depth_mixer" in name)
    trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    groups = [
        {"params": [each for name, each in trained if ("depth_mixer" in name) == depth], "lr": rate}
        for depth, rate in ((False, grid["rates"].get(tuning)), (True, run["depth_rate"]))
    ]
    return model, [group for group in groups if group["params"]]


@torch.no_grad()
def evaluate(model, rows: torch.Tensor) -> float:
    """Nats per token."""
    model.eval()
    losses = [model(input_ids=part, labels=part, use_cache=False).loss.item() for part in rows.split(2)]
    model.train()
    return sum(losses) / len(losses)


def train(run: dict, grid: dict, plain: Path, tokens: dict[str, torch.Tensor]) -> dict:
    """Trains one run; what it returns is its line of results."""
    model, groups = build(run, grid, plain)
    model.train()
    order = np.random.default_rng(run["seed"]).permutation(len(tokens["train"]))
    batches = [order[start : start + grid["batch_size"]] for start in range(0, len(order), grid["batch_size"])]
    seen, core, steps = hashlib.sha256(), 0.0, run["steps"]
    name, last = " ".join(str(run[field]) for field in FIELDS), None
    if groups:
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 8, num_training_steps=steps)
        for batch in tqdm(batches[:steps], desc=name, disable=None):
            started, rows = time.process_time(), tokens["train"][batch]
            seen.update(rows.numpy().tobytes())
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            core, last = core + time.process_time() - started, loss.item()
    split = "validation" if run["seed"] == 0 else "held_out"
    result = {f"{split}_loss": evaluate(model, tokens[split])}
    tokens_seen = steps * grid["batch_size"] * grid["sequence_length"] if groups else 0
    return (
        run
        | result
        | {
            "last_training_loss": last,
            "tokens": tokens_seen,
            "core_seconds": round(core, 1),
            "batches": seen.hexdigest()[:16],
            "torch": torch.__version__,
        }
    )


def report(results: list[dict]) -> str:
    """Markdown: validation loss by the depth mixer's rate, and held-out loss against plain of the same tuning."""
    swept, groups = defaultdict(dict), defaultdict(dict)
    for run in results:
        if run["seed"] == 0:
            swept[run["tuning"], run["arm"]][run["depth_rate"]] = run["validation_loss"]
        else:
            groups[run["tuning"], run["arm"], run["depth_rate"]][run["seed"]] = run
    rates = [None, *sorted({rate for losses in swept.values() for rate in losses if rate is not None})]
    names = ["no mixer" if rate is None else str(rate) for rate in rates]
    lines = [f"| trained | model | {' | '.join(names)} |", "|:--|:--|" + "--:|" * len(rates)]
    for (tuning, arm), losses in swept.items():
        shown = (_shown(losses[rate]) if rate in losses else "" for rate in rates)
        lines.append(f"| {TRAINED[tuning]} | {arm} | {' | '.join(shown)} |")
    lines += ["", "| trained | model | depth rate | seeds | nats/token | SD | less plain (95 %) | core s |"]
    lines += ["|:--|:--|--:|--:|--:|--:|:-:|--:|"]
    for (tuning, arm, rate), runs in groups.items():
        losses = [run["held_out_loss"] for run in runs.values()]
        spread = f"{np.std(losses, ddof=1):.3f}" if len(losses) > 1 else ""
        # Of a plain model nothing would be trained if its backbone were frozen.
        plain = groups.get(("lora" if tuning == "frozen" else tuning, "plain", None), {})
        against = "" if arm == "plain" else mean_difference(runs, plain)
        core = np.mean([run["core_seconds"] for run in runs.values()])
        numbers = f"{len(runs)} | {np.mean(losses):.3f} | {spread} | {against} | {core:.0f}"
        lines.append(f"| {TRAINED[tuning]} | {arm} | {rate or ''} | {numbers} |")
    return "\n".join(lines) + "\n"


def _shown(loss: float) -> str:
    return f"{loss:.3f}" if isfinite(loss) else "diverged"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=Path, default=HERE / "retrofit.yaml", help="the runs")
    parser.add_argument("--results", type=Path, default=HERE / "retrofit.jsonl", help="JSON lines, appended to")
    parser.add_argument("--minutes", type=float, default=1e9, help="after which no run is started")
    parser.add_argument("--report", action="store_true", help="print the tables of what is finished, and train nothing")
    options = parser.parse_args()
    if options.report:
        print(report(read_results(options.results)), end="")
        return
    if not (cache_folder() / "packages").is_dir():
        parser.error("the text is missing; fetch it with `python -m benchmarks.study.corpus`.")
    grid, stop = yaml.safe_load(options.grid.read_text(encoding="utf-8")), time.monotonic() + 60 * options.minutes
    torch.set_num_threads(grid["threads"])
    plain = cache_folder() / "smollm2"
    if not plain.is_dir():
        smollm2.save_plain(smollm2.fetch(smollm2.weights_folder()), plain)
    tokens = read_tokens(AutoTokenizer.from_pretrained(plain), grid)
    results = read_results(options.results)
    for run in expand(grid):
        if run["depth_rate"] == "best":
            run["depth_rate"] = best_rate(run, results)
        if key(run) in {key(result) for result in results}:
            continue
        if time.monotonic() > stop:
            break
        results.append(train(run, grid, plain, tokens))
        with options.results.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(results[-1]) + "\n")
        print(json.dumps(results[-1]), flush=True)


if __name__ == "__main__":
    main()
