"""`attnres train`."""

import click

from ..messages import say
from .options import Command
from .process import SOME_FAILED, require


@click.command(
    "train",
    cls=Command,
    short_help="pre-train or fine-tune with transformers' Trainer",
    # The options include all of TrainingArguments, which takes seconds to import: `training.command.run` parses them.
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("words", metavar="MODEL [OPTIONS]", nargs=-1, type=click.UNPROCESSED)
def train(words) -> int:
    """Trains a model; exits with status 1 if the run stops before its last step."""
    require("datasets", extra="train")
    from ..training.command import run
    from ..training.trainer import Stopped

    try:
        run(list(words))
    except Stopped as error:
        say(f"stopped: {error}")
        return SOME_FAILED
    return 0
