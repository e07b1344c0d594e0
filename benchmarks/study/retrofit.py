"""Continues SmolLM2-135M-Instruct on the study's text: plain, and converted with several ways of mixing.

    python -m benchmarks.study.retrofit --minutes 60

Runs of `retrofit.yaml` that have no result yet, in order; one JSON line for each that finishes. All start from the same
function, or say what their variant makes of it, and see the same batches for the same seed. Learning rates are chosen
on validation text with seed 0, that of the backbone or its adapter with the plain model; the held-out text is read
once, at the end of other runs.
"""

import argparse
import hashlib
import json
import random
import sys
import time
from collections import defaultdict
from math import isfinite
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from attnres import AttnResForCausalLM
from attnres.configuration_attnres import DEPTH_OPTIONS
from attnres.demo import smollm2
from attnres.messages import one_line

from . import files
from .corpus import cache_folder, read_texts, split_of, without_near_duplicates
from .report import mean_difference
from .train import HERE

TRAINED = {"none": "nothing", "lora": "LoRA", "full": "all weights", "frozen": "the mixer"}
FIELDS = ("arm", "tuning", "seed", "steps", "rate", "depth_rate")
TUNES_BACKBONE = ("lora", "full")


def key(run: dict) -> tuple:
    return tuple(run[name] for name in FIELDS)


SETTINGS = {
    "sequence_length": files.LENGTH,
    "batch_size": files.WHOLE,
    "steps": files.WHOLE,
    "train_rows": files.WHOLE,
    "rows": files.WHOLE,
    "threads": files.WHOLE,
    "arms": files.MAPPING,
    "stages": files.STAGES,
}


def read_grid(path: Path) -> dict:
    """Reads a grid, and refuses one with runs that cannot be started."""
    grid = files.read_yaml(path)
    files.check(grid, SETTINGS, str(path))
    if grid["train_rows"] < grid["steps"] * grid["batch_size"]:
        raise ValueError(f"train_rows of {path} must be at least steps * batch_size, got {grid['train_rows']}")
    options = dict.fromkeys(DEPTH_OPTIONS, files.ANYTHING)
    for name, arm in grid["arms"].items():
        files.check({} if arm is None else arm, options, f"arm {name!r} of {path}", optional=options)
    numbers = {"seeds": files.SEED, "rates": files.POSITIVE, "depth_rates": files.POSITIVE}
    rules = {name: files.each_of(rule) for name, rule in {"arms": files.one_of(grid["arms"]), **numbers}.items()}
    rules["tuning"] = files.one_of(TRAINED)
    swept = set()  # (tuning, arm, which rate)
    for number, stage in enumerate(grid["stages"], 1):
        place = f"stage {number} of {path}"
        files.check(stage, rules, place, optional=("rates", "depth_rates"))
        tuning = stage["tuning"]
        swept |= {(tuning, arm, name) for name in stage if 0 in stage["seeds"] for arm in stage["arms"]}
        for arm in stage["arms"]:
            mixes = grid["arms"][arm] is not None
            if tuning == "frozen" and not mixes:
                raise ValueError(f"{place} trains the mixer alone, and {arm!r} has none; take it out")
            if tuning in TUNES_BACKBONE and "rates" not in stage and (tuning, "plain", "rates") not in swept:
                raise ValueError(
                    f"{place} needs a rate for {arm}; give rates, or a sweep of plain with seed 0 before it"
                )
            if (
                mixes
                and "depth_rates" not in stage
                and not swept & {(tuning, each, "depth_rates") for each in (arm, "block")}
            ):
                raise ValueError(
                    f"{place} needs a depth rate for {arm}; give depth_rates, or a sweep with seed 0 before it"
                )
    return grid


def expand(grid: dict) -> list[dict]:
    """The runs in order; a rate is `None` where nothing is trained at it, and "best" where a sweep has to say."""
    runs = []
    for stage in grid["stages"]:
        tuning = stage["tuning"]
        for arm in stage["arms"]:
            for rate in stage.get("rates", ["best"]) if tuning in TUNES_BACKBONE else [None]:
                for depth_rate in [None] if grid["arms"][arm] is None else stage.get("depth_rates", ["best"]):
                    for seed in stage["seeds"]:
                        run = {"arm": arm, "tuning": tuning, "seed": seed, "steps": grid["steps"]}
                        runs.append(run | {"rate": rate, "depth_rate": depth_rate})
    return runs


def best_rate(results: list[dict], tuning: str, arms: tuple[str, ...], name: str) -> float | None:
    """The rate with the lowest validation loss in the sweep of the first of `arms` that has one; `None` if none has."""
    for arm in arms:
        swept = [run for run in results if run["seed"] == 0 and (run["arm"], run["tuning"]) == (arm, tuning)]
        swept = [run for run in swept if isfinite(run["validation_loss"])]
        if swept:
            return min(swept, key=lambda run: run["validation_loss"])[name]
    return None


def with_best_rates(run: dict, results: list[dict]) -> dict:
    """A run with the rates of sweeps in place of "best": plain's for the backbone, its own or block's for the mixer."""
    found = {
        "rate": best_rate(results, run["tuning"], ("plain",), "rate"),
        "depth_rate": best_rate(results, run["tuning"], (run["arm"], "block"), "depth_rate"),
    }
    return run | {name: rate for name, rate in found.items() if run[name] == "best"}


