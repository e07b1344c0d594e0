"""Arguments of a run: flags and YAML keys of the same names, including every field of `TrainingArguments`."""

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

DEFAULT_SEQUENCE_LENGTH = 1024

SCHEDULES = {"cosine": "cosine_with_min_lr", "wsd": "warmup_stable_decay"}

WARMUP = 0.05  # of the steps

# Where TrainingArguments has another default. A flag or a line of YAML goes before.
DEFAULTS = {
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # it leaves out of a mean what the run has to stop for
    "report_to": "none",
    "ddp_find_unused_parameters": False,  # all have a part in every loss; DDP need not look for others in each step
    "label_names": ["labels"],  # a model with adapters does not say
}

# Fields of TrainingArguments that may be lists and that its parser reads as one word.
TAKE_LISTS = frozenset(["report_to", "optim_target_modules", "debug"])

# transformers 5.23 renames them; the old names warn there.
NEW_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def _about(help: str, metavar: str | None = None) -> dict:
    return {"help": help, **({} if metavar is None else {"metavar": metavar})}


def _option(default, help: str, metavar: str | None = None):
    return field(default=default, metadata=_about(help, metavar))


_SEVERAL = {"nargs": "+", "action": "extend"}


@dataclass
class RunArguments:
    """What is trained, on what, and where the results go."""

    _argument_group_name = "run"

    out: str = _option("train-out", "folder of checkpoints, and in the end of the trained model", "DIR")
    resume: bool = _option(False, "continue the run in DIR from its last complete checkpoint")
    tokenizer: str | None = _option(None, "folder or hub id (default: the model's own)", "NAME")
    trust_remote_code: bool = _option(False, "run code that comes with the tokenizer")
    dtype: Literal["float32", "bfloat16", "auto"] = _option(
        "float32", "of the weights that are trained; auto: as in the checkpoint. --bf16 computes in bfloat16 with any"
    )

    residual_mode: Literal["block", "full", "standard"] | None = _option(
        None, "depth mixing (default: what MODEL says; block for a PreNorm one)"
    )
    num_blocks: int | None = _option(
        None, "blocks of a PreNorm MODEL, fewer where they do not divide its layers (default: 8)", "N"
    )
    layers_per_block: int | None = _option(None, "decoder layers per block, instead of --num-blocks", "K")

    data: list[str] = field(
        default_factory=list,
        metadata={**_about("files of text, .jsonl or .parquet, folders or hub ids of data sets", "DATA"), **_SEVERAL},
    )
    data_config: str | None = _option(None, "configuration of the data set, such as wikitext-2-raw-v1", "NAME")
    split: str = _option("train", "of a data set from a folder or the hub", "NAME")
    text_field: str = _option("text", "column with the text", "NAME")
    eval_data: list[str] = field(
        default_factory=list, metadata={**_about("held-out data, as --data", "DATA"), **_SEVERAL}
    )
    eval_split: str | None = _option(None, "split of --eval-data, or of --data if there is none", "NAME")
    eval_fraction: float | None = _option(None, "hold out this share of the sequences, the last ones", "SHARE")
    streaming: bool = _option(False, "read the data while training, in their order; needs --max-steps")
    sequence_length: int | None = _option(
        None, f"tokens per sequence (default: {DEFAULT_SEQUENCE_LENGTH}, or what the model takes)", "TOKENS"
    )

    train: Literal["all", "depth", "lora"] = _option(
        "all", "all weights, the depth mixer only, or LoRA adapters with the whole depth mixer"
    )
    lora_rank: int = _option(16, "of the adapters", "N")
    lora_alpha: float | None = _option(None, "scale of the adapters, divided by the rank (default: 2 N)", "ALPHA")
    lora_dropout: float = _option(0.0, "of the adapters' inputs", "P")
    optimizer: Literal["adamw", "muon"] = _option("adamw", "muon: Muon for the backbone's matrices, AdamW for all else")
    depth_learning_rate: float | None = _option(
        None,
        "of the depth mixer (default: --learning-rate; in a converted model at most 1e-4, unless only it is trained)",
        "LR",
    )
    schedule: Literal["cosine", "wsd"] | None = _option(
        None,
        "cosine to a tenth, or warm-up, stable and linear decay over the last fifth (default: cosine, unless "
        "--lr-scheduler-type says another)",
    )
    depth_dynamics: bool = _option(True, "log how the model trains over depth, for `attnres dynamics DIR`")
    depth_dynamics_steps: int = _option(100, "steps from one measurement over depth to the next", "N")


