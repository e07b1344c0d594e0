"""Arguments of a training run, as flags and YAML keys of the same names, including all of `TrainingArguments`."""

import argparse
import difflib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Literal, get_origin

import torch
import yaml
from accelerate import ParallelismConfig
from transformers import HfArgumentParser, TrainingArguments

from ..messages import one_line

DEFAULT_SEQUENCE_LENGTH = 1024
SCHEDULES = {"cosine": "cosine_with_min_lr", "wsd": "warmup_stable_decay"}
WARMUP = 0.05  # share of the steps

# Defaults that differ from those of TrainingArguments.
DEFAULTS = {
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # would hide a loss that is not finite
    "report_to": "none",
    "ddp_find_unused_parameters": False,  # every parameter takes part in every loss
    "label_names": ["labels"],  # Trainer cannot infer them from a PEFT model
}

# Fields of TrainingArguments that may be lists although HfArgumentParser reads them as one word.
TAKE_LISTS = frozenset(["report_to", "optim_target_modules", "debug"])


def _option(default, help: str):
    return field(default=default, metadata={"help": help})


_DATA = {"metavar": "DATA", "nargs": "+", "action": "extend"}


@dataclass
class RunArguments:
    """Arguments of a run that are not part of `TrainingArguments`."""

    out: str = _option("train-out", "folder for checkpoints and, at the end, the trained model")
    resume: bool = _option(False, "continue the run in --out from its last complete checkpoint")
    tokenizer: str | None = _option(None, "folder or hub id of the tokenizer (default: the tokenizer of MODEL)")
    trust_remote_code: bool = _option(False, "run code that comes with the tokenizer")
    dtype: Literal["float32", "bfloat16", "auto"] = _option(
        "float32",
        "data type of the trained weights (auto: that of the checkpoint); --bf16 computes in bfloat16 with any of them",
    )

    residual_mode: Literal["block", "full", "standard"] | None = _option(
        None, "kind of depth mixing (default: that of MODEL, or block for a PreNorm MODEL)"
    )
    num_blocks: int | None = _option(
        None, "number of blocks for a PreNorm MODEL; fewer if N does not divide its layers (default: 8)"
    )
    layers_per_block: int | None = _option(None, "decoder layers per block, instead of --num-blocks")

    data: list[str] = field(
        default_factory=list,
        metadata=_DATA | {"help": "training data: text, .jsonl or .parquet files, folders, or hub ids of data sets"},
    )
    data_config: str | None = _option(None, "configuration of the data set, for example wikitext-2-raw-v1")
    split: str = _option("train", "split to train on, if DATA is a folder or a hub id")
    text_field: str = _option("text", "column that holds the text")
    eval_data: list[str] = field(
        default_factory=list, metadata=_DATA | {"help": "held-out data, in the same forms as --data"}
    )
    eval_split: str | None = _option(None, "held-out split of --eval-data, or of --data without --eval-data")
    eval_fraction: float | None = _option(None, "share of the training sequences to hold out, from the end")
    streaming: bool = _option(False, "read the data in order during training; needs --max-steps")
    sequence_length: int | None = _option(
        None, f"tokens per sequence (default: {DEFAULT_SEQUENCE_LENGTH}, or fewer if the model takes fewer)"
    )

    train: Literal["all", "depth", "lora"] = _option(
        "all", "train all weights, only the depth mixer, or LoRA adapters and the depth mixer"
    )
    lora_rank: int = _option(16, "rank of the LoRA adapters")
    lora_alpha: float | None = _option(
        None, "scale of the LoRA adapters, which is divided by their rank (default: twice the rank)"
    )
    lora_dropout: float = _option(0.0, "dropout probability in the LoRA adapters")
    optimizer: Literal["adamw", "muon"] = _option(
        "adamw", "AdamW for all weights, or Muon for the backbone's matrices and AdamW for the rest"
    )
    depth_learning_rate: float | None = _option(
        None,
        "peak learning rate of the depth mixer (default: --learning-rate; at most 1e-4 for a converted model, unless "
        "only the depth mixer is trained)",
    )
    schedule: Literal["cosine", "wsd"] | None = _option(
        None,
        "learning rate after the warm-up: cosine decay to a tenth, or constant with a linear decay over the last fifth "
        "of the steps (default: cosine, unless --lr-scheduler-type is given)",
    )
    depth_dynamics: bool = _option(True, "log training dynamics over depth, which `attnres dynamics DIR` shows")
    depth_dynamics_steps: int = _option(100, "steps between two measurements of the dynamics over depth")

    @property
    def evaluates(self) -> bool:
        """Returns whether there are held-out data."""
        return bool(self.eval_data or self.eval_split or self.eval_fraction)


