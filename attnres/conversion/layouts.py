"""Checkpoint layouts (plain, AttnRes, Kimi K3, flash-linear-attention): how each is recognised, read and written.

Here every tensor has one canonical name, that of an AttnRes checkpoint on disk, whatever layout it comes from.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedConfig

from ..backbones import check_supported
from ..checkpoint_names import OUTPUT_NAMES, PER_LAYER_NAMES
from ..configuration_attnres import AttnResConfig
from ..depth_variants import VARIANTS
from ..messages import one_line
from . import fla, kimi_k3
from .checkpoint import CONFIG_NAME, Checkpoint, CheckpointError
from .mxfp4 import dequantise, unpacked_shape
from .pieces import Piece

PRENORM, ATTNRES, KIMI_K3, FLA = "prenorm", "attnres", "kimi-k3", "fla"
VARIANT_NAME = "model.depth_mixer.variant_norm.weight"  # what a depth variant learns besides pseudo-queries
GATE_PARTS = (".self_attn.g_a_proj.weight", ".self_attn.g_b_proj.weight")  # product: g_proj


@dataclass
class Source:
    """A checkpoint whose layout is known."""

    checkpoint: Checkpoint
    layout: str  # `PRENORM`, `ATTNRES`, `KIMI_K3` or `FLA`
    config: AttnResConfig  # for a plain checkpoint, that of the lossless conversion
    stored_names: dict[str, str]  # names on disk by canonical name; each part of a packed weight has one of its own
    left_out: list[str]  # names on disk of tensors of the other parts of a multimodal checkpoint
    # Names on disk of the two parts of each packed weight, by the canonical name of the weight.
    packed: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes by canonical name; a packed weight has the shape that it unpacks to."""
        return {piece.name: piece.shape for piece in self._canonical_pieces()}

    @property
    def depth_names(self) -> set[str]:
        """Returns the names on disk of the depth tensors that a model with this configuration has."""
        names = depth_names(self.config.num_hidden_layers)
        return names if VARIANTS[self.config.depth_variant].initial is None else names | {VARIANT_NAME}

    def depth_is_zero(self) -> bool:
        """Returns whether the pseudo-queries are exactly zero and what the depth variant learns is as at the start."""
        zero, folder = True, self.checkpoint.folder
        for name in sorted(self.depth_names):
            if name not in self.stored_names:
                raise CheckpointError(f"{folder}: lacks depth tensor {name}.")
            tensor = self.checkpoint.read(self.stored_names[name])
            if not torch.isfinite(tensor.float()).all():
                raise CheckpointError(f"{folder}: depth tensor {name} has NaN or Inf.")
            if name == VARIANT_NAME:
                zero = zero and torch.equal(tensor, _initial_extras(self.config).to(tensor.dtype))
            elif name.endswith("_res_proj.weight"):
                zero = zero and not tensor.any()
        return zero

    def pieces(
        self, layout: str, keep_packed: bool = False, engine: str | None = None, dropped: Collection[str] = ()
    ) -> list[Piece]:
        """Returns how each tensor of the result is made.

        Args:
            layout: layout of the result.
            keep_packed: whether packed weights stay packed.
            engine: engine that loads the result. In the Kimi K3 layout, tensors have the form that it insists on; in
                the AttnRes layout, depth tensors are stacked.
            dropped: canonical names of tensors that the result does not have.
        """
        backbone = self.config.backbone_config
        pieces = [piece for piece in self._canonical_pieces(keep_packed) if piece.name not in dropped]
        pieces = [replace(piece, shape=_shape_in(layout, piece, backbone, engine)) for piece in pieces]
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

    def _canonical_pieces(self, keep_packed: bool = False) -> list[Piece]:
        """Returns the tensors under canonical names, in the shapes on disk."""
        packed = {} if keep_packed else self.packed
        parts = {part for pair in packed.values() for part in pair}
        pieces = []
        for name, stored in self.stored_names.items():
            if stored not in parts:
                _, dtype, shape = self.checkpoint.tensors[stored]
                pieces.append(Piece(name, shape, dtype, (stored,)))
        for name, pair in packed.items():
            pieces.append(Piece(name, unpacked_shape(self.checkpoint.tensors[pair[0]].shape), "BF16", pair, dequantise))
        return pieces

    def _stacked_pieces(self, pieces: list[Piece]) -> list[Piece]:
        """Replaces the depth tensors of the layers by stacked ones, for an engine that does not stack them itself."""
        by_name = {piece.name: piece for piece in pieces}
        stacked = []
        for target, names in stacked_names(self.config.num_hidden_layers).items():
            parts = [by_name[name] for name in names if name in by_name]
            if parts:
                shape = (len(parts), *parts[0].shape) if len(names) > 1 else parts[0].shape
                stored = tuple(part.stored[0] for part in parts)
                stacked.append(Piece(target, shape, parts[0].dtype, stored, stack_layers))
        layers = depth_names(self.config.num_hidden_layers)
        return [piece for piece in pieces if piece.name not in layers] + stacked

    def _equal_pieces(self, pieces: list[Piece], engine: str | None) -> list[Piece]:
        """Merges the matrices of the gate and writes the embeddings as a head, where the engine insists on it."""
        backbone, by_name = self.config.backbone_config, {piece.name: piece for piece in pieces}
        if kimi_k3.merges_gates(backbone, engine):
            for high in [piece for piece in pieces if piece.name.endswith(GATE_PARTS[1])]:
                low = by_name[high.name.replace(".g_b_proj.", ".g_a_proj.")]
                name, shape = high.name.replace(".g_b_proj.", ".g_proj."), (high.shape[0], low.shape[1])
                pieces.append(Piece(name, shape, high.dtype, (*low.stored, *high.stored), _merged_gate))
            pieces = [piece for piece in pieces if not piece.name.endswith(GATE_PARTS)]
        if kimi_k3.unties_head(backbone, engine):
            pieces = [piece for piece in pieces if piece.name != "lm_head.weight"]
            pieces.append(replace(by_name["model.embed_tokens.weight"], name="lm_head.weight"))
        return pieces


