"""Keeps the sources that one stage of a rank has received or completed and that later stages of the rank read.

A source crosses to a rank once. Its value stays in the store until the last stage of the rank has read it. Gradients of
these readers collect in the store until the stage that stored the source runs backward, which sends them on towards the
producer. Backward visits the stages of one micro-batch in reverse, so all gradients have arrived by then.
"""

import weakref

import torch


class BlockStore:
    """Values and gradients of sources by (micro-batch, source), with a count of the sources that use memory.

    Attributes:
        peak_stored: largest number of values that were in the store at the same time.
        alive: number of sources that this rank received or completed and whose memory is still in use by the store, by
            messages or by autograd.
        peak_alive: largest value of `alive`.
    """

    def __init__(self):
        self._values: dict[tuple[int, int], tuple[torch.Tensor, int]] = {}
        self._gradients: dict[tuple[int, int], torch.Tensor] = {}
        self.alive = self.peak_alive = self.peak_stored = 0

    def __len__(self) -> int:
        return len(self._values)

    @property
    def waiting_gradients(self) -> int:
        """The number of gradients that no stage has taken yet; zero between steps."""
        return len(self._gradients)

    def clear(self):
        """Removes the values and gradients that a failed step has left."""
        self._values.clear()
        self._gradients.clear()

    def publish(self, micro_batch: int, index: int, source: torch.Tensor, readers: int):
        """Keeps a source `[B, T, D]` for `readers` later stages and adds their gradients to its own."""
        key = (micro_batch, index)
        self._values[key] = (source.detach(), readers)
        self.peak_stored = max(self.peak_stored, len(self._values))
        if source.requires_grad:
            # Called once per backward, with the sum over all uses in this stage and the stages that follow it.
            source.register_hook(lambda gradient: self._with_later_readers(key, gradient))

    def fetch(self, micro_batch: int, index: int) -> torch.Tensor:
        """Returns a source as a leaf of the reading stage's graph; the last reader removes it from the store."""
        key = (micro_batch, index)
        value, readers = self._values.pop(key)
        if readers > 1:
            self._values[key] = (value, readers - 1)
        leaf = value.detach().requires_grad_(torch.is_grad_enabled())
        if leaf.requires_grad:
            leaf.register_post_accumulate_grad_hook(lambda leaf: self._collect(key, leaf))
        return leaf

    def _collect(self, key: tuple[int, int], leaf: torch.Tensor):
        gradient, leaf.grad = leaf.grad, None
        waiting = self._gradients.get(key)
        self._gradients[key] = gradient if waiting is None else waiting + gradient

    def _with_later_readers(self, key: tuple[int, int], gradient: torch.Tensor) -> torch.Tensor:
        later = self._gradients.pop(key, None)
        return gradient if later is None else gradient + later

    def watch(self, source: torch.Tensor):
        """Counts a source as alive until its memory is freed."""
        self.alive += 1
        self.peak_alive = max(self.peak_alive, self.alive)
        weakref.finalize(source.untyped_storage(), self._freed).atexit = False

    def _freed(self):
        self.alive -= 1
