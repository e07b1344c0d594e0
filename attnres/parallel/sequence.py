"""Sequence-sharded prefill (paper, section 4.2): each rank keeps the sources of its own tokens only.

Tensor parallelism leaves what is between two sublayers whole on every rank, all sources of all tokens included. Here a
rank keeps sources and partial sums for one slice of the sequence, mixes that slice, and all ranks put their mixtures
together right before a sublayer, which needs all tokens; of the sublayer's output each keeps its slice again. A rank's
sources then take up n * T / P * D numbers, in place of n * T * D.

Shapes: B batch, T tokens, P ranks, D hidden size, n sources.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..modeling_attnres import AttnResPreTrainedModel

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13


class SequenceShards:
    """How T tokens are divided among the ranks of a group: in order, and as evenly as can be.

    Args:
        group: the ranks.
        tokens: T, at least one per rank.
    """

    def __init__(self, group: dist.ProcessGroup, tokens: int):
        self.group = group
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        each, over = divmod(tokens, ranks)
        self.sizes = [each + (number < over) for number in range(ranks)]
        start = sum(self.sizes[:rank])
        self.slice = slice(start, start + self.sizes[rank])

    def own(self, whole: torch.Tensor) -> torch.Tensor:
        """Of `[B, T, ...]` this rank's tokens: a copy, as a view would keep all of them."""
        return whole[:, self.slice].clone(memory_format=torch.contiguous_format)

    def gather(self, shard: torch.Tensor) -> torch.Tensor:
        """All tokens `[B, T, ...]` from every rank's own."""
        longest, ranks = self.sizes[0], len(self.sizes)
        rows = shard.transpose(0, 1).contiguous()  # tokens first: what the ranks send then stands in order
        if len(rows) < longest:  # collectives take equal parts
            rows = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
        whole = rows.new_empty(ranks * longest, *rows.shape[1:])
        _all_gather(whole, rows, group=self.group)
        if self.sizes[-1] < longest:
            parts = zip(whole.split(longest), self.sizes, strict=True)
            whole = torch.cat([part[:size] for part, size in parts])
        return whole.transpose(0, 1).contiguous()


def shard_sequence(model: AttnResPreTrainedModel, group: dist.ProcessGroup | DeviceMesh | None = None):
    """From now on each rank keeps the sources of its own tokens only; results stay as they were.

    For inference: prefill, whole or in chunks, and decoding, where a pass with fewer tokens than ranks is not divided.
    All ranks must call the model with the same inputs.

    Args:
        model: an AttnRes model, as a rule one loaded with tensor parallelism.
        group: the ranks that share the tokens, a group or a mesh with the dimension `tp`. Default: those that the model
            was loaded onto by tensor parallelism.

    Raises:
        ValueError: it is no AttnRes model, or no group is given and the model has none.
    """
    base = _base_of(model)
    if group is None:
        group = getattr(model, "_device_mesh", None)
        if group is None:
            raise ValueError(
                "shard_sequence needs the ranks that share the tokens: load the model with "
                "distributed_config=DistributedConfig(tp_size=...), or give a group."
            )
    if isinstance(group, DeviceMesh):
        group = (group if group.ndim == 1 else group["tp"]).get_group()

    def shards_of(tokens: int) -> SequenceShards | None:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a model with a sharded sequence is for inference: call it under torch.no_grad(), or call "
                "unshard_sequence(model) first."
            )
        return SequenceShards(group, tokens) if tokens >= dist.get_world_size(group) > 1 else None

    base.sequence_shards = shards_of


def unshard_sequence(model: AttnResPreTrainedModel):
    """Takes back `shard_sequence`: every rank keeps all tokens again."""
    _base_of(model).sequence_shards = None


def _base_of(model: AttnResPreTrainedModel):
    base = getattr(model, "base_model", model)
    if not hasattr(base, "sequence_shards"):  # by what it has: remote code brings a class of its own
        raise ValueError(
            f"sequence shards need an AttnRes model, got {type(model).__name__}; of a PEFT model give get_base_model()."
        )
    return base
