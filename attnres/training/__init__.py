"""Training with transformers' Trainer, as `attnres train` does it."""
