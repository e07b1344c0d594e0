"""The store of a rank: sources that one of its stages has received or completed and that its later stages read.

A source crosses to a rank once. Its value waits here until the last stage of the rank that reads it has; its gradient
collects here until the stage that stored it runs backward, and leaves from there towards its producer. For one
micro-batch backward goes through the stages in reverse, so that by then all gradients have arrived.
"""

import weakref

import torch


class BlockStore:
    """Values and gradients by (micro-batch, source), and a count of what is alive.

    Attributes:
        peak_stored: most values that were in the store at a time.
        alive: sources that this rank received or completed and whose memory is still in use by anybody: the store,
            messages under way, or autograd. `peak_alive`: the most at a time.
    """

    def __init__(self):
        self._values: dict[tuple[int, int], tuple[torch.Tensor, int]] = {}
        self._gradients: dict[tuple[int, int], torch.Tensor] = {}
        self.alive = 0
        self.reset_peaks()

    def __len__(self) -> int:
        return len(self._values)

    @property
    def waiting_gradients(self) -> int:
        """Gradients that no stage has taken yet; none between steps."""
        return len(self._gradients)

    def reset_peaks(self):
        self.peak_stored = len(self._values)
        self.peak_alive = self.alive

    def clear(self):
        """Forgets what a step that failed has left."""
        self._values.clear()
        self._gradients.clear()

    def publish(self, micro_batch: int, index: int, source: torch.Tensor, readers: int):
        """Keeps a source `[B, T, D]` for `readers` later stages; its gradient will include theirs."""
        key = (micro_batch, index)
        self._values[key] = (source.detach(), readers)
        self.peak_stored = max(self.peak_stored, len(self._values))
        if source.requires_grad:
            # Called once per backward, with the sum over all uses in this stage and the stages that follow it.
            source.register_hook(lambda gradient: self._with_later_readers(key, gradient))

    def fetch(self, micro_batch: int, index: int) -> torch.Tensor:
        """A stored source as a leaf of the reading stage's graph; given to the last reader, the store forgets it."""
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
        """Counts a source as alive until its memory is free."""
        self.alive += 1
        self.peak_alive = max(self.peak_alive, self.alive)
        weakref.finalize(source.untyped_storage(), self._freed).atexit = False

    def _freed(self):
        self.alive -= 1
