"""Trains the demo's model with plain residuals, Block AttnRes and Full AttnRes, logging dynamics over depth.

    python benchmarks/dynamics_runs.py --out dynamics-runs
    attnres dynamics dynamics-runs/standard dynamics-runs/block dynamics-runs/full

All models start from the same backbone weights and see the same text (Python's standard library) in the same order.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from attnres import AttnResForCausalLM, DepthDynamicsCallback
from attnres.demo import FULL, build_plain, prepare_data

MODES = ("standard", "block", "full")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder with one folder per run")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="(default: all)")
    parser.add_argument("--steps", type=int, default=FULL.steps, help="of each run (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = replace(FULL, steps=options.steps, warmup_steps=options.steps // 10)
    options.out.mkdir(parents=True)
    data = prepare_data(settings, options.out)
    train, held_out = ([{"input_ids": row, "labels": row} for row in data[part]] for part in ("train", "held_out"))
    for mode in options.modes:
        plain = build_plain(settings, data["tokenizer"].eos_token_id)
        blocks = {"num_blocks": settings.num_blocks} if mode == "block" else {}
        trainer = Trainer(
            AttnResForCausalLM.from_backbone(plain, residual_mode=mode, **blocks),
            TrainingArguments(
                str(options.out / mode),
                max_steps=settings.steps,
                per_device_train_batch_size=settings.batch_size,
                per_device_eval_batch_size=settings.eval_batch_size,
                train_sampling_strategy="sequential",
                learning_rate=settings.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=settings.warmup_steps,
                weight_decay=settings.weight_decay,
                adam_beta2=settings.adam_beta2,
                eval_strategy="steps",
                eval_steps=settings.eval_every,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=train,
            eval_dataset=held_out,
            callbacks=[DepthDynamicsCallback(interval=settings.eval_every)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_state()


if __name__ == "__main__":
    main()
