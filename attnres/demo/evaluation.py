"""Evaluation on held-out text. Shapes: N sequences, T tokens, V vocabulary, L decoder layers, n sources."""

import io
import json
import logging
import math
import sys
from collections.abc import Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, set_seed

from .settings import Settings

TASK = "standard_library"
PROMPT = 'def read_config(path, encoding="utf-8"):\n    """Read'


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, sequences: torch.Tensor, batch_size: int) -> float:
    """Mean next-token loss over `[N, T]`, in nats per token, without any load-balancing term."""
    training = model.training
    model.eval()
    losses = [
        model(input_ids=batch, labels=batch, output_router_logits=False, use_cache=False).loss * len(batch)
        for batch in sequences.split(batch_size)
    ]
    model.train(training)
    return (torch.stack(losses).sum() / len(sequences)).item()


@torch.no_grad()
def loss_by_position(model: PreTrainedModel, sequences: torch.Tensor, batch_size: int) -> list[float]:
    """Mean loss of each token over `[N, T]`, in nats, by the tokens before it: 1 to T - 1."""
    total = torch.zeros(sequences.shape[1] - 1, dtype=torch.double)
    for batch in sequences.split(batch_size):
        logits = model(input_ids=batch, output_router_logits=False, use_cache=False).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(logits.mT, batch[:, 1:], reduction="none").double().sum(dim=0)
    return (total / len(sequences)).tolist()


def doublings(length: int) -> list[tuple[int, int]]:
    """First and last of 1, 2 to 3, 4 to 7, ... below `length`: what a context gains shows in its doublings."""
    return [(1 << power, min((2 << power) - 1, length - 1)) for power in range((length - 1).bit_length())]


def interval_over_files(bits: Sequence[float], sizes: Sequence[int], resamples: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of bits per byte by resampling files, as tokens of one file are not independent."""
    bits, sizes = np.asarray(bits, dtype=float), np.asarray(sizes, dtype=float)
    drawn = np.random.default_rng(seed).integers(0, len(bits), (resamples, len(bits)))
    low, high = np.quantile(bits[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


@torch.no_grad()
def compare_logits(model: PreTrainedModel, other: PreTrainedModel, sequences: torch.Tensor) -> dict[str, float]:
    """Largest absolute logit difference on `[N, T]`, the logits' standard deviation, the share of equal top-1."""
    ours, theirs = (each.eval()(input_ids=sequences, use_cache=False).logits for each in (model, other))
    return {
        "max_abs_logit_difference": (ours - theirs).abs().max().item(),
        "logit_std": theirs.std().item(),
        "top1_agreement": (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item(),
    }


@torch.no_grad()
def mean_depth_weights(model: PreTrainedModel, sequences: torch.Tensor, batch_size: int) -> list[list[float]]:
    """Depth weights averaged over the tokens of `[N, T]`: 2 L + 1 rows of n numbers."""
    totals: list[torch.Tensor] | None = None
    for batch in sequences.split(batch_size):
        output = model(input_ids=batch, output_depth_weights=True, output_router_logits=False, use_cache=False)
        sums = [weights.double().sum(dim=(0, 1)) for weights in output.depth_weights]
        totals = sums if totals is None else [total + new for total, new in zip(totals, sums, strict=True)]
    return [(total / sequences.numel()).tolist() for total in totals]


@torch.no_grad()
def complete(model: PreTrainedModel, tokenizer, settings: Settings) -> str:
    """`PROMPT` with a continuation sampled by `generate()`, the same seed for every model."""
    set_seed(settings.seed)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(
        **inputs,
        max_new_tokens=settings.new_tokens,
        do_sample=True,
        temperature=0.7,
        top_k=20,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def evaluate_with_lm_eval(model: PreTrainedModel, tokenizer, documents: Path, settings: Settings, name: str) -> dict:
    """Bits and perplexity per byte of whole documents, by lm-eval's rolling likelihood; `file_bits` of each of them.

    Args:
        documents: JSON lines with a `text` each.
        name: of the model, for the progress bar.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    progress = sys.stderr

    class QuietLM(HFLM):
        """HFLM with one progress bar over all windows, where its own shows one per batch."""

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            lengths = (len(self.tok_encode(request.args[0])) for request in requests)
            windows = sum(max(1, -(-length // self.max_length)) for length in lengths)
            with tqdm(total=windows, desc=f"lm-eval {name}", unit="window", file=progress) as self.bar:
                return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            result = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
            self.bar.update(len(requests))
            return result

    def load(**_):
        from datasets import Dataset

        # In memory: load_dataset would leave a cache in the user's home folder.
        return {"test": Dataset.from_list([json.loads(line) for line in documents.read_text("utf-8").splitlines()])}

    task = {
        "task": TASK,
        "output_type": "loglikelihood_rolling",
        "custom_dataset": load,
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": _text_of,
        "metric_list": [
            {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
            for metric, aggregation in (("bits_per_byte", "bits_per_byte"), ("byte_perplexity", "weighted_perplexity"))
        ],
    }
    with _quiet_lm_eval():
        results = simple_evaluate(
            model=QuietLM(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                max_length=settings.sequence_length,
                batch_size=settings.eval_batch_size,
            ),
            tasks=[task],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    scores = results["results"][TASK]
    samples = sorted(results["samples"][TASK], key=lambda sample: sample["doc_id"])
    file_bits = [-sample["bits_per_byte"][0] / math.log(2) for sample in samples]  # beside the number of bytes
    metrics = {metric: scores[f"{metric},none"] for metric in ("bits_per_byte", "byte_perplexity")}
    return {**metrics, "file_bits": file_bits}


def write_documents(documents: Sequence, path: Path):
    """Documents as JSON lines with `name` and `text`."""
    lines = (json.dumps({"name": document.name, "text": document.text}) for document in documents)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _text_of(document: dict) -> str:
    return document["text"]


@contextmanager
def _quiet_lm_eval():
    """lm-eval warns about options that the demo leaves alone on purpose, and shows bars that vanish at once."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
