"""Logits by mlx-lm, of one prompt at once and token by token: python mlx_logits.py FOLDER TOKENS RESULT.

Runs in the environment that has mlx-lm, which need have nothing else.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

folder, tokens, result = sys.argv[1:]
with open(tokens) as file:
    tokens = json.load(file)
model, _ = load_model(Path(folder))


def logits(parts):
    """`[T, V]`, evaluated in parts of these lengths."""
    cache, rows, start = make_prompt_cache(model), [], 0
    for length in parts:
        output = model(mx.array([tokens[start : start + length]]), cache=cache)
        rows.append(numpy.array(output[0].astype(mx.float32)))
        start += length
    return numpy.concatenate(rows)


numpy.savez(result, prefill=logits([len(tokens)]), decode=logits([1] * len(tokens)))
