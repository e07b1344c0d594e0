"""Task definitions that lm-eval 0.4.13 lacks or has wrong; loaded by path, as lm-eval loads its own."""
