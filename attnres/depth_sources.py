"""Where the complete sources of a forward pass are kept, with their logits for all later sublayers.

Shapes: B batch, T tokens, D hidden size, n complete sources, Q pseudo-queries, K sublayers.
"""

import torch

from .depth_functions import mix_together, score


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
