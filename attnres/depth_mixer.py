"""Attention Residuals: every sublayer attends over the outputs of the sublayers before it (paper, section 3).

    h_l = sum_i a_{i->l} v_i,     a_{.->l} = softmax_i( w_l . RMSNorm_l(v_i) )

w_l is the pseudo-query of sublayer l, and RMSNorm_l is its key norm, which has a gain of its own. The v_i are its
sources. In "full" mode (section 3.1) these are the embedding and the outputs of all earlier sublayers. In "block" mode
(section 3.2) they are the embedding, one block representation (the sum of its sublayer outputs) per complete block, and
the partial sum of the current block.

Shapes: B batch, T tokens, D hidden size, L decoder layers, n sources.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from .depth_kernels import Norm, fused_backend, fused_mixture
from .depth_variants import VARIANTS, read_streams, write_streams


def attention_residual(
    sources: Sequence[torch.Tensor], query: torch.Tensor, eps: float, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes the sources by attention over depth: h = sum_i softmax_i(w . RMSNorm(v_i)) v_i (paper, section 3.1).

    `depth_implementation="eager"` runs this function on every device, and the fused kernels are tested against it.

    Args:
        sources: n tensors `[B, T, D]`.
        query: the pseudo-query times the gain of its key norm, `[D]`, float32 or wider: w . (g * x) = (w * g) . x.
        eps: epsilon of the key norm.
        scale: a factor on the mixture, see `Mixing.scale_norm_eps`.

    Returns:
        The mixture `[B, T, D]` and the depth weights `[B, T, n]`, whose rows sum to 1, both in the dtype of the query.
    """
    # Sums of products instead of matrix products, which autocast would round to bfloat16: a logit of 50 is off by 0.1.
    values = torch.stack(tuple(sources), dim=2).to(query.dtype)
    keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    weights = torch.softmax((keys * query).sum(-1), dim=-1)
    # Scaling the weights keeps conversions exact: with zero queries they are n * (1 / n) = 1, and h is the plain sum.
    return ((scale * weights).unsqueeze(-1) * values).sum(2), weights


class DepthScore(nn.Module):
    """The pseudo-queries and key-norm gains of one place in the decoder layers (attention, MLP), or of the output.

    One module holds both and is named `..._norm`, because Trainer exempts parameters from weight decay by that name:
    decay would pull a trained mixture back to a plain average.

    `query` is `[*shape, 1, D]`, as the projection on disk, and starts at exactly zero. `weight` is `[*shape, D]` and
    starts at exactly one.

    Args:
        shape: leading dimensions of the parameters: `(L,)` for one per decoder layer, `()` for the output.
        hidden_size: D.
    """

    def __init__(self, shape: tuple[int, ...], hidden_size: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(*shape, 1, hidden_size))
        self.weight = nn.Parameter(torch.ones(*shape, hidden_size))

    def forward(self) -> torch.Tensor:
        """Returns the pseudo-queries times the gains, `[*shape, D]`, float32 or wider."""
        precision = torch.promote_types(self.query.dtype, torch.float32)
        return self.query.squeeze(-2).to(precision) * self.weight


class VariantParameters(nn.Module):
    """A variant's own parameters, stacked over the sublayers and the output: `weight` `[2 L + 1, ...]`."""

    def __init__(self, variant: str, num_layers: int, hidden_size: int):
        super().__init__()
        self.variant, self.sizes = variant, (2 * num_layers + 1, hidden_size)
        self.weight = nn.Parameter(self.initial())

    def initial(self) -> torch.Tensor:
        """Returns the values before training."""
        return VARIANTS[self.variant].initial(*self.sizes)


class PseudoQuery(NamedTuple):
    """The parameters with which one sublayer, or the output, reads its sources."""

    query: torch.Tensor  # [D], the pseudo-query times the gain of its key norm, float32 or wider
    extra: torch.Tensor | None = None  # the variant's own parameters, if it has any

    def to(self, device: torch.device) -> "PseudoQuery":
        return PseudoQuery(*(None if each is None else each.to(device) for each in self))


