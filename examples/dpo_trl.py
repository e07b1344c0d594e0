"""Direct preference optimisation with TRL, from a saved AttnRes model.

    python examples/dpo_trl.py smollm2-attnres-sft preferences.jsonl --out smollm2-attnres-dpo --steps 100

DATA is jsonl with the columns prompt, chosen and rejected: texts, or lists of messages. MODEL has to be a folder or hub
id of a model that `attnres convert` or a training has saved: TRL loads the reference from the same place.
"""

import argparse

from datasets import load_dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from attnres import AttnResForCausalLM


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of an AttnRes model with its tokenizer")
    parser.add_argument("data", metavar="DATA", help="jsonl with the columns prompt, chosen and rejected")
    parser.add_argument("--out", default="attnres-dpo", help="folder of the result (default: %(default)s)")
    parser.add_argument("--beta", type=float, default=0.1, help="of DPO (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs per step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-6, help="peak (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    options = parser.parse_args()

    trainer = DPOTrainer(
        AttnResForCausalLM.from_pretrained(options.model, dtype="float32"),
        args=DPOConfig(
            options.out,
            beta=options.beta,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            bf16=options.bf16,
            save_strategy="no",
            logging_steps=max(1, options.steps // 20),
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(options.model),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {losses[0]:.4f} first, {losses[-1]:.4f} after {options.steps} steps")
    trainer.save_model(options.out)
    print(f"saved: {options.out}")


if __name__ == "__main__":
    main()
