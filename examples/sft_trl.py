"""Supervised fine-tuning on conversations with TRL, the loss on the assistant's answers only.

    python examples/sft_trl.py HuggingFaceTB/SmolLM2-135M-Instruct chats.jsonl --out smollm2-attnres-sft --steps 100

DATA is jsonl with a row per conversation: {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}.
The chat template is the tokenizer's. TRL marks the assistant's tokens by {% generation %} in it, and knows the training
templates of usual models that lack it (`--template` names another file). `--lora` trains an adapter of PEFT's default
targets and the whole depth mixer instead of all weights.
"""

import argparse
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from attnres import AttnResForCausalLM


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of a checkpoint, plain or AttnRes")
    parser.add_argument("data", metavar="DATA", help="jsonl with a column messages")
    parser.add_argument("--out", default="attnres-sft", help="folder of the result (default: %(default)s)")
    parser.add_argument("--template", metavar="FILE", help="chat template with {%% generation %%}")
    parser.add_argument("--lora", action="store_true", help="train an adapter and the depth mixer")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="tokens per conversation (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="conversations per step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="peak (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if options.template:
        tokenizer.chat_template = Path(options.template).read_text(encoding="utf-8")
    trainer = SFTTrainer(
        AttnResForCausalLM.from_pretrained(options.model, dtype="float32"),  # converts a plain checkpoint
        args=SFTConfig(
            options.out,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            max_length=options.length,
            assistant_only_loss=True,
            bf16=options.bf16,
            save_strategy="no",
            logging_steps=max(1, options.steps // 20),
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
        processing_class=tokenizer,
        peft_config=LoraConfig(modules_to_save=["depth_mixer"]) if options.lora else None,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {losses[0]:.4f} first, {losses[-1]:.4f} after {options.steps} steps")
    trainer.save_model(options.out)
    print(f"saved: {options.out}")


if __name__ == "__main__":
    main()
