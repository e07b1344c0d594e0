"""Puts GPQA's choices in an order drawn from (seed, question): the same in every process, another for every seed."""

import hashlib
import random

import datasets

CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def process_docs(dataset: datasets.Dataset, seed: int = 0) -> datasets.Dataset:
    """Adds `choice1` to `choice4` and `answer`, and drops all columns but the question.

    The order depends on nothing else in the data set, because lm-eval processes examples and test questions separately
    and then compares them.
    """

    def shuffled(doc):
        digest = hashlib.sha256(f"{seed}\n{doc['Question']}".encode()).digest()
        order = list(range(len(CHOICES)))
        random.Random(digest).shuffle(order)
        choices = {f"choice{place + 1}": clean(doc[CHOICES[index]]) for place, index in enumerate(order)}
        return {"Question": clean(doc["Question"]), **choices, "answer": f"({chr(65 + order.index(0))})"}

    # Not with map: its cache is keyed by the function's code and could miss another seed.
    return datasets.Dataset.from_list([shuffled(doc) for doc in dataset])


def clean(text: str | None) -> str:
    """Cleans a text as lm-eval does for GPQA, except that a missing one becomes empty."""
    return (text or "").strip().replace(" [title]", ". ").replace("  ", " ")
