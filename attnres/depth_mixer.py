"""Attention Residuals: every sublayer attends over the outputs of the sublayers before it (paper, section 3).

    h_l = sum_i a_{i->l} v_i,     a_{.->l} = softmax_i( w_l . RMSNorm_l(v_i) )

w_l is the pseudo-query of sublayer l, RMSNorm_l its key norm with a gain of its own, v_i the sources: the embedding and
the outputs of all earlier sublayers ("full", section 3.1), or the embedding, the sums of completed blocks and the
partial sum of the current block ("block", section 3.2).

Shapes: B batch, T tokens, D hidden size, L decoder layers, n sources.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from .depth_kernels import Norm, fused_backend, fused_mixture
from .depth_variants import VARIANTS, lossless_scale, read_streams, write_streams


def attention_residual(
    sources: Sequence[torch.Tensor], query: torch.Tensor, eps: float, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mixture of the sources by attention over depth, in the dtype of the query.

    What `depth_implementation="eager"` computes on every device, and what the fused kernels are tested against.

    Args:
        sources: n tensors `[B, T, D]`.
        query: `[D]`, the pseudo-query times the gain of its key norm: w . (g * x) = (w * g) . x. Float32 or wider.
        eps: epsilon of the key norm.
        scale: a factor on the mixture (`Mixing.scale_norm_eps`).

    Returns:
        The mixture `[B, T, D]` and the depth weights `[B, T, n]`, rows summing to 1, both in the dtype of the query.
    """
    # Sums of products, not matrix products: autocast would round those to bfloat16, and a logit of 50 by 0.1.
    values = torch.stack(tuple(sources), dim=2).to(query.dtype)
    keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    weights = torch.softmax((keys * query).sum(-1), dim=-1)
    # Scaled weights: with zero queries they are n * (1 / n) = 1, and the mixture is the sum to the last bit.
    return ((scale * weights).unsqueeze(-1) * values).sum(2), weights


class DepthScore(nn.Module):
    """Pseudo-queries with the gains of their key norms, for one place in the decoder layers.

    One module holds both, named `..._norm`, because Trainer exempts parameters from weight decay by that name: decay
    would pull a trained mixture back to a plain average.

    Args:
        shape: leading dimensions of the parameters, `(L,)` for one per decoder layer or `()` for the output.
        hidden_size: D.

    `query` is `[*shape, 1, D]` (the middle dimension is that of the on-disk projection), exactly zero at
    initialisation; `weight` is `[*shape, D]`, exactly one.
    """

    def __init__(self, shape: tuple[int, ...], hidden_size: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(*shape, 1, hidden_size))
        self.weight = nn.Parameter(torch.ones(*shape, hidden_size))

    def forward(self) -> torch.Tensor:
        """The pseudo-queries times the gains, `[*shape, D]`, float32 or wider."""
        precision = torch.promote_types(self.query.dtype, torch.float32)
        return self.query.squeeze(-2).to(precision) * self.weight


class VariantParameters(nn.Module):
    """What a variant learns per sublayer besides the pseudo-query, stacked: `weight` `[2 L + 1, ...]`."""

    def __init__(self, variant: str, num_layers: int, hidden_size: int):
        super().__init__()
        self.variant, self.sizes = variant, (2 * num_layers + 1, hidden_size)
        self.weight = nn.Parameter(self.initial())

    def initial(self) -> torch.Tensor:
        """Its values before training."""
        return VARIANTS[self.variant].initial(*self.sizes)


class PseudoQuery(NamedTuple):
    """What one sublayer reads its sources with.

    Attributes:
        query: `[D]`, the pseudo-query times the gain of its key norm, float32 or wider.
        extra: what the variant learns besides; `None` for most.
    """

    query: torch.Tensor
    extra: torch.Tensor | None = None

    def to(self, device: torch.device) -> "PseudoQuery":
        return PseudoQuery(*(None if each is None else each.to(device) for each in self))


