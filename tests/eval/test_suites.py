"""Tests the rows: the paper's fifteen, their protocol, and the task definitions behind them."""

import datasets
import pytest
from tiny_eval import gpqa_item

from attnres.eval import mirror
from attnres.eval.loading import load_tasks, task_configs
from attnres.eval.suites import ROWS, SUITES, select_rows
from attnres.eval.tasks import cmath, gpqa


def test_paper_has_fifteen_rows_and_a_published_pair_for_each():
    assert len(SUITES["paper"]) == 15
    assert list(SUITES["paper"]) == list(ROWS)
    assert (ROWS["mmlu"].paper, ROWS["ceval"].paper) == ((73.5, 74.6), (79.6, 82.5))


def test_readme_has_nine_rows():
    assert len(SUITES["readme"]) == 9 and set(SUITES["readme"]) < set(ROWS)


def test_sample_runs_the_rows_of_paper():
    assert SUITES["sample"] == SUITES["paper"]


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("gsm9k", "gsm8k"), ("GPQA-Diamond", "gpqa_diamond"), ("papr", "paper"), ("mmlu,hellaswg", "hellaswag")],
)
def test_unknown_row_is_answered_with_the_nearest_name(wrong, near):
    with pytest.raises(ValueError, match=f"unknown suite or row.*Did you mean {near!r}"):
        select_rows(wrong)


def test_rows_come_once_and_in_the_order_of_the_table():
    assert [row.name for row in select_rows("gsm8k,mmlu,gsm8k")] == ["mmlu", "gsm8k"]


def test_sample_does_not_mix_with_rows_of_real_data():
    with pytest.raises(ValueError, match="run it alone"):
        select_rows("sample,mmlu")


@pytest.mark.parametrize("name", ["arc_challenge", "hellaswag", "mgsm", "mbpp"])
def test_unpublished_shots_are_marked_as_ours(name):
    (shots,) = (choice for choice in ROWS[name].protocol if choice["choice"] == "shots")
    assert shots["origin"] == "ours"


@pytest.mark.parametrize(("name", "leaves"), [("mmlu", 57), ("bbh", 27), ("mgsm", 11), ("cmmlu", 67), ("ceval", 52)])
def test_group_has_all_its_leaf_tasks(name, leaves):
    assert len({config["task"] for config in task_configs(ROWS[name])}) == leaves


def test_every_row_names_tasks_that_exist():
    data_sets = {config["dataset_path"] for row in ROWS.values() for config in task_configs(row)}
    assert len(data_sets) == 15


@pytest.fixture
def data(mirror_root):
    return mirror.Mirror(mirror_root)


def test_token_limit_is_at_least_1024_where_lm_eval_stops_at_256(data):
    (config,) = task_configs(ROWS["gsm8k"])
    assert "max_gen_toks" not in config["generation_kwargs"]
    (loaded,) = load_tasks(ROWS["gsm8k"], mirror=data)
    assert loaded.task.config.generation_kwargs["max_gen_toks"] == 1024


def test_shots_are_those_of_the_row(data):
    assert load_tasks(ROWS["gsm8k"], mirror=data)[0].task.config.num_fewshot == 8
    assert load_tasks(ROWS["arc_challenge"], mirror=data)[0].task.config.num_fewshot == 25


def prompts(loaded) -> list[str]:
    loaded.task.set_fewshot_seed(seed=1)
    loaded.task.build_all_requests(rank=0, world_size=1)
    return [instance.args[0] for instance in loaded.task.instances if instance.idx == 0]


def test_gpqa_never_shows_a_question_among_its_own_examples(data):
    for loaded in load_tasks(ROWS["gpqa_diamond"], mirror=data):
        for prompt in prompts(loaded):
            *examples, question = prompt.split("Question: ")[1:]
            assert len(examples) == 5
            rod = question.split("\n")[0]
            assert not [example for example in examples if example.startswith(rod)]


def test_gpqa_runs_eight_seeds_that_order_the_choices_differently(data):
    loaded = load_tasks(ROWS["gpqa_diamond"], mirror=data)
    answers = [tuple(doc["answer"] for doc in each.task.eval_docs) for each in loaded]
    assert len(loaded) == len(set(answers)) == 8
    assert {each.name for each in loaded} == {"attnres_gpqa_diamond"}


def test_gpqa_order_depends_on_seed_and_question_alone():
    questions = [gpqa_item(number) for number in range(20)]

    def orders(items, seed):
        return {doc["Question"]: doc["answer"] for doc in gpqa.process_docs(datasets.Dataset.from_list(items), seed)}

    assert orders(questions, 3) == orders(questions[::-1], 3)
    assert orders(questions[:5], 3).items() <= orders(questions, 3).items()
    assert orders(questions, 3) != orders(questions, 4)


@pytest.mark.parametrize(
    ("written", "golden", "score"),
    [
        ("3+4=7。所以答案是7。", "7", 1),
        ("共有1,250米。答案是1,250米", "1250", 1),
        ("所以答案是0.50元", "0.5", 1),
        ("答案是3/4", "0.75", 1),
        ("先算12。再加3。得15", "15", 1),
        ("答案为8个、不是9个", "8", 1),
        ("答案是6", "7", 0),
        ("不知道", "7", 0),
        ("", "7", 0),
        ("答案是1/0", "7", 0),
    ],
)
def test_cmath_compares_the_answer_as_a_number(written, golden, score):
    assert cmath.process_results({"golden": golden}, [written]) == {"exact_match": score}
