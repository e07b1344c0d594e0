"""Names of the depth tensors on disk, and transformers' converters between them and the stacked ones in memory."""

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

# Depth tensors on disk (the names of the public Kimi K3 checkpoint) and in memory.
PER_LAYER_NAMES = {
    "self_attention_res_proj": "attention_norm.query",
    "self_attention_res_norm": "attention_norm.weight",
    "mlp_res_proj": "mlp_norm.query",
    "mlp_res_norm": "mlp_norm.weight",
}
OUTPUT_NAMES = {"output_attn_res_proj": "output_norm.query", "output_attn_res_norm": "output_norm.weight"}


class StackLayers(MergeModulelist):
    """One tensor of the per-layer ones, in numeric order of the layers."""

    @property
    def reverse_op(self):
        return UnstackLayers(self.dim)


class UnstackLayers(SplitModulelist):
    """The per-layer tensors again, each in its own shape: transformers 5.17 squeezes [1, D] to [D]."""

    def convert(self, input_dict, *args, **kwargs):
        (stacked,) = (tensor[0] if isinstance(tensor, list) else tensor for tensor in input_dict.values())
        layers = super().convert(input_dict, *args, **kwargs)
        return {name: layer.reshape(stacked.shape[1:]) for name, layer in layers.items()}

    @property
    def reverse_op(self):
        return StackLayers(self.dim)


def depth_weight_conversions() -> list:
    """transformers' converters between the depth tensors on disk and the stacked ones of the `depth_mixer`."""
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
    """All converters of a checkpoint: the family's own, then those of the depth tensors."""
    return checkpoint_conversions(config.backbone_config) + depth_weight_conversions()


def names_in_memory(model: PreTrainedModel, state_dict: dict[str, torch.Tensor], partial: bool = False) -> dict:
    """A state dict under the names of the model's parameters, from one under names on disk, in memory, or both.

    Args:
        model: whose names to use.
        state_dict: tensors under either name.
        partial: whether one part of a stacked tensor may be missing, as in one shard of several: it stays as it is.
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

    def convert(target: str, patterns: dict[str, str], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        converter = deepcopy(converter_of[next(iter(patterns.values()))])
        for name, pattern in patterns.items():
            converter.add_tensor(target, name, pattern, tensors[name])
        values = converter.convert(target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in values.items()}

    for target, patterns in groups.items():
        if partial and target in own:
            whole = revert_weight_conversion(model, {target: own[target]})
            if whole.keys() > patterns.keys():
                tensors = {**whole, **{name: state_dict[name] for name in patterns}}
                patterns = {name: rename_source_key(name, renamings, converters)[1] for name in whole}
                converted.update(convert(target, patterns, tensors))
                continue
        converted.update(convert(target, patterns, state_dict))
    return converted