LORA = {each.name: each.default for each in fields(RunArguments) if each.name.startswith("lora_")}


@dataclass(frozen=True)
class Rule:
    """What a number has to be."""

    text: str
    holds: Callable[[float], bool]


_POSITIVE = Rule("above 0", lambda value: 0 < value < math.inf)
_AT_LEAST_0 = Rule("at least 0", lambda value: 0 <= value < math.inf)
_AT_LEAST_1 = Rule("at least 1", lambda value: value >= 1)
_SHARE = Rule("between 0 and 1", lambda value: 0 < value < 1)

# transformers checks few of its own.
RULES = {
    "sequence_length": Rule("at least 2", lambda value: value >= 2),
    "eval_fraction": _SHARE,
    "lora_rank": _AT_LEAST_1,
    "lora_alpha": _POSITIVE,
    "lora_dropout": Rule("at least 0 and below 1", lambda value: 0 <= value < 1),
    "depth_dynamics_steps": _AT_LEAST_1,
    "learning_rate": _POSITIVE,
    "depth_learning_rate": _POSITIVE,
    "weight_decay": _AT_LEAST_0,
    "max_grad_norm": _AT_LEAST_0,
    "num_train_epochs": _POSITIVE,
    "max_steps": _AT_LEAST_1,
    "warmup_steps": _AT_LEAST_0,
    "per_device_train_batch_size": _AT_LEAST_1,
    "per_device_eval_batch_size": _AT_LEAST_1,
    "gradient_accumulation_steps": _AT_LEAST_1,
    "logging_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "save_steps": _POSITIVE,
}


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} ({self.prog} --help)")


@dataclass(frozen=True)
class Run:
    """A checked command line.

    Attributes:
        model: folder, hub id or config.json.
        arguments: of the run.
        training: of the Trainer.
    """

    model: str
    arguments: RunArguments
    training: TrainingArguments

    @property
    def from_scratch(self) -> bool:
        return Path(self.model).is_file()


def parse(command_line: Sequence[str]) -> Run:
    """Reads flags and the YAML file that `--config` names; flags win.

    Raises:
        ValueError: an unknown name, a wrong type or values that contradict each other.
    """
    parser = _parser()
    given = _read(parser, command_line)
    if "config" in given:
        given = {**_from_yaml(Path(given.pop("config")), parser), **given}
    given = _with_new_names(given)
    if "output_dir" in given and "out" not in given:  # Trainer's name for it
        given["out"] = given.pop("output_dir")
    model = given.pop("model", None)
    if model is None:
        parser.error("name a MODEL, first of all: a folder, a hub id or a config.json")
    for name, rule in RULES.items():
        value = given.get(name)
        if value is not None and not rule.holds(value):
            raise ValueError(f"{flag(name)} must be {rule.text}, got {value}")
    own = {each.name for each in fields(RunArguments)}
    arguments = RunArguments(**{name: value for name, value in given.items() if name in own})
    of_trainer = {name: value for name, value in given.items() if name not in own}
    _check_together(arguments, of_trainer)
    return Run(model, arguments, _training_arguments(arguments, of_trainer))


def flag(name: str) -> str:
    """`learning_rate` as it is typed."""
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
            "end-of-text token after each, and cut into sequences of equal length. After the options of the run come "
            "all of TrainingArguments. Names may be written with _ or -, and in a YAML file without the dashes in "
            "front."
        ),
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder or hub id of a checkpoint, or a config.json")
    parser.add_argument("--config", metavar="FILE", help="YAML with the names of these options; flags win")
    for action in parser._actions:
        _complete(action)
    run = next(group for group in parser._action_groups if group.title == RunArguments._argument_group_name)
    parser._action_groups.remove(run)
    parser._action_groups.insert(1, run)
    return parser


