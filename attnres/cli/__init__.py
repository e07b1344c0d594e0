"""The `attnres` command. Progress goes to stderr and results go to stdout.

Each module here holds the sub-commands of one folder of the package, and imports what is heavy only when they run.
"""

import os
import sys
from collections.abc import Sequence

import click

from .. import __version__
from ..messages import is_first, say
from . import analysis, bench, conversion, demo, eval, hub_card, training
from .process import INTERRUPTED, PIPE_CLOSED, USER_ERROR


@click.group(no_args_is_help=False, context_settings={"show_default": True, "max_content_width": 100})
@click.version_option(__version__, message="attnres %(version)s")
def attnres():
    """Attention Residuals (arXiv 2603.15031): convert, train, evaluate, inspect and share models."""


for _command in (
    demo.demo,
    conversion.convert,
    conversion.inspect_checkpoint,
    eval.evaluate,
    eval.compare,
    hub_card.card,
    bench.bench,
    analysis.inspect,
    analysis.dynamics,
    training.train,
):
    attnres.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status.

    The status is 0, 1 if a row failed, 2 for a user error, 130 after Ctrl-C, or 141 if the reader of stdout has gone.
    """
    try:
        try:
            words = list(sys.argv[1:] if arguments is None else arguments)
            with attnres.make_context("attnres", words) as context:
                return attnres.invoke(context) or 0
        finally:
            sys.stdout.flush()  # raises BrokenPipeError here instead of when Python ends
    except click.exceptions.Exit as end:  # --help, --version
        sys.exit(end.exit_code)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else "attnres"
        message = " ".join(error.format_message().split())
        if is_first():
            print(f"{path}: error: {message} ({path} --help)", file=sys.stderr)
        sys.exit(USER_ERROR)
    except BrokenPipeError:
        # `attnres ... | head -1`: the reader has gone. Python's own flush at the end must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except (click.ClickException, ValueError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename is not None:  # raised by the system
            text = f"{error.filename}: {error.strerror}"
        say(f"error: {' '.join(text.split())}")
        return USER_ERROR


__all__ = ["USER_ERROR", "main"]
