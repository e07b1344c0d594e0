"""Chooses the demo's learning rate and initialisation for its plain model: the comparison favours the baseline.

    python benchmarks/demo_sweep.py --learning-rates 0.004 0.008 0.016 0.032 --initializer-ranges 0.02 0.06

Trains the plain model of `attnres demo` once per combination and prints a Markdown table of final held-out losses.
"""

import argparse
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path

from transformers import logging

from attnres.demo import FULL, build_plain, prepare_data
from attnres.demo.training import train_model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learning-rates", type=float, nargs="+", required=True, help="peak learning rates of AdamW")
    parser.add_argument(
        "--initializer-ranges",
        type=float,
        nargs="+",
        default=[FULL.initializer_range],
        help="deviations of the weights",
    )
    parser.add_argument("--layers", type=int, default=FULL.num_hidden_layers, help="decoder layers")
    parser.add_argument("--seed", type=int, default=FULL.seed, help="of the weights and the order of the text")
    options = parser.parse_args()
    logging.set_verbosity_error()
    base = replace(FULL, seed=options.seed, num_hidden_layers=options.layers)
    print("| initializer_range | peak learning rate | held-out loss (nats/token) |\n|--:|--:|--:|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = prepare_data(base, Path(folder))
        for spread, learning_rate in product(options.initializer_ranges, options.learning_rates):
            settings = replace(base, learning_rate=learning_rate, initializer_range=spread)
            model = build_plain(settings, data["tokenizer"].eos_token_id)
            history = train_model(
                f"plain {spread:g} {learning_rate:g}",
                model,
                data["train"],
                data["held_out"],
                settings,
                Path(folder) / "trainer",
            )
            print(f"| {spread:g} | {learning_rate:g} | {history.held_out_loss[-1]:.4f} |", flush=True)


if __name__ == "__main__":
    main()
