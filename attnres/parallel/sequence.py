"""Sequence-sharded prefill (paper, section 4.2): each rank keeps the sources of its own tokens only.

Under tensor parallelism, everything between two sublayers is whole on every rank, including all sources of all tokens.
With a sharded sequence, a rank keeps sources and partial sums for one slice of the tokens and mixes only that slice.
Right before a sublayer, which needs all tokens, the ranks gather their mixtures; each keeps its slice of the
sublayer's output. The sources of a rank then have n * T / P * D elements instead of n * T * D.

Shapes: B batch, T tokens, P ranks, D hidden size, n sources.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..modeling_attnres import AttnResPreTrainedModel

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13


class SequenceShards:
    """The division of T tokens among the ranks of a group, in order and as even as possible.

    Args:
        group: ranks that share the tokens.
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
        """Returns a copy of this rank's tokens of `[B, T, ...]`; a view would keep all tokens in memory."""
        return whole[:, self.slice].clone(memory_format=torch.contiguous_format)

    def gather(self, shard: torch.Tensor) -> torch.Tensor:
        """Returns all tokens `[B, T, ...]`, gathered from the ranks' own tokens."""
        longest, ranks = self.sizes[0], len(self.sizes)
        rows = shard.transpose(0, 1).contiguous()  # tokens first, so that the parts of the ranks are in order
        if len(rows) < longest:  # collectives take parts of equal size
            rows = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
        whole = rows.new_empty(ranks * longest, *rows.shape[1:])
        _all_gather(whole, rows, group=self.group)
        if self.sizes[-1] < longest:
            parts = zip(whole.split(longest), self.sizes, strict=True)
            whole = torch.cat([part[:size] for part, size in parts])
        return whole.transpose(0, 1).contiguous()


def shard_sequence(model: AttnResPreTrainedModel, group: dist.ProcessGroup | DeviceMesh | None = None):
    """Makes each rank keep the sources of its own tokens only, in all later calls of the model.

    Results do not change. This is for inference: prefill, whole or in chunks, and decoding, where a pass with fewer
    tokens than ranks is not divided. All ranks must call the model with the same inputs.

    Args:
        model: AttnRes model, usually loaded with tensor parallelism.
        group: ranks that share the tokens, as a group or as a mesh with the dimension `tp`. Default: the ranks among
            which tensor parallelism divided the model when it was loaded.

    Raises:
        ValueError: the model is no AttnRes model, or no group is given and the model was loaded without tensor
            parallelism.
    """
    base = _base_of(model)
    if group is None:
        group = getattr(model, "_device_mesh", None)
        if group is None:
            raise ValueError(
                "shard_sequence needs the ranks that share the tokens; load the model with "
                "distributed_config=DistributedConfig(tp_size=...), or give a group."
            )
    if isinstance(group, DeviceMesh):
        group = (group if group.ndim == 1 else group["tp"]).get_group()

    def shards_of(tokens: int) -> SequenceShards | None:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a model with a sharded sequence is for inference; call it under torch.no_grad(), or call "
                "unshard_sequence(model) first."
            )
        return SequenceShards(group, tokens) if tokens >= dist.get_world_size(group) > 1 else None

    base.sequence_shards = shards_of


def unshard_sequence(model: AttnResPreTrainedModel):
    """Reverts `shard_sequence`: every rank keeps the sources of all tokens again."""
    _base_of(model).sequence_shards = None


def _base_of(model: AttnResPreTrainedModel):
    base = getattr(model, "base_model", model)
    if not hasattr(base, "sequence_shards"):  # no isinstance: models from remote code have their own classes
        raise ValueError(
            f"sequence shards need an AttnRes model, got {type(model).__name__}; of a PEFT model give get_base_model()."
        )
    return base
