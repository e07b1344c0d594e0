"""What holds for every test: nothing is downloaded, few threads, a fixed seed."""

import os

# transformers, datasets and OpenMP read these when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch
from hypothesis import settings

# The first example of a property builds a model, which no deadline allows for; a suite says the same thing twice.
settings.register_profile("attnres", deadline=None, derandomize=True)
settings.load_profile("attnres")


def pytest_configure(config):
    # Triton reads this when it is imported, by whichever test comes first. Its kernels run on the CPU, slowly, unless
    # those on a GPU are asked for with -m gpu.
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
