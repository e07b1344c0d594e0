"""`attnres train`, step by step: everything is read and checked before anything is written."""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from .. import AttnResConfig, AttnResForCausalLM, DepthDynamicsCallback
from . import run_folder
from .arguments import DEFAULT_SEQUENCE_LENGTH, Run, RunArguments, parse
from .data import Source, Stream, collate, digest, sequences, tokenizer_digest
from .lora import BASE, save_with_adapter, with_adapters
from .trainer import RunTrainer

# What gained most where SmolLM2-135M was retrofitted (docs/study.md); ten times as much lost.
CONVERTED_DEPTH_RATE = 1e-4


def run(command_line: Sequence[str]):
    """Trains a model as a command line says.

    Raises:
        ValueError, OSError: a mistake in the command line, the model or the data; nothing has been written.
        Stopped: the run has ended before its last step.
    """
    order = parse(command_line)
    arguments, training = order.arguments, order.training
    _quiet_unless_first()
    out = Path(arguments.out)
    run_folder.check_place(out, arguments.resume)
    _configuration(order)  # a model that is not there is the first thing to say
    tokenizer = _tokenizer(order)
    set_seed(training.seed)
    model = load_model(order)
    _check_vocabulary(model, tokenizer)
    length = _sequence_length(model, arguments)
    train_source, eval_source = _sources(arguments)
    with training.main_process_first(desc="data"):
        train_data, eval_data = _data(train_source, eval_source, arguments, tokenizer, length)
    record = _record(order, model, tokenizer, train_source, eval_source)
    if arguments.resume:
        run_folder.check_same_run(out, record)
    checkpoint = run_folder.last_checkpoint(out) if arguments.resume else None
    if checkpoint is not None:
        run_folder.check_undamaged(checkpoint)

    def begin():
        run_folder.begin(out, record)
        if arguments.resume:
            where = "the beginning: there is no complete checkpoint yet" if checkpoint is None else checkpoint
            print(f"attnres: resuming from {where}", file=sys.stderr)

    with _no_folder_without_run(out):
        trainer = RunTrainer(
            model=_trained_part(model, arguments),
            args=training,
            train_dataset=train_data,
            eval_dataset=eval_data,
            data_collator=collate,
            processing_class=tokenizer,
            callbacks=[DepthDynamicsCallback(arguments.depth_dynamics_steps)] if arguments.depth_dynamics else [],
            muon=arguments.optimizer == "muon",
            depth_learning_rate=_depth_learning_rate(order, model),
            begin=begin,
        )
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    _save(trainer, order)
    if trainer.is_world_process_zero():
        _report(trainer, out)


def _depth_learning_rate(order: Run, model: AttnResForCausalLM) -> float | None:
    """Of the depth mixer: as given; in a converted model, whose mixtures are those of a trained one, small."""
    given = order.arguments.depth_learning_rate
    is_converted = model.config.scale_norm_eps and model.config.residual_mode != "standard" and not order.from_scratch
    if given is not None or order.arguments.train == "depth" or not is_converted:
        return given
    return min(order.training.learning_rate, CONVERTED_DEPTH_RATE)


@contextmanager
def _no_folder_without_run(out: Path):
    """Trainer makes the folder before all has been checked."""
    there = out.exists()
    try:
        yield
    except BaseException:
        if not there:
            with suppress(OSError):
                out.rmdir()  # only if it is empty
        raise


def load_model(order: Run) -> AttnResForCausalLM:
    """The model before training: loaded, converted, or new from a configuration."""
    dtype = order.arguments.dtype if order.arguments.dtype == "auto" else getattr(torch, order.arguments.dtype)
    if order.from_scratch:
        return AutoModelForCausalLM.from_config(_configuration(order), dtype=None if dtype == "auto" else dtype)
    try:
        return AttnResForCausalLM.from_pretrained(order.model, dtype=dtype, **_depth_options(order))
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{order.model}: its weights cannot be read ({reason}); for random ones name its config.json"
        ) from error


def _depth_options(order: Run) -> dict:
    names = ("residual_mode", "num_blocks", "layers_per_block")
    return {name: value for name in names if (value := getattr(order.arguments, name)) is not None}


def _configuration(order: Run) -> AttnResConfig:
    path = Path(order.model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{path}: has no config.json, so it is not a checkpoint to train")
    try:
        return AttnResConfig.from_pretrained(order.model, **_depth_options(order))
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: no folder of a checkpoint, hub id or config.json to be read ({reason})") from error


def _quiet_unless_first():
    """Of several processes one shows what it does."""
    if os.environ.get("RANK", "0") != "0":
        import datasets

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        datasets.disable_progress_bars()


def _tokenizer(order: Run) -> PreTrainedTokenizerBase:
    path = Path(order.model)
    name = order.arguments.tokenizer or str(path.parent if path.is_file() else order.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=order.arguments.trust_remote_code)
        if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):  # what some are without their files
            raise ValueError("it has special tokens only")
    except Exception as error:  # of many kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name}: has no tokenizer to be loaded ({reason}); name one by --tokenizer") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: its tokenizer has no end-of-text token (eos_token) to put between documents")
    return tokenizer


