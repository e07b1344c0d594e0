"""What Attention Residuals cost in time and memory beside the same backbone with plain residuals, on this machine."""
