"""What DepthDynamicsCallback costs: measured steps beside the unmeasured ones around them, in the same training.

    python benchmarks/dynamics.py --threads 2

Trains a Qwen3-like model on random tokens with transformers' Trainer and measures every second step. A measured step is
divided by the mean of its two neighbours, which are not measured; one step in 100 is measured by default, so the cost
of a training is a hundredth of what is printed for a step.
"""

import argparse
import statistics
import tempfile
import time

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from attnres import AttnResForCausalLM, DepthDynamicsCallback
from attnres.analysis.dynamics import DEFAULT_INTERVAL

WARM_UP = 6  # steps
MODES = ("plain", "standard", "block", "full")


class Clock(TrainerCallback):
    """When each step ended, all callbacks before this one included."""

    def __init__(self):
        self.times = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="(default: all)")
    parser.add_argument("--layers", type=int, default=12, help="decoder layers (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=256, help="D, a multiple of 64 (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="per sequence (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="sequences per step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of each mode (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--threads", type=int, help="of torch on the CPU (default: torch's own)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"| model | step (s) | a measured step costs more by (quartiles) | at every {DEFAULT_INTERVAL}th step |")
    print("|---|--:|--:|--:|")
    for mode in options.modes:
        seconds, extra = measure(mode, options)
        low, median, high = statistics.quantiles(extra, n=4)
        print(
            f"| {mode} | {seconds:.3f} | {100 * median:+.1f} % ({100 * low:+.1f} to {100 * high:+.1f}) "
            f"| {100 * median / DEFAULT_INTERVAL:+.3f} % |",
            flush=True,
        )


def measure(mode: str, options: argparse.Namespace) -> tuple[float, list[float]]:
    """Median seconds of a step that is not measured, and what each measured one takes more, as a share."""
    torch.manual_seed(0)
    data = torch.randint(0, 8192, (options.steps * options.batch, options.tokens))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            build(mode, options),
            TrainingArguments(
                folder,
                max_steps=options.steps,
                per_device_train_batch_size=options.batch,
                bf16=options.bf16,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in data],
            callbacks=[DepthDynamicsCallback(interval=2), clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    took = {step: end - start for step, (start, end) in enumerate(zip(clock.times, clock.times[1:], strict=False), 2)}
    measured = [step for step in took if step % 2 == 0 and step > WARM_UP and step + 1 in took]
    extra = [2 * took[step] / (took[step - 1] + took[step + 1]) - 1 for step in measured]
    return statistics.median(took[step + 1] for step in measured), extra


def build(mode: str, options: argparse.Namespace):
    config = Qwen3Config(
        vocab_size=8192,
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        num_key_value_heads=options.hidden_size // 64,
        head_dim=64,
    )
    plain = Qwen3ForCausalLM(config)
    return plain if mode == "plain" else AttnResForCausalLM.from_backbone(plain, residual_mode=mode)


if __name__ == "__main__":
    main()