class DepthMixer(nn.Module):
    """All parameters of the mixing over depth, stacked over the decoder layers.

    Args:
        num_layers: L, the number of decoder layers.
        hidden_size: D.
        variant: a key of `VARIANTS`.
    """

    def __init__(self, num_layers: int, hidden_size: int, variant: str = "attnres"):
        super().__init__()
        self.attention_norm = DepthScore((num_layers,), hidden_size)
        self.mlp_norm = DepthScore((num_layers,), hidden_size)
        self.output_norm = DepthScore((), hidden_size)
        self.variant = variant
        learns = VARIANTS[variant].initial is not None
        self.variant_norm = VariantParameters(variant, num_layers, hidden_size) if learns else None

    def forward(self) -> list[PseudoQuery]:
        """Returns 2 L + 1 pseudo-queries in the order attention, MLP, attention, MLP, ..., output."""
        attention, mlp = self.attention_norm(), self.mlp_norm()
        queries = torch.stack([attention, mlp.to(attention.device)], dim=1).flatten(0, 1).unbind()
        if hasattr(self, "output_norm"):  # of a pipeline's stages only the last has it
            queries = (*queries, self.output_norm())
        extras = [None] * len(queries) if self.variant_norm is None else self.variant_norm.weight.unbind()
        return [PseudoQuery(query, extra) for query, extra in zip(queries, extras, strict=True)]


class Mixing(NamedTuple):
    """The depth options of a configuration that a forward pass needs."""

    eps: float  # of the key norms
    # Decoder layers per block. 0: every sublayer output is a source ("full"). `None`: there are no sources but one
    # residual stream ("standard"), or several ("mhc").
    layers_per_block: int | None
    variant: str = "attnres"
    implementation: str = "eager"
    # Whether a mixture of n sources is multiplied by n. With zero queries it is then their sum, as in the plain model,
    # and the RMSNorm that follows has the plain model's epsilon: RMSNorm(n h; eps) = RMSNorm(h; eps / n^2).
    scale_norm_eps: bool = False

    @classmethod
    def of(cls, config) -> "Mixing":
        """Reads the depth options of an `AttnResConfig`."""
        blocks = {"block": config.layers_per_block, "full": 0, "standard": None}[config.residual_mode]
        if VARIANTS[config.depth_variant].streams:
            blocks = None
        eps, implementation = config.backbone_config.rms_norm_eps, config.depth_implementation
        return cls(eps, blocks, config.depth_variant, implementation, config.scale_norm_eps)

    def start(self, embedding: torch.Tensor) -> "DepthState":
        """Returns the state before the first decoder layer, given the embedding `[B, T, D]`."""
        if self.layers_per_block is not None:
            return DepthState(self, (embedding,))
        streams = VARIANTS[self.variant].streams
        return DepthState(self, partial=embedding.unsqueeze(2).expand(-1, -1, streams, -1) if streams else embedding)


