"""attnres: Attention Residuals (arXiv 2603.15031) as a transformers model."""

import importlib
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .analysis.dynamics import DepthDynamicsCallback
    from .configuration_attnres import AttnResConfig
    from .modeling_attnres import (
        AttnResForCausalLM,
        AttnResForQuestionAnswering,
        AttnResForSequenceClassification,
        AttnResForTokenClassification,
        AttnResModel,
    )

__version__ = "0.1.0"

__all__ = [
    "AttnResConfig",
    "AttnResForCausalLM",
    "AttnResForQuestionAnswering",
    "AttnResForSequenceClassification",
    "AttnResForTokenClassification",
    "AttnResModel",
    "DepthDynamicsCallback",
    "__version__",
]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "DepthDynamicsCallback":
        place = ".analysis.dynamics"  # on demand, because it imports Trainer, which takes seconds
    else:
        importlib.import_module(".registration", __name__)
        place = ".modeling_attnres"
    value = globals()[name] = getattr(importlib.import_module(place, __name__), name)
    return value


def _is_command() -> bool:
    """Returns whether Python runs the `attnres` command, which answers `--help` without importing torch."""
    if sys.argv[:1] == ["-m"]:
        return any(word == __name__ or word.endswith(f"m{__name__}") for word in sys.orig_argv)  # -mattnres is one word
    return bool(sys.argv) and PurePath(sys.argv[0]).name in ("attnres", "attnres.exe")


if not _is_command():
    importlib.import_module(".registration", __name__)
