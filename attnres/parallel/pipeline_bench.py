"""What pipeline parallelism costs: bytes that cross between stages beside the paper's formulas, blocks that ranks hold,
and time beside standard residuals in the same schedule. Starts its own processes on this machine.

Symbols as in traffic.py: P ranks, V virtual stages each, C = P V stages, N_p blocks per rank and virtual stage.
"""

import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from transformers import AutoConfig

from ..configuration_attnres import RESIDUAL_MODES, AttnResConfig
from .launch import run_ranks
from .pipeline import Pipeline
from .runtime import SCHEDULES, check_schedule
from .traffic import cached_blocks, naive_blocks, split_layers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VOCABULARY = 512  # small, so that the head does not hide what crossing costs
HEAD_SIZE = 32
BASELINE = "standard"
GOAL = 0.04  # of the wall-clock time of standard residuals (paper, section 4.1)
WAYS = ("naive", "cached")


@dataclass(frozen=True)
class Settings:
    """Everything that determines a run; where it is `None`, the default follows from the number of stages.

    Attributes:
        layers: decoder layers. Default: 2 per stage.
        layers_per_block: Default: 2, with the default of layers one block per stage.
        tokens: of a micro-batch, one sequence.
        micro_batches: Default: 2 per rank.
        modes: of the residuals, besides standard ones.
        rounds: in each of them every variant runs once; 0: nothing is timed.
    """

    ranks: int = 4
    virtual_stages: int = 2
    schedule: str = "interleaved-1f1b"
    layers: int | None = None
    layers_per_block: int = 2
    hidden_size: int = 256
    tokens: int = 128
    micro_batches: int | None = None
    modes: tuple[str, ...] = ("block", "full")
    dtype: str = "float32"
    rounds: int = 5
    seed: int = 0

    def __post_init__(self):
        if self.ranks < 2:
            raise ValueError(f"ranks must be at least 2, got {self.ranks}.")
        stages = self.ranks * self.virtual_stages
        for name, value in (("layers", 2 * stages), ("micro_batches", 2 * self.ranks)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        modes = [mode for mode in RESIDUAL_MODES if mode != BASELINE]
        wrong = [mode for mode in self.modes if mode not in modes]
        if wrong or not self.modes:
            raise ValueError(f"modes must be some of {', '.join(modes)}, got {', '.join(wrong) or 'none'}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.hidden_size % (2 * HEAD_SIZE):
            raise ValueError(f"hidden_size must be a multiple of {2 * HEAD_SIZE}, got {self.hidden_size}.")
        if self.tokens < 2:
            raise ValueError(f"tokens must be at least 2, got {self.tokens}: a label is the token that follows.")
        check_schedule(self.schedule, self.ranks, self.virtual_stages, self.micro_batches)
        split_layers(self.layers, stages)
        self.config(BASELINE)

    def config(self, mode: str) -> AttnResConfig:
        """Of the model that is measured: Qwen3-like, with random weights."""
        backbone = AutoConfig.for_model(
            "qwen3",
            vocab_size=VOCABULARY,
            hidden_size=self.hidden_size,
            intermediate_size=3 * self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden_size // HEAD_SIZE,
            num_key_value_heads=self.hidden_size // HEAD_SIZE // 2,
            head_dim=HEAD_SIZE,
            tie_word_embeddings=False,
        )
        return AttnResConfig(
            backbone_config=backbone,
            residual_mode=mode,
            layers_per_block=self.layers_per_block,
            dtype=DTYPES[self.dtype],
        )


def run(settings: Settings) -> dict:
    """Measures, in `settings.ranks` processes of its own.

    Returns:
        Settings; per mode and way ("naive", "cached") the traffic and what ranks held; per variant the times.

    Raises:
        PipelineError: a rank was lost or failed.
    """
    threads = max(1, (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) // settings.ranks)
    each_rank = run_ranks(_measure, settings.ranks, settings, threads=threads)
    modes = {}
    for mode in (BASELINE, *settings.modes):
        ways = ("cached",) if mode == BASELINE else WAYS
        modes[mode] = {way: _traffic_of(settings, mode, way, [rank[mode, way] for rank in each_rank]) for way in ways}
    return {
        "settings": asdict(settings),
        "tokens_per_step": settings.tokens * settings.micro_batches,
        "threads_per_rank": threads,
        "traffic": modes,
        "wall_clock": _times_of(settings, [rank["seconds"] for rank in each_rank]),
        "notes": NOTES,
    }


NOTES = {
    "bytes_per_token": "sum over all ranks, by a step's number of tokens",
    "formula": "the paper's: naive C(C-1)/2 N_p D, cached (P(P-1)/2 + (V-1) P^2) N_p D, times bytes per number; "
    "N_p: blocks (in full mode sublayer outputs) by stages",
    "difference": "what measured forward bytes have more or less than the formula: the embedding is a source too and "
    "crosses (C-1 times, cached P-1); a rank is not sent back the blocks that it completed itself (cached, -(V-1) P "
    "N_p); partial sums of blocks that straddle stages cross as well; uneven: stages that differ",
    "stored_blocks": "most values at a time in the store that a rank's stages share, all micro-batches under way",
    "alive_blocks": "most sources at a time whose memory a rank uses, for the store, messages or backward",
    "wall_clock": "ratio of a step's time to standard residuals in the same schedule and round; without the optimiser",
}


def _traffic_of(settings: Settings, mode: str, way: str, ranks: list[dict]) -> dict:
    size = DTYPES[settings.dtype].itemsize * settings.hidden_size
    tokens = settings.tokens * settings.micro_batches
    total = {name: sum(rank[name] for rank in ranks) / tokens for name in ("forward", "sources", "backward")}
    found = {
        "forward_bytes_per_token": total["forward"],
        "backward_bytes_per_token": total["backward"],
        "stored_blocks_peak_per_rank": [rank["stored"] for rank in ranks],
        "alive_blocks_peak_per_rank": [rank["alive"] for rank in ranks],
    }
    if mode == BASELINE:
        return found
    config, count, virtual = settings.config(mode), settings.ranks, settings.virtual_stages
    stages = count * virtual
    per_stage = (config.num_blocks if mode == "block" else config.num_sublayers) / stages
    formula = (naive_blocks if way == "naive" else cached_blocks)(count, virtual, per_stage)
    difference = {
        "embedding": (stages if way == "naive" else count) - 1,
        "own_blocks": 0.0 if way == "naive" else -(virtual - 1) * count * per_stage,
        "partial_sums": (total["forward"] - total["sources"]) / size,
    }
    difference["uneven"] = total["forward"] / size - formula - sum(difference.values())
    return {
        "blocks_per_stage": per_stage,
        "formula_bytes_per_token": formula * size,
        **found,
        "difference_bytes_per_token": {name: value * size for name, value in difference.items()},
    }


def _times_of(settings: Settings, each_rank: list[dict[str, list[float]]]) -> dict:
    """A step takes as long as its slowest rank."""
    if not settings.rounds:
        return {}
    seconds = {
        arm: [max(times) for times in zip(*(rank[arm] for rank in each_rank), strict=True)] for arm in each_rank[0]
    }
    found = {}
    for arm, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds[BASELINE], strict=True)]
        found[arm] = {
            "median_seconds": statistics.median(values),
            "overhead": statistics.median(ratios) - 1,
            "overhead_of_rounds": [ratio - 1 for ratio in ratios],
        }
    return {"goal": GOAL, "rounds": settings.rounds, "arms": found}


def _measure(settings: Settings) -> dict:
    """What one rank does: one counted step of every variant, then the rounds."""
    pipelines = {}
    for mode in (BASELINE, *settings.modes):
        for way in ("cached",) if mode == BASELINE else WAYS:
            pipelines[mode, way] = _pipeline(settings, mode, way == "cached")
    generator = torch.Generator().manual_seed(settings.seed)
    input_ids = torch.randint(VOCABULARY, (settings.micro_batches, settings.tokens), generator=generator)
    found: dict = {}
    for (mode, way), pipeline in pipelines.items():
        _progress(f"counting {mode}, {way}")
        pipeline.step(input_ids, input_ids)
        found[mode, way] = {
            "forward": pipeline.traffic.forward,
            "sources": pipeline.traffic.forward_sources,
            "backward": pipeline.traffic.backward,
            "stored": pipeline.store.peak_stored,
            "alive": pipeline.store.peak_alive,
        }
        pipeline.zero_grad()
    timed = {mode: pipeline for (mode, way), pipeline in pipelines.items() if way == "cached"}
    names, seconds = list(timed), {mode: [] for mode in timed}
    for number in range(settings.rounds):
        _progress(f"round {number + 1} of {settings.rounds}")
        first = number % len(names)
        for mode in names[first:] + names[:first]:
            dist.barrier()
            start = time.perf_counter()
            timed[mode].step(input_ids, input_ids)
            seconds[mode].append(time.perf_counter() - start)
            timed[mode].zero_grad()
    return {**found, "seconds": seconds}


def _pipeline(settings: Settings, mode: str, caching: bool) -> Pipeline:
    torch.manual_seed(settings.seed + dist.get_rank())
    pipeline = Pipeline(
        settings.config(mode),
        schedule=settings.schedule,
        virtual_stages=settings.virtual_stages,
        micro_batches=settings.micro_batches,
        caching=caching,
    )
    with torch.no_grad():
        for name, parameter in pipeline.named_parameters():
            if name.endswith(".query"):  # zero ones would weigh all sources alike
                parameter.normal_(std=settings.hidden_size**-0.5)
    return pipeline


def _progress(line: str):
    if dist.get_rank() == 0:
        print(f"attnres: {line}", file=sys.stderr, flush=True)


def as_text(result: dict) -> str:
    """The result as a table."""
    settings = result["settings"]
    head = ("", "formula", "forward", "backward", "stored blocks", "alive blocks")
    rows = [head]
    for mode, ways in result["traffic"].items():
        for way, found in ways.items():
            formula = found.get("formula_bytes_per_token")
            rows.append(
                (
                    mode if mode == BASELINE else f"{mode}, {way}",
                    "" if formula is None else f"{formula:,.0f}",
                    f"{found['forward_bytes_per_token']:,.0f}",
                    f"{found['backward_bytes_per_token']:,.0f}",
                    "/".join(map(str, found["stored_blocks_peak_per_rank"])),
                    "/".join(map(str, found["alive_blocks_peak_per_rank"])),
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        f"{settings['ranks']} ranks, {settings['virtual_stages']} virtual stages each, {settings['schedule']}, "
        f"{settings['layers']} decoder layers, {settings['layers_per_block']} per block, D {settings['hidden_size']}, "
        f"{settings['micro_batches']} micro-batches of {settings['tokens']} tokens, {settings['dtype']}",
        "",
        "Bytes per token that cross between ranks, by the paper's formula and measured; most blocks per rank",
        "",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
        "",
    ]
    for mode, ways in result["traffic"].items():
        for way, found in ways.items():
            difference = found.get("difference_bytes_per_token", {})
            parts = {name: value for name, value in difference.items() if abs(value) > 0.5}
            if parts:
                said = ", ".join(f"{name.replace('_', ' ')} {value:+,.0f}" for name, value in parts.items())
                lines.append(f"{mode}, {way}: measured less formula is {said}")
    if result["wall_clock"]:
        lines += ["", f"Wall clock beside standard residuals, median of {settings['rounds']} rounds (goal: +4 %)", ""]
        for arm, found in result["wall_clock"]["arms"].items():
            lines.append(f"{arm:<9} {found['median_seconds']:.3f} s per step  {100 * found['overhead']:+.1f} %")
    return "\n".join(lines)


__all__ = ["DTYPES", "SCHEDULES", "Settings", "as_text", "run"]
