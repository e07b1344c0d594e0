"""Checks that a checkpoint has the tensors of its model, which transformers builds on the meta device."""

import re
from math import prod
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..messages import one_line
from ..modeling_attnres import AttnResForCausalLM
from .checkpoint import CONFIG_NAME, CheckpointError
from .kimi_k3 import DECAY_RATES, canonical_name
from .layouts import PRENORM, Source


def meta_model(origin: Source) -> PreTrainedModel:
    """Returns the model of a checkpoint without weights."""
    with torch.device("meta"):
        if origin.layout == PRENORM:
            return AutoModelForCausalLM.from_config(origin.config.backbone_config)
        return AttnResForCausalLM(origin.config)


def check_structure(origin: Source):
    """Checks the names and shapes of all tensors against the model that `config.json` describes."""
    folder, backbone = origin.checkpoint.folder, origin.config.backbone_config
    try:
        model = meta_model(origin)
        tensors = revert_weight_conversion(model, dict(model.state_dict()))
    except Exception as error:  # model classes raise errors of any type for untrusted sizes
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: is not of a model that can be built: {one_line(error)}"
        ) from None
    expected = {canonical_name(name, backbone): tuple(tensor.shape) for name, tensor in tensors.items()}
    tied = set(model.all_tied_weights_keys) | ({"lm_head.weight"} if backbone.tie_word_embeddings else set())
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    found = {}
    for name, shape in origin.shapes.items():
        if not any(re.search(pattern, name) for pattern in ignored):
            found[name] = shape
        if name.endswith(DECAY_RATES) and name in expected:  # may have another shape, or be padded
            size = prod(expected[name])
            if prod(shape) == size or (len(shape) == 1 and shape[0] >= size):
                found[name] = expected[name]
    if origin.checkpoint.config.get("quantization_config") and not origin.packed:
        # The names and shapes of the packed weights are the quantiser's own; they are copied unchanged.
        expected = {name: shape for name, shape in expected.items() if name in origin.depth_names}
        found = {name: shape for name, shape in found.items() if name in origin.depth_names}
    check_tensors(folder, expected, found, tied)


def check_tensors(folder: Path, expected: dict[str, tuple], found: dict[str, tuple], tied: set[str]):
    """Checks the names and shapes of tensors; those that are tied to others may be missing or surplus."""
    faults = {
        "missing": sorted(expected.keys() - found.keys() - tied),
        "surplus": sorted(found.keys() - expected.keys() - tied),
        "misshapen": [
            f"{name} {list(found[name])} instead of {list(expected[name])}"
            for name in sorted(expected.keys() & found.keys())
            if found[name] != expected[name]
        ],
    }
    for kind, names in faults.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"{folder}: not the tensors that its {CONFIG_NAME} describes, {kind}: {', '.join(names[:3])}{more}."
            )
