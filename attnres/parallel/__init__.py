"""Several processes for one model: pipeline parallelism with the paper's cross-stage caching."""

from .pipeline import Pipeline, PipelineError

__all__ = ["Pipeline", "PipelineError"]
