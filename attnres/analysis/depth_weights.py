"""Depth weights of an AttnRes model over a text, as running statistics: memory does not grow with the text.

Shapes: T tokens, K tokens that are kept one by one, L decoder layers, n sources.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path

import torch

from .text import pieces_of, prefix_of, token_text, tokens_of

FORMAT = "attnres-depth-weights/1"
IGNORED_SHARE = 0.1  # a source is ignored if its mean weight is below this share of 1 / n, the uniform weight
KINDS = {"attention": "attention", "mlp": "MLP", "output": "output"}  # as they are called in text
MAX_CONTEXT = 2048  # unless more is asked for: what is alive at a time grows with it
DIGITS = 6  # of the weights of single tokens


@dataclass(frozen=True)
class Mixture:
    """Weights of one mixture, over the tokens of the text; sources in the order of depth, the embedding first.

    Attributes:
        layer: decoder layer, from 0; None for the output.
        kind: "attention" or "mlp", the sublayer that reads the mixture, or "output".
        partial: whether the newest source is the partial sum of the sublayer's own block.
        mean, std, min, max: n numbers each; std is that of the tokens at hand (divided by T).
        entropy: mean over tokens of the entropy of the weights, in nats.
    """

    layer: int | None
    kind: str
    partial: bool
    mean: list[float]
    std: list[float]
    min: list[float]
    max: list[float]
    entropy: float

    @property
    def name(self) -> str:
        return "output" if self.layer is None else f"layer {self.layer} {KINDS[self.kind]}"

    @property
    def num_sources(self) -> int:
        return len(self.mean)

    @property
    def newest(self) -> float:
        """Mean weight on the newest source."""
        return self.mean[-1]

    @property
    def embedding(self) -> float:
        """Mean weight on the embedding."""
        return self.mean[0]

    @property
    def effective_sources(self) -> float:
        """exp(entropy): as many sources with equal weights have this entropy."""
        return math.exp(self.entropy)

    @property
    def ignored(self) -> list[int]:
        """Sources with a mean weight below `IGNORED_SHARE / n`."""
        return [index for index, mean in enumerate(self.mean) if mean < IGNORED_SHARE / self.num_sources]


@dataclass(frozen=True)
class Token:
    """A token of the text: its id and the text that it stands for."""

    id: int
    text: str


@dataclass(frozen=True)
class DepthWeights:
    """What `depth_weights` measured.

    Attributes:
        model: its name.
        family: of the backbone, such as "qwen3".
        residual_mode: "block" or "full".
        num_layers: L.
        layers_per_block: decoder layers per block; None in "full" mode.
        text: name of the text.
        num_tokens: T, tokens of the text that were counted.
        context: tokens that the model saw at a time, each chunk starting anew.
        sources: names of all sources in the order of depth; a mixture of n sources has the first n.
        short_sources: the same, short enough for the axis of a figure.
        mixtures: 2 L + 1, in the order attention, MLP, attention, MLP, ..., output.
        tokens: the first K of the text.
        token_weights: per mixture and kept token n weights.
    """

    model: str
    family: str
    residual_mode: str
    num_layers: int
    layers_per_block: int | None
    text: str
    num_tokens: int
    context: int
    sources: list[str]
    short_sources: list[str]
    mixtures: list[Mixture]
    tokens: list[Token]
    token_weights: list[list[list[float]]]

    def of_kind(self, kind: str) -> list[Mixture]:
        """The mixtures before attention, before MLP, or of the output."""
        return [mixture for mixture in self.mixtures if mixture.kind == kind]

    def summary(self) -> dict:
        """Summary numbers: `overall` (means over the mixtures of two sources or more, by kind and of all), `mixtures`
        (of each one) and `ignored` (per source that any mixture ignores: which do, and how many see it)."""
        several = [mixture for mixture in self.mixtures if mixture.num_sources > 1]
        groups = {
            **{kind: [mixture for mixture in several if mixture.kind == kind] for kind in KINDS},
            "all": several,
        }
        ignored = {}
        for index, source in enumerate(self.sources):
            by = [mixture.name for mixture in self.mixtures if index in mixture.ignored]
            if by:
                seen = sum(mixture.num_sources > index for mixture in self.mixtures)
                ignored[source] = {"by": by, "seen_by": seen}
        return {
            "ignored_rule": f"mean weight below {IGNORED_SHARE}/n, n the number of sources that the mixture sees",
            "overall": {kind: _means(group) for kind, group in groups.items() if group},
            "mixtures": [
                {
                    "name": mixture.name,
                    "sources": mixture.num_sources,
                    "newest": mixture.newest,
                    "embedding": mixture.embedding,
                    "entropy": mixture.entropy,
                    "effective_sources": mixture.effective_sources,
                    "ignored": [self.sources[index] for index in mixture.ignored],
                }
                for mixture in self.mixtures
            ],
            "ignored": ignored,
        }

    def save(self, path: str | os.PathLike):
        """Writes all as JSON, with the summary, atomically."""
        content = {"format": FORMAT, **asdict(self), "summary": self.summary()}
        write_text(path, json.dumps(content, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "DepthWeights":
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is something else.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            found = content["format"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: no depth weights; `attnres inspect` writes them as JSON.") from None
        if found != FORMAT:
            raise ValueError(
                f"{path}: format must be {FORMAT!r}, got {found!r}; write it again with `attnres inspect`."
            )
        try:
            values = {field.name: content[field.name] for field in fields(cls)}
            values["mixtures"] = [Mixture(**mixture) for mixture in values["mixtures"]]
            values["tokens"] = [Token(**token) for token in values["tokens"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged ({error}); write it again with `attnres inspect`.") from None
        return cls(**values)


@torch.no_grad()
def depth_weights(
    model,
    tokenizer,
    text: str | Iterable[str] | None = None,
    *,
    token_ids: Iterable[int] | None = None,
    context: int | None = None,
    max_tokens: int | None = None,
    keep_tokens: int = 64,
    name: str | None = None,
    text_name: str = "text",
    progress: Callable[[int], object] | None = None,
) -> DepthWeights:
    """Statistics of the depth weights over a text, which may be longer than memory.

    The text is cut into chunks of `context` tokens, each of which starts anew: its first tokens see little of what
    came before them. Tokens that the tokenizer puts before every text are there at the start of each chunk, and are
    not counted.

    Args:
        model: an AttnRes model in residual_mode "block" or "full".
        tokenizer: of the model; None only with `token_ids`.
        text: the text, or its parts in order.
        token_ids: instead of a text.
        context: tokens at a time (default: what the model takes, at most 2048).
        max_tokens: stop after as many tokens of the text (default: all).
        keep_tokens: first tokens whose weights are kept one by one.
        name, text_name: what the result calls the model and the text.
        progress: called with the number of tokens after each chunk.

    Raises:
        ValueError: a model without depth mixing, a text of fewer than two tokens, or weights that are not finite.
    """
    config = model.config
    name = name or model.name_or_path or type(model).__name__
    if getattr(config, "residual_mode", "standard") == "standard":
        raise ValueError(f'{name}: depth weights need residual_mode "block" or "full"; this model mixes nothing.')
    if (text is None) == (token_ids is None) or (text is not None and tokenizer is None):
        raise ValueError("depth_weights needs either a tokenizer and a text, or token_ids.")
    prefix = [] if tokenizer is None else prefix_of(tokenizer)
    context = _context(config, context, len(prefix), name)
    stream = tokens_of(tokenizer, pieces_of(text)) if token_ids is None else ((int(id), None) for id in token_ids)
    kept: list[tuple[int, str | None]] = []
    running: list[_Running] | None = None
    training = model.training
    model.eval()
    try:
        for chunk in _chunks(islice(stream, max_tokens), context - len(prefix)):
            ids = [id for id, _ in chunk]
            _check_ids(ids, config.vocab_size, name)
            inputs = torch.tensor([prefix + ids], device=model.device)
            # The base model: logits are not needed.
            mixed = model.base_model(input_ids=inputs, use_cache=False, output_depth_weights=True).depth_weights
            if running is None:
                running = [_Running(weights.shape[-1]) for weights in mixed]
            keep = max(0, keep_tokens - len(kept))
            for statistics, weights in zip(running, mixed, strict=True):
                statistics.add(weights[0, len(prefix) :], keep, name)
            kept += chunk[:keep]
            if progress is not None:
                progress(len(ids))
    finally:
        model.train(training)
    if running is None or running[0].count < 2:
        count = 0 if running is None else running[0].count
        limit = "; raise max_tokens" if max_tokens is not None and max_tokens < 2 else ""
        raise ValueError(f"{text_name}: a mean and its spread need at least 2 tokens, got {count}{limit}.")
    names, short_names = _sources(config)
    return DepthWeights(
        model=name,
        family=config.backbone_config.model_type,
        residual_mode=config.residual_mode,
        num_layers=config.num_hidden_layers,
        layers_per_block=config.layers_per_block if config.residual_mode == "block" else None,
        text=text_name,
        num_tokens=running[0].count,
        context=context,
        sources=names,
        short_sources=short_names,
        mixtures=[statistics.mixture(index, config) for index, statistics in enumerate(running)],
        tokens=[Token(id, token_text(tokenizer, id) if text is None else text) for id, text in kept],
        token_weights=[statistics.kept for statistics in running],
    )


def write_text(path: str | os.PathLike, text: str):
    """Writes a file atomically."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class _Running:
    """Statistics of one mixture, updated chunk by chunk (Chan, Golub and LeVeque's parallel form of Welford's)."""

    def __init__(self, num_sources: int):
        self.count = 0
        self.mean = torch.zeros(num_sources, dtype=torch.float64)
        self.squares = torch.zeros(num_sources, dtype=torch.float64)  # of deviations from the mean, summed
        self.min = torch.full((num_sources,), math.inf, dtype=torch.float64)
        self.max = torch.full((num_sources,), -math.inf, dtype=torch.float64)
        self.entropy = 0.0
        self.kept: list[list[float]] = []

    def add(self, weights: torch.Tensor, keep: int, name: str):
        """Takes the weights `[T, n]` of a chunk, and keeps those of its first tokens."""
        weights = weights.to("cpu", torch.float64)
        if not weights.isfinite().all():
            raise ValueError(f"{name}: its depth weights are not finite; try --dtype float32, or check the checkpoint.")
        count = len(weights)
        mean = weights.mean(0)
        difference, total = mean - self.mean, self.count + count
        self.squares += (weights - mean).square().sum(0) + difference.square() * self.count * count / total
        self.mean += difference * count / total
        self.min = torch.minimum(self.min, weights.amin(0))
        self.max = torch.maximum(self.max, weights.amax(0))
        self.entropy += torch.special.entr(weights).sum().item()
        self.count = total
        self.kept += [[round(weight, DIGITS) for weight in row] for row in weights[:keep].tolist()]

    def mixture(self, index: int, config) -> Mixture:
        """The statistics of mixture `index` of a model."""
        is_output = index == config.num_sublayers
        layer, is_mlp = divmod(index, 2)
        in_block = config.residual_mode == "block" and not is_output
        return Mixture(
            layer=None if is_output else layer,
            kind="output" if is_output else "mlp" if is_mlp else "attention",
            partial=in_block and (bool(is_mlp) or layer % config.layers_per_block != 0),
            mean=self.mean.tolist(),
            std=(self.squares / self.count).sqrt().tolist(),
            min=self.min.tolist(),
            max=self.max.tolist(),
            entropy=self.entropy / self.count,
        )


