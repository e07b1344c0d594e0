"""Training with transformers' Trainer: what `attnres train` does, from arguments to the final model."""
