"""`attnres bench` and `attnres bench pipeline`."""

import json

import click

from ..bench.settings import DTYPES, FULL, MEASURES, QUICK, DepthShape
from ..folders import check_writable
from .options import NAMES, NUMBERS, SEED, Command, Group, Parsed, at_least, exclusive, register, whole
from .process import SOME_FAILED, require, say, wrote

HELP = """\
Times variants of one model in one process, interleaved: in every round each runs once, in an order that rotates, and
is divided by the transformers backbone with plain residuals in the same round. All share the backbone's weights and
have the same random pseudo-queries; before anything is timed, all are checked to compute the same logits. Takes a few
minutes on 2 cores. Lists are joined by commas, and every combination is measured.

Variants: plain (the transformers model itself), standard, block and full (this package), stacked and stacked-full (the
paper's pseudo-code inside the transformers model), fla-naive and fla-fused (flash-linear-attention's functions in their
place; left out where they cannot run).

Memory: "saved for backward" is counted with hooks on what autograd saves, each storage once, without parameters. "Peak"
is above what there was before: on CUDA by torch's allocator, on a CPU the sum of torch's own allocations from its
profiler, which does not see what libraries allocate for themselves.

\b
Measures:
""" + "\n".join(f"  {name:<15} {text}" for name, text in MEASURES.items())


def _listed(value) -> str:
    return ",".join(str(each) for each in (value if isinstance(value, tuple) else [value]))


def _default(name: str) -> str:
    full, quick = (_listed(getattr(settings, name)) for settings in (FULL, QUICK))
    return f"(default: {full})" if full == quick else f"(default: {full}; --quick: {quick})"


def _depth_shape(value: str) -> DepthShape:
    numbers = [whole(each, 1, None, "four whole numbers of at least 1: L,S,T,D") for each in value.split(",")]
    if len(numbers) != 4:
        raise ValueError(f"must be four whole numbers of at least 1: L,S,T,D, got {value}")
    return DepthShape(*numbers)


@click.command(
    "bench",
    cls=Group,
    invoke_without_command=True,
    help=HELP,
    short_help="time and memory beside the same backbone with plain residuals",
    subcommand_metavar="[pipeline]",
)
@click.option(
    "--model",
    metavar="MODEL",
    help="folder, config.json or hub id: its configuration with random weights (default: Qwen3-like, 12 layers)",
)
@click.option("--measure", "measures", metavar="NAMES", type=NAMES, help=f"of those above {_default('measures')}")
@click.option(
    "--variants", "--arms", "arms", metavar="NAMES", type=NAMES, help=f"plain is always one {_default('arms')}"
)
@click.option(
    "--implementations",
    metavar="NAMES",
    type=NAMES,
    help="of the depth mixing, such as eager: block and full once more with each (default: as shipped)",
)
@click.option("--depths", metavar="N", type=NUMBERS, help="decoder layers (default: the model's)")
@click.option("--num-blocks", metavar="N", type=NUMBERS, help=f"at most this many blocks {_default('num_blocks')}")
@click.option("--layers-per-block", metavar="K", type=NUMBERS, help="decoder layers per block, instead of --num-blocks")
@click.option("--tokens", metavar="T", type=NUMBERS, help=f"in prefill, train and memory {_default('tokens')}")
@click.option("--batches", metavar="B", type=NUMBERS, help=f"sequences at a time in decode {_default('batches')}")
@click.option("--context", metavar="TOKENS", type=at_least(1), help=f"before decode and generate {_default('context')}")
@click.option("--new-tokens", metavar="N", type=at_least(1), help=f"in decode and generate {_default('new_tokens')}")
@click.option("--dtype", "dtypes", metavar="NAMES", type=NAMES, help=f"of {', '.join(DTYPES)} {_default('dtypes')}")
@click.option(
    "--depth-shape",
    metavar="L,S,T,D",
    type=Parsed("shape", _depth_shape),
    help=f"of depth: sublayers, sublayers per block (the paper's S), tokens, hidden size {_default('depth_shape')}",
)
@click.option("--rounds", metavar="N", type=at_least(1), help=f"in which each variant runs {_default('rounds')}")
@click.option("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
@click.option("--threads", metavar="N", type=at_least(1), help="of torch on the CPU (default: torch's own)")
@click.option("--seed", metavar="N", type=SEED, default=0, help="of weights and tokens")
@click.option("--quick", is_flag=True, help="a small model and fewer rounds: a quick check that everything works")
@click.option("--out", metavar="DIR", default="bench-out", help="folder of results")
def bench(quick, out, **options):
    if click.get_current_context().invoked_subcommand is not None:
        return
    exclusive("num_blocks", "layers_per_block")
    require("matplotlib", extra="hub")
    register()
    from dataclasses import replace

    from ..bench.report import as_markdown, write
    from ..bench.runner import run

    check_writable(out)
    given = {name: value for name, value in options.items() if value is not None}
    result = run(replace(QUICK if quick else FULL, **given))
    written = write(result, out)
    print(as_markdown(result), end="")
    wrote(written, out)


@bench.command("pipeline", cls=Command, short_help="traffic between pipeline stages, and time")
@click.option("--ranks", metavar="N", type=at_least(1), default=4, help="processes, the paper's P; at least 2")
@click.option("--virtual-stages", metavar="N", type=at_least(1), default=2, help="stages on each rank, the paper's V")
@click.option("--layers", metavar="N", type=at_least(1), help="decoder layers (default: 2 per stage)")
@click.option("--layers-per-block", metavar="N", type=at_least(1), default=2, help="decoder layers in each block")
@click.option("--hidden-size", metavar="N", type=at_least(1), default=256, help="D, a multiple of 64")
@click.option("--tokens", metavar="N", type=at_least(1), default=128, help="of a micro-batch, which is one sequence")
@click.option("--micro-batches", metavar="N", type=at_least(1), help="of a step (default: 2 per rank)")
@click.option("--schedule", metavar="NAME", default="interleaved-1f1b", help="gpipe, 1f1b or interleaved-1f1b")
@click.option(
    "--modes", metavar="NAMES", type=NAMES, default="block,full", help="residual modes to measure beside standard"
)
@click.option("--dtype", metavar="NAME", default="float32", help=f"{DTYPES[0]} or {DTYPES[1]}")
@click.option("--rounds", metavar="N", type=at_least(0), default=5, help="timed steps of each variant, 0: none")
@click.option("--seed", metavar="N", type=SEED, default=0, help="of weights and tokens")
@click.option("--json", "as_json", is_flag=True, help="as JSON")
def pipeline(as_json, **options) -> int:
    """Trains a small Qwen3-like model with random weights over pipeline stages, each rank a process on this machine
    (gloo, CPU). Counts the bytes that really cross per token, with every block sent every time (naive) and with
    cross-stage caching (cached), beside the paper's two formulas; the most blocks that each rank holds; and the time of
    a step beside standard residuals in the same schedule, interleaved in rounds."""
    from ..parallel.pipeline_bench import Settings, as_text, run
    from ..parallel.watch import PipelineError

    try:
        result = run(Settings(**options))
    except PipelineError as error:
        say(f"error: {error}")
        return SOME_FAILED
    print(json.dumps(result, indent=1) if as_json else as_text(result))
    return 0