def read_tokens(tokenizer, grid: dict) -> dict[str, torch.Tensor]:
    """`[rows, length]` per split, the same for all runs, from files in random order; kept after the first time."""
    length = grid["sequence_length"]
    wanted = {"train": grid["train_rows"], "validation": grid["rows"], "held_out": grid["rows"]}
    path = cache_folder() / f"smollm2-{length}-{grid['train_rows']}-{grid['rows']}.safetensors"
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
        save_file(rows, unfinished)
        unfinished.rename(path)
    return load_file(path)


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
        for depth, rate in ((False, run["rate"]), (True, run["depth_rate"]))
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
    """Markdown: validation loss by learning rate, and held-out loss against plain trained in the same way."""
    of_plain, of_mixer, groups = defaultdict(dict), defaultdict(dict), defaultdict(dict)
    for run in results:
        if run["seed"]:
            groups[run["tuning"], run["arm"], run["rate"], run["depth_rate"]][run["seed"]] = run
        elif run["arm"] == "plain":
            of_plain[run["tuning"],][run["rate"]] = run["validation_loss"]
        else:
            of_mixer[run["tuning"], run["arm"], run["rate"]][run["depth_rate"]] = run["validation_loss"]
    lines = [*sweep_table(["trained"], of_plain), "", *sweep_table(["trained", "model", "rate"], of_mixer)]
    lines += ["", "| trained | model | rate | depth rate | seeds | nats/token | SD | less plain (95 %) | core s |"]
    lines += ["|:--|:--|--:|--:|--:|--:|--:|:-:|--:|"]
    for (tuning, arm, rate, depth_rate), runs in groups.items():
        losses = [run["held_out_loss"] for run in runs.values()]
        spread = f"{np.std(losses, ddof=1):.3f}" if len(losses) > 1 else ""
        # Of a plain model nothing would be trained if its backbone were frozen.
        like = ("lora", best_rate(results, "lora", ("plain",), "rate")) if tuning == "frozen" else (tuning, rate)
        plain = groups.get((like[0], "plain", like[1], None), {})
        against = "" if arm == "plain" else mean_difference(runs, plain)
        core = np.mean([run["core_seconds"] for run in runs.values()])
        numbers = f"{len(runs)} | {np.mean(losses):.3f} | {spread} | {against} | {core:.0f}"
        lines.append(f"| {TRAINED[tuning]} | {arm} | {rate or ''} | {depth_rate or ''} | {numbers} |")
    return "\n".join(lines) + "\n"


def sweep_table(heading: list[str], swept: dict[tuple, dict[float | None, float]]) -> list[str]:
    """Validation loss by learning rate, a row per key of `swept`, whose first entry is what was trained."""
    rates = sorted({rate for losses in swept.values() for rate in losses}, key=lambda rate: rate or 0.0)
    columns = [*heading, *("no training" if rate is None else str(rate) for rate in rates)]
    lines = [f"| {' | '.join(columns)} |", "|" + ":--|" * len(heading) + "--:|" * len(rates)]
    for (tuning, *rest), losses in swept.items():
        shown = [_shown(losses[rate]) if rate in losses else "" for rate in rates]
        lines.append(f"| {' | '.join([TRAINED[tuning], *(str(each or '') for each in rest), *shown])} |")
    return lines


def _shown(loss: float) -> str:
    return f"{loss:.3f}" if isfinite(loss) else "diverged"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=Path, default=HERE / "retrofit.yaml", help="the runs")
    parser.add_argument("--results", type=Path, default=HERE / "retrofit.jsonl", help="JSON lines, appended to")
    parser.add_argument("--minutes", type=files.positive, default=1e9, help="after which no run is started")
    parser.add_argument("--report", action="store_true", help="print the tables of what is finished, and train nothing")
    options = parser.parse_args()
    try:
        files.check_folder_of(options.results)
        grid, results = read_grid(options.grid), files.read_results(options.results, FIELDS)
    except ValueError as error:
        parser.error(str(error))
    if options.report:
        print(report(results), end="")
        return 0
    if not (cache_folder() / "packages").is_dir():
        parser.error("the text is missing; fetch it with `python -m benchmarks.study.corpus`.")
    stop = time.monotonic() + 60 * options.minutes
    torch.set_num_threads(grid["threads"])
    plain = cache_folder() / "smollm2"
    if not plain.is_dir():
        smollm2.save_plain(smollm2.fetch(smollm2.weights_folder()), plain)
    tokens = read_tokens(AutoTokenizer.from_pretrained(plain), grid)
    done, failures = {key(result) for result in results}, 0
    for run in expand(grid):
        run = with_best_rates(run, results)
        if key(run) in done:
            continue
        if time.monotonic() > stop:
            break
        if (run["tuning"] in TUNES_BACKBONE and run["rate"] is None) or (
            grid["arms"][run["arm"]] and not run["depth_rate"]
        ):
            print(*key(run), "not started: every run of the sweep diverged or failed", file=sys.stderr, flush=True)
            failures += 1
            continue
        try:
            result = train(run, grid, plain, tokens)
        except Exception as error:
            print(*key(run), f"failed: {type(error).__name__}: {one_line(error)}", file=sys.stderr, flush=True)
            failures += 1
            continue
        results.append(result)
        done.add(key(result))
        files.append(options.results, result)
        print(json.dumps(result), flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
