"""What `attnres train` does, in order: everything is read and checked before anything is written."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from .. import AttnResConfig, AttnResForCausalLM, DepthDynamicsCallback
from .arguments import DEFAULT_SEQUENCE_LENGTH, Run, RunArguments, parse
from .data import Source, Stream, collate, sequences
from .trainer import RunTrainer, last_checkpoint


def run(command_line: Sequence[str]):
    """Trains a model as a command line says."""
    order = parse(command_line)
    arguments, training = order.arguments, order.training
    out = Path(arguments.out)
    checkpoint = _checkpoint_to_resume(out, arguments)
    tokenizer = _tokenizer(order)
    set_seed(training.seed)
    model = load_model(order)
    if arguments.train == "depth":
        model.freeze_backbone()
    length = arguments.sequence_length or min(
        DEFAULT_SEQUENCE_LENGTH, getattr(model.config, "max_position_embeddings", DEFAULT_SEQUENCE_LENGTH)
    )
    with training.main_process_first(desc="data"):
        train_data, eval_data = _data(arguments, tokenizer, length)
    trainer = RunTrainer(
        model=model,
        args=training,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[DepthDynamicsCallback(arguments.depth_dynamics_steps)] if arguments.depth_dynamics else [],
        muon=arguments.optimizer == "muon",
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model(str(out))
    trainer.save_state()
    if trainer.is_world_process_zero():
        losses = {name: value for entry in trainer.state.log_history for name, value in entry.items() if "loss" in name}
        print(f"{out}: step {trainer.state.global_step}, loss {losses.get('loss', float('nan')):.4f}")


def load_model(order: Run) -> AttnResForCausalLM:
    arguments = order.arguments
    depth = {
        name: value
        for name in ("residual_mode", "num_blocks", "layers_per_block")
        if (value := getattr(arguments, name)) is not None
    }
    path = Path(order.model)
    if path.is_file():
        config = AttnResConfig.from_pretrained(str(path), **depth)
        return AttnResForCausalLM(config)
    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    return AttnResForCausalLM.from_pretrained(order.model, dtype=dtype, **depth)


def _tokenizer(order: Run) -> PreTrainedTokenizerBase:
    path = Path(order.model)
    name = order.arguments.tokenizer or str(path.parent if path.is_file() else order.model)
    return AutoTokenizer.from_pretrained(name, trust_remote_code=order.arguments.trust_remote_code)


def _data(arguments: RunArguments, tokenizer: PreTrainedTokenizerBase, length: int):
    source = Source(tuple(arguments.data), arguments.data_config, arguments.split, arguments.text_field)
    held_out = None
    if arguments.eval_data or arguments.eval_split:
        held_out = Source(
            tuple(arguments.eval_data or arguments.data),
            arguments.data_config,
            arguments.eval_split or arguments.split,
            arguments.text_field,
        )
    if arguments.streaming:
        stream = Stream(source, tokenizer, length, endless=True)
        return stream, None if held_out is None else Stream(held_out, tokenizer, length, endless=False)
    train = sequences(source, tokenizer, length)
    if held_out is not None:
        return train, sequences(held_out, tokenizer, length)
    if arguments.eval_fraction is None:
        return train, None
    count = max(1, round(arguments.eval_fraction * len(train)))
    if count >= len(train):
        raise ValueError(f"--eval-fraction {arguments.eval_fraction} of {len(train)} sequences leaves none to train on")
    return train.select(range(len(train) - count)), train.select(range(len(train) - count, len(train)))


def _checkpoint_to_resume(out: Path, arguments: RunArguments) -> Path | None:
    if not arguments.resume:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} is there already: --resume continues the run in it, another --out starts one")
        return None
    return last_checkpoint(out)
