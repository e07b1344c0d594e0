"""Times a training step of every model of the grid, and writes one JSON line for each.

    python -m benchmarks.study.speed

The runs of the study were made over weeks, several at a time, on machines of changing speed: their times say little.
Here the models of a size alternate step by step, in random order, in one process of one thread, so that a slow spell
affects all of them. Run it on a machine that does nothing else.
"""

import argparse
import json
import random
from pathlib import Path

import torch

from attnres.bench.timing import Sample, compare, interleave

from .corpus import VOCABULARY
from .files import check_folder_of, whole
from .train import HERE, SCALED, build_model, build_optimizer, expand, read_grid

ROUNDS = 25


def training_step(model: torch.nn.Module, grid: dict, vocabulary: int) -> Sample:
    """A step as in training, on one random batch and with a learning rate that changes nothing."""
    ids = torch.randint(vocabulary, (grid["batch_size"], grid["sequence_length"]))
    optimizer = build_optimizer(model.train(), grid | {"adamw_learning_rate": 0.0}, 0.0)

    def run(_):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Sample(run)


def measure(grid: dict, size: str, arms: list[str], vocabulary: int, rounds: int) -> list[dict]:
    """One line per model of a size: median seconds of a step, and median and quartiles of the ratio to the first's."""
    settings = grid | grid["sizes"][size]
    samples = {
        arm: training_step(
            build_model(settings, grid["sizes"][size], grid["arms"][arm], vocabulary), settings, vocabulary
        )
        for arm in arms
    }
    shuffle, seconds = random.Random(0).shuffle, {arm: [] for arm in arms}
    for number in range(-2, rounds):  # the first two warm up
        order = list(arms)
        shuffle(order)
        for arm, (value,) in interleave({arm: samples[arm] for arm in order}, 1, warmup=0).items():
            if number >= 0:
                seconds[arm].append(value)
    found = compare(seconds, arms[0])
    return [
        {
            "size": size,
            "arm": arm,
            "seconds": round(found[arm]["seconds"]["median"], 5),
            "against": arms[0],
            "ratio": {name: round(value, 4) for name, value in found[arm]["ratio"].items()},
            "rounds": rounds,
            "torch": torch.__version__,
        }
        for arm in arms
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=Path, default=HERE / "grid.yaml", help="the runs")
    parser.add_argument("--out", type=Path, default=HERE / "speed.jsonl", help="JSON lines, written anew")
    parser.add_argument("--rounds", type=whole, default=ROUNDS, help="timed steps of each model (default: %(default)s)")
    options = parser.parse_args()
    try:
        check_folder_of(options.out)
        grid = read_grid(options.grid)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    arms = {}
    for run in expand(grid):
        if not run["sweep"]:
            arms.setdefault(run["size"], {})[run["arm"]] = None  # each once, in the grid's order
    lines = []
    for size, names in arms.items():
        plain = "plain" if "plain" in names else SCALED
        lines += measure(grid, size, [plain, *(name for name in names if name != plain)], VOCABULARY, options.rounds)
        for line in lines[-len(names) :]:
            print(f"{size}, {line['arm']}: {1e3 * line['seconds']:.1f} ms, {line['ratio']['median']:.3f}", flush=True)
    partial = options.out.with_suffix(".part")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    partial.replace(options.out)


if __name__ == "__main__":
    main()
