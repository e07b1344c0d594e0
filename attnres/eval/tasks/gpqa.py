"""GPQA's choices in an order drawn from (seed, question): the same in every process, another for every seed."""

import hashlib
import random

import datasets

CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def process_docs(dataset: datasets.Dataset, seed: int = 0) -> datasets.Dataset:
    """Adds `choice1` to `choice4` and `answer`, and drops all columns but the question.

    Sets differ in the questions they hold, never in how a question's choices are ordered: examples and test questions
    are processed apart and compared.
    """

    def shuffled(doc):
        digest = hashlib.sha256(f"{seed}\n{doc['Question']}".encode()).digest()
        order = list(range(len(CHOICES)))
        random.Random(digest).shuffle(order)
        choices = {f"choice{place + 1}": clean(doc[CHOICES[index]]) for place, index in enumerate(order)}
        return {"Question": clean(doc["Question"]), **choices, "answer": f"({chr(65 + order.index(0))})"}

    # Without map: its cache is keyed by the function's code, and a seed must never be missed.
    return datasets.Dataset.from_list([shuffled(doc) for doc in dataset])


def clean(text: str | None) -> str:
    """As lm-eval cleans GPQA, but for an empty choice."""
    return (text or "").strip().replace(" [title]", ". ").replace("  ", " ")
