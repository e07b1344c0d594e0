"""Which tensors a checkpoint must have, taken from transformers' own model and converters on the meta device."""

import re

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..modeling_attnres import AttnResForCausalLM
from .checkpoint import CheckpointError
from .layouts import KIMI_K3, PRENORM, Source, shape_in


def meta_model(origin: Source) -> PreTrainedModel:
    """The model that a checkpoint's configuration describes, without weights."""
    with torch.device("meta"):
        if origin.layout == PRENORM:
            return AutoModelForCausalLM.from_config(origin.config.backbone_config)
        return AttnResForCausalLM(origin.config)


def expected_tensors(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes on disk of all tensors of a model."""
    tensors = revert_weight_conversion(model, dict(model.state_dict()))
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_structure(origin: Source):
    """Raises CheckpointError if tensors are missing, misshapen or surplus for what `config.json` describes."""
    folder = origin.checkpoint.folder
    try:
        model = meta_model(origin)
        expected = expected_tensors(model)
    except Exception as error:  # whatever a model class makes of untrusted sizes
        raise CheckpointError(
            f"{folder / 'config.json'}: describes no model that can be built ({' '.join(str(error).split())[:300]})."
        ) from None
    tied = set(model.all_tied_weights_keys) | {
        name for name in expected if name == "lm_head.weight" and origin.config.backbone_config.tie_word_embeddings
    }
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    found = {name for name in origin.stored_names if not any(re.search(pattern, name) for pattern in ignored)}
    missing = sorted(set(expected) - found - tied)
    surplus = sorted(found - set(expected) - tied)
    quantised = bool(origin.checkpoint.config.get("quantization_config"))
    if quantised:  # packed under names and in shapes of the quantiser's own: carried over as they are
        missing = [name for name in missing if name in origin.depth_names]
        surplus = []
    misshapen = [
        f"{name} {list(shape)} instead of {list(wanted)}"
        for name in sorted(found & set(expected))
        if (shape := origin.tensor(name).shape) != (wanted := _wanted_shape(origin, name, expected[name]))
        and not (quantised and name not in origin.depth_names)
    ]
    for kind, names in (("missing", missing), ("surplus", surplus), ("misshapen", misshapen)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"{folder}: not the tensors that its config.json describes, {kind}: {', '.join(names[:3])}{more}."
            )


def _wanted_shape(origin: Source, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape_in(KIMI_K3, name, shape) if origin.layout == KIMI_K3 else shape
