"""Where the complete sources of a forward pass are kept, with their logits for all later sublayers.

Shapes: B batch, T tokens, D hidden size, n complete sources, Q pseudo-queries, K sublayers.
"""

import numpy as np
import torch

from .depth_functions import TokenLogit, mix_bank, mix_together, mix_tokens_together, score, score_token, token_vector


class SourceList:
    """Complete sources as the separate tensors that they came as: what autograd, compilers and several devices need.

    Args:
        queries: scaled pseudo-queries `[Q, D]` of all sublayers and the output.
        eps: epsilon of the key norms.

    Attributes:
        shared: whether all sublayers before the next commit read the same sources.
    """

    shared = True

    def __init__(self, queries: torch.Tensor, eps: float):
        self.queries = queries
        self.each_query = queries.split(1)
        self.eps = eps
        self._values: list[torch.Tensor] = []
        self._logits: list[tuple[torch.Tensor, ...]] = []  # each ends with the output's: sublayers count from the end

    def commit(self, source: torch.Tensor, first_reader: int):
        """Adds a complete source `[B, T, D]` and scores it for sublayer `first_reader` and all later ones."""
        readers = self.queries[first_reader:].to(source.device)
        self._values.append(source)
        self._logits.append(score(source, readers, self.eps).unbind(-1))

    def logits(self, reader: int) -> torch.Tensor:
        """Of all complete sources for one sublayer, `[B, T, n]`, on the device of the newest."""
        from_end = reader - len(self.queries)
        device = self._values[-1].device
        return torch.stack([logits[from_end].to(device) for logits in self._logits], dim=-1)

    def read(self, reader: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """What one sublayer reads: logits `[B, T, n]` and n sources `[B, T, D]`, on the device of the newest."""
        device = self._values[-1].device
        return self.logits(reader), tuple(value.to(device) for value in self._values)  # layers may be spread over them


class SourceGroups(SourceList):
    """A list whose complete sources are mixed for several sublayers at once: what autograd gets on a CPU.

    The sources that are complete when the first of K sublayers reads come to all K as one source, their mixture, whose
    logit is the logarithm of the sum of their exponentials. The backward pass then makes one gradient of each of them
    for all K, not one for each (paper, algorithm 1, and its inverse).

    Args:
        queries, eps: as above.
        readers_at_once: K.
    """

    shared = False

    def __init__(self, queries: torch.Tensor, eps: float, readers_at_once: int):
        super().__init__(queries, eps)
        self.readers_at_once = readers_at_once
        self._early_count = 0
        self._early: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # logit and mixture by sublayer

    def read(self, reader: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The mixture of early sources and the later ones: logits `[B, T, n]` and n sources `[B, T, D]`."""
        if reader not in self._early:
            self._early_count = len(self._values)
            readers = range(reader, min(reader + self.readers_at_once, len(self.queries)))
            if self._early_count == 1:
                self._early = {each: (self._logits[0][each - len(self.queries)], self._values[0]) for each in readers}
            else:
                logits = [[logits[each - len(self.queries)] for logits in self._logits] for each in readers]
                together, mixtures = mix_together(torch.stack([torch.stack(each) for each in logits]), self._values)
                self._early = dict(zip(readers, zip(together.unbind(), mixtures, strict=True), strict=True))
        logit, early = self._early.pop(reader)
        late = [logits[reader - len(self.queries)] for logits in self._logits[self._early_count :]]
        return torch.stack([logit, *late], dim=-1), (early, *self._values[self._early_count :])


class SourceBank:
    """The sources in one preallocated tensor, mixed for several sublayers at once; without autograd.

    What a sublayer reads is then a mixture of the complete ones, whose logit is the logarithm of the sum of their
    exponentials. A softmax over it and the partial sum gives the mixture over all. The sources that are complete when
    the first of K sublayers reads are mixed for all K in one pass; those that are completed before the last of them has
    read are mixed for two at a time, and both mixtures are read (paper, algorithm 1).

    Args:
        queries, eps: as above.
        embedding: `[B, T, D]`, for shape, dtype and device.
        capacity: how many sources there will be.
        readers_at_once: K.
    """

    shared = False

    def __init__(self, queries: torch.Tensor, eps: float, embedding: torch.Tensor, capacity: int, readers_at_once: int):
        self.queries = queries
        self.each_query = queries.split(1)
        self.eps = eps
        self.readers_at_once = readers_at_once
        precision = torch.promote_types(embedding.dtype, torch.float32)
        self._values = embedding.new_empty(capacity, *embedding.shape)
        self._logits = embedding.new_empty(len(queries), capacity, *embedding.shape[:2], dtype=precision)
        self._count = 0
        self._early_count = 0  # of the sources, how many the early mixtures hold
        self._early: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # logit and mixture by sublayer
        self._late: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def commit(self, source: torch.Tensor, first_reader: int):
        self._values[self._count] = source
        scores = score(source, self.queries[first_reader:], self.eps)
        self._logits[first_reader:, self._count] = scores.movedim(-1, 0)
        self._count += 1
        self._late.clear()

    def read(self, reader: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Logits `[B, T, n]` and n sources `[B, T, D]`, at most two mixtures of all that are complete."""
        if reader not in self._early:
            self._early = self._mixtures(reader, self.readers_at_once, 0)
            self._early_count = self._count
        early_logit, early = self._early.pop(reader)
        if self._early_count == self._count:
            return early_logit, (early,)
        if reader not in self._late:
            self._late = self._mixtures(reader, 2, self._early_count)
        late_logit, late = self._late.pop(reader)
        return torch.cat([early_logit, late_logit], dim=-1), (early, late)

    def _mixtures(self, reader: int, readers: int, first: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Of the sources from `first` on, for that many sublayers from `reader` on."""
        logits = self._logits[reader : reader + readers, first : self._count]
        mixtures = mix_bank(self._values[first : self._count], logits).unbind(2)
        together = torch.logsumexp(logits, dim=1).unsqueeze(-1).unbind(0)
        return {reader + number: pair for number, pair in enumerate(zip(together, mixtures, strict=True))}


class TokenBank:
    """`SourceBank` for one token, where operations cost more than what they compute: all is numpy's."""

    shared = False

    def __init__(self, queries: torch.Tensor, eps: float, embedding: torch.Tensor, capacity: int, readers_at_once: int):
        self.queries = queries.numpy()
        self.each_query = list(self.queries)
        self.eps = eps
        self.readers_at_once = readers_at_once
        self._stand_in = (embedding,)
        self._rows = np.empty((capacity, embedding.shape[-1]), dtype=self.queries.dtype)
        self._logits = np.empty((capacity, len(queries)), dtype=self.queries.dtype)
        self._count = 0
        self._ready: dict[int, TokenLogit] = {}

    def commit(self, source: torch.Tensor, first_reader: int):
        row = self._rows[self._count]
        row[:] = token_vector(source.detach())
        self._logits[self._count, first_reader:] = score_token(row, self.queries[first_reader:], self.eps)
        self._count += 1
        self._ready.clear()

    def read(self, reader: int) -> tuple[TokenLogit, tuple[torch.Tensor]]:
        """A logit with its mixture; and a tensor that has the sources' shape and dtype, for those who ask for them."""
        if reader not in self._ready:
            logits = self._logits[: self._count, reader : reader + self.readers_at_once]
            self._ready = dict(enumerate(mix_tokens_together(self._rows[: self._count], logits), reader))
        return self._ready.pop(reader), self._stand_in
