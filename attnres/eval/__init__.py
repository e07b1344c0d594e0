"""Runs the paper's benchmark table on any causal language model with unmodified lm-eval; independent of AttnRes."""

from .driver import evaluate
from .suites import ROWS, SUITES

__all__ = ["ROWS", "SUITES", "evaluate"]
