"""The tensors a checkpoint must have, taken from transformers' own model and converters on the meta device."""

import re
from math import prod

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..modeling_attnres import AttnResForCausalLM
from .checkpoint import CheckpointError
from .kimi_k3 import DECAY_RATES, canonical_name
from .layouts import PRENORM, Source


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
        backbone = origin.config.backbone_config
        expected = {canonical_name(name, backbone): shape for name, shape in expected_tensors(model).items()}
    except Exception as error:  # whatever a model class makes of untrusted sizes
        raise CheckpointError(
            f"{folder / 'config.json'}: describes no model that can be built ({' '.join(str(error).split())[:300]})."
        ) from None
    tied = set(model.all_tied_weights_keys) | {
        name for name in expected if name == "lm_head.weight" and origin.config.backbone_config.tie_word_embeddings
    }
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    shapes = origin.shapes
    found = {name for name in shapes if not any(re.search(pattern, name) for pattern in ignored)}
    missing = sorted(set(expected) - found - tied)
    surplus = sorted(found - set(expected) - tied)
    quantised = bool(origin.checkpoint.config.get("quantization_config")) and not origin.packed
    if quantised:  # packed under names and in shapes of the quantiser's own: copied unchanged
        missing = [name for name in missing if name in origin.depth_names]
        surplus = []
    misshapen = [
        f"{name} {list(shape)} instead of {list(wanted)}"
        for name in sorted(found & set(expected))
        if (shape := shapes[name]) != (wanted := expected[name])
        and not (name.endswith(DECAY_RATES) and _is_the_same(shape, wanted))
        and not (quantised and name not in origin.depth_names)
    ]
    for kind, names in (("missing", missing), ("surplus", surplus), ("misshapen", misshapen)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"{folder}: not the tensors that its config.json describes, {kind}: {', '.join(names[:3])}{more}."
            )


def _is_the_same(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether decay rates have the values that are wanted, one for every head, in whatever shape or padded."""
    return prod(shape) == prod(wanted) or (len(shape) == 1 and shape[0] >= prod(wanted))
