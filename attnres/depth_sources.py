"""Where the complete sources of a forward pass are kept, with their logits for all later sublayers.

Shapes: B batch, T tokens, D hidden size, n complete sources, Q pseudo-queries, K sublayers.
"""

import torch

from .depth_mixer import mix_bank, score


class SourceList:
    """Complete sources as the separate tensors that they came as: what autograd, compilers and several devices need.

    Args:
        queries: scaled pseudo-queries `[Q, D]` of all sublayers and the output.
        eps: epsilon of the key norms.
    """

    def __init__(self, queries: torch.Tensor, eps: float):
        self.queries = queries
        self.eps = eps
        self._values: list[torch.Tensor] = []
        self._logits: list[tuple[torch.Tensor, ...]] = []  # each ends with the output's: sublayers count from the end

    def commit(self, source: torch.Tensor, first_reader: int):
        """Adds a complete source `[B, T, D]` and scores it for sublayer `first_reader` and all later ones."""
        readers = self.queries[first_reader:].to(source.device)
        self._values.append(source)
        self._logits.append(score(source, readers, self.eps).unbind(-1))

    def read(self, reader: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """What one sublayer reads: logits `[B, T, n]`, on the device of the newest source, and as many
        sources `[B, T, D]`.
        """
        from_end = reader - len(self.queries)
        device = self._values[-1].device
        logits = torch.stack([logits[from_end].to(device) for logits in self._logits], dim=-1)
        return logits, tuple(self._values)


class SourceBank:
    """The same in one preallocated tensor, mixed for several sublayers at once; without autograd.

    What a sublayer reads is then one source: the mixture of the complete ones, whose logit is the logarithm of the sum
    of their exponentials. A softmax over it and the partial sum gives the mixture over all.

    Args:
        queries, eps: as above.
        embedding: `[B, T, D]`, for shape, dtype and device.
        capacity: how many sources there will be.
        readers_at_once: K.
    """

    def __init__(self, queries: torch.Tensor, eps: float, embedding: torch.Tensor, capacity: int, readers_at_once: int):
        self.queries = queries
        self.eps = eps
        self.readers_at_once = readers_at_once
        precision = torch.promote_types(embedding.dtype, torch.float32)
        self._values = embedding.new_empty(capacity, *embedding.shape)
        self._logits = embedding.new_empty(len(queries), *embedding.shape[:2], capacity, dtype=precision)
        self._count = 0
        self._ready: dict[int, tuple[torch.Tensor, tuple[torch.Tensor]]] = {}

    def commit(self, source: torch.Tensor, first_reader: int):
        self._values[self._count] = source
        scores = score(source, self.queries[first_reader:], self.eps)
        self._logits[first_reader:, ..., self._count] = scores.movedim(-1, 0)
        self._count += 1
        self._ready.clear()

    def read(self, reader: int) -> tuple[torch.Tensor, tuple[torch.Tensor]]:
        """A logit `[B, T, 1]` and a source `[B, T, D]`, the mixture of all that are complete."""
        if reader not in self._ready:
            logits = self._logits[reader : reader + self.readers_at_once, ..., : self._count]
            mixtures = mix_bank(self._values[: self._count], logits).unbind(0)
            together = torch.logsumexp(logits, dim=-1, keepdim=True).unbind(0)
            self._ready = {
                reader + number: (logit, (mixture,))
                for number, (logit, mixture) in enumerate(zip(together, mixtures, strict=True))
            }
        return self._ready.pop(reader)
