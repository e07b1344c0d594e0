"""`attnres bench`."""

import click

from ..bench.settings import DTYPES, FULL, MEASURES, QUICK, DepthShape
from ..folders import check_writable
from .options import AT_LEAST_1, SEED, Command, device, names, numbers
from .process import require, wrote

HELP = """\
Times variants of one model in one process. In every round, each variant runs once, in a rotating order, and its time
is divided by that of the transformers backbone with plain residuals in the same round. All variants share the
backbone's weights and the same random pseudo-queries, and must compute the same logits before anything is timed. Takes
a few minutes on 2 cores. Lists are separated by commas, and every combination is measured.

Variants: plain (the transformers model itself), standard, block and full (this package), stacked and stacked-full (the
paper's pseudo-code inside the transformers model), fla-naive and fla-fused (flash-linear-attention's functions instead;
left out where they cannot run).

Memory: "saved for backward" counts what autograd saves, by hooks, each storage once and without parameters. "Peak" is
the increase over the memory in use before: on CUDA by torch's allocator, on a CPU by torch's profiler, which does not
see what other libraries allocate.

\b
Measures:
""" + "\n".join(f"  {name:<15} {text}" for name, text in MEASURES.items())


def _listed(value) -> str:
    return ",".join(str(each) for each in (value if isinstance(value, tuple) else [value]))


def _default(name: str) -> str:
    full, quick = (_listed(getattr(settings, name)) for settings in (FULL, QUICK))
    return f"(default: {full})" if full == quick else f"(default: {full}; --quick: {quick})"


def _depth_shape(value: str) -> DepthShape:
    sizes = numbers(value)
    if len(sizes) != 4:
        raise click.BadParameter(f"must be four whole numbers of at least 1: L,S,T,D, got {value}")
    try:
        return DepthShape(*sizes)
    except ValueError as error:  # whose text older versions of click do not show
        raise click.BadParameter(str(error)) from None


@click.command(
    "bench", cls=Command, help=HELP, short_help="compare time and memory with the same backbone with plain residuals"
)
@click.option(
    "--model",
    metavar="MODEL",
    help="folder, config.json or hub id of a configuration, for random weights (default: Qwen3-like, 12 layers)",
)
@click.option("--measure", "measures", metavar="NAMES", type=names, help=f"measures, see above {_default('measures')}")
@click.option(
    "--variants", "--arms", "arms", metavar="NAMES", type=names, help=f"variants; plain always runs {_default('arms')}"
)
@click.option(
    "--implementations",
    metavar="NAMES",
    type=names,
    help="depth implementations, such as eager, to run block and full with as well (default: none)",
)
@click.option("--depths", metavar="N", type=numbers, help="decoder layers (default: the model's)")
@click.option("--num-blocks", metavar="N", type=numbers, help=f"at most this many blocks {_default('num_blocks')}")
@click.option("--layers-per-block", metavar="K", type=numbers, help="decoder layers per block, instead of --num-blocks")
@click.option("--tokens", metavar="T", type=numbers, help=f"tokens in prefill, train and memory {_default('tokens')}")
@click.option("--batches", metavar="B", type=numbers, help=f"sequences in a batch in decode {_default('batches')}")
@click.option(
    "--context", metavar="TOKENS", type=AT_LEAST_1, help=f"tokens before decode and generate {_default('context')}"
)
@click.option(
    "--new-tokens", metavar="N", type=AT_LEAST_1, help=f"tokens that decode and generate add {_default('new_tokens')}"
)
@click.option("--dtype", "dtypes", metavar="NAMES", type=names, help=f"{', '.join(DTYPES)} {_default('dtypes')}")
@click.option(
    "--depth-shape",
    metavar="L,S,T,D",
    type=_depth_shape,
    help=f"sizes in depth: sublayers, sublayers per block (S), tokens, hidden size {_default('depth_shape')}",
)
@click.option("--rounds", metavar="N", type=AT_LEAST_1, help=f"times that every variant runs {_default('rounds')}")
@device
@click.option("--threads", metavar="N", type=AT_LEAST_1, help="torch's threads on the CPU (default: chosen by torch)")
@click.option("--seed", metavar="N", type=SEED, default=0, help="seed of weights and tokens")
@click.option("--quick", is_flag=True, help="small model and few rounds, to check that everything works")
@click.option("--out", metavar="DIR", default="bench-out", help="folder for the results")
def bench(quick, out, **options):
    if None not in (options["num_blocks"], options["layers_per_block"]):
        raise click.UsageError("--num-blocks and --layers-per-block exclude each other; leave one out.")
    require("matplotlib", extra="hub")
    from dataclasses import replace

    from ..bench.report import as_markdown, write
    from ..bench.runner import run

    check_writable(out)
    given = {name: value for name, value in options.items() if value is not None}
    result = run(replace(QUICK if quick else FULL, **given))
    written = write(result, out)
    print(as_markdown(result), end="")
    wrote(written, out)
