"""Defines `attnres convert` and `attnres inspect-checkpoint`."""

import json

import click

from .options import Command
from .process import local_folder


@click.command("convert", cls=Command, short_help="convert a checkpoint: PreNorm, AttnRes, Kimi K3 and FLA layouts")
@click.argument("source", metavar="SRC")
@click.argument("result", metavar="DST")
@click.option(
    "--residual-mode",
    type=click.Choice(["block", "full", "standard"]),
    help="residual mode of an AttnRes result (default: block)",
)
@click.option(
    "--layers-per-block", metavar="K", type=int, help="decoder layers (attention + MLP) per block; the paper's S is 2 K"
)
@click.option(
    "--num-blocks",
    metavar="N",
    type=int,
    help="number of blocks, instead of K; there are fewer if N does not divide the layers (default: 8)",
)
@click.option(
    "--depth-variant",
    metavar="NAME",
    help="variant of the depth mixing, for experiments: see docs/variants.md (default: attnres, as in the paper)",
)
@click.option("--to", type=click.Choice(["attnres", "prenorm", "kimi-k3"]), default="attnres", help="layout to write")
@click.option(
    "--from",
    "from_layout",
    type=click.Choice(["attnres", "prenorm", "kimi-k3", "fla"]),
    help="layout that SRC must have (default: the one that its config.json describes)",
)
@click.option(
    "--verify",
    type=click.Choice(["auto", "none", "full"]),
    default="auto",
    help="run the same prompts through SRC and DST and compare the logits; auto: in memory if both models fit in what "
    "is free, otherwise one decoder layer at a time from disk; full: always in memory",
)
@click.option(
    "--link",
    is_flag=True,
    help="make hard links instead of copies, which takes seconds; saving over DST later then changes SRC",
)
@click.option("--overwrite", is_flag=True, help="replace DST once the new one is complete")
@click.option("--reinit-depth", is_flag=True, help="start with zero pseudo-queries where the trained ones do not fit")
@click.option(
    "--for",
    "engine",
    type=click.Choice(["llama.cpp", "vllm", "sglang", "mlx"]),
    help="with --to kimi-k3: write the form that this engine loads, which computes the same, and print the command "
    "that serves it; vllm also takes other backbones, which it runs with the code of transformers",
)
@click.option(
    "--keep-packed",
    is_flag=True,
    help="keep MXFP4 weights packed instead of converting them to bfloat16; DST can then be copied but not loaded",
)
def convert(source, result, to, **options):
    """Converts a checkpoint folder without loading the model.

    Weight files are copied, and one small file with the depth tensors is added. DST appears only when it is complete
    and verified.

    SRC is a folder or a Hub id of a checkpoint in safetensors, and is never changed; DST is the folder to create.
    """
    from ..conversion import convert as convert_folder
    from ..conversion.engines import serving_text
    from ..conversion.inspection import shown_size
    from ..conversion.verification import report_table

    outcome = convert_folder(local_folder(source), result, to=to, progress=True, **options)
    print(
        f"{outcome.result}: {outcome.from_layout} -> {outcome.to_layout} ({outcome.depth}), "
        f"{outcome.shards} weight files, {shown_size(outcome.bytes)}"
    )
    if outcome.left_out:
        print(f"not converted: {len(outcome.left_out)} tensors of other parts, such as {outcome.left_out[0]}")
    if outcome.from_layout == "shards":
        print("joined the tensors of the shards")
    else:
        print("not verified" if outcome.report is None else report_table(outcome.report))
    if options["engine"] is not None:
        print(serving_text(options["engine"], str(outcome.result), outcome.to_layout))


@click.command("inspect-checkpoint", cls=Command, short_help="describe a checkpoint folder from its headers alone")
@click.argument("path", metavar="PATH")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def inspect_checkpoint(path, as_json):
    """Prints family, layers, blocks, dtypes, parameters, files and depth tensors of a checkpoint folder.

    PATH is a folder or a Hub id.
    """
    from ..conversion.inspection import inspect_checkpoint as inspect_folder
    from ..conversion.inspection import inspection_table

    facts = inspect_folder(local_folder(path))
    print(json.dumps(facts, indent=2) if as_json else inspection_table(facts))
