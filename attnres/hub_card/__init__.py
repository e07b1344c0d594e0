"""Hub folders: a checkpoint with its code, figures, and a model card of measured results."""

from .folder import build
from .push import push, upload_list

__all__ = ["build", "push", "upload_list"]
