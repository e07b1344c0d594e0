"""Traffic between pipeline stages, counted beside the paper's formulas, and time beside standard residuals.

    python benchmarks/pipeline.py --ranks 4 --virtual-stages 2

Trains a small Qwen3-like model with random weights over pipeline stages; each rank is a gloo process on this machine.
Bytes per token are those that the ranks really send, with every block sent every time (naive) and with cross-stage
caching (cached). "Stored" blocks are the most values at a time in a rank's store, over all micro-batches under way;
"alive" blocks the most sources whose memory a rank uses for any reason. Times are of a training step without the
optimiser, each divided by that of standard residuals in the same schedule and round.

P ranks, V virtual stages each, C = P V stages, N_p blocks (in full mode: sublayer outputs) per stage.
"""

import argparse
import json
import os
import statistics
import sys
import time

import torch
import torch.distributed as dist
from processes import run_ranks
from transformers import AutoConfig

from attnres import AttnResConfig
from attnres.parallel import Pipeline

VOCABULARY = 512  # small, so that the head does not hide the cost of crossing
HEAD_SIZE = 32
BASELINE = "standard"
GOAL = 0.04  # of the time with standard residuals (paper, section 4.1)


def naive_blocks(ranks: int, virtual_stages: int, blocks_per_stage: float) -> float:
    """The paper's C (C - 1) / 2 N_p: blocks per token that cross without caching, over all stages."""
    stages = ranks * virtual_stages
    return stages * (stages - 1) / 2 * blocks_per_stage


def cached_blocks(ranks: int, virtual_stages: int, blocks_per_stage: float) -> float:
    """The paper's P (P - 1) / 2 N_p + (V - 1) P^2 N_p: blocks per token that cross with cross-stage caching."""
    return (ranks * (ranks - 1) / 2 + (virtual_stages - 1) * ranks**2) * blocks_per_stage


FORMULAS = {"naive": naive_blocks, "cached": cached_blocks}


def config_of(options: argparse.Namespace, mode: str) -> AttnResConfig:
    backbone = AutoConfig.for_model(
        "qwen3",
        vocab_size=VOCABULARY,
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // HEAD_SIZE,
        num_key_value_heads=options.hidden_size // HEAD_SIZE // 2,
        head_dim=HEAD_SIZE,
        tie_word_embeddings=False,
    )
    return AttnResConfig(
        backbone_config=backbone,
        residual_mode=mode,
        layers_per_block=options.layers_per_block,
        dtype=torch.float32,
    )


def pipeline_of(options: argparse.Namespace, mode: str, way: str) -> Pipeline:
    torch.manual_seed(dist.get_rank())
    pipeline = Pipeline(
        config_of(options, mode),
        schedule=options.schedule,
        virtual_stages=options.virtual_stages,
        micro_batches=options.micro_batches,
        caching=way == "cached",
    )
    with torch.no_grad():
        for name, parameter in pipeline.named_parameters():
            if name.endswith(".query"):  # zero ones would weigh all sources alike
                parameter.normal_(std=options.hidden_size**-0.5)
    return pipeline


def measure(options: argparse.Namespace) -> dict:
    """Counts one step of every mode and way on this rank, then times the modes in rounds."""

    def progress(line: str):
        if dist.get_rank() == 0:
            print(line, file=sys.stderr, flush=True)

    ways = [(BASELINE, "cached"), *((mode, way) for mode in options.modes for way in FORMULAS)]
    pipelines = {each: pipeline_of(options, *each) for each in ways}
    input_ids = torch.randint(
        VOCABULARY, (options.micro_batches, options.tokens), generator=torch.Generator().manual_seed(0)
    )
    counted = {}
    for (mode, way), pipeline in pipelines.items():
        progress(f"counting {mode}, {way}")
        pipeline.step(input_ids, input_ids)
        pipeline.zero_grad()
        traffic, store = pipeline.traffic, pipeline.store
        counted[mode, way] = {
            "forward": traffic.forward,
            "sources": traffic.forward_sources,
            "backward": traffic.backward,
            "stored": store.peak_stored,
            "alive": store.peak_alive,
        }
    modes = [BASELINE, *options.modes]
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    for number in range(options.rounds):
        progress(f"round {number + 1} of {options.rounds}")
        first = number % len(modes)
        for mode in modes[first:] + modes[:first]:
            dist.barrier()
            start = time.perf_counter()
            pipelines[mode, "cached"].step(input_ids, input_ids)
            seconds[mode].append(time.perf_counter() - start)
            pipelines[mode, "cached"].zero_grad()
    return {"counted": counted, "seconds": seconds}


