"""Statistics of the depth weights of an AttnRes model over a text, in memory that does not grow with the text.

Shapes: T tokens, K tokens whose own weights are kept, L decoder layers, n sources.
"""

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path

import torch

from ..folders import write_text
from ..messages import one_line
from .text import prefix_of, tokens_of

FORMAT = "attnres-depth-weights/1"
IGNORED_SHARE = 0.1  # a source is ignored if its mean weight is below this share of 1 / n, the uniform weight
KINDS = {"attention": "attention", "mlp": "MLP", "output": "output"}  # and how they are written in text
MAX_CONTEXT = 2048  # by default; the memory of a forward pass grows with it
DIGITS = 6  # of the weights of single tokens
SUMMARY = ("newest", "embedding", "entropy", "effective_sources")


@dataclass(frozen=True)
class Mixture:
    """The weights of one mixture over the tokens of the text; sources in the order of depth, the embedding first."""

    layer: int | None  # decoder layer, from 0; None for the output
    kind: str  # "attention" or "mlp", the sublayer that reads the mixture, or "output"
    partial: bool  # whether the newest source is the partial sum of the sublayer's own block
    mean: list[float]  # this and the next three: n numbers
    std: list[float]  # of the tokens at hand (divided by T)
    min: list[float]
    max: list[float]
    entropy: float  # of each token's weights, in nats, mean over tokens

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
        """exp(entropy): the number of equally weighted sources that have this entropy."""
        return math.exp(self.entropy)

    @property
    def ignored(self) -> list[int]:
        """Indices of the sources with a mean weight below `IGNORED_SHARE / n`."""
        return [index for index, mean in enumerate(self.mean) if mean < IGNORED_SHARE / self.num_sources]


@dataclass(frozen=True)
class Token:
    """A token of the text: its id and the characters that it stands for."""

    id: int
    text: str


