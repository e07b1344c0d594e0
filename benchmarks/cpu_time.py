"""What Block AttnRes costs a CPU beside plain residuals, in processor time of one thread.

    python benchmarks/cpu_time.py --dtype float32 bfloat16 --rounds 9

Where other programs run, wall-clock times differ by more than the mixing costs; processor time leaves out what
others took. A Qwen3-like model of random weights and the same converted, with random pseudo-queries, alternate in one
process, in decoding token by token: medians and quartiles of the ratios within rounds. glibc is told to keep freed
memory, as otherwise page faults of whichever model runs after the other decide.
"""

import argparse
import os
import statistics
import sys
import time

STEADY = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}
TOKENS, CONTEXT, NEW = 512, 128, 32


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--measure", nargs="+", default=["prefill", "decode", "train"], choices=list(MEASURES))
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=28, help="(default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=1024, help="(default: %(default)s)")
    options = parser.parse_args()
    if not STEADY.items() <= os.environ.items():  # read by the C library when the process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | STEADY)

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from attnres import AttnResForCausalLM

    torch.set_num_threads(1)
    size = options.hidden_size
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=512,
        hidden_size=size,
        intermediate_size=3 * size,
        num_hidden_layers=options.layers,
        num_attention_heads=size // 64,
        num_key_value_heads=size // 128,
        head_dim=64,
    )
    print("| | plain s | block s | over plain (quartiles) |\n|---|--:|--:|--:|")
    for dtype in options.dtype:
        torch.manual_seed(0)
        plain = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        block = AttnResForCausalLM.from_backbone(plain, num_blocks=min(8, options.layers), scale_norm_eps=False).eval()
        for name, parameter in block.named_parameters():
            if name.endswith("_norm.query"):
                torch.nn.init.normal_(parameter, std=0.02)
        tokens = torch.randint(0, config.vocab_size, (1, TOKENS))
        for measure in options.measure:
            function = MEASURES[measure]
            times = [[], []]
            for round_ in range(-1, options.rounds):  # the first one warms up
                # Plain first in every other round.
                models = (plain, block) if round_ % 2 else (block, plain)
                seconds = function(models, tokens)
                if round_ >= 0:
                    for kept, each in zip(times, seconds if round_ % 2 else reversed(seconds), strict=True):
                        kept.append(each)
            ratios = [100 * (ours / theirs - 1) for theirs, ours in zip(*times, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            theirs, ours = (statistics.median(each) for each in times)
            print(
                f"| {measure}, {dtype} | {theirs:.3f} | {ours:.3f} | {middle:+.1f} % ({low:+.1f} to {high:+.1f}) |",
                flush=True,
            )


def prefill(models, tokens) -> list[float]:
    import torch

    seconds = []
    with torch.inference_mode():
        for model in models:
            started = time.process_time()
            model(tokens, use_cache=True, logits_to_keep=1)
            seconds.append(time.process_time() - started)
    return seconds


def decode(models, tokens) -> list[float]:
    """Medians over tokens, which the models take in turn: a machine's speed changes from second to second."""
    import torch

    seconds = [[] for _ in models]
    with torch.inference_mode():
        caches = [model(tokens[:, :CONTEXT], use_cache=True, logits_to_keep=1).past_key_values for model in models]
        for place in range(CONTEXT, CONTEXT + NEW):
            for model, cache, kept in zip(models, caches, seconds, strict=True):
                started = time.process_time()
                model(tokens[:, place : place + 1], past_key_values=cache, use_cache=True)
                kept.append(time.process_time() - started)
    return [statistics.median(kept) for kept in seconds]


def train(models, tokens) -> list[float]:
    """Forward with loss, and backward."""
    seconds = []
    for model in models:
        started = time.process_time()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        seconds.append(time.process_time() - started)
        model.zero_grad()
    return seconds


MEASURES = {"prefill": prefill, "decode": decode, "train": train}

if __name__ == "__main__":
    main()
