"""Shared checkpoints and text, and a temporary cache of data sets.

The checkpoints have dropout, so that a change of the random numbers shows.
"""

import datasets
import pytest
from tiny_train import train, words, write_lines, write_plain


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory):
    """Moves the cache of `datasets` to a temporary folder."""
    folder = tmp_path_factory.mktemp("cache")
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder
    datasets.disable_progress_bars()
    yield folder
    datasets.config.HF_DATASETS_CACHE = before
    datasets.enable_progress_bars()


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    return write_plain(tmp_path_factory.mktemp("plain"), attention_dropout=0.2)


@pytest.fixture(scope="session")
def mixture(tmp_path_factory):
    """A checkpoint of a mixture of experts."""
    return write_plain(tmp_path_factory.mktemp("mixture"), "qwen3_moe", attention_dropout=0.2)


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """A file with documents of several lengths."""
    texts = [words(3 + 7 * (number % 5), number) for number in range(24)]
    return write_lines(tmp_path_factory.mktemp("data") / "documents.jsonl", texts)


@pytest.fixture(scope="session")
def finished(plain, documents, tmp_path_factory):
    """The folder of a finished run with the usual options, which no test changes."""
    return train(plain, documents, tmp_path_factory.mktemp("finished") / "run")
