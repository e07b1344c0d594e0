"""Names of the depth tensors on disk, and transformers' converters between them and the stacked ones in memory."""

from transformers.core_model_loading import MergeModulelist, SplitModulelist, WeightConverter, WeightRenaming

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
