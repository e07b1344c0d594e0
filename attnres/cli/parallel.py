"""`attnres plan`."""

import json
import sys

import click

from .options import MEMORY_SIZE, Command, at_least, exclusive


@click.command("plan", cls=Command, short_help="parameters, memory and traffic of a model on a cluster")
@click.argument("config", metavar="[CONFIG]", required=False)
@click.option("--world", metavar="N", type=at_least(1), help="devices (default: the product of the below)")
@click.option("--data", metavar="N", type=at_least(1), help="replicas, each with batches of its own")
@click.option("--tensor", metavar="N", type=at_least(1), help="tensor-parallel ranks")
@click.option("--pipeline", metavar="N", type=at_least(1), help="pipeline ranks")
@click.option("--virtual-stages", metavar="N", type=at_least(1), default=1, help="per pipeline rank")
@click.option(
    "--expert", metavar="N", type=at_least(1), default=1, help="expert-parallel ranks, among those of data and tensor"
)
@click.option(
    "--shard",
    type=click.Choice(["zero3", "fsdp", "none"]),
    help="zero3 or fsdp, which are the same here: replicas divide parameters, gradients and optimizer state; none: "
    "each has all (default: what fits; none with pipeline ranks)",
)
@click.option("--tokens", metavar="T", type=at_least(1), default=4096, help="of a sequence")
@click.option("--batch", metavar="N", type=at_least(1), default=1, help="sequences per micro-batch")
@click.option(
    "--micro-batches",
    metavar="N",
    type=at_least(1),
    help="per step and replica (default: twice the pipeline ranks, else 1)",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32", "bf16", "fp32"]),
    default="bfloat16",
    help="bfloat16, in training mixed precision with float32 weights, or float32",
)
@click.option("--optimizer", type=click.Choice(["adamw", "muon"]), default="adamw", help="whose state is counted")
@click.option("--checkpointing", is_flag=True, help="decoder layers run again in the backward pass")
@click.option(
    "--device-memory",
    metavar="SIZE",
    type=MEMORY_SIZE,
    default="80GB",
    help="of a device, such as 80GB or 16GiB; a tenth is left free",
)
@click.option("--inference", is_flag=True, help="a prefill of --tokens tokens with tensor parallelism, no training")
@click.option("--chunk", metavar="T", type=at_least(1), help="with --inference: tokens at a time")
@click.option(
    "--sequence-shards",
    is_flag=True,
    help="with --inference: each tensor-parallel rank keeps block representations of its part of the sequence",
)
@click.option(
    "--residual-mode", type=click.Choice(["block", "full", "standard"]), help="depth mixing (default: as in CONFIG)"
)
@click.option("--num-blocks", metavar="N", type=at_least(1), help="at most this many blocks")
@click.option("--layers-per-block", metavar="K", type=at_least(1), help="decoder layers per block")
@click.option("--json", "as_json", is_flag=True, help="all numbers, in bytes, for machines")
def plan(as_json, **options):
    """Works out what a model needs on a cluster: parameters in all and active, memory of a device at the peak of a
    training step or a prefill, and what every rank sends. The real model classes run on tensors without memory, with
    transformers' own parallel plans; nothing is downloaded but a configuration. Of --data, --tensor and --pipeline,
    what is left out is chosen: the simplest that fits.

    CONFIG is a folder, config.json or hub id, of an AttnRes or a plain model; or kimi-k3, the release of 2.78 T
    parameters (default: the paper's 48B-A3B).
    """
    exclusive("num_blocks", "layers_per_block")
    from ..parallel.plan import Options, run
    from ..parallel.plan_report import as_text

    options["shard"] = {"fsdp": "zero3"}.get(options["shard"], options["shard"])
    options["dtype"] = {"bf16": "bfloat16", "fp32": "float32"}.get(options["dtype"], options["dtype"])
    result = run(Options(**options), lambda line: print(f"attnres: {line}", file=sys.stderr))
    print(json.dumps(result, indent=1) if as_json else as_text(result), end="\n" if as_json else "")
