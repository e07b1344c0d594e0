"""Checkpoint layouts (plain, AttnRes, Kimi K3) and how each is written: configuration keys, names, shapes.

Whatever the layout on disk, tensors have one canonical name in here: that of an AttnRes checkpoint on disk.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedConfig

from ..backbones import check_supported
from ..checkpoint_names import OUTPUT_NAMES, PER_LAYER_NAMES
from ..configuration_attnres import AttnResConfig
from ..depth_variants import VARIANTS
from . import fla, kimi_k3
from .checkpoint import Checkpoint, CheckpointError, TensorInfo
from .mxfp4 import dequantise, unpacked_shape
from .pieces import Piece

PRENORM, ATTNRES, KIMI_K3, FLA = "prenorm", "attnres", "kimi-k3", "fla"
LAYOUTS = (PRENORM, ATTNRES, KIMI_K3, FLA)
VARIANT_NAME = "model.depth_mixer.variant_norm.weight"  # what a depth variant learns besides pseudo-queries
GATE_PART = re.compile(r"\.self_attn\.g_[ab]_proj\.weight$")


@dataclass
class Source:
    """A checkpoint, understood.

    Attributes:
        checkpoint: what is on disk.
        layout: one of `LAYOUTS`.
        config: as an AttnRes configuration; that of the lossless conversion for a plain checkpoint.
        stored_names: canonical name to name on disk; the two parts of packed weights are under their own names.
        left_out: names on disk that belong to another part of a multimodal checkpoint.
        packed: canonical name of a weight that is stored packed, and the names on disk of its two parts.
    """

    checkpoint: Checkpoint
    layout: str
    config: AttnResConfig
    stored_names: dict[str, str]
    left_out: list[str]
    packed: dict[str, tuple[str, str]] = field(default_factory=dict)

    def tensor(self, name: str) -> TensorInfo:
        """What the header says of a tensor, by canonical name."""
        return self.checkpoint.tensors[self.stored_names[name]]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by canonical name, of packed weights those that they unpack to."""
        parts = {part for pair in self.packed.values() for part in pair}
        shapes = {name: self.tensor(name).shape for name, stored in self.stored_names.items() if stored not in parts}
        for name, (stored, _) in self.packed.items():
            shapes[name] = unpacked_shape(self.checkpoint.tensors[stored].shape)
        return shapes

    def pieces(
        self, layout: str, keep_packed: bool = False, engine: str | None = None, dropped: Collection[str] = ()
    ) -> list[Piece]:
        """What the tensors are made of in a layout.

        Args:
            keep_packed: whether packed weights stay so.
            engine: in the Kimi K3 layout, for which equal functions are written; otherwise, for which depth tensors are
                stacked.
            dropped: canonical names of tensors that do not come along.
        """
        backbone, pieces = self.config.backbone_config, []
        parts = {part for pair in self.packed.values() for part in pair}
        for name, stored in self.stored_names.items():
            if name in dropped or (stored in parts and not keep_packed):
                continue
            info = self.checkpoint.tensors[stored]
            shape = shape_in(layout, name, info.shape, backbone, engine)
            pieces.append(Piece(name, shape, info.dtype, (stored,)))
        if not keep_packed:
            for name, pair in self.packed.items():
                shape = unpacked_shape(self.checkpoint.tensors[pair[0]].shape)
                pieces.append(Piece(name, shape, "BF16", pair, dequantise))
        if layout == KIMI_K3:
            pieces = self._equal_pieces(pieces, engine)
            prefix = kimi_k3.PREFIX if kimi_k3.is_multimodal(backbone, engine) else ""
            return [replace(piece, name=prefix + piece.name) for piece in pieces]
        if layout == ATTNRES and engine is not None:
            pieces = self._stacked_pieces(pieces)
        if self.layout == FLA:
            return pieces
        if self.layout == KIMI_K3:
            return [replace(piece, name=kimi_k3.saved_name(piece.name, backbone)) for piece in pieces]
        # A plain or AttnRes checkpoint keeps its own names.
        return [piece if piece.make else replace(piece, name=piece.stored[0]) for piece in pieces]

    def _stacked_pieces(self, pieces: list[Piece]) -> list[Piece]:
        """Depth tensors as they are in memory, for an engine that does not stack them itself."""
        by_name = {piece.name: piece for piece in pieces}
        stacked = []
        for target, names in stacked_names(self.config.num_hidden_layers).items():
            parts = [by_name[name] for name in names if name in by_name]
            if parts:
                shape = (len(parts), *parts[0].shape) if len(names) > 1 else parts[0].shape
                stored = tuple(part.stored[0] for part in parts)
                stacked.append(Piece(target, shape, parts[0].dtype, stored, stack_layers))
        return [piece for piece in pieces if piece.name not in self.depth_names] + stacked

    def _equal_pieces(self, pieces: list[Piece], engine: str | None) -> list[Piece]:
        """The gate as one matrix and the embeddings as a head, where the engine wants them."""
        backbone = self.config.backbone_config
        if kimi_k3.merges_gates(backbone, engine):
            low = {piece.name: piece for piece in pieces if piece.name.endswith(".self_attn.g_a_proj.weight")}
            merged = []
            for piece in pieces:
                if piece.name.endswith(".self_attn.g_b_proj.weight"):
                    other = low[piece.name.replace(".g_b_proj.", ".g_a_proj.")]
                    name = piece.name.replace(".g_b_proj.", ".g_proj.")
                    shape, stored = (piece.shape[0], other.shape[1]), (*other.stored, *piece.stored)
                    merged.append(Piece(name, shape, piece.dtype, stored, kimi_k3.merged_gate))
            kept = [piece for piece in pieces if not GATE_PART.search(piece.name)]
            pieces = kept + merged
        if kimi_k3.unties_head(backbone, engine):
            pieces = [piece for piece in pieces if piece.name != "lm_head.weight"]
            (embeddings,) = (piece for piece in pieces if piece.name == "model.embed_tokens.weight")
            pieces.append(replace(embeddings, name="lm_head.weight"))
        return pieces

    @property
    def depth_names(self) -> set[str]:
        """The depth tensors that an AttnRes checkpoint of this many layers has."""
        names = depth_names(self.config.num_hidden_layers)
        return names if VARIANTS[self.config.depth_variant].initial is None else names | {VARIANT_NAME}


