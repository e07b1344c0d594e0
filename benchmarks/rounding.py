"""Rounding errors in bfloat16 against a float64 computation of the same weights: AttnRes beside plain residuals.

    python benchmarks/rounding.py --seeds 5

Error: norm of the difference of the logits by the norm of the exact logits. Weights are rounded to bfloat16 first, so
that all errors are those of the computation; pseudo-queries are random.
"""

import argparse
import statistics

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from attnres import AttnResForCausalLM


def errors(seed: int, layers: int, hidden_size: int, tokens: int) -> dict[str, float]:
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=512,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
    )
    torch.manual_seed(seed)
    plain = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        plain.model.embed_tokens.weight.normal_()  # states of a trained model's size, not of a fresh one's
    arms = {
        "plain": plain,
        "block": AttnResForCausalLM.from_backbone(plain, num_blocks=8),
        "full": AttnResForCausalLM.from_backbone(plain, residual_mode="full"),
    }
    ids = torch.randint(512, (1, tokens))
    found = {}
    for name, model in arms.items():
        if name != "plain":
            with torch.no_grad():
                for parameter_name, parameter in model.depth_mixer.named_parameters():
                    if parameter_name.endswith("query"):
                        parameter.normal_(std=1.5 / hidden_size**0.5)
        model.to(torch.bfloat16)
        with torch.no_grad():
            rounded = model(ids).logits.double()
        recorded = model(ids).logits.detach().double()
        with torch.no_grad():
            exact = model.double()(ids).logits
        for how, logits in (("inference", rounded), ("training", recorded)):
            found[f"{name} {how}"] = ((logits - exact).norm() / exact.norm()).item()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="models tried (default: 5)")
    parser.add_argument("--layers", type=int, default=28, help="decoder layers (default: 28)")
    parser.add_argument("--hidden-size", type=int, default=256, help="D (default: 256)")
    parser.add_argument("--tokens", type=int, default=128, help="length of the text (default: 128)")
    options = parser.parse_args()
    runs = [errors(seed, options.layers, options.hidden_size, options.tokens) for seed in range(options.seeds)]
    for name in runs[0]:
        plain = [run[f"plain {name.split()[1]}"] for run in runs]
        ratios = [run[name] / own for run, own in zip(runs, plain, strict=True)]
        median = statistics.median(run[name] for run in runs)
        print(f"{name:16s} {median:.2e}  over plain {statistics.median(ratios):.2f} (largest {max(ratios):.2f})")


if __name__ == "__main__":
    main()
