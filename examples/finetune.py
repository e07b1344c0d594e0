"""Converts your checkpoint to Block AttnRes without loss, fine-tunes it on your text with Trainer, and saves it.

    python examples/finetune.py Qwen/Qwen3-0.6B notes.txt --out qwen3-attnres --steps 200 --bf16

Any PreNorm checkpoint of a supported family will do. Afterwards `attnres dynamics qwen3-attnres` draws how it trained
over depth, and `AutoModelForCausalLM.from_pretrained("qwen3-attnres")` loads it after `import attnres`.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from attnres import AttnResForCausalLM, DepthDynamicsCallback


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of a PreNorm checkpoint with its tokenizer")
    parser.add_argument("text", metavar="TEXT", help="text file in UTF-8; its last tenth is held out")
    parser.add_argument("--out", default="attnres-finetuned", help="folder of the result (default: %(default)s)")
    parser.add_argument("--num-blocks", type=int, default=8, help="at most this many blocks (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="peak (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="(default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--freeze-backbone", action="store_true", help="train the depth mixer alone")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train, held_out = sequences(tokenizer, options.text, options.length)

    plain = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = AttnResForCausalLM.from_backbone(plain, num_blocks=options.num_blocks)
    with torch.no_grad():
        sample = held_out[0]["input_ids"].unsqueeze(0)
        difference = (model.eval()(sample).logits - plain.eval()(sample).logits).abs().max()
    print(f"converted: {model.config.num_blocks} blocks, largest logit difference {difference:.1e}")
    del plain
    if options.freeze_backbone:
        model.freeze_backbone()

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
    decayed = set(trainer.get_decay_parameter_names(model))
    depth = {name for name, _ in model.named_parameters() if ".depth_mixer." in name}
    print(f"weight decay: {len(decayed)} tensors, {len(decayed & depth)} of the depth mixer's {len(depth)}")

    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    print(f"held-out loss: {losses[0]:.4f} before, {losses[-1]:.4f} after {options.steps} steps")
    trainer.save_model(options.out)
    trainer.save_state()  # what `attnres dynamics` reads
    tokenizer.save_pretrained(options.out)
    print(f"saved: {options.out}")


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
