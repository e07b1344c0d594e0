"""Names of the depth tensors on disk, and transformers' converters to the stacked ones in memory and back."""

from copy import deepcopy

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    MergeModulelist,
    SplitModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from .backbones import checkpoint_conversions
from .configuration_attnres import AttnResConfig

# Modules of the depth tensors on disk, named as in the public Kimi K3 checkpoint, and their parameters in memory.
PER_LAYER_NAMES = {
    "self_attention_res_proj": "attention_norm.query",
    "self_attention_res_norm": "attention_norm.weight",
    "mlp_res_proj": "mlp_norm.query",
    "mlp_res_norm": "mlp_norm.weight",
}
OUTPUT_NAMES = {"output_attn_res_proj": "output_norm.query", "output_attn_res_norm": "output_norm.weight"}


class StackLayers(MergeModulelist):
    """Stacks the tensors of the decoder layers in the numeric order of the layers."""

    @property
    def reverse_op(self):
        return UnstackLayers(self.dim)


class UnstackLayers(SplitModulelist):
    """Splits a stacked tensor into those of the layers, without squeezing `[1, D]` to `[D]` like transformers."""

    def convert(self, input_dict, *args, **kwargs):
        (stacked,) = (tensor[0] if isinstance(tensor, list) else tensor for tensor in input_dict.values())
        layers = super().convert(input_dict, *args, **kwargs)
        return {name: layer.reshape(stacked.shape[1:]) for name, layer in layers.items()}

    @property
    def reverse_op(self):
        return StackLayers(self.dim)


def depth_weight_conversions() -> list:
    """Returns the converters between the depth tensors on disk and the stacked ones of the `depth_mixer`."""
    per_layer = [
        WeightConverter(
            source_patterns=f"layers.*.{name}.weight",
            target_patterns=f"depth_mixer.{target}",
            operations=[StackLayers(dim=0)],
        )
        for name, target in PER_LAYER_NAMES.items()
    ]
    output = [
        WeightRenaming(source_patterns=f"{name}.weight", target_patterns=f"depth_mixer.{target}")
        for name, target in OUTPUT_NAMES.items()
    ]
    return per_layer + output


def weight_conversions(config: AttnResConfig) -> list:
    """Returns all converters of a checkpoint: those of the family, then those of the depth tensors."""
    return checkpoint_conversions(config.backbone_config) + depth_weight_conversions()


def names_in_memory(model: PreTrainedModel, state_dict: dict[str, torch.Tensor], partial: bool = False) -> dict:
    """Returns a state dict under the names of the model's parameters, with the depth tensors of the layers stacked.

    Args:
        model: model that is to load the tensors.
        state_dict: tensors under their names on disk, in memory, or some under each.
        partial: whether tensors of some layers may be missing, as in one file of several; those of the model are used.
    """
    own = model.state_dict()
    conversions = weight_conversions(model.config)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    converted, groups = {}, {}
    for name in sorted(state_dict, key=dot_natural_key):
        target, pattern = (name, None) if name in own else rename_source_key(name, renamings, converters)
        if pattern is None:
            converted[target] = state_dict[name]
        else:
            groups.setdefault(target, {})[name] = pattern

    for target, patterns in groups.items():
        tensors = state_dict
        if partial and target in own:
            whole = revert_weight_conversion(model, {target: own[target]})
            if whole.keys() > patterns.keys():
                tensors = {**whole, **{name: state_dict[name] for name in patterns}}
                patterns = {name: rename_source_key(name, renamings, converters)[1] for name in whole}
        converter = deepcopy(converter_of[next(iter(patterns.values()))])
        for name, pattern in patterns.items():
            converter.add_tensor(target, name, pattern, tensors[name])
        for name, value in converter.convert(target, model=model, config=model.config).items():
            converted[name] = value[0] if isinstance(value, list) else value
    return converted