def traffic_of(options: argparse.Namespace, mode: str, way: str, ranks: list[dict]) -> dict:
    size, tokens = 4 * options.hidden_size, options.tokens * options.micro_batches
    total = {name: sum(rank[name] for rank in ranks) / tokens for name in ("forward", "sources", "backward")}
    found = {
        "forward_bytes_per_token": total["forward"],
        "backward_bytes_per_token": total["backward"],
        "stored_blocks_peak_per_rank": [rank["stored"] for rank in ranks],
        "alive_blocks_peak_per_rank": [rank["alive"] for rank in ranks],
    }
    if mode == BASELINE:
        return found
    config, stages = config_of(options, mode), options.ranks * options.virtual_stages
    per_stage = (config.num_blocks if mode == "block" else config.num_sublayers) / stages
    formula = FORMULAS[way](options.ranks, options.virtual_stages, per_stage)
    # The embedding is a source too; with caching a rank is not sent the blocks that it has completed itself.
    difference = {
        "embedding": (stages if way == "naive" else options.ranks) - 1,
        "own_blocks": 0.0 if way == "naive" else -(options.virtual_stages - 1) * options.ranks * per_stage,
        "partial_sums": (total["forward"] - total["sources"]) / size,
    }
    difference["uneven"] = total["forward"] / size - formula - sum(difference.values())
    return {
        **found,
        "blocks_per_stage": per_stage,
        "formula_bytes_per_token": formula * size,
        "difference_bytes_per_token": {name: value * size for name, value in difference.items()},
    }


def times_of(ranks: list[dict[str, list[float]]]) -> dict:
    """Returns the times of each mode, a step's time being that of its slowest rank."""
    seconds = {mode: [max(times) for times in zip(*(rank[mode] for rank in ranks), strict=True)] for mode in ranks[0]}
    found = {}
    for mode, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds[BASELINE], strict=True)]
        found[mode] = {
            "median_seconds": statistics.median(values),
            "overhead": statistics.median(ratios) - 1,
            "overhead_of_rounds": [ratio - 1 for ratio in ratios],
        }
    return found


def print_tables(options: argparse.Namespace, result: dict):
    print(
        f"{options.ranks} ranks, {options.virtual_stages} virtual stages each, {options.schedule}, {options.layers} "
        f"decoder layers, {options.layers_per_block} per block, D {options.hidden_size}, {options.micro_batches} "
        f"micro-batches of {options.tokens} tokens, float32. Bytes per token, and the most blocks on each rank:\n"
    )
    row = "{:<15}{:<9}{:<9}{:<10}{:<15}{}"
    print(row.format("", "formula", "forward", "backward", "stored blocks", "alive blocks"))
    for name, found in result["traffic"].items():
        numbers = [found.get(f"{kind}_bytes_per_token", "") for kind in ("formula", "forward", "backward")]
        peaks = ["/".join(map(str, found[f"{kind}_blocks_peak_per_rank"])) for kind in ("stored", "alive")]
        print(row.format(name, *(f"{each:,.0f}" if each != "" else "" for each in numbers), *peaks))
    print()
    for name, found in result["traffic"].items():
        parts = found.get("difference_bytes_per_token", {})
        said = [f"{part.replace('_', ' ')} {value:+,.0f}" for part, value in parts.items() if abs(value) > 0.5]
        if said:
            print(f"{name}: measured less formula is {', '.join(said)}")
    if options.rounds:
        print(f"\nTime of a step, median of {options.rounds} rounds (the paper's goal: {100 * GOAL:+.0f} %)\n")
        for mode, found in result["times"].items():
            print(f"{mode:<9} {found['median_seconds']:.3f} s  {100 * found['overhead']:+.1f} %")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="processes, the paper's P (default: %(default)s)")
    parser.add_argument("--virtual-stages", type=int, default=2, help="stages per rank, V (default: %(default)s)")
    parser.add_argument("--schedule", default="interleaved-1f1b", help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, help="decoder layers (default: 2 per stage)")
    parser.add_argument("--layers-per-block", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=256, help="D, a multiple of 64 (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of a micro-batch, one sequence (default: %(default)s)")
    parser.add_argument("--micro-batches", type=int, help="of a step (default: 2 per rank)")
    parser.add_argument("--modes", nargs="+", choices=("block", "full"), default=["block", "full"])
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each mode (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    options.layers = options.layers or 2 * options.ranks * options.virtual_stages
    options.micro_batches = options.micro_batches or 2 * options.ranks
    ranks = run_ranks(measure, options.ranks, options, threads=max(1, (os.cpu_count() or 1) // options.ranks))
    result = {
        "settings": vars(options),
        "traffic": {
            mode if mode == BASELINE else f"{mode}, {way}": traffic_of(
                options, mode, way, [rank["counted"][mode, way] for rank in ranks]
            )
            for mode, way in ranks[0]["counted"]
        },
        "times": times_of([rank["seconds"] for rank in ranks]) if options.rounds else {},
    }
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print_tables(options, result)


if __name__ == "__main__":
    main()