def _means(mixtures: list[Mixture]) -> dict[str, float]:
    entropy = sum(mixture.entropy for mixture in mixtures) / len(mixtures)
    return {
        "mixtures": len(mixtures),
        "newest": sum(mixture.newest for mixture in mixtures) / len(mixtures),
        "embedding": sum(mixture.embedding for mixture in mixtures) / len(mixtures),
        "entropy": entropy,
        "effective_sources": sum(mixture.effective_sources for mixture in mixtures) / len(mixtures),
        "ignoring": sum(bool(mixture.ignored) for mixture in mixtures),
    }


def _sources(config) -> tuple[list[str], list[str]]:
    """Names of all sources, and short ones."""
    layers, per_block = config.num_hidden_layers, config.layers_per_block
    if config.residual_mode == "full":
        outputs = [(layer, kind) for layer in range(layers) for kind in ("attention", "mlp")]
        names = [f"output of layer {layer} {KINDS[kind]}" for layer, kind in outputs]
        return ["embedding", *names], ["emb", *(f"{layer}{kind[0]}" for layer, kind in outputs)]
    spans = [(start, min(start + per_block, layers) - 1) for start in range(0, layers, per_block)]
    names = [
        f"block {number} ({f'layer {first}' if first == last else f'layers {first} to {last}'})"
        for number, (first, last) in enumerate(spans, 1)
    ]
    return ["embedding", *names], ["emb", *(f"b{number}" for number in range(1, len(spans) + 1))]


def _context(config, context: int | None, prefix: int, name: str) -> int:
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        context = min(MAX_CONTEXT, longest or MAX_CONTEXT)
    if context <= prefix or (longest and context > longest):
        raise ValueError(
            f"{name}: context must be above {prefix}, the tokens that start every text, and at most "
            f"{longest or 'what the model takes'} tokens, got {context}."
        )
    return context


def _check_ids(ids: list[int], vocab_size: int, name: str):
    wrong = next((id for id in ids if not 0 <= id < vocab_size), None)
    if wrong is not None:
        raise ValueError(
            f"{name}: the tokenizer gives token id {wrong}, the model has {vocab_size} embeddings; "
            "they do not belong together."
        )


def _chunks(stream: Iterator, size: int) -> Iterator[list]:
    while chunk := list(islice(stream, size)):
        yield chunk
