"""Registers the public classes with the Auto classes of transformers. `import attnres` imports this module."""

import warnings
from importlib import metadata

import transformers

from . import modeling_attnres
from .configuration_attnres import AttnResConfig

transformers.AutoConfig.register("attnres", AttnResConfig, exist_ok=True)
# Saved folders contain their code, so that they load with trust_remote_code where this package is not installed.
AttnResConfig.register_for_auto_class()
for _auto_class, _place in modeling_attnres.AUTO_MAP.items():
    if _auto_class != "AutoConfig":
        _model_class = getattr(modeling_attnres, _place.rpartition(".")[2])
        getattr(transformers, _auto_class).register(AttnResConfig, _model_class, exist_ok=True)
        _model_class.register_for_auto_class(_auto_class)


def _warn_of_a_clash():
    """Warns if fast-attnres is installed, which puts files in a folder of the same name."""
    try:
        others = metadata.distribution("fast-attnres").files or ()
    except metadata.PackageNotFoundError:
        return
    if any(file.parts[0] == __package__ for file in others):
        warnings.warn(
            f"fast-attnres is installed too, and both put files in {__package__}/: the one installed last has replaced "
            "files of the other. Uninstall both, then install attention-residuals in an environment of its own.",
            stacklevel=2,
        )


_warn_of_a_clash()
