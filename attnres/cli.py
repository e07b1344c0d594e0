"""The `attnres` command: one thin function per sub-command. Progress goes to stderr, results to stdout.

Heavy modules are imported inside the sub-commands.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from . import __version__

USER_ERROR = 2
INTERRUPTED = 130
OTHER_FORMATS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx"]  # of weights, which are not read


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


def convert(options: argparse.Namespace):
    """Converts a checkpoint folder and prints what was measured."""
    from .conversion import convert as convert_folder
    from .conversion.inspection import shown_size
    from .conversion.verification import report_table

    outcome = convert_folder(
        _local_folder(options.source),
        options.result,
        to=options.to,
        from_layout=options.from_layout,
        verify=options.verify,
        link=options.link,
        overwrite=options.overwrite,
        reinit_depth=options.reinit_depth,
        progress=True,
        residual_mode=options.residual_mode,
        layers_per_block=options.layers_per_block,
        num_blocks=options.num_blocks,
    )
    print(
        f"{outcome.result}: {outcome.from_layout} -> {outcome.to_layout}, {outcome.shards} weight files, "
        f"{shown_size(outcome.bytes)}"
    )
    if outcome.left_out:
        print(f"left out: {len(outcome.left_out)} tensors of other parts, such as {outcome.left_out[0]}")
    print("not verified" if outcome.report is None else report_table(outcome.report))


def inspect_checkpoint(options: argparse.Namespace):
    """Prints what a checkpoint folder holds."""
    from .conversion.inspection import inspect_checkpoint as inspect_folder
    from .conversion.inspection import inspection_table

    facts = inspect_folder(_local_folder(options.path))
    print(json.dumps(facts, indent=2) if options.json else inspection_table(facts))


def _local_folder(name: str) -> str:
    """A local folder as it is; a hub id is downloaded, without the formats that are not read."""
    if Path(name).is_dir() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, ignore_patterns=OTHER_FORMATS)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CommandError(f"{name}: no such folder, and not to be had from the hub ({reason})") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attnres", description="Attention Residuals as transformers models.")
    parser.add_argument("--version", action="version", version=f"attnres {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_convert(commands)
    _add_inspect_checkpoint(commands)
    return parser


def _add_demo(commands):
    parser = commands.add_parser(
        "demo",
        help="the whole life of a small model on real text, on this machine",
        description=(
            "Trains a small PreNorm mixture of experts on Python's standard library, converts its half-way checkpoint "
            "to Block AttnRes, trains Block AttnRes from scratch, and compares all on held-out files. Needs no "
            "network; takes 4 to 8 minutes on 2 cores."
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


def _add_convert(commands):
    parser = commands.add_parser(
        "convert",
        help="convert a checkpoint folder: PreNorm, AttnRes, Kimi K3 layout",
        description=(
            "Converts a checkpoint folder without loading the model: weight files are carried over, one small file "
            "with the depth tensors is added. DST appears when it is complete and verified, or not at all."
        ),
    )
    parser.add_argument("source", metavar="SRC", help="folder or hub id of a checkpoint in safetensors; never changed")
    parser.add_argument("result", metavar="DST", help="folder to make")
    parser.add_argument(
        "--residual-mode",
        choices=("block", "full", "standard"),
        help="depth mixing of an AttnRes result (default: block)",
    )
    parser.add_argument(
        "--layers-per-block",
        metavar="K",
        type=int,
        help="decoder layers (attention + MLP) per block; the paper's S is 2 K",
    )
    parser.add_argument("--num-blocks", metavar="N", type=int, help="blocks, instead of K (default: 8)")
    parser.add_argument(
        "--to",
        choices=("attnres", "prenorm", "kimi-k3"),
        default="attnres",
        help="layout to write (default: %(default)s)",
    )
    parser.add_argument(
        "--from",
        dest="from_layout",
        choices=("attnres", "prenorm", "kimi-k3"),
        help="layout that SRC must have (default: what its config.json says)",
    )
    parser.add_argument(
        "--verify",
        choices=("auto", "none", "full"),
        default="auto",
        help="run the same prompts through SRC and DST: auto, in memory if both fit in what is free, else a decoder "
        "layer at a time from disk; full, always in memory (default: %(default)s)",
    )
    parser.add_argument(
        "--link",
        action="store_true",
        help="hard links instead of copies: takes seconds, but saving over DST later changes SRC",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST once the new one is complete")
    parser.add_argument(
        "--reinit-depth", action="store_true", help="start with zero pseudo-queries where trained ones do not fit"
    )
    parser.set_defaults(command=convert)


def _add_inspect_checkpoint(commands):
    parser = commands.add_parser(
        "inspect-checkpoint",
        help="what a checkpoint folder holds, from its headers alone",
        description="Family, layers, blocks, dtypes, parameters, files and depth tensors of a checkpoint folder.",
    )
    parser.add_argument("path", metavar="PATH", help="folder or hub id")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(command=inspect_checkpoint)


def _seed(value: str) -> int:
    seed = int(value)
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"must be between 0 and 2**32 - 1, got {seed}")
    return seed


def _require(*modules: str, extra: str):
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise CommandError(f"{', '.join(missing)} not installed: pip install 'attnres[{extra}]'")