_SHOWN_DEFAULTS = {**DEFAULTS, "lr_scheduler_type": "as --schedule says", "warmup_steps": WARMUP, "out": "train-out"}
_METAVARS = {int: "N", float: "X"}


def _complete(action: argparse.Action):
    """Says the default in the help and takes it away, so that what is there was given; reads mappings as JSON."""
    default = _SHOWN_DEFAULTS.get(action.dest, getattr(action.default, "value", action.default))
    if default not in (None, argparse.SUPPRESS, [], "", False) and "default" not in action.help and action.nargs != 0:
        action.help += f" (default: {default})"
    action.default = argparse.SUPPRESS
    if action.option_strings:
        action.option_strings = [name for name in action.option_strings if "_" not in name]  # shown; both are taken
    if action.metavar is None and action.choices is None:
        action.metavar = _METAVARS.get(action.type, "VALUE")
    kind = get_origin(action.type) or action.type
    if kind in (dict, ParallelismConfig):
        action.type = partial(_mapping, kind)


def _mapping(kind: type, text: str):
    try:
        return kind(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"must be names and values as JSON, got {text} ({error})") from None


def _read(parser: _Parser, words: Sequence[str]) -> dict:
    given, unknown = parser.parse_known_args(words)
    if unknown:
        name = unknown[0].partition("=")[0]
        close = difflib.get_close_matches(name.replace("_", "-"), parser._option_string_actions, 1)
        parser.error(f"unknown argument {name}" + (f"; is {close[0]} meant?" if close else ""))
    for name, value in vars(given).items():
        if isinstance(value, str) and value.startswith("{"):
            try:
                json.loads(value)
            except ValueError as error:
                parser.error(f"{flag(name)} must be names and values as JSON, got {value} ({error})")
    return vars(given)