def depth_names(layers: int) -> set[str]:
    """Names of the depth tensors on disk."""
    kinds = ("self_attention_res_proj", "self_attention_res_norm", "mlp_res_proj", "mlp_res_norm")
    names = {f"model.layers.{layer}.{kind}.weight" for layer in range(layers) for kind in kinds}
    return names | {"model.output_attn_res_proj.weight", "model.output_attn_res_norm.weight"}


def stacked_names(layers: int) -> dict[str, list[str]]:
    """Names of the depth tensors in memory, and on disk those of every layer that each is stacked of."""
    per_layer = {
        f"model.depth_mixer.{target}": [f"model.layers.{layer}.{name}.weight" for layer in range(layers)]
        for name, target in PER_LAYER_NAMES.items()
    }
    return per_layer | {
        f"model.depth_mixer.{target}": [f"model.{name}.weight"] for name, target in OUTPUT_NAMES.items()
    }


def stack_layers(*tensors: torch.Tensor) -> torch.Tensor:
    """One tensor of the layers' own; that of the output as it is."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0]


def understand(checkpoint: Checkpoint, layout: str | None = None) -> Source:
    """What a checkpoint is; a layout asked for that it is not is an error.

    Raises:
        CheckpointError: an unknown or unsupported kind of model, with the reason.
    """
    config = checkpoint.config
    model_type = kimi_k3.text_config(config).get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: model_type must be a string, got {model_type!r}.")
    found = ATTNRES if model_type == AttnResConfig.model_type else PRENORM
    if found == PRENORM:
        found = FLA if fla.is_fla(config) else KIMI_K3 if kimi_k3.is_k3(config) else PRENORM
    if layout is not None and layout != found:
        raise CheckpointError(f"{checkpoint.folder}: is a checkpoint in the layout {found}, but --from says {layout}.")
    names, left_out = {name: name for name in checkpoint.tensors}, []
    try:
        if found == KIMI_K3:
            kimi_k3.check_quantisation(checkpoint)
            attnres_config = kimi_k3.read_config(checkpoint)
            names, left_out = kimi_k3.own_names(checkpoint, attnres_config)
        elif found == FLA:
            attnres_config = fla.read_config(checkpoint)
            names = fla.own_names(list(names))
        else:
            if found == PRENORM:
                check_supported(model_type)
            attnres_config = AttnResConfig.from_dict(dict(config))
    except CheckpointError:
        raise
    except Exception as error:  # whatever a configuration class makes of untrusted values
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: {' '.join(str(error).split())[:400]}") from None
    dtypes = (attnres_config.dtype, attnres_config.backbone_config.dtype)
    if not all(dtype is None or isinstance(dtype, torch.dtype) for dtype in dtypes):
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: dtype must be the name of a torch dtype, got {dtypes}."
        )
    backbone, packed = attnres_config.backbone_config, {}
    if backbone.model_type in kimi_k3.BACKBONES:
        count = len(names)
        names = {kimi_k3.canonical_name(name, backbone): stored for name, stored in names.items()}
        if len(names) != count:
            raise CheckpointError(f"{checkpoint.folder}: has a dense layer's MLP twice, as mlp and block_sparse_moe.")
        packed = kimi_k3.packed_pairs(checkpoint, names)
        if packed:  # transformers would want to unpack them itself
            attnres_config.__dict__.pop("quantization_config", None)
    return Source(checkpoint, found, attnres_config, names, left_out, packed)


def to_prenorm(config: AttnResConfig) -> dict:
    """The `config.json` of the plain backbone."""
    backbone: PreTrainedConfig = config.backbone_config
    content = backbone.to_diff_dict()
    content["model_type"] = backbone.model_type
    content.pop("auto_map", None)  # names code that does not come along
    if config.dtype is not None:
        content["dtype"] = str(config.dtype).removeprefix("torch.")
    return content


def shape_in(
    layout: str, name: str, shape: tuple[int, ...], backbone: PreTrainedConfig, engine: str | None = None
) -> tuple[int, ...]:
    """The shape that a tensor has in a layout: only the decay rates of linear attention differ."""
    if not name.endswith(kimi_k3.DECAY_RATES):
        return shape
    if layout == KIMI_K3:
        return kimi_k3.decay_rates_shape(backbone, engine)
    heads = backbone.linear_num_heads
    return (1, 1, heads, 1) if backbone.model_type == "kimi_linear" else (heads,)
