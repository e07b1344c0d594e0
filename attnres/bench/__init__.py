"""Benchmarks: time and memory of Attention Residuals against the same backbone with plain residuals."""
