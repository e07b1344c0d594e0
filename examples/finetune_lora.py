"""Converts your checkpoint to Block AttnRes and trains a LoRA adapter (PEFT) together with the whole depth mixer.

    python examples/finetune_lora.py Qwen/Qwen3-0.6B notes.txt --out qwen3-attnres-lora --steps 200 --bf16

The depth mixer has 2 (2 L + 1) D numbers, fewer than most adapters: it is trained in full and saved with the adapter
(`modules_to_save`). The backbone stays as it was, so the adapter loads onto your checkpoint, converted again:

    model = AttnResForCausalLM.from_backbone("Qwen/Qwen3-0.6B", num_blocks=8)
    model = PeftModel.from_pretrained(model, "qwen3-attnres-lora")
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, Trainer, TrainingArguments

from attnres import AttnResForCausalLM, DepthDynamicsCallback


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of a PreNorm checkpoint with its tokenizer")
    parser.add_argument("text", metavar="TEXT", help="text file in UTF-8; its last tenth is held out")
    parser.add_argument("--out", default="attnres-lora", help="folder of the adapter (default: %(default)s)")
    parser.add_argument("--merge", metavar="DIR", help="save a model with the adapter merged into it here, too")
    parser.add_argument("--num-blocks", type=int, default=8, help="at most this many blocks (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="peak (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="(default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train, held_out = sequences(tokenizer, options.text, options.length)

    model = get_peft_model(
        converted(options),
        LoraConfig(
            task_type="CAUSAL_LM",
            r=options.rank,
            lora_alpha=2 * options.rank,
            target_modules="all-linear",
            modules_to_save=["depth_mixer"],
        ),
    )
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    depth = {name for name in trained if ".depth_mixer." in name}
    print(
        f"trained: {sum(trained.values()):,} of {sum(p.numel() for p in model.parameters()):,} numbers, "
        f"{sum(trained[name] for name in depth):,} of them in the depth mixer"
    )

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            options.out,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            lr_scheduler_type="cosine",
            warmup_steps=options.steps // 20,
            bf16=options.bf16,
            eval_strategy="steps",
            eval_steps=max(1, options.steps // 10),
            eval_on_start=True,
            logging_steps=max(1, options.steps // 20),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=[DepthDynamicsCallback(interval=max(1, options.steps // 10))],
    )
    decayed = set(trainer.get_decay_parameter_names(model)) & set(trained)
    print(f"weight decay: {len(decayed)} trained tensors, {len(decayed & depth)} of the depth mixer's {len(depth)}")

    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    print(f"held-out loss: {losses[0]:.4f} before, {losses[-1]:.4f} after {options.steps} steps")
    trainer.save_model(options.out)
    trainer.save_state()  # what `attnres dynamics` reads
    tokenizer.save_pretrained(options.out)

    sample = held_out[0]["input_ids"].unsqueeze(0)
    again = PeftModel.from_pretrained(converted(options), options.out).eval()
    with torch.no_grad():
        difference = (again(sample).logits - model.eval().cpu()(sample).logits).abs().max()
    print(f"saved: {options.out}; loaded again, largest logit difference {difference:.1e}")
    if options.merge:
        again.merge_and_unload().save_pretrained(options.merge)
        tokenizer.save_pretrained(options.merge)
        print(f"merged: {options.merge}")


def converted(options: argparse.Namespace) -> AttnResForCausalLM:
    return AttnResForCausalLM.from_backbone(options.model, num_blocks=options.num_blocks, dtype=torch.float32)


def sequences(tokenizer, path: str, length: int) -> tuple[list[dict], list[dict]]:
    """Training and held-out sequences of `length` tokens each, in the order of the text."""
    ids = tokenizer(Path(path).read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
    rows = [{"input_ids": row, "labels": row} for row in ids.split(length) if len(row) == length]
    held_out = max(1, len(rows) // 10)
    if len(rows) <= held_out:
        raise SystemExit(f"{path}: {len(ids)} tokens make {len(rows)} sequences, 2 are needed; choose --length below")
    return rows[:-held_out], rows[-held_out:]


if __name__ == "__main__":
    main()
