"""Peak memory of a long prefill, whole and in chunks, over that of the same backbone with plain residuals.

    python benchmarks/long_context.py --tokens 32768 --chunk 2048

Memory is the sum of torch's own allocations above what there was before, from its profiler; the key-value cache, which
is the same for all, is part of it.
"""

import argparse

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from attnres import AttnResForCausalLM
from attnres.bench.memory import peak_bytes

MIB = 2**20


def backbone(layers: int, hidden_size: int, tokens: int):
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=512,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=hidden_size // 2,
        max_position_embeddings=tokens,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def prefill(model, ids: torch.Tensor, chunk: int):
    cache = None
    with torch.no_grad():
        for start in range(0, ids.shape[1], chunk):
            part = ids[:, start : start + chunk]
            cache = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768, help="length of the prompt (default: 32768)")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens per chunk (default: 2048)")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers (default: 8)")
    parser.add_argument("--hidden-size", type=int, default=64, help="D (default: 64)")
    parser.add_argument("--num-blocks", type=int, default=4, help="of the block variant (default: 4)")
    options = parser.parse_args()

    plain = backbone(options.layers, options.hidden_size, options.tokens)
    arms = {
        "plain": plain,
        "block": AttnResForCausalLM.from_backbone(plain, num_blocks=options.num_blocks),
        "full": AttnResForCausalLM.from_backbone(plain, residual_mode="full"),
    }
    ids = torch.randint(512, (1, options.tokens), generator=torch.Generator().manual_seed(0))
    state = options.tokens * options.hidden_size * 4
    print(f"one state [T, D] of {options.tokens} tokens in float32: {state / MIB:.1f} MiB")
    for title, chunk in (("whole", options.tokens), (f"chunks of {options.chunk}", options.chunk)):
        baseline = None
        for name, model in arms.items():
            peak = peak_bytes(lambda: prefill(model, ids, chunk), torch.device("cpu"))  # noqa: B023
            baseline = peak if baseline is None else baseline
            over = f"{(peak - baseline) / MIB:+8.1f} MiB, {(peak - baseline) / state:+.2f} states" if peak else ""
            print(f"{title:16s} {name:6s} {peak / MIB:8.1f} MiB  over plain {over}", flush=True)


if __name__ == "__main__":
    main()