@dataclass(frozen=True)
class DepthWeights:
    """The result of `depth_weights`."""

    model: str
    family: str  # model type of the backbone, such as "qwen3"
    residual_mode: str  # "block" or "full"
    num_layers: int  # L
    layers_per_block: int | None  # None in "full" mode
    text: str  # name of the text
    num_tokens: int  # T
    context: int  # tokens per chunk
    sources: list[str]  # names of all sources in the order of depth; a mixture of n sources has the first n
    short_sources: list[str]  # the same, short enough for the axis of a figure
    mixtures: list[Mixture]  # 2 L + 1, in the order attention, MLP, attention, MLP, ..., output
    tokens: list[Token]  # the first K tokens of the text
    token_weights: list[list[list[float]]]  # per mixture and kept token: n weights

    @property
    def description(self) -> str:
        """Mode, depth and text of the measurement, on one line."""
        mode = "Full AttnRes" if self.layers_per_block is None else "Block AttnRes"
        blocks = "" if self.layers_per_block is None else f" in blocks of {self.layers_per_block}"
        return f"{mode}, {self.num_layers} decoder layers{blocks}; {self.num_tokens:,} tokens of {self.text}"

    def summary(self) -> dict:
        """Returns summary numbers.

        `overall` has means over the mixtures of two sources or more, by kind and of all; `mixtures` has the numbers of
        each mixture; `ignored` has, per source that any mixture ignores, which mixtures do and how many see it.
        """
        several = [mixture for mixture in self.mixtures if mixture.num_sources > 1]
        groups = {kind: [mixture for mixture in several if mixture.kind == kind] for kind in KINDS} | {"all": several}
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
                    **{name: getattr(mixture, name) for name in SUMMARY},
                    "ignored": [self.sources[index] for index in mixture.ignored],
                }
                for mixture in self.mixtures
            ],
            "ignored": ignored,
        }

    def save(self, path: str | os.PathLike):
        """Writes everything as JSON, including the summary, atomically."""
        content = {"format": FORMAT, **asdict(self), "summary": self.summary()}
        write_text(path, json.dumps(content, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "DepthWeights":
        """Reads a file written by `save`.

        Raises:
            ValueError: the file is not such a file, has another format, or is damaged.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format must be {FORMAT!r}, got {content['format']!r}")
            values = {field.name: content[field.name] for field in fields(cls)}
            values["mixtures"] = [Mixture(**mixture) for mixture in values["mixtures"]]
            values["tokens"] = [Token(**token) for token in values["tokens"]]
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise ValueError(f"{path}: holds no depth weights ({reason}); write it with `attnres inspect`.") from None
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
    """Computes statistics of the depth weights over a text of any length.

    The text is cut into chunks of `context` tokens, each of which starts anew: its first tokens see little of what
    came before them. Tokens that the tokenizer puts before every text are put before each chunk and not counted.

    Args:
        model: an AttnRes model in residual_mode "block" or "full".
        tokenizer: the model's tokenizer; may be None with `token_ids`.
        text: the text, or its parts in order.
        token_ids: the ids of the tokens, instead of a text.
        context: tokens per chunk (default: the model's maximum, but at most 2048).
        max_tokens: number of tokens of the text after which to stop (default: all).
        keep_tokens: number of first tokens whose own weights are kept.
        name: name of the model in the result.
        text_name: name of the text in the result.
        progress: function called with the number of tokens after each chunk.

    Raises:
        ValueError: the model does not mix over depth, the text has fewer than two tokens, the weights are not finite,
            or `context` or a token id is out of range.
    """
    config = model.config
    name = name or model.name_or_path or type(model).__name__
    if getattr(config, "residual_mode", "standard") == "standard":
        raise ValueError(f'{name}: depth weights need residual_mode "block" or "full"; this model mixes nothing.')
    if (text is None) == (token_ids is None) or (text is not None and tokenizer is None):
        raise ValueError("depth_weights needs either a tokenizer and a text, or token_ids.")
    prefix = [] if tokenizer is None else prefix_of(tokenizer)
    context = _context(config, context, len(prefix), name)
    if text is not None:
        tokens = tokens_of(tokenizer, text)
    else:
        shown = "<{}>".format if tokenizer is None else tokenizer.convert_ids_to_tokens
        tokens = ((id, str(shown(id))) for id in map(int, token_ids))
    stream = islice(tokens, max_tokens)
    kept: list[Token] = []
    running: list[_Running] = []
    num_tokens, training = 0, model.training
    model.eval()
    try:
        while chunk := list(islice(stream, context - len(prefix))):
            ids = [id for id, _ in chunk]
            if wrong := [id for id in ids if not 0 <= id < config.vocab_size]:
                raise ValueError(
                    f"{name}: the text has token id {wrong[0]}, but the model has {config.vocab_size} embeddings; use "
                    "the model's own tokenizer."
                )
            inputs = torch.tensor([prefix + ids], device=model.device)
            # The base model, because logits are not needed.
            mixed = model.base_model(input_ids=inputs, use_cache=False, output_depth_weights=True).depth_weights
            running = running or [_Running(weights.shape[-1]) for weights in mixed]
            keep = max(0, keep_tokens - len(kept))
            for statistics, weights in zip(running, mixed, strict=True):
                statistics.add(weights[0, len(prefix) :], keep, name)
            kept += [Token(*token) for token in chunk[:keep]]
            num_tokens += len(ids)
            if progress is not None:
                progress(len(ids))
    finally:
        model.train(training)
    if num_tokens < 2:
        raise ValueError(f"{text_name}: a mean and its spread need at least 2 tokens, got {num_tokens}.")
    names, short_names = source_names(config)
    return DepthWeights(
        model=name,
        family=config.backbone_config.model_type,
        residual_mode=config.residual_mode,
        num_layers=config.num_hidden_layers,
        layers_per_block=config.layers_per_block if config.residual_mode == "block" else None,
        text=text_name,
        num_tokens=num_tokens,
        context=context,
        sources=names,
        short_sources=short_names,
        mixtures=[statistics.mixture(index, config) for index, statistics in enumerate(running)],
        tokens=kept,
        token_weights=[statistics.kept for statistics in running],
    )


def source_names(config) -> tuple[list[str], list[str]]:
    """Returns the names of all sources of a model in the order of depth, and short ones."""
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


class _Running:
    """Statistics of one mixture, updated chunk by chunk (Chan, Golub and LeVeque's parallel form of Welford's)."""

    def __init__(self, num_sources: int):
        self.count = 0
        self.mean = torch.zeros(num_sources, dtype=torch.float64)
        self.squares = torch.zeros(num_sources, dtype=torch.float64)  # sum of squared deviations from the mean
        self.min = torch.full((num_sources,), math.inf, dtype=torch.float64)
        self.max = torch.full((num_sources,), -math.inf, dtype=torch.float64)
        self.entropy = 0.0
        self.kept: list[list[float]] = []

    def add(self, weights: torch.Tensor, keep: int, name: str):
        """Adds the weights `[T, n]` of a chunk and keeps those of its first `keep` tokens."""
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
        """Returns the statistics of mixture `index` of a model with this configuration."""
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
    return {
        "mixtures": len(mixtures),
        **{name: sum(getattr(mixture, name) for mixture in mixtures) / len(mixtures) for name in SUMMARY},
        "ignoring": sum(bool(mixture.ignored) for mixture in mixtures),
    }


def _context(config, context: int | None, prefix: int, name: str) -> int:
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        context = min(MAX_CONTEXT, longest or MAX_CONTEXT)
    if context <= prefix or (longest and context > longest):
        most = f", and at most {longest} tokens" if longest else ""
        raise ValueError(
            f"{name}: context must be above {prefix}, the number of tokens that start every text{most}, got {context}."
        )
    return context
