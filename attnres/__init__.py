"""attnres: Attention Residuals (arXiv 2603.15031) as a transformers model."""

from typing import TYPE_CHECKING

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_attnres import AttnResConfig
from .modeling_attnres import (
    AttnResForCausalLM,
    AttnResForQuestionAnswering,
    AttnResForSequenceClassification,
    AttnResForTokenClassification,
    AttnResModel,
)

if TYPE_CHECKING:
    from .analysis.dynamics import DepthDynamicsCallback

__version__ = "0.1.0"

AutoConfig.register("attnres", AttnResConfig, exist_ok=True)
_CLASSES = {
    AutoModel: AttnResModel,
    AutoModelForCausalLM: AttnResForCausalLM,
    AutoModelForSequenceClassification: AttnResForSequenceClassification,
    AutoModelForTokenClassification: AttnResForTokenClassification,
    AutoModelForQuestionAnswering: AttnResForQuestionAnswering,
}

# Every saved folder carries its own code, so that it loads with trust_remote_code where this package is not installed.
AttnResConfig.register_for_auto_class()
for _auto_class, _model_class in _CLASSES.items():
    _auto_class.register(AttnResConfig, _model_class, exist_ok=True)
    _model_class.register_for_auto_class(_auto_class.__name__)


def __getattr__(name: str):
    if name == "DepthDynamicsCallback":  # on demand: with it comes Trainer, which takes seconds to import
        from .analysis.dynamics import DepthDynamicsCallback

        return DepthDynamicsCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
