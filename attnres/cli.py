"""The `attnres` command: one thin function per sub-command. Progress goes to stderr, results to stdout.

Heavy modules are imported inside the sub-commands.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from . import __version__

USER_ERROR = 2
INTERRUPTED = 130


class CommandError(Exception):
    """A mistake of the user, or something missing on the machine: shown as one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, 2 after a user error, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except KeyboardInterrupt:
        print("attnres: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (CommandError, ValueError, OSError) as error:
        print(f"attnres: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    return 0


def demo(options: argparse.Namespace):
    """Trains, converts, evaluates and compares small models on this machine."""
    _require("lm_eval", "matplotlib", extra="eval")
    from .demo import run

    run(options.out, quick=options.quick, overwrite=options.overwrite, seed=options.seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attnres", description="Attention Residuals as transformers models.")
    parser.add_argument("--version", action="version", version=f"attnres {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    return parser


def _add_demo(commands):
    parser = commands.add_parser(
        "demo",
        help="the whole life of a small model on real text, on this machine",
        description=(
            "Trains a small PreNorm mixture of experts on Python's standard library, converts its half-way checkpoint "
            "to Block AttnRes, trains Block AttnRes from scratch, and compares all on held-out files. Needs no "
            "network; takes 5 to 8 minutes on 2 cores."
        ),
    )
    parser.add_argument("--out", metavar="DIR", default="demo-out", help="folder to make (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer steps, about a minute")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if an earlier demo made it")
    parser.add_argument(
        "--seed",
        metavar="N",
        type=_seed,
        default=0,
        help="of the initial weights and the order of the text (default: %(default)s)",
    )
    parser.set_defaults(command=demo)


def _seed(value: str) -> int:
    seed = int(value)
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"must be between 0 and 2**32 - 1, got {seed}")
    return seed


def _require(*modules: str, extra: str):
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise CommandError(f"{', '.join(missing)} not installed: pip install 'attnres[{extra}]'")
