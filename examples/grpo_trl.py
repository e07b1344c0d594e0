"""Group relative policy optimisation with TRL, the model by its path: TRL finds AttnRes by the Auto classes.

    python examples/grpo_trl.py smollm2-attnres prompts.jsonl --out smollm2-attnres-grpo --steps 20

DATA is jsonl with a column prompt: texts, or lists of messages. The reward of this example favours answers of about
`--words` words; put your own in its place.
"""

import argparse

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

import attnres  # noqa: F401  registers the model with the Auto classes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of an AttnRes model with its tokenizer")
    parser.add_argument("data", metavar="DATA", help="jsonl with a column prompt")
    parser.add_argument("--out", default="attnres-grpo", help="folder of the result (default: %(default)s)")
    parser.add_argument("--words", type=int, default=20, help="length of answer to reward (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--generations", type=int, default=4, help="answers per prompt (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="of an answer (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-6, help="peak (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    options = parser.parse_args()

    def length(completions, **kwargs) -> list[float]:
        texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
        return [-abs(len(text.split()) - options.words) / options.words for text in texts]

    trainer = GRPOTrainer(
        options.model,
        reward_funcs=length,
        args=GRPOConfig(
            options.out,
            max_steps=options.steps,
            per_device_train_batch_size=options.generations,
            num_generations=options.generations,
            max_completion_length=options.new_tokens,
            learning_rate=options.learning_rate,
            bf16=options.bf16,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"reward: {rewards[0]:.3f} first, {rewards[-1]:.3f} after {options.steps} steps")
    trainer.save_model(options.out)
    print(f"saved: {options.out}")


if __name__ == "__main__":
    main()