def _check_vocabulary(model: AttnResForCausalLM, tokenizer: PreTrainedTokenizerBase):
    tokens, rows = max(tokenizer.get_vocab().values()) + 1, model.get_input_embeddings().num_embeddings
    if tokens > rows:
        raise ValueError(
            f"the tokenizer has {tokens} tokens and the model embeds {rows}: --tokenizer must name the model's own"
        )


def _sequence_length(model: AttnResForCausalLM, arguments: RunArguments) -> int:
    longest = getattr(model.config, "max_position_embeddings", None)
    length = arguments.sequence_length
    if length is None:
        return min(DEFAULT_SEQUENCE_LENGTH, longest or DEFAULT_SEQUENCE_LENGTH)
    if longest is not None and length > longest:
        raise ValueError(
            f"--sequence-length {length}: the model takes {longest} tokens (max_position_embeddings in its config.json)"
        )
    return length


def _sources(arguments: RunArguments) -> tuple[Source, Source | None]:
    config, split, field = arguments.data_config, arguments.split, arguments.text_field
    train = Source(tuple(arguments.data), config, split, field)
    if not (arguments.eval_data or arguments.eval_split):
        return train, None
    return train, Source(tuple(arguments.eval_data or arguments.data), config, arguments.eval_split or split, field)


def _data(
    train_source: Source,
    eval_source: Source | None,
    arguments: RunArguments,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
):
    if arguments.streaming:
        held_out = None if eval_source is None else Stream(eval_source, tokenizer, length, endless=False)
        if held_out is not None and next(iter(held_out), None) is None:  # now, not when the first evaluation fails
            raise ValueError(
                f"{', '.join(eval_source.names)}: holds too little text for one sequence of {length} tokens to "
                "evaluate on; give more or lower --sequence-length"
            )
        return Stream(train_source, tokenizer, length, endless=True), held_out
    train = sequences(train_source, tokenizer, length)
    if eval_source is not None:
        return train, sequences(eval_source, tokenizer, length)
    if arguments.eval_fraction is None:
        return train, None
    count = max(1, round(arguments.eval_fraction * len(train)))
    if count >= len(train):
        raise ValueError(f"--eval-fraction {arguments.eval_fraction} of {len(train)} sequences leaves none to train on")
    return train.select(range(len(train) - count)), train.select(range(len(train) - count, len(train)))


def _record(
    order: Run,
    model: AttnResForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    train_source: Source,
    eval_source: Source | None,
) -> dict:
    """What makes a run the one that it is; the same in all processes."""
    training = order.training
    found = [None]
    if training.process_index == 0:
        found = [
            {
                "training data": digest(train_source),
                "held-out data": None if eval_source is None else digest(eval_source),
                "tokenizer": tokenizer_digest(tokenizer),
            }
        ]
    if training.world_size > 1:
        broadcast_object_list(found)
    return {
        "arguments": {
            "model": order.model,
            "processes": training.world_size,
            **asdict(order.arguments),
            **training.to_dict(),
        },
        "content": {**found[0], "configuration": json.loads(model.config.to_json_string(use_diff=False))},
    }


def _trained_part(model: AttnResForCausalLM, arguments: RunArguments) -> nn.Module:
    if arguments.train == "all":
        return model
    if model.depth_mixer is None:
        raise ValueError(
            f"--train {arguments.train} trains the depth mixer, which residual_mode standard does not have: use "
            "--train all"
        )
    return model.freeze_backbone() if arguments.train == "depth" else with_adapters(model, arguments)


def _save(trainer: RunTrainer, order: Run):
    """The model in the folder of the run, as `from_pretrained` takes it; with LoRA merged, the adapter beside it."""
    out = Path(order.arguments.out)
    folder = out / run_folder.UNFINISHED / "model"
    trainer.check_weights()
    trainer.save_whole_model(folder)
    if trainer.is_world_process_zero():
        if order.arguments.train == "lora":
            stored = PreTrainedConfig.get_config_dict(order.model)[0].get("model_type") == AttnResConfig.model_type
            base = None if stored and not order.from_scratch else out / BASE
            save_with_adapter(folder, load_model(order), trainer.processing_class, base)
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
        run_folder.put_in_place(out, "model")
    trainer.accelerator.wait_for_everyone()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def _report(trainer: RunTrainer, out: Path):
    losses: dict[str, float] = {}
    for entry in trainer.state.log_history:
        losses.update({name: entry[name] for name in ("loss", "eval_loss") if name in entry})
    shown = [f"training loss {losses['loss']:.4f}"] if "loss" in losses else []
    shown += [f"held-out loss {losses['eval_loss']:.4f}"] if "eval_loss" in losses else []
    print(f"{out}: {', '.join([f'{trainer.state.global_step} steps', *shown])}")
    print(f"next: attnres eval {out}")
    if any(name.startswith("depth/") for entry in trainer.state.log_history for name in entry):
        print(f"      attnres dynamics {out}")
