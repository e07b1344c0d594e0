"""attnres: Attention Residuals (arXiv 2603.15031) as a transformers model."""

from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_attnres import AttnResConfig
from .modeling_attnres import AttnResForCausalLM, AttnResModel

if TYPE_CHECKING:
    from .analysis.dynamics import DepthDynamicsCallback

__version__ = "0.1.0"

AutoConfig.register("attnres", AttnResConfig, exist_ok=True)
AutoModel.register(AttnResConfig, AttnResModel, exist_ok=True)
AutoModelForCausalLM.register(AttnResConfig, AttnResForCausalLM, exist_ok=True)

# Every saved folder carries its own code, so that it loads with trust_remote_code where this package is not installed.
AttnResConfig.register_for_auto_class()
AttnResModel.register_for_auto_class("AutoModel")
AttnResForCausalLM.register_for_auto_class("AutoModelForCausalLM")


def __getattr__(name: str):
    if name == "DepthDynamicsCallback":  # on demand: with it comes Trainer, which takes seconds to import
        from .analysis.dynamics import DepthDynamicsCallback

        return DepthDynamicsCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["AttnResConfig", "AttnResForCausalLM", "AttnResModel", "DepthDynamicsCallback", "__version__"]
