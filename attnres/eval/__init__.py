"""The paper's benchmark table on any causal language model, with unmodified lm-eval. Independent of AttnRes."""

from .driver import evaluate
from .suites import ROWS, SUITES

__all__ = ["ROWS", "SUITES", "evaluate"]
