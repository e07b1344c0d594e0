"""Evaluation on held-out text.

Shapes: N sequences, T tokens, V vocabulary.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from ..messages import quiet_lm_eval, say
from .settings import Settings

TASK, METRIC = "standard_library", "bits_per_byte"


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, sequences: torch.Tensor, batch_size: int) -> float:
    """Returns the mean next-token loss over `[N, T]` in nats per token, without any load-balancing term."""
    training = model.training
    model.eval()
    total = 0.0
    for batch in sequences.split(batch_size):
        logits = model(input_ids=batch, output_router_logits=False, use_cache=False).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(logits.mT, batch[:, 1:], reduction="none").double().sum().item()
    model.train(training)
    return total / sequences[:, 1:].numel()


def interval_over_files(bits: Sequence[float], sizes: Sequence[int], settings: Settings) -> tuple[float, float]:
    """Returns the 95 % percentile interval of bits per byte, from the bits and bytes of each file.

    Whole files are resampled because the tokens of a file are not independent.
    """
    bits, sizes = np.asarray(bits, dtype=float), np.asarray(sizes, dtype=float)
    drawn = np.random.default_rng(settings.seed).integers(0, len(bits), (settings.resamples, len(bits)))
    low, high = np.quantile(bits[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


@torch.no_grad()
def compare_logits(model: PreTrainedModel, other: PreTrainedModel, sequences: torch.Tensor) -> dict[str, float]:
    """Compares logits on `[N, T]`: largest difference, standard deviation, and share of equal top-1 tokens."""
    ours, theirs = (each.eval()(input_ids=sequences, use_cache=False).logits for each in (model, other))
    return {
        "max_abs_logit_difference": (ours - theirs).abs().max().item(),
        "logit_std": theirs.std().item(),
        "top1_agreement": (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item(),
    }


def evaluate_with_lm_eval(model: PreTrainedModel, tokenizer, documents: Path, settings: Settings, name: str) -> dict:
    """Returns lm-eval's `bits_per_byte` of the documents with its `interval` and `file_bits`.

    `documents` is a file of JSON lines with a `text` each; `name` names the model in the progress messages.
    """
    from datasets import Dataset
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    say(f"lm-eval {name}: bits per byte of the held-out files")
    rows = [json.loads(line) for line in documents.read_text("utf-8").splitlines()]
    task = {
        "task": TASK,
        "output_type": "loglikelihood_rolling",
        # The data set is made in memory because load_dataset would leave a cache in the user's home folder.
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": lambda document: document["text"],
        "metric_list": [{"metric": METRIC, "aggregation": METRIC, "higher_is_better": False}],
    }
    with quiet_lm_eval():
        results = simple_evaluate(
            model=HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                max_length=settings.sequence_length,
                batch_size=settings.eval_batch_size,
            ),
            tasks=[task],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
        )
    samples = sorted(results["samples"][TASK], key=lambda sample: sample["doc_id"])
    file_bits = [-sample[METRIC][0] / math.log(2) for sample in samples]  # lm-eval: log-likelihood and bytes
    return {
        METRIC: results["results"][TASK][f"{METRIC},none"],
        "file_bits": file_bits,
        "interval": interval_over_files(file_bits, [len(row["text"].encode()) for row in rows], settings),
    }
