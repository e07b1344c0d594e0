"""The paper's benchmark table on any causal language model, by lm-eval as it is. Knows no AttnRes."""

from .driver import evaluate
from .suites import ROWS, SUITES

__all__ = ["ROWS", "SUITES", "evaluate"]
