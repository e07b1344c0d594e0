"""QLoRA: the backbone in 4 bits (bitsandbytes), an adapter on it, and the depth mixer in full precision.

    python examples/qlora.py smollm2-attnres notes.txt --out smollm2-attnres-qlora --steps 200

Pseudo-queries and key-norm gains are parameters, not linear layers, and are never quantised. MODEL may be a plain
checkpoint too: it is converted while it is loaded.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

from attnres import AttnResForCausalLM


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of a checkpoint, plain or AttnRes")
    parser.add_argument("text", metavar="TEXT", help="text file in UTF-8")
    parser.add_argument("--out", default="attnres-qlora", help="folder of the adapter (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="peak (default: %(default)s)")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = Path(options.text).read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    rows = [{"input_ids": row, "labels": row} for row in ids.split(options.length) if len(row) == options.length]

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AttnResForCausalLM.from_pretrained(options.model, quantization_config=four_bits, dtype=torch.bfloat16)
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=options.rank,
            lora_alpha=2 * options.rank,
            target_modules="all-linear",
            modules_to_save=["depth_mixer"],
        ),
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            options.out,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            save_strategy="no",
            logging_steps=max(1, options.steps // 20),
            report_to="none",
        ),
        train_dataset=rows,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {losses[0]:.4f} first, {losses[-1]:.4f} after {options.steps} steps")
    trainer.save_model(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"saved: {options.out}")


if __name__ == "__main__":
    main()
