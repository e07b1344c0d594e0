"""Engines that serve what is converted: they run in environments of their own, which `make test-engines` makes."""

import os
from dataclasses import dataclass

import pytest


@dataclass
class LlamaCpp:
    """Attributes: source: llama.cpp's own folder, with its converter; python: has llama-cpp-python."""

    source: str
    python: str


@pytest.fixture(scope="session")
def llama_cpp():
    found = [os.environ.get(name) for name in ("LLAMA_CPP", "LLAMA_CPP_PYTHON")]
    if not all(found):
        pytest.fail(
            "set LLAMA_CPP to the folder of llama.cpp and LLAMA_CPP_PYTHON to a Python that has llama-cpp-python, "
            "or run make test-engines"
        )
    return LlamaCpp(*found)


@pytest.fixture(scope="session")
def mlx_python():
    if not (found := os.environ.get("MLX_PYTHON")):
        pytest.fail("set MLX_PYTHON to a Python that has mlx-lm, or run make test-engines")
    return found