Rule = tuple[str, Callable[[float], bool]]
_POSITIVE: Rule = ("above 0", lambda value: 0 < value < math.inf)
_AT_LEAST_0: Rule = ("at least 0", lambda value: 0 <= value < math.inf)
_AT_LEAST_1: Rule = ("at least 1", lambda value: value >= 1)

# Ranges of numbers, most of which transformers does not check.
RULES: dict[str, Rule] = {
    "sequence_length": ("at least 2", lambda value: value >= 2),
    "eval_fraction": ("between 0 and 1", lambda value: 0 < value < 1),
    "lora_dropout": ("at least 0 and below 1", lambda value: 0 <= value < 1),
    **dict.fromkeys(("lora_alpha", "learning_rate", "depth_learning_rate", "num_train_epochs"), _POSITIVE),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), _POSITIVE),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "warmup_steps"), _AT_LEAST_0),
    **dict.fromkeys(("lora_rank", "depth_dynamics_steps", "max_steps", "gradient_accumulation_steps"), _AT_LEAST_1),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _AT_LEAST_1),
}


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} ({self.prog} --help)")


@dataclass(frozen=True)
class Run:
    """A checked command line: the model (a folder, hub id or config.json) and the arguments of the run and Trainer."""

    model: str
    arguments: RunArguments
    training: TrainingArguments

    @property
    def from_scratch(self) -> bool:
        """Returns whether the model is a config.json, which means random weights."""
        return Path(self.model).is_file()


def parse(command_line: Sequence[str]) -> Run:
    """Reads flags and the YAML file that `--config` names; flags take precedence."""
    parser = _parser()
    given = _read(parser, command_line)
    if "config" in given:
        given = {**_from_yaml(Path(given.pop("config")), parser), **given}
    if "out" not in given and "output_dir" in given:
        given["out"] = given.pop("output_dir")
    model = given.pop("model", None)
    if model is None:
        parser.error("the first argument must be a MODEL: a folder, a hub id or a config.json")
    for name, (rule, holds) in RULES.items():
        if given.get(name) is not None and not holds(given[name]):
            raise ValueError(f"{flag(name)} must be {rule}, got {given[name]}")
    own = {each.name for each in fields(RunArguments)}
    arguments = RunArguments(**{name: value for name, value in given.items() if name in own})
    _check_together(arguments, given)
    of_trainer = {name: value for name, value in given.items() if name not in own}
    return Run(model, arguments, _training_arguments(arguments, of_trainer))


def flag(name: str) -> str:
    """Returns the flag of an argument, such as `--learning-rate`."""
    return f"--{name.replace('_', '-')}"


def _parser() -> _Parser:
    parser = _Parser(
        [RunArguments, TrainingArguments],
        prog="attnres train",
        allow_abbrev=False,
        formatter_class=argparse.HelpFormatter,
        usage="attnres train MODEL --data DATA [DATA ...] [--out DIR] [--config FILE] [options]",
        description=(
            "Trains a causal language model with transformers' Trainer: an AttnRes checkpoint, a PreNorm checkpoint "
            "(converted losslessly in memory), or a config.json with random weights. Documents are joined, with an "
            "end-of-text token after each, and cut into sequences of equal length. The options of the run are listed "
            "first, then all of TrainingArguments. Option names may be written with _ or -, and without the leading "
            "dashes in a YAML file."
        ),
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder or hub id of a checkpoint, or a config.json")
    parser.add_argument("--config", metavar="FILE", help="YAML file with values for these options; flags win")
    for action in parser._actions:
        _complete(action)
    return parser


_SHOWN_DEFAULTS = {**DEFAULTS, "lr_scheduler_type": "that of --schedule", "warmup_steps": WARMUP}


def _complete(action: argparse.Action):
    """Moves the default of an option into its help, so that only given values are returned; reads mappings as JSON."""
    default = _SHOWN_DEFAULTS.get(action.dest, getattr(action.default, "value", action.default))
    if action.nargs == 0 and action.dest != "help":
        action.help = f"same as {flag(action.dest)} false"
    elif default not in (None, argparse.SUPPRESS, [], "", False) and "default" not in action.help:
        action.help += f" (default: {default})"
    action.default = argparse.SUPPRESS
    action.option_strings = [name for name in action.option_strings if "_" not in name]  # in the help; both are parsed
    if action.metavar is None and action.choices is None:
        action.metavar = "true|false" if action.nargs == "?" else {int: "N", float: "X"}.get(action.type, "VALUE")
    kind = get_origin(action.type) or action.type
    if kind in (dict, str, ParallelismConfig):
        action.type = partial(_json, kind)


def _json(kind: type, text: str):
    """Reads a mapping; fields that take text as well, such as a path, take a mapping as text."""
    if kind is str and not text.startswith("{"):
        return text
    try:
        values = json.loads(text)
        return text if kind is str else kind(**values)
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text} ({error})") from None


