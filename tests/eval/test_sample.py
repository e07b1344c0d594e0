"""Tests the miniature data sets: their schemas, names and sizes, and the mirror that they are written to."""

import os
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Sequence, Value
from sample_rows import EVALUATED, configs, evaluated, files, rows

from attnres.eval import sample
from attnres.eval.mirror import Mirror

TEXT, INT32, INT64 = (Value(name) for name in ("string", "int32", "int64"))
LETTERED = dict.fromkeys("ABCD", TEXT)

# (config, splits, columns) per data set, written down from the hub's cards.
HUB = {
    "cais/mmlu": (
        "anatomy",
        {"test", "validation", "dev"},
        {"question": TEXT, "subject": TEXT, "choices": Sequence(TEXT), "answer": ClassLabel(names=list("ABCD"))},
    ),
    "TIGER-Lab/MMLU-Pro": (
        None,
        {"test", "validation"},
        {
            "question_id": INT64,
            "question": TEXT,
            "options": Sequence(TEXT),
            "answer": TEXT,
            "answer_index": INT64,
            "cot_content": TEXT,
            "category": TEXT,
            "src": TEXT,
        },
    ),
    "SaylorTwift/bbh": ("navigate", {"test"}, {"input": TEXT, "target": TEXT}),
    "allenai/ai2_arc": (
        "ARC-Challenge",
        {"train", "validation", "test"},
        {"id": TEXT, "question": TEXT, "choices": Sequence({"text": TEXT, "label": TEXT}), "answerKey": TEXT},
    ),
    "Rowan/hellaswag": (
        None,
        {"train", "validation", "test"},
        {
            "ind": INT32,
            **dict.fromkeys(("activity_label", "ctx_a", "ctx_b", "ctx"), TEXT),
            "endings": Sequence(TEXT),
            **dict.fromkeys(("source_id", "split", "split_type", "label"), TEXT),
        },
    ),
    "mandarjoshi/trivia_qa": (
        "rc.nocontext",
        {"train", "validation", "test"},
        {
            **dict.fromkeys(("question", "question_id", "question_source"), TEXT),
            "entity_pages": Sequence(dict.fromkeys(("doc_source", "filename", "title", "wiki_context"), TEXT)),
            "search_results": Sequence(
                {
                    "description": TEXT,
                    "filename": TEXT,
                    "rank": INT32,
                    **dict.fromkeys(("title", "url", "search_context"), TEXT),
                }
            ),
            "answer": {
                "aliases": Sequence(TEXT),
                "normalized_aliases": Sequence(TEXT),
                "matched_wiki_entity_name": TEXT,
                "normalized_matched_wiki_entity_name": TEXT,
                "normalized_value": TEXT,
                "type": TEXT,
                "value": TEXT,
            },
        },
    ),
    "openai/gsm8k": ("main", {"train", "test"}, {"question": TEXT, "answer": TEXT}),
    "juletxara/mgsm": (
        "sw",
        {"train", "test"},
        {"question": TEXT, "answer": TEXT, "answer_number": INT32, "equation_solution": TEXT},
    ),
    "EleutherAI/hendrycks_math": (
        "geometry",
        {"train", "test"},
        dict.fromkeys(("problem", "level", "type", "solution"), TEXT),
    ),
    "weitianwen/cmath": (
        None,
        {"validation", "test"},
        {"grade": INT64, "question": TEXT, "golden": TEXT, "reasoning_step": INT64, "num_digits": INT64},
    ),
    "openai/openai_humaneval": (
        None,
        {"test"},
        dict.fromkeys(("task_id", "prompt", "canonical_solution", "test", "entry_point"), TEXT),
    ),
    "google-research-datasets/mbpp": (
        "full",
        {"train", "test", "validation", "prompt"},
        {
            "task_id": INT32,
            "text": TEXT,
            "code": TEXT,
            "test_list": Sequence(TEXT),
            "test_setup_code": TEXT,
            "challenge_test_list": Sequence(TEXT),
        },
    ),
    "haonan-li/cmmlu": ("agronomy", {"test", "dev"}, {"Question": TEXT, **LETTERED, "Answer": TEXT}),
    "ceval/ceval-exam": (
        "law",
        {"val", "test", "dev"},
        {"id": INT32, "question": TEXT, **LETTERED, "answer": TEXT, "explanation": TEXT},
    ),
}
# Of GPQA's columns, those that lm-eval's tasks read.
GPQA_READ = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")

