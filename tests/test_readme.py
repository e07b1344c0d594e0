"""The README's snippets run, in their order, in a folder that has what they name."""

import re
from pathlib import Path

import pytest
import torch
from families import tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from attnres import AttnResForCausalLM
from attnres.backbones import FAMILIES

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TEXT = [f"def answer_{n}(): return {n} * {n + 1}  # the product of two neighbours" for n in range(40)]


@pytest.fixture
def folder_of_a_reader(tmp_path, monkeypatch):
    """A model folder under the hub id that the snippets name, and two text files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", model_max_length=256
    )
    config = tiny_config(
        "qwen3", vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=0, eos_token_id=0, initializer_range=0.1
    )
    model = AutoModelForCausalLM.from_config(config)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "Qwen" / "Qwen3-0.6B")
    (tmp_path / "train.txt").write_text("\n".join(TEXT[:30]))
    (tmp_path / "held_out.txt").write_text("\n".join(TEXT[30:]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")  # Trainer's
def test_the_snippets_run_and_do_what_the_text_says(folder_of_a_reader):
    assert len(SNIPPETS) == 4
    torch.manual_seed(0)
    names = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), names)
        if "difference" in names and "trainer" not in names:
            assert names["difference"] < 1e-3
    assert isinstance(names["model"], AttnResForCausalLM)
    assert len(names["weights"]) == 2 * 12 + 1
    assert (folder_of_a_reader / "qwen3-attnres" / "model.safetensors").exists()
    assert 0 < names["results"]["results"]["held_out"]["bits_per_byte,none"] < 20


def test_the_list_of_backbones_is_the_table():
    listed = README.split("## Which backbones")[1].split(". Without arguments")[0]
    assert set(re.findall(r"[a-z0-9_]+", listed)) == set(FAMILIES)
