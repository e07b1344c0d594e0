"""A small AttnRes checkpoint with its tokenizer, what the real driver measured on it, and its finished Hub folder."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "eval"))  # tiny_eval: a mirror of three data sets

from once import once
from tiny_card import save_checkpoint
from tiny_eval import CONFIGS, ITEMS, Scripted, write_data_set

from attnres.eval import evaluate
from attnres.eval.identity import checkpoint_identity
from attnres.hub_card import build


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    def make(top):
        folder = save_checkpoint(top / "source")
        (folder / "LICENSE").write_text("Apache License\n   Version 2.0, January 2004\n")
        return folder

    return once(tmp_path_factory, "card-checkpoint", make)


@pytest.fixture
def source(checkpoint, tmp_path) -> Path:
    """A copy of the checkpoint, for a test to change."""
    return shutil.copytree(checkpoint, tmp_path / "source")


@pytest.fixture(scope="session")
def finished(checkpoint, tmp_path_factory) -> Path:
    """Built without loading the model."""
    return build(checkpoint, tmp_path_factory.mktemp("finished") / "tiny", execute_snippets=False)


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy of a finished folder, for a test to change."""
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture(scope="session")
def small_mirror(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mirror")
    for repository, (config, splits) in CONFIGS.items():
        parts = zip(splits, range(0, 1000, 100), strict=False)
        items = {
            split: [ITEMS[repository](start + number) for number in range(3 if split == "test" else 30)]
            for split, start in parts
        }
        write_data_set(root, repository, config, items)
    return root


@pytest.fixture(scope="session")
def measure(checkpoint, small_mirror, tmp_path_factory):
    """Runs the real driver over a model that knows two answers of three; gives the folder of results."""

    def measure(suite: str, identity: dict | None = None, **options) -> Path:
        out = tmp_path_factory.mktemp("results")
        lm = Scripted(write=lambda doc: "no idea" if doc["answer"].endswith(" 104") else doc["answer"])
        lm.identity = checkpoint_identity(checkpoint) if identity is None else identity
        options = {"data_dir": small_mirror, "progress": False, **options}
        assert not evaluate(None, suite, lm=lm, out=out, **options)["failed"]
        return out

    return measure


@pytest.fixture(scope="session")
def results(measure, tmp_path_factory) -> Path:
    return once(tmp_path_factory, "card-results", lambda _: measure("gsm8k,gpqa_diamond,arc_challenge"))


@pytest.fixture(scope="session")
def hub_folder(checkpoint, results, tmp_path_factory) -> Path:
    """Built with all that is run and checked."""

    def make(top):
        return build(checkpoint, top / "tiny-attnres", [results], language="en", base_model="someone/plain-qwen")

    return once(tmp_path_factory, "card-folder", make)
