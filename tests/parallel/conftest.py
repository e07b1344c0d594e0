"""What several tests of parallel training start from."""

import multiprocessing
import sys
from pathlib import Path

import pytest
from helpers import random_attnres
from once import once
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

multiprocessing.set_forkserver_preload(["attnres.parallel"])  # importing takes seconds: once, not in every rank
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # processes.py starts ranks


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A folder with a model, its tokenizer and a text."""
    folder = tmp_path_factory.mktemp("material")
    words = {"[PAD]": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 97)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="</s>")
    fast.save_pretrained(folder / "model")
    random_attnres("qwen3_moe").save_pretrained(folder / "model")
    (folder / "book.txt").write_text("\n".join(" ".join(f"w{3 + i * j % 93}" for j in range(30)) for i in range(90)))
    return folder


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """What one process makes of the cases."""
    from launching import outcomes_of
    from training_cases import ALONE

    return once(tmp_path_factory, "alone", lambda folder: outcomes_of(ALONE, folder)[0])


@pytest.fixture(scope="session")
def trained_alone(material, tmp_path_factory):
    """The model that `attnres train` makes in one process, to which those of several are compared."""
    from launching import train_options

    from attnres.training.command import run

    def make(folder):
        run(train_options(material, folder / "one", 4))
        return folder / "one"

    return once(tmp_path_factory, "trained-alone", make)