class DepthState:
    """The sources and the partial sum that a forward pass carries from sublayer to sublayer.

    The model, the stages of a pipeline and sequence shards all use it.

    Args:
        mixing: the depth options.
        sources: the complete sources, tensors `[B, T, D]`: the embedding, then block representations ("block") or
            sublayer outputs ("full"). Empty in "standard" mode.
        partial: the partial sum of the current block `[B, T, D]`, the newest source; `None` at the start of a block.
            In "standard" mode it is the residual stream.
    """

    def __init__(self, mixing: Mixing, sources: Iterable[torch.Tensor] = (), partial: torch.Tensor | None = None):
        self.mixing = mixing
        self.sources = tuple(sources)
        self.partial = partial
        self._backend: str | bool | None = False  # of the fused operator; False before it is chosen
        self._block: int | None = None  # the block of the last decoder layer
        self._maps: tuple[torch.Tensor, torch.Tensor] | None = None  # of "mhc", from a read to the next `add`

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all sources, which is that of the embedding."""
        return self._first.dtype

    @property
    def _first(self) -> torch.Tensor:
        return self.sources[0] if self.sources else self.partial

    def read(
        self, query: PseudoQuery | None, norm: Norm | None = None, keep_weights: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the input of the next sublayer, or of the model's final norm: the mixture of all sources.

        Args:
            query: the pseudo-query; `None` in "standard" mode, where the residual stream is returned.
            norm: the RMSNorm that follows, to be applied as well; only where `fuses_norm` is true.
            keep_weights: whether the depth weights are needed. Memory for them takes time while a token is decoded.

        Returns:
            The mixture `[B, T, D]`, normed if `norm` is given, in the dtype of the sources, rounded once; and the depth
            weights `[B, T, n]`, float32 or wider, or `None` in "standard" mode and possibly without `keep_weights`.
        """
        if query is None:
            return self.partial, None
        mixing = self.mixing
        sources = self.sources if self.partial is None else (*self.sources, self.partial)
        first, variant = sources[0], VARIANTS[mixing.variant]
        if query.query.device != first.device:
            query = query.to(first.device)
        if variant.streams:
            mixture, weights, self._maps = read_streams(first, query.extra, mixing.eps, query.query.dtype)
            return mixture.to(first.dtype), weights
        scale = variant.lossless(len(sources)) if mixing.scale_norm_eps and variant.lossless is not None else 1.0
        if variant.mixture is not None:
            values = torch.stack(sources, dim=2).to(query.query.dtype)
            mixture, weights = variant.mixture(values, query.query, query.extra, mixing.eps)
            mixture = mixture * scale
        elif self._fused_backend():
            return fused_mixture(self._backend, sources, query.query, mixing.eps, norm, scale, keep_weights)
        else:
            mixture, weights = attention_residual(sources, query.query, mixing.eps, scale)
        return mixture.to(first.dtype), weights

    def fuses_norm(self) -> bool:
        """Returns whether `read` can apply the norm that follows.

        It does not for float32 prompts of a converted model. There the family's own norm has to round as it does in the
        plain model: otherwise the two models would differ by as much as each differs from the exact result.
        """
        mixing = self.mixing
        if mixing.variant != "attnres" or not self.sources:
            return False
        source = self.sources[0]
        if mixing.scale_norm_eps and source.dtype == torch.float32 and source.shape[1] > 1:
            return False
        return self._fused_backend() is not None

    def _fused_backend(self) -> str | None:
        if self._backend is False:
            self._backend = fused_backend(self.mixing.implementation, self._first)
        return self._backend

    def add(self, output: torch.Tensor):
        """Adds a sublayer output `[B, T, D]` to the partial sum or, in "full" mode, to the sources."""
        output = output if output.dtype == self.dtype else output.to(self.dtype)  # autocast returns a narrower dtype
        if self._maps is not None:
            self.partial, self._maps = write_streams(self.partial, output, self._maps), None
        else:
            self.partial = output if self.partial is None else self.partial + output
        if self.mixing.layers_per_block == 0:
            self.complete()

    def complete(self):
        """Turns the partial sum, if any, into the representation of its block, a source of all later blocks."""
        if self.partial is None:
            return
        complete = VARIANTS[self.mixing.variant].complete
        source = self.partial if complete is None else complete(self.partial, self.mixing.eps)
        self.sources, self.partial = (*self.sources, source), None

    @property
    def new(self) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """What a decoder layer returns: the partial sum or, in "full" mode, its two sublayer outputs."""
        return self.sources[-2:] if self.mixing.layers_per_block == 0 else self.partial

    def walk(self, layers: Iterable[tuple[int, nn.Module]], call_layer: Callable[..., torch.Tensor | tuple]):
        """Calls decoder layers in order and completes each block after its last one.

        Args:
            layers: pairs of a layer's index in the model and the layer. Indices may be missing: a block then consists
                of the layers that are left of it.
            call_layer: a function of the index, the layer, the partial sum or `None`, and the complete sources, which
                returns the new partial sum or, in "full" mode, the outputs of the attention and the MLP.
        """
        per_block = self.mixing.layers_per_block
        for index, layer in layers:
            if per_block and self._block not in (None, index // per_block):
                self.complete()
            self._take(call_layer(index, layer, self.partial, *self.sources), index)
            if per_block:
                self._block = index // per_block
                if (index + 1) % per_block == 0:
                    self.complete()

    def _take(self, new: torch.Tensor | tuple[torch.Tensor, ...], layer: int):
        expected = 2 if self.mixing.layers_per_block == 0 else 1
        tensors = (new,) if isinstance(new, torch.Tensor) else new
        shape = self._first.shape
        if not isinstance(tensors, tuple) or len(tensors) != expected or any(each.shape != shape for each in tensors):
            what = "the outputs of its attention and its MLP, each" if expected == 2 else "one partial sum"
            raise TypeError(
                f"layers.{layer} must return {what} {list(shape)}: an AttnRes model calls its decoder layers with "
                "sources, so only an AttnResDecoderLayer, or a wrapper around one, can be used as a layer."
            )
        device = tensors[-1].device
        if self.sources and self.sources[0].device != device:  # layers may be spread over several devices
            self.sources, self._backend = tuple(source.to(device) for source in self.sources), False
        if expected == 2:
            self.sources = (*self.sources, *tensors)
        else:
            (self.partial,) = tensors


__all__ = ["DepthMixer", "DepthScore", "DepthState", "Mixing", "Norm", "PseudoQuery", "attention_residual"]
