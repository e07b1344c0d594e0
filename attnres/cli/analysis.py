"""`attnres inspect` and `attnres dynamics`."""

import click

from ..messages import say
from .options import AT_LEAST_1, Command, device, dtype
from .process import local_folder, require, wrote


@click.command("inspect", cls=Command, short_help="show which earlier outputs each sublayer reads, over a text")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--text", metavar="FILE", required=True, help="text in UTF-8, or - for standard input")
@click.option("--out", metavar="DIR", default="inspect-out", help="folder for the results")
@click.option("--max-tokens", metavar="N", type=AT_LEAST_1, help="stop after N tokens of the text (default: all)")
@click.option(
    "--tokens",
    "keep_tokens",
    metavar="N",
    type=click.IntRange(0),
    default=64,
    help="number of first tokens whose own weights the page shows",
)
@click.option(
    "--ablate",
    "ablation_tokens",
    metavar="[TOKENS]",
    type=click.IntRange(2),
    is_flag=False,  # the number can be left out
    flag_value=512,
    help="also measure how the loss on the first TOKENS tokens of the text (512 if no number is given) changes without "
    "each source of each sublayer; takes a forward pass for each",
)
@click.option(
    "--context",
    metavar="TOKENS",
    type=AT_LEAST_1,
    help="number of tokens that the model sees at a time; each chunk starts anew (default: what the model takes, at "
    "most 2048)",
)
@dtype
@device
def inspect(models, text, out, **options):
    """Averages the depth weights of AttnRes checkpoints over the tokens of a text of any length. Writes the paper's
    heatmaps before attention and before MLP with the output row as PNG, all numbers as JSON, and one HTML page that
    needs no network. Prints summary numbers.

    MODEL... are folders or hub ids of AttnRes checkpoints in safetensors; several are drawn one below the other.
    """
    require("matplotlib", extra="hub")
    from ..analysis.inspection import as_markdown, named
    from ..analysis.inspection import inspect as run

    folders = named(list(models), [local_folder(model) for model in models])
    found, written = run(folders, text, out, progress=True, **options)
    print("\n".join(as_markdown(weights) for weights in found), end="")
    wrote(written, out)


@click.command("dynamics", cls=Command, short_help="draw loss, outputs and gradients over depth of training runs")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--step", metavar="N", type=AT_LEAST_1, help="use the last measurement up to step N (default: the last)")
@click.option("--out", metavar="DIR", default="dynamics-out", help="folder for the results")
def dynamics(runs, step, out):
    """Draws the paper's figure of training dynamics from what DepthDynamicsCallback logged in one or more trainings
    with transformers' Trainer: validation loss over steps, and for each decoder layer the magnitude of its output and
    the norm of the loss's gradient with respect to it.

    RUN... are output_dirs of a Trainer, with checkpoints or a trainer_state.json.
    """
    require("matplotlib", extra="hub")
    from ..analysis.dynamics_runs import as_markdown, read_runs, write

    found = read_runs(list(runs), step)
    for run in found:
        if not run.validation["loss"]:
            say(f'{run.name}: has no eval_loss; evaluate during training (eval_strategy="steps")')
    written = write(found, out)
    print(as_markdown(found), end="")
    wrote(written, out)
