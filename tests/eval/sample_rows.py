"""Reads the miniature data sets as they are written into the mirror."""

import json
from functools import lru_cache

from attnres.eval import sample

# Where the evaluated items of a data set are; in "test" if it is not here.
EVALUATED = {"ceval/ceval-exam": "val", "Rowan/hellaswag": "validation", "mandarjoshi/trivia_qa": "validation"}
EVALUATED["Idavidrein/gpqa"] = "train"


@lru_cache
def files():
    return sample.files()


def rows(repository, config, split):
    return [json.loads(line) for line in files()[f"{repository}/data/{config}/{split}.jsonl"].decode().splitlines()]


def configs(repository):
    """Returns the names of the splits of each config."""
    found = {}
    for path in files():
        if path.startswith(f"{repository}/data/"):
            config, split = path.removeprefix(f"{repository}/data/").split("/")
            found.setdefault(config, set()).add(split.removesuffix(".jsonl"))
    return found


def evaluated(repository):
    """Returns (config, row) for all evaluated items of a data set."""
    split = EVALUATED.get(repository, "test")
    return [(config, row) for config in configs(repository) for row in rows(repository, config, split)]
