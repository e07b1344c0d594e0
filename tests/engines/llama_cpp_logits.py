"""Logits by llama.cpp, of one prompt at once and token by token: python llama_cpp_logits.py GGUF TOKENS RESULT.

Runs in the environment that has llama-cpp-python, which need have nothing else.
"""

import ctypes
import json
import sys

import llama_cpp
import numpy

gguf, tokens, result = sys.argv[1:]
with open(tokens) as file:
    tokens = json.load(file)


def logits(flash_attention, parts):
    """`[T, V]`, evaluated in parts of these lengths."""
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = 64
    options.n_threads = options.n_threads_batch = 1
    options.flash_attn_type = 1 if flash_attention else 0
    options.type_k = options.type_v = 0  # float32
    context = llama_cpp.llama_init_from_model(model, options)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows, start = [], 0
    for length in parts:
        batch = llama_cpp.llama_batch_init(length, 0, 1)
        batch.n_tokens = length
        for place in range(length):
            batch.token[place] = tokens[start + place]
            batch.pos[place] = start + place
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
            batch.logits[place] = 1
        assert llama_cpp.llama_decode(context, batch) == 0
        for place in range(length):
            row = llama_cpp.llama_get_logits_ith(context, place)
            rows.append(numpy.ctypeslib.as_array(row, (vocabulary,)).copy())
        start += length
        llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return numpy.stack(rows)


llama_cpp.llama_backend_init()
quiet = llama_cpp.llama_log_callback(lambda *arguments: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
model = llama_cpp.llama_model_load_from_file(gguf.encode(), llama_cpp.llama_model_default_params())
assert model, f"{gguf} was not loaded"
numpy.savez(
    result,
    prefill=logits(False, [len(tokens)]),
    decode=logits(False, [1] * len(tokens)),
    flash=logits(True, [len(tokens)]),
)
