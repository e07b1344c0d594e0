"""One model on several processes: pipelines with the paper's cross-stage caching, and sequence-sharded prefill."""

from .pipeline import Pipeline, PipelineError
from .sequence import SequenceShards, shard_sequence, unshard_sequence

__all__ = ["Pipeline", "PipelineError", "SequenceShards", "shard_sequence", "unshard_sequence"]