# Data set: (folder of lm-eval's task files, how many configs, split of the examples, shots).
TASKS = {
    "cais/mmlu": ("mmlu/default", 57, "dev", 5),
    "haonan-li/cmmlu": ("cmmlu", 67, "dev", 5),
    "ceval/ceval-exam": ("ceval", 52, "dev", 5),
    "SaylorTwift/bbh": ("bbh/cot_fewshot", 27, None, 0),
    "juletxara/mgsm": ("mgsm/native_cot", 11, "train", 8),
    "EleutherAI/hendrycks_math": ("minerva_math", 7, None, 0),
    "Idavidrein/gpqa": (None, 1, None, 0),
    "TIGER-Lab/MMLU-Pro": (None, 1, "validation", 5 * 14),
    "allenai/ai2_arc": (None, 1, "train", 25),
    "Rowan/hellaswag": (None, 1, "train", 10),
    "mandarjoshi/trivia_qa": (None, 1, "train", 5),
    "openai/gsm8k": (None, 1, "train", 8),
    "weitianwen/cmath": (None, 1, "validation", 6),
    "openai/openai_humaneval": (None, 1, None, 0),
    "google-research-datasets/mbpp": (None, 1, "prompt", 3),
}


def question(row):
    for name in ("question", "Question", "input", "problem", "prompt", "text", "ctx"):
        if name in row:
            return row[name]
    raise AssertionError(row)


@pytest.fixture(scope="module")
def mirror():
    return Mirror(sample.root())


@pytest.mark.parametrize("repository", HUB)
def test_a_data_set_loads_with_the_columns_and_types_of_the_hub(repository, mirror):
    config, splits, columns = HUB[repository]
    loaded = mirror.load(repository, config)
    assert set(loaded) == splits
    for split in loaded.values():
        assert len(split) > 0
        assert split.cast(datasets.Features(columns)).to_list() == split.to_list()


def test_gpqa_loads_with_the_columns_that_tasks_read(mirror):
    loaded = mirror.load("Idavidrein/gpqa", "gpqa_diamond")
    assert set(loaded) == {"train"}
    assert {loaded["train"].features[name].dtype for name in GPQA_READ} == {"string"}
    assert all(row[name] for row in loaded["train"] for name in GPQA_READ)


def test_the_mirror_is_what_datasets_loads_too(mirror, tmp_path):
    loaded = datasets.load_dataset(str(mirror.root / "openai/gsm8k"), "main", cache_dir=str(tmp_path))
    assert {split: data.to_list() for split, data in loaded.items()} == {
        split: data.to_list() for split, data in mirror.load("openai/gsm8k", "main").items()
    }


@pytest.mark.parametrize("repository", HUB)
def test_every_config_has_the_same_splits_and_columns(repository):
    _, splits, columns = HUB[repository]
    for config, found in configs(repository).items():
        assert found == splits
        for split in found:
            assert all(row.keys() == columns.keys() for row in rows(repository, config, split))


@pytest.mark.parametrize("repository", TASKS)
def test_there_are_enough_items_and_examples(repository):
    _, count, examples, shots = TASKS[repository]
    assert len(configs(repository)) == count
    per_config = Counter(config for config, _ in evaluated(repository))
    assert per_config.total() >= 12
    assert per_config.keys() == configs(repository).keys()
    if examples:
        assert all(len(rows(repository, config, examples)) >= shots for config in per_config)


@pytest.mark.parametrize("repository", [name for name, task in TASKS.items() if task[0]])
def test_configs_are_those_that_lm_eval_names(repository):
    folder = Path(find_spec("lm_eval").origin).parent / "tasks" / TASKS[repository][0]
    found = set()
    for path in folder.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        if "MATH-500" not in text:
            found.update(re.findall(r"^\"?dataset_name\"?: \"?(\w+)\"?", text, flags=re.MULTILINE))
    assert set(configs(repository)) == found


def test_mmlu_pro_has_the_categories_that_lm_eval_names():
    source = (Path(find_spec("lm_eval").origin).parent / "tasks/mmlu_pro/utils.py").read_text()
    expected = set(re.findall(r'subject="([^"]+)"', source))
    repository = "TIGER-Lab/MMLU-Pro"
    assert {row["category"] for row in rows(repository, "default", "test")} == expected
    examples = Counter(row["category"] for row in rows(repository, "default", "validation"))
    assert examples == dict.fromkeys(expected, 5)


def test_no_question_comes_twice():
    for repository in TASKS:
        questions = [question(row) for _, row in evaluated(repository)]
        assert len(set(questions)) == len(questions)
        for config, splits in configs(repository).items():
            per_split = {split: rows(repository, config, split) for split in splits}
            tested = {question(row) for row in per_split.pop(EVALUATED.get(repository, "test"))}
            others = {question(row) for split in per_split.values() for row in split}
            bare = {text.partition(": ")[2] or text for text in others}  # MGSM's examples say "Question: " before it
            assert not tested & (others | bare), (repository, config)


def test_the_mirror_is_a_temporary_folder_that_ends_with_its_process(tmp_path):
    script = "from attnres.eval import sample\nprint(sample.root(), sum(p.is_file() for p in sample.root().rglob('*')))"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    folder, count = done.stdout.split()
    assert folder.startswith(str(tmp_path / "attnres-sample-")) and int(count) == len(files()) + 1
    assert not list(tmp_path.iterdir())


def test_items_are_small():
    assert sum(path.stat().st_size for path in sample.ITEMS.iterdir()) < 300_000
