"""Task definitions that lm-eval 0.4.13 lacks or gets wrong. They are loaded by path, as lm-eval loads its own."""
