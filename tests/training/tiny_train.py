"""Helpers of the training tests: tiny checkpoints, text, and readers of a run's folder."""

import json
import random
from pathlib import Path

import torch
from helpers import short_config
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from attnres import AttnResForCausalLM
from attnres.backbones import causal_lm_class
from attnres.training.command import run

VOCABULARY = 257  # the bytes and the end-of-text token
LENGTH = 16


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token per byte and 0 as the end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(["<eos>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def write_plain(folder: Path, family: str = "qwen3", **options):
    """Writes a PreNorm checkpoint with a tokenizer."""
    torch.manual_seed(0)
    special = {"eos_token_id": 0, "pad_token_id": None, "bos_token_id": None}
    config = short_config(family, 3, vocab_size=VOCABULARY, **{**special, "initializer_range": 0.05, **options})
    causal_lm_class(config)(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def words(count: int, seed: int = 0) -> str:
    """Returns a text with something to learn."""
    choose = random.Random(seed).choice
    return " ".join(choose(["tree", "sea", "wind", "stone", "cloud"]) for _ in range(count)) + ".\n"


def write_lines(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def command_line(model, data, out, **options) -> list[str]:
    """Returns the flags of a short run; an option that is None is left out, and one that is True has no value."""
    options = {
        "sequence_length": LENGTH,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "seed": 5,
        "disable_tqdm": "true",
        "use_cpu": True,
        **options,
    }
    line = [str(model), "--data", str(data), "--out", str(out)]
    for name, value in options.items():
        if value is not None:
            line += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return line


def train(model, data, out: Path, **options) -> Path:
    run(command_line(model, data, out, **options))
    return out


def log(out: Path, key: str = "loss") -> dict[int, float]:
    """Returns logged values by step."""
    state = json.loads((out / "trainer_state.json").read_text())
    return {entry["step"]: entry[key] for entry in state["log_history"] if key in entry}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def loaded(out: Path) -> AttnResForCausalLM:
    return AttnResForCausalLM.from_pretrained(out)
