"""`attnres train`: reads and checks everything, then trains and saves the model."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import datasets
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from .. import AttnResConfig, AttnResForCausalLM, DepthDynamicsCallback
from ..messages import is_first, one_line, say
from . import run_folder
from .arguments import DEFAULT_SEQUENCE_LENGTH, Run, RunArguments, parse
from .data import Source, Stream, collate, digest, sequences, tokenizer_digest
from .lora import BASE, save_with_adapter, with_adapters
from .trainer import RunTrainer

# The best of the rates tried when SmolLM2-135M was retrofitted (docs/study.md); a tenfold rate lost.
CONVERTED_DEPTH_RATE = 1e-4

Sources = tuple[Source, Source | None]  # of the training data and the held-out data


def run(command_line: Sequence[str]):
    """Trains a model according to a command line; after a ValueError, no file has been written.

    Raises:
        Stopped: the run ended before its last step.
    """
    parsed = parse(command_line)
    arguments, training = parsed.arguments, parsed.training
    if not is_first():
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        datasets.disable_progress_bars()
    out = Path(arguments.out)
    run_folder.check_place(out, arguments.resume)
    _configuration(parsed)  # report a missing model before anything else is loaded
    tokenizer = _tokenizer(parsed)
    set_seed(training.seed)
    model = load_model(parsed)
    _check_vocabulary(model, tokenizer)
    length = _sequence_length(model, arguments)
    sources = _sources(arguments)
    with training.main_process_first(desc="data"):
        train_data, eval_data = _data(sources, arguments, tokenizer, length)
    record = _record(parsed, model, tokenizer, sources)
    checkpoint = run_folder.checkpoint_of_same_run(out, record) if arguments.resume else None

    def begin():
        run_folder.begin(out, record)
        if arguments.resume:
            say(f"resuming from {checkpoint or 'the beginning, because there is no complete checkpoint yet'}")

    trainer = RunTrainer(
        model=_trained_part(model, arguments),
        args=training,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[DepthDynamicsCallback(arguments.depth_dynamics_steps)] if arguments.depth_dynamics else [],
        muon=arguments.optimizer == "muon",
        depth_learning_rate=_depth_learning_rate(parsed, model),
        begin=begin,
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    _save(trainer, parsed)
    if trainer.is_world_process_zero():
        _report(trainer, out)


def _depth_learning_rate(parsed: Run, model: AttnResForCausalLM) -> float | None:
    """Returns the learning rate of the depth mixer, or None for that of the other parameters."""
    given = parsed.arguments.depth_learning_rate
    is_converted = model.config.scale_norm_eps and model.config.residual_mode != "standard" and not parsed.from_scratch
    if given is not None or parsed.arguments.train == "depth" or not is_converted:
        return given
    return min(parsed.training.learning_rate, CONVERTED_DEPTH_RATE)


def load_model(parsed: Run) -> AttnResForCausalLM:
    """Returns the model before training: loaded, converted, or initialised from a configuration."""
    dtype = parsed.arguments.dtype if parsed.arguments.dtype == "auto" else getattr(torch, parsed.arguments.dtype)
    if parsed.from_scratch:
        return AutoModelForCausalLM.from_config(_configuration(parsed), dtype=None if dtype == "auto" else dtype)
    try:
        return AttnResForCausalLM.from_pretrained(parsed.model, dtype=dtype, **_depth_options(parsed))
    except OSError as error:
        raise ValueError(
            f"{parsed.model}: its weights cannot be read ({one_line(error)}); for random weights name its config.json"
        ) from error


def _depth_options(parsed: Run) -> dict:
    names = ("residual_mode", "num_blocks", "layers_per_block")
    return {name: value for name in names if (value := getattr(parsed.arguments, name)) is not None}


def _configuration(parsed: Run) -> AttnResConfig:
    try:
        return AttnResConfig.from_pretrained(parsed.model, **_depth_options(parsed))
    except OSError as error:
        raise ValueError(
            f"{parsed.model}: is no checkpoint folder, hub id or config.json that can be read ({one_line(error)})"
        ) from error


def _tokenizer(parsed: Run) -> PreTrainedTokenizerBase:
    path = Path(parsed.model)
    name = parsed.arguments.tokenizer or str(path.parent if path.is_file() else parsed.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=parsed.arguments.trust_remote_code)
        # Without their files, some tokenizers load with an empty vocabulary.
        if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
            raise ValueError("it has only special tokens")
    except Exception as error:  # transformers raises many types
        raise ValueError(f"{name}: has no tokenizer that can be loaded ({one_line(error)}); use --tokenizer") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: the tokenizer has no end-of-text token (eos_token) to put between documents")
    return tokenizer


def _check_vocabulary(model: AttnResForCausalLM, tokenizer: PreTrainedTokenizerBase):
    tokens, rows = max(tokenizer.get_vocab().values()) + 1, model.get_input_embeddings().num_embeddings
    if tokens > rows:
        raise ValueError(
            f"the tokenizer has {tokens} tokens, but the model has {rows} embeddings; use --tokenizer to name its own"
        )


def _sequence_length(model: AttnResForCausalLM, arguments: RunArguments) -> int:
    longest = getattr(model.config, "max_position_embeddings", None)
    length = arguments.sequence_length
    if length is None:
        return min(DEFAULT_SEQUENCE_LENGTH, longest or DEFAULT_SEQUENCE_LENGTH)
    if longest is not None and length > longest:
        raise ValueError(f"--sequence-length {length}: the model takes at most {longest} tokens")
    return length


def _sources(arguments: RunArguments) -> Sources:
    config, split, field = arguments.data_config, arguments.split, arguments.text_field
    train = Source(tuple(arguments.data), config, split, field)
    if not (arguments.eval_data or arguments.eval_split):
        return train, None
    return train, Source(tuple(arguments.eval_data or arguments.data), config, arguments.eval_split or split, field)


def _data(sources: Sources, arguments: RunArguments, tokenizer: PreTrainedTokenizerBase, length: int):
    """Returns the training and the held-out sequences."""
    train_source, eval_source = sources
    if arguments.streaming:
        held_out = None if eval_source is None else Stream(eval_source, tokenizer, length, endless=False)
        if held_out is not None and next(iter(held_out), None) is None:
            raise ValueError(
                f"{', '.join(eval_source.names)}: has too little text for one held-out sequence of {length} tokens; "
                "give more or lower --sequence-length"
            )
        return Stream(train_source, tokenizer, length, endless=True), held_out
    train = sequences(train_source, tokenizer, length)
    if eval_source is not None:
        return train, sequences(eval_source, tokenizer, length)
    if arguments.eval_fraction is None:
        return train, None
    count = len(train) - max(1, round(arguments.eval_fraction * len(train)))
    if count <= 0:
        raise ValueError(f"--eval-fraction {arguments.eval_fraction} of {len(train)} sequences leaves none to train on")
    return train.select(range(count)), train.select(range(count, len(train)))


def _record(parsed: Run, model: AttnResForCausalLM, tokenizer: PreTrainedTokenizerBase, sources: Sources) -> dict:
    """Returns everything that the weights depend on."""
    own = {"model": parsed.model, "processes": parsed.training.world_size}
    train, held_out = sources
    return {
        "arguments": {**own, **asdict(parsed.arguments), **parsed.training.to_dict()},
        "content": {
            "training data": digest(train),
            "held-out data": held_out and digest(held_out),
            "tokenizer": tokenizer_digest(tokenizer),
            "configuration": json.loads(model.config.to_json_string(use_diff=False)),
        },
    }


def _trained_part(model: AttnResForCausalLM, arguments: RunArguments) -> nn.Module:
    if model.depth_mixer is None and (arguments.train != "all" or arguments.depth_learning_rate is not None):
        raise ValueError(
            "a model with residual_mode standard has no depth mixer; use --train all and leave out "
            "--depth-learning-rate"
        )
    if arguments.train == "all":
        return model
    return model.freeze_backbone() if arguments.train == "depth" else with_adapters(model, arguments)


def _save(trainer: RunTrainer, parsed: Run):
    """Saves the model in the folder of the run; adapters are merged and also saved in a subfolder."""
    out = Path(parsed.arguments.out)
    folder = out / run_folder.UNFINISHED / "model"
    trainer.check_weights()
    trainer.save_whole_model(folder)
    if trainer.is_world_process_zero():
        if parsed.arguments.train == "lora":
            model_type = PreTrainedConfig.get_config_dict(parsed.model)[0].get("model_type")
            is_stored = model_type == AttnResConfig.model_type and not parsed.from_scratch
            save_with_adapter(folder, load_model(parsed), trainer.processing_class, None if is_stored else out / BASE)
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
        run_folder.put_in_place(out, "model")
    trainer.accelerator.wait_for_everyone()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def _report(trainer: RunTrainer, out: Path):
    last = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    shown = [f"{trainer.state.global_step} steps"]
    for name, description in (("loss", "training loss"), ("eval_loss", "held-out loss")):
        if name in last:
            shown.append(f"{description} {last[name]:.4f}")
    print(f"{out}: {', '.join(shown)}\nnext: attnres eval {out}")
    if any(name.startswith("depth/") for name in last):
        print(f"      attnres dynamics {out}")
