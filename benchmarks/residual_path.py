"""The residual path with its norms alone: what a model adds to the time of plain residuals, with little noise.

    python benchmarks/residual_path.py --work forward,training --dtype float32,bfloat16

Attention is the identity and an MLP halves its input, so that of a decoder layer the two norms and what replaces the
two additions are left, as the models run them. `attnres bench --measure depth` omits the norms. Variants alternate;
times are medians over the rounds.
"""

import argparse
import statistics
import time
from functools import partial

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from attnres import AttnResForCausalLM


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1))  # a layer is where its parameters are

    def forward(self, hidden_states, **_):
        return hidden_states, None


class Half(nn.Module):
    def forward(self, hidden_states):
        return 0.5 * hidden_states


def arms(options, dtype: torch.dtype) -> dict[str, nn.Module]:
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=8,
        hidden_size=options.hidden_size,
        intermediate_size=8,
        num_hidden_layers=options.layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config)
    models = {
        "plain": plain,
        "block": AttnResForCausalLM.from_backbone(plain, num_blocks=options.num_blocks),
        "full": AttnResForCausalLM.from_backbone(plain, residual_mode="full"),
    }
    for name, model in models.items():
        for layer in model.model.layers:
            layer.self_attn, layer.mlp = Attention(), Half()
        if name != "plain":
            for parameter_name, parameter in model.depth_mixer.named_parameters():
                if parameter_name.endswith("query"):
                    nn.init.normal_(parameter, std=options.hidden_size**-0.5)
        model.to(dtype)
    return models


def forward(model, embedding):
    with torch.no_grad():
        model.eval().model(inputs_embeds=embedding, use_cache=False)


def training(model, embedding):
    leaf = embedding.detach().requires_grad_()
    model.train().model(inputs_embeds=leaf, use_cache=False).last_hidden_state.backward(embedding)
    model.zero_grad(set_to_none=True)


WORK = {"forward": forward, "training": training}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="forward,training", help="of %(default)s (default: both)")
    parser.add_argument("--dtype", default="float32", help="one or more, by commas (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="of the forward pass; twice in training (default: 512)")
    parser.add_argument("--layers", type=int, default=28, help="decoder layers (default: 28)")
    parser.add_argument("--hidden-size", type=int, default=1024, help="D (default: 1024)")
    parser.add_argument("--num-blocks", type=int, default=8, help="of the block variant (default: 8)")
    parser.add_argument("--rounds", type=int, default=9, help="(default: 9)")
    parser.add_argument("--threads", type=int, default=2, help="(default: 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for dtype in options.dtype.split(","):
        models = arms(options, getattr(torch, dtype))
        for work in options.work.split(","):
            tokens = options.tokens * (1 + (work == "training"))
            embedding = torch.randn(1, tokens, options.hidden_size).to(getattr(torch, dtype))
            seconds = {name: [] for name in models}
            for number in range(-1, options.rounds):
                for name in list(models)[number % 3 :] + list(models)[: number % 3]:
                    run = partial(WORK[work], models[name], embedding)
                    start = time.perf_counter()
                    run()
                    if number >= 0:
                        seconds[name].append(time.perf_counter() - start)
            medians = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
            over = "; ".join(f"{name} {medians[name] - medians['plain']:+.0f} ms" for name in ("block", "full"))
            print(f"{work:8s} {dtype:8s} T={tokens}: plain {medians['plain']:.0f} ms; {over}", flush=True)


if __name__ == "__main__":
    main()