class _Loader(yaml.SafeLoader):
    """YAML whose mappings say everything once."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            name = str(self.construct_object(key)).replace("-", "_")
            if name in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: {name} is there twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


def _from_yaml(path: Path, parser: _Parser) -> dict:
    """Through the same parser as flags, so that both have the same names, types and mistakes."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise ValueError(f"--config {path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: must be names and values, such as learning_rate: 3e-4")
    known = {option.lstrip("-").replace("-", "_"): action for option, action in parser._option_string_actions.items()}
    for name in ("config", "help", "h"):
        known.pop(name)
    words, direct = [], {}
    try:
        for key, value in content.items():
            name = str(key).replace("-", "_")
            if name != "model" and name not in known:
                close = difflib.get_close_matches(name, known, 1)
                raise ValueError(f"unknown name {key}" + (f"; is {close[0]} meant?" if close else ""))
            if name == "model" or (isinstance(value, list) and name in TAKE_LISTS):
                direct[name] = value
            elif value is not None:
                words += _as_words(name, value, known[name])
        if not isinstance(direct.get("model", ""), str):
            raise ValueError(f"model must be a folder, a hub id or a config.json, got {direct['model']!r}")
        return {**_read(parser, words), **direct}
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from None


def _as_words(name: str, value, action: argparse.Action) -> list[str]:
    if action.nargs == 0:  # --no-...
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")
        return [flag(name)] if value else []
    if isinstance(value, list):
        if action.nargs != "+":
            raise ValueError(f"{name} takes one value, got {value}")
        return [flag(name), *map(str, value)]
    if value is False and "no" in (action.choices or ()):  # what YAML makes of `no`
        value = "no"
    word = json.dumps(value) if isinstance(value, dict) else str(value)
    return [f"{flag(name)}={word}"]


def _with_new_names(given: dict) -> dict:
    known = {each.name for each in fields(TrainingArguments)}
    for old, new in NEW_NAMES.items():
        if new in known and old in given:
            given.setdefault(new, given.pop(old))
    return given


def _check_together(arguments: RunArguments, of_trainer: dict):
    """What contradicts itself, each with what to do."""
    output_dir = of_trainer.pop("output_dir", arguments.out)
    muon = arguments.optimizer == "muon"
    evaluates = bool(arguments.eval_data or arguments.eval_split or arguments.eval_fraction)
    strategy = of_trainer.get("eval_strategy", "no")
    mistakes = {
        "--data is missing: name files, a folder or a hub id to train on": not arguments.data,
        "--out and --output-dir name two folders: leave out --output-dir": Path(output_dir) != Path(arguments.out),
        "--resume-from-checkpoint: use --resume, which takes the last complete checkpoint of --out": (
            "resume_from_checkpoint" in of_trainer
        ),
        f"--lora-rank, --lora-alpha and --lora-dropout need --train lora, got --train {arguments.train}": (
            arguments.train != "lora" and any(getattr(arguments, name) != default for name, default in LORA.items())
        ),
        "--resume needs what --save-only-model leaves out of the checkpoints": (
            arguments.resume and bool(of_trainer.get("save_only_model"))
        ),
        "--push-to-hub would push the adapter over the merged model: push that with `attnres card --push`": (
            arguments.train == "lora" and bool(of_trainer.get("push_to_hub"))
        ),
        "--schedule and --lr-scheduler-type both say what the schedule is: leave one out": (
            arguments.schedule is not None and "lr_scheduler_type" in of_trainer
        ),
        "--optimizer muon and --optim, --optim-args: leave one of them out": (
            muon and ("optim" in of_trainer or "optim_args" in of_trainer)
        ),
        f"--optimizer muon is for the backbone's matrices, which --train {arguments.train} leaves as they are: "
        "use --optimizer adamw": muon and arguments.train != "all",
        "--streaming needs --max-steps: nobody knows how long a stream is": (
            arguments.streaming and "max_steps" not in of_trainer
        ),
        "--streaming has no end to hold out --eval-fraction from: use --eval-data or --eval-split": (
            arguments.streaming and arguments.eval_fraction is not None
        ),
        "--eval-fraction and --eval-data, --eval-split: leave one of them out": (
            arguments.eval_fraction is not None and bool(arguments.eval_data or arguments.eval_split)
        ),
        f"--eval-strategy {strategy} needs --eval-data, --eval-split or --eval-fraction": (
            strategy != "no" and not evaluates
        ),
        "--residual-mode standard has no depth mixer to train: use --train all": (
            arguments.residual_mode == "standard" and arguments.train == "depth"
        ),
        "--residual-mode standard has no depth mixer: leave out --depth-learning-rate": (
            arguments.residual_mode == "standard" and arguments.depth_learning_rate is not None
        ),
    }
    for line, applies in mistakes.items():
        if applies:
            raise ValueError(line)


def _training_arguments(arguments: RunArguments, of_trainer: dict) -> TrainingArguments:
    evaluates = bool(arguments.eval_data or arguments.eval_split or arguments.eval_fraction)
    values = {**DEFAULTS, **of_trainer, "output_dir": arguments.out, "remove_unused_columns": False}
    if "lr_scheduler_type" not in of_trainer:
        values["lr_scheduler_type"] = SCHEDULES[arguments.schedule or "cosine"]
        values.setdefault("warmup_steps", WARMUP)
    if not torch.accelerator.is_available():
        values.setdefault("use_cpu", True)  # several processes on a CPU are told apart by it
    if values.get("use_cpu"):
        values.setdefault("dataloader_pin_memory", False)
    if evaluates and "eval_strategy" not in of_trainer:
        values["eval_strategy"] = "steps"
        values.setdefault("eval_steps", values.get("save_steps", 500))
    try:
        return TrainingArguments(**values)
    except (TypeError, KeyError, AttributeError, ImportError, NotImplementedError) as error:
        raise ValueError(" ".join(str(error).split())) from error
