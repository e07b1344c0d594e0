"""Complete sources as they came, mixed by compiled kernels: what a model reads from on CPUs without autograd.

Shapes: B batch, T tokens, D hidden size, Q pseudo-queries, K sublayers.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch

from ..depth_functions import Norm, score
from .mix_cpu import CALL, LISTS, MIXTURE_LOGITS, MIXTURES, QUERIES, kernels, parts, run

FEW_TOKENS = 16  # are scored by a kernel, more by torch's matrix product
# From this many complete sources on they are mixed for several sublayers at once: before, mixtures cost what they save.
MANY_SOURCES = 12
READERS_AT_ONCE = 8


class SourceTable:
    """A `SourceList` that mixes what it holds.

    The sources that are complete when the first of K sublayers reads are mixed for all K in one pass, if they are many.
    A sublayer then mixes that mixture, the sources that were completed since and the newest one, and norms the result
    (paper, algorithm 1).

    Args:
        queries: scaled pseudo-queries `[Q, D]` of all sublayers and the output, float32.
        eps: epsilon of the key norms.
        embedding: `[B, T, D]` on a CPU, of one of `DTYPES`: the shape and dtype of all sources.
    """

    shared = False

    def __init__(self, queries: torch.Tensor, eps: float, embedding: torch.Tensor):
        self.each_query = [None] * len(queries)  # a reader's number says which
        self.eps = eps
        if embedding.ndim != 3 or not embedding.is_cpu:
            raise ValueError(
                f"embedding must be [B, T, D] on a CPU, got {list(embedding.shape)} on {embedding.device}."
            )
        self._kernels = kernels(embedding.dtype)
        self._like = self._in_memory(embedding, embedding.dtype)
        self._shape, self._size = embedding.shape, embedding.shape[-1]
        self._tokens = embedding.shape[0] * embedding.shape[1]
        if queries.shape[1:] != self._shape[-1:]:
            raise ValueError(f"queries must be [Q, {self._size}], got {list(queries.shape)}.")
        self._queries = self._in_memory(queries, torch.float32)
        self._scored: list[tuple[torch.Tensor, torch.Tensor]] = []  # sources and their logits
        self._first_reader = 0  # that all of them have logits for
        self._table = np.zeros(LISTS + 3 * len(queries), np.int64)
        self._table[QUERIES:LISTS] = self._queries.data_ptr(), 0, 0, len(queries), self._size, self._tokens
        self._address = self._table.ctypes.data
        self._lists = self._table[LISTS:].reshape(3, len(queries))
        self._readers = range(0)  # that the early mixtures are for
        self._early_count = 0  # how many sources they hold
        self._early: tuple[torch.Tensor, torch.Tensor] | None = None  # mixtures `[K, B T, D]`, logits `[K, B T]`

    def commit(self, source: torch.Tensor, first_reader: int):
        """Adds a complete source `[B, T, D]` and scores it for sublayer `first_reader` and all later ones."""
        source = self._checked(source, self._shape)
        queries = self._queries[first_reader:]
        if self._tokens > FEW_TOKENS:
            scores = score(source, queries, self.eps).contiguous()
        else:
            scores = queries.new_empty(self._tokens, len(queries))
            call = {"reader": first_reader, "state": source.data_ptr(), "result": scores.data_ptr()}
            self._run(self._kernels.score, len(queries), **call)
        self._lists[:, len(self._scored)] = source.data_ptr(), scores.data_ptr(), len(queries)
        self._scored.append((source, scores))
        self._first_reader = max(self._first_reader, first_reader)

    def read(self, reader: int) -> tuple["TableReader", tuple[torch.Tensor]]:
        """What mixes for one sublayer; and a tensor of the sources' shape and dtype, for those who look at them."""
        return TableReader(self, reader), (self._like,)

    def mix(self, reader: int, newest: torch.Tensor | None, norm: Norm | None) -> torch.Tensor:
        """The mixture of the complete sources and, if there is one, the newest: `[B, T, D]`, normed if wanted."""
        if not self._scored:
            raise ValueError("no source is complete: commit the embedding first.")
        if not self._first_reader <= reader < len(self._queries):
            raise ValueError(f"sublayer must be from {self._first_reader} to {len(self._queries) - 1}, got {reader}.")
        if reader not in self._readers:
            self._mix_together(reader)
        count = len(self._scored)
        newest_address = gain = 0
        offset = norm_eps = 0.0
        if newest is not None:
            newest = self._checked(newest, self._shape)
            newest_address = newest.data_ptr()
        if norm is not None:
            weight = norm.weight if norm.weight.shape == self._shape[-1:] else norm.weight.expand(self._size)
            weight = self._checked(weight, self._shape[-1:])
            gain, offset, norm_eps = weight.data_ptr(), norm.offset, norm.eps
        mixed = torch.empty_like(self._like)
        # Sources read, newest and result.
        states = count - self._early_count + 2
        addresses = newest_address, gain, mixed.data_ptr()
        number = reader - self._readers.start
        self._run(self._kernels.mix, states, self._early_count, reader, number, *addresses, offset, norm_eps)
        return mixed

    def _mix_together(self, reader: int):
        """For this sublayer and those after it."""
        self._readers = range(reader, min(reader + READERS_AT_ONCE, len(self._queries)))
        count = len(self._scored)
        self._early_count = count if count >= MANY_SOURCES else 0
        if not self._early_count:
            return
        if self._early is None:
            shape = (READERS_AT_ONCE, self._tokens)
            self._early = self._queries.new_empty(*shape, self._size), self._queries.new_empty(shape)
            self._table[[MIXTURES, MIXTURE_LOGITS]] = [each.data_ptr() for each in self._early]
        self._run(self._kernels.mix_together, count, 0, reader, len(self._readers))

    def _run(
        self, kernel, states: int, first=0, reader=0, readers=0, state=0, gain=0, result=0, offset=0.0, norm_eps=0.0
    ):
        """Writes the beginning of the table and calls a kernel, which reads or writes that many states."""
        in_parts = parts(states * self._tokens * self._size, self._tokens)
        count, addresses = len(self._scored), (state, gain, result)
        CALL.pack_into(
            self._table, 0, 0, in_parts, first, count, reader, readers, *addresses, self.eps, offset, norm_eps
        )
        run(kernel, self._address, in_parts)

    def _checked(self, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """As kernels read it: they see nothing but its address."""
        if tensor.shape != shape or not tensor.is_floating_point():
            raise ValueError(
                f"a source must be {list(shape)} of a floating dtype, got {list(tensor.shape)} {tensor.dtype}."
            )
        return self._in_memory(tensor, self._like.dtype)

    @staticmethod
    def _in_memory(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Itself if its numbers lie one after the other as they are, else a copy of which that is true."""
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.is_cpu and tensor.is_contiguous()
        if plain and tensor.dtype == dtype and not tensor.is_neg() and not tensor._is_zerotensor():
            return tensor
        copy = torch.empty(tensor.shape, dtype=dtype, device="cpu")
        copy.copy_(tensor)
        return copy


class TableReader(NamedTuple):
    """What a sublayer gets in place of logits."""

    table: SourceTable
    reader: int

    def mix(self, newest: torch.Tensor | None, norm: Norm | None) -> torch.Tensor:
        return self.table.mix(self.reader, newest, norm)


@functools.cache
def self_check(dtype: torch.dtype) -> str | None:
    """Mixes small random sources and compares with the formula, once per process.

    Returns:
        None where they agree, otherwise one line saying what went wrong.
    """
    try:
        with torch.inference_mode(False), torch.no_grad():
            return _compare(dtype)
    except Exception as error:  # whatever a compiler raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _compare(dtype: torch.dtype) -> str | None:
    generator = torch.Generator("cpu").manual_seed(0)
    n, shape, eps = MANY_SOURCES + 1, (1, 3, 131), 1e-5

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64, device="cpu")

    sources, newest, gain = random(n, *shape).to(dtype), random(*shape).to(dtype), random(shape[-1]).to(dtype)
    queries = random(n + 1, shape[-1]).float()
    table = SourceTable(queries, eps, sources[0])
    for source in sources[: n - 1]:
        table.commit(source, 0)
    table.mix(0, None, None)  # mixes all of them for the later readers
    table.commit(sources[n - 1], 1)
    found = table.mix(1, newest, Norm(gain, 0.0, eps))

    exact = torch.cat([sources, newest.unsqueeze(0)]).double()
    keys = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    weights = torch.softmax(keys @ queries[1].double() / shape[-1] ** 0.5, dim=0)
    mixed = (weights.unsqueeze(-1) * exact).sum(0)
    expected = mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + eps) * gain.double()
    error = ((found.double() - expected).norm() / expected.norm()).item()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    return None if error < tolerance else f"a mixture in {dtype} is off by {error:.1e} (tolerance {tolerance})"