class DepthMixer(nn.Module):
    """All parameters of the mixing over depth, stacked over decoder layers.

    Args:
        num_layers: decoder layers L.
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
        """What the sublayers read with, 2 L + 1 in the order attention, MLP, attention, MLP, ..., output."""
        attention, mlp = self.attention_norm(), self.mlp_norm()
        queries = torch.stack([attention, mlp.to(attention.device)], dim=1).flatten(0, 1).unbind()
        if hasattr(self, "output_norm"):
            queries = (*queries, self.output_norm())
        extras = [None] * len(queries) if self.variant_norm is None else self.variant_norm.weight.unbind()
        return [PseudoQuery(query, extra) for query, extra in zip(queries, extras, strict=True)]


class Mixing(NamedTuple):
    """How a model mixes: the options of its configuration that a forward pass needs.

    Attributes:
        eps: epsilon of the key norms.
        layers_per_block: decoder layers per block; 0: every sublayer output is a source ("full"); `None`: there are no
            sources, but a residual stream, or several.
        variant: a key of `VARIANTS`.
        implementation: a key of `depth_kernels.DEPTH_IMPLEMENTATIONS`.
        scale_norm_eps: whether the norm after a mixture of n sources has epsilon / n^2.
        chosen: a device, and the back end of the fused operator there, so that not every layer has to ask.
    """

    eps: float
    layers_per_block: int | None
    variant: str = "attnres"
    implementation: str = "eager"
    scale_norm_eps: bool = False
    chosen: tuple[torch.device, str | None] | None = None

    @classmethod
    def of(cls, config) -> "Mixing":
        blocks = {"block": config.layers_per_block, "full": 0, "standard": None}[config.residual_mode]
        if VARIANTS[config.depth_variant].streams:
            blocks = None
        eps, implementation = config.backbone_config.rms_norm_eps, config.depth_implementation
        return cls(eps, blocks, config.depth_variant, implementation, config.scale_norm_eps)

    def start(self, embedding: torch.Tensor) -> "DepthState":
        """The state before the first decoder layer; embedding `[B, T, D]`."""
        if self.layers_per_block is not None:
            if VARIANTS[self.variant].mixture is None:
                self = self._replace(chosen=(embedding.device, fused_backend(self.implementation, embedding)))
            return DepthState(self, (embedding,))
        streams = VARIANTS[self.variant].streams
        return DepthState(self, partial=embedding.unsqueeze(2).expand(-1, -1, streams, -1) if streams else embedding)


class DepthState:
    """What a forward pass carries from sublayer to sublayer, in the model, its pipeline stages and sequence shards.

    Args:
        mixing: how the model mixes.
        sources: complete sources, tensors `[B, T, D]`: the embedding, then block representations ("block") or sublayer
            outputs ("full"). None with plain residuals.
        partial: the partial sum of the current block `[B, T, D]`, a source of its own; with plain residuals the
            residual stream.
    """

    def __init__(self, mixing: Mixing, sources: Iterable[torch.Tensor] = (), partial: torch.Tensor | None = None):
        self.mixing = mixing
        self.sources = tuple(sources)
        self.partial = partial
        self._backend: str | bool | None = False  # of the fused operator; False: not asked for yet
        self._block: int | None = None  # of the last decoder layer
        self._maps: tuple[torch.Tensor, torch.Tensor] | None = None  # of several streams, for the next output

    @property
    def all(self) -> tuple[torch.Tensor, ...]:
        """What the next sublayer attends over, n tensors `[B, T, D]`."""
        return self.sources if self.partial is None else (*self.sources, self.partial)

    @property
    def dtype(self) -> torch.dtype:
        """Of all sources: that of the embedding."""
        return self._first.dtype

    @property
    def _first(self) -> torch.Tensor:
        return self.sources[0] if self.sources else self.partial

    def read(
        self, query: PseudoQuery | None, norm: Norm | None = None, keep_weights: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the next sublayer, or the output, attends to.

        Args:
            query: what it reads with; `None` with plain residuals.
            norm: the RMSNorm that follows, where the implementation can fuse it (`fuses_norm`).
            keep_weights: whether the depth weights are wanted: while a token is decoded, room for them is not free.

        Returns:
            The mixture `[B, T, D]`, or what the norm makes of it, in the dtype of the sources, rounded once; and the
            depth weights `[B, T, n]`, float32 or wider; `None` with plain residuals, and maybe where they are not
            wanted.
        """
        if query is None:
            return self.partial, None
        mixing, sources = self.mixing, self.all
        first, variant = sources[0], VARIANTS[mixing.variant]
        if query.query.device != first.device:
            query = query.to(first.device)
        if variant.streams:
            mixture, weights, self._maps = read_streams(first, query.extra, mixing.eps, query.query.dtype)
            return mixture.to(first.dtype), weights
        # RMSNorm(n h; eps) = RMSNorm(h; eps / n^2)
        scale = lossless_scale(mixing.variant, len(sources)) if mixing.scale_norm_eps else 1.0
        if variant.mixture is not None:
            mixture, weights = variant.mixture(sources, query.query, query.extra, mixing.eps)
            mixture = mixture * scale
        elif self._fused_backend():
            return fused_mixture(self._backend, sources, query.query, mixing.eps, norm, scale, keep_weights)
        else:
            mixture, weights = attention_residual(sources, query.query, mixing.eps, scale)
        return mixture.to(first.dtype), weights

    def fuses_norm(self) -> bool:
        """Whether `read` takes the norm that follows.

        Not for float32 prompts of a converted model, for which the family's own norm rounds as it does in the plain
        model: else the two would be as far apart as each is from the exact result.
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
            first, chosen = self._first, self.mixing.chosen
            # A layer that is compiled by itself is another place than the model that calls it.
            known = chosen is not None and chosen[0] == first.device and not torch.compiler.is_compiling()
            self._backend = chosen[1] if known else fused_backend(self.mixing.implementation, first)
        return self._backend

    def add(self, output: torch.Tensor):
        """Adds the output of a sublayer `[B, T, D]`: to the partial sum, or in "full" mode as a source."""
        output = output if output.dtype == self.dtype else output.to(self.dtype)  # which autocast narrows
        if self._maps is not None:
            self.partial, self._maps = write_streams(self.partial, output, self._maps), None
        else:
            self.partial = output if self.partial is None else self.partial + output
        if self.mixing.layers_per_block == 0:
            self.complete()

    def complete(self):
        """Makes the partial sum the representation of its block: a source of all later blocks."""
        complete = VARIANTS[self.mixing.variant].complete
        source = self.partial if complete is None else complete(self.partial, self.mixing.eps)
        self.sources, self.partial = (*self.sources, source), None

    @property
    def new(self) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """What a decoder layer has added: the partial sum, or in "full" mode two sources."""
        return self.sources[-2:] if self.mixing.layers_per_block == 0 else self.partial

    def walk(self, layers: Iterable[tuple[int, nn.Module]], call_layer: Callable[..., torch.Tensor | tuple]):
        """Calls decoder layers in order, and completes each block after its last one.

        Args:
            layers: indices in the model, and layers. Some may be left out: a block is what is left of it.
            call_layer: takes an index, a layer, the partial sum or `None`, and the complete sources, and returns what
                is new: the partial sum, or in "full" mode the outputs of the attention and the MLP.
        """
        per_block = self.mixing.layers_per_block
        for index, layer in layers:
            if per_block and self._block not in (None, index // per_block):
                self._complete_open()
            self._take(call_layer(index, layer, self.partial, *self.sources), index)
            if per_block:
                self._block = index // per_block
                if (index + 1) % per_block == 0:
                    self._complete_open()

    def _complete_open(self):
        if self.partial is not None:
            self.complete()

    def _take(self, new: torch.Tensor | tuple[torch.Tensor, ...], layer: int):
        expected = 2 if self.mixing.layers_per_block == 0 else 1
        tensors = (new,) if isinstance(new, torch.Tensor) else new
        shape = self._first.shape
        if not isinstance(tensors, tuple) or len(tensors) != expected or any(each.shape != shape for each in tensors):
            raise TypeError(
                f"layers.{layer} must return {'the outputs of its attention and MLP' if expected == 2 else 'one sum'}, "
                f"{expected} x {list(shape)}: an AttnRes model calls its decoder layers with sources, so that only "
                "an AttnResDecoderLayer, or a wrapper around one, can take the place of one."
            )
        device = tensors[-1].device
        if self.sources and self.sources[0].device != device:  # layers may be spread over several
            self.sources, self._backend = tuple(source.to(device) for source in self.sources), False
        if expected == 2:
            self.sources = (*self.sources, *tensors)
        else:
            (self.partial,) = tensors


__all__ = ["DepthMixer", "DepthScore", "DepthState", "Mixing", "Norm", "PseudoQuery", "attention_residual"]