def _read(parser: _Parser, words: Sequence[str]) -> dict:
    given, unknown = parser.parse_known_args(words)
    if unknown:
        name = unknown[0].partition("=")[0]
        close = difflib.get_close_matches(name.replace("_", "-"), parser._option_string_actions, 1)
        parser.error(f"unknown argument {name}{f'; did you mean {close[0]}?' if close else ''}")
    return vars(given)


def _from_yaml(path: Path, parser: _Parser) -> dict:
    """Reads a YAML file through the parser of the flags, so that names, types and error messages are the same."""
    words, direct = [], {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("must have lines of names and values, such as learning_rate: 3e-4")
        for key, value in content.items():
            name = str(key).replace("-", "_")
            nargs = getattr(parser._option_string_actions.get(flag(name)), "nargs", None)
            if name == "model":
                direct[name] = str(value)
            elif name in TAKE_LISTS and isinstance(value, list):
                direct[name] = value
            elif nargs == "+" and isinstance(value, list):
                words += [flag(name), *map(str, value)]
            elif nargs == 0 and value is True:  # --no-...
                words.append(flag(name))
            elif value is not None:
                value = "no" if value is False else value  # YAML reads `no` as false
                words.append(f"{flag(name)}={json.dumps(value) if isinstance(value, dict) else value}")
        return {**_read(parser, words), **direct}
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise ValueError(f"--config {path}: {getattr(error, 'strerror', None) or error}") from None


def _check_together(arguments: RunArguments, given: dict):
    """Refuses arguments that contradict each other."""
    names, lora, muon = given.keys(), arguments.train == "lora", arguments.optimizer == "muon"
    fraction = arguments.eval_fraction is not None
    mistakes = {
        "--data is missing; name files, a folder or a hub id to train on": not arguments.data,
        "--out and --output-dir are the same; leave one out": {"out", "output_dir"} <= names,
        "--resume-from-checkpoint is not supported; use --resume": "resume_from_checkpoint" in names,
        "--lora-... needs --train lora": not lora and any(name.startswith("lora_") for name in names),
        "--resume needs what --save-only-model leaves out": arguments.resume and given.get("save_only_model"),
        "--push-to-hub would push the adapter; use `attnres card --push`": lora and given.get("push_to_hub"),
        "--schedule excludes --lr-scheduler-type; leave one out": {"schedule", "lr_scheduler_type"} <= names,
        "--optimizer muon excludes --optim and --optim-args; leave one out": muon and {"optim", "optim_args"} & names,
        "--optimizer muon needs --train all": muon and arguments.train != "all",
        "--eval-fraction does not work with --streaming; use --eval-data": fraction and arguments.streaming,
        "--eval-fraction excludes --eval-data and --eval-split; leave one out": (
            fraction and (arguments.eval_data or arguments.eval_split)
        ),
    }
    for message, applies in mistakes.items():
        if applies:
            raise ValueError(message)


def _training_arguments(arguments: RunArguments, of_trainer: dict) -> TrainingArguments:
    values = {**DEFAULTS, **of_trainer, "output_dir": arguments.out, "remove_unused_columns": False}
    if "lr_scheduler_type" not in of_trainer:
        values["lr_scheduler_type"] = SCHEDULES[arguments.schedule or "cosine"]
        values.setdefault("warmup_steps", WARMUP)
    if not torch.accelerator.is_available():
        values.setdefault("use_cpu", True)  # needed to launch several processes on a CPU
    if values.get("use_cpu"):
        values.setdefault("dataloader_pin_memory", False)
    if arguments.evaluates and "eval_strategy" not in of_trainer:
        values["eval_strategy"] = "steps"
        values.setdefault("eval_steps", values.get("save_steps", 500))
    try:
        return TrainingArguments(**values)
    except (TypeError, KeyError, AttributeError, ImportError, NotImplementedError) as error:
        raise ValueError(one_line(error)) from error
