"""Hub folders: a checkpoint with its code, figures and a card that says what was measured."""

from .folder import build
from .push import push, upload_list

__all__ = ["build", "push", "upload_list"]