def depth_names(layers: int) -> set[str]:
    """Returns the names on disk of the depth tensors of a model with this number of decoder layers."""
    return {name for names in stacked_names(layers).values() for name in names}


def stacked_names(layers: int) -> dict[str, list[str]]:
    """Returns the names in memory of the depth tensors, each with the names on disk of the tensors that it stacks."""
    names = {
        target: [f"model.layers.{layer}.{name}.weight" for layer in range(layers)]
        for name, target in PER_LAYER_NAMES.items()
    } | {target: [f"model.{name}.weight"] for name, target in OUTPUT_NAMES.items()}
    return {f"model.depth_mixer.{target}": parts for target, parts in names.items()}


def stack_layers(*tensors: torch.Tensor) -> torch.Tensor:
    """Stacks the depth tensors of the decoder layers; returns the one of the output as it is."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0]


def _merged_gate(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return high.double() @ low.double()


def new_depth_tensors(config: AttnResConfig, dtype: torch.dtype, stacked: bool) -> dict[str, torch.Tensor]:
    """Returns the depth tensors of a lossless start, zero pseudo-queries and unit gains, per layer or stacked."""
    tensors, size = {}, config.hidden_size
    for target, names in stacked_names(config.num_hidden_layers).items():
        tensor = torch.zeros(1, size, dtype=dtype) if target.endswith(".query") else torch.ones(size, dtype=dtype)
        each = {name: tensor.clone() for name in names}
        tensors |= {target: stack_layers(*each.values())} if stacked else each
    extras = _initial_extras(config)
    return tensors if extras is None else {**tensors, VARIANT_NAME: extras.to(dtype)}


def _initial_extras(config: AttnResConfig) -> torch.Tensor | None:
    """Returns what the depth variant learns besides pseudo-queries, as it is before training."""
    initial = VARIANTS[config.depth_variant].initial
    return None if initial is None else initial(config.num_sublayers + 1, config.hidden_size)


def understand(checkpoint: Checkpoint, layout: str | None = None) -> Source:
    """Recognises the layout of a checkpoint, which must be `layout` if it is given, and reads its configuration."""
    config, place = checkpoint.config, checkpoint.folder / CONFIG_NAME
    model_type = kimi_k3.text_config(config).get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{place}: model_type must be a string, got {model_type!r}.")
    if model_type == AttnResConfig.model_type:
        found = ATTNRES
    else:
        found = FLA if fla.BLOCK_SIZE in config else KIMI_K3 if kimi_k3.is_k3(config) else PRENORM
    if layout is not None and layout != found:
        raise CheckpointError(f"{checkpoint.folder}: is a checkpoint in the layout {found}, but --from says {layout}.")
    names, left_out = {name: name for name in checkpoint.tensors}, []
    try:
        if found == KIMI_K3:
            attnres_config = kimi_k3.read_config(checkpoint)
            names, left_out = kimi_k3.own_names(checkpoint, attnres_config)
        elif found == FLA:
            attnres_config = fla.read_config(checkpoint)
            names = {fla.own_name(name): name for name in names}
        else:
            if found == PRENORM:
                check_supported(model_type)
            attnres_config = AttnResConfig.from_dict(dict(config))
    except CheckpointError:
        raise
    except Exception as error:  # configuration classes raise errors of any type for untrusted values
        raise CheckpointError(f"{place}: {one_line(error, 400)}") from None
    backbone, packed = attnres_config.backbone_config, {}
    dtypes = (attnres_config.dtype, backbone.dtype)
    if not all(dtype is None or isinstance(dtype, torch.dtype) for dtype in dtypes):
        raise CheckpointError(f"{place}: dtype must be the name of a torch dtype, got {dtypes}.")
    if backbone.model_type in kimi_k3.BACKBONES:
        names = {kimi_k3.canonical_name(name, backbone): stored for name, stored in names.items()}
        packed = kimi_k3.packed_pairs(checkpoint, names)
        if packed:  # with this key, transformers would try to unpack them itself
            attnres_config.__dict__.pop("quantization_config", None)
    return Source(checkpoint, found, attnres_config, names, left_out, packed)


def _shape_in(layout: str, piece: Piece, backbone: PreTrainedConfig, engine: str | None) -> tuple[int, ...]:
    """Returns the shape of a tensor in a layout, which differs only for the decay rates of Kimi's linear attention."""
    if not piece.name.endswith(kimi_k3.DECAY_RATES):
        return piece.shape
    heads = backbone.linear_num_heads
    if backbone.model_type == "kimi_linear":
        return (heads,) if layout == KIMI_K3 else (1, 1, heads, 1)
    is_padded = layout == KIMI_K3 and engine is None  # as in the release
    return (-(-heads // kimi_k3.DECAY_RATES_MULTIPLE) * kimi_k3.DECAY_RATES_MULTIPLE,) if is_padded else (heads,)
