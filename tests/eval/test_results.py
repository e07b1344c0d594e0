"""Tests the scores computed from items, and the tables: columns, averages, marks."""

import csv
import json
import shutil
from math import sqrt

import pytest
from tiny_eval import Scripted

from attnres.eval import evaluate
from attnres.eval.results import COLUMNS, LIMITED, SAMPLE, as_csv, as_markdown, table_row
from attnres.eval.scores import row_scores, task_scores
from attnres.eval.suites import ROWS


def items(task: str, values: list[float], metric: str = "acc", filter_name: str = "none", seed=None) -> list[dict]:
    return [
        {"task": task, "doc_id": number, "filter": filter_name, "metrics": {metric: value}, "seed": seed}
        for number, value in enumerate(values)
    ]


def test_micro_weighs_items_and_macro_subtasks():
    score, _ = row_scores(ROWS["mmlu"], items("a", [1, 1, 1, 0, 0, 0]) + items("b", [1, 1]))
    assert score["value"] == score["micro"]["value"] == pytest.approx(62.5)
    assert score["macro"]["value"] == pytest.approx(75)
    error = 100 * sqrt(0.3 / 6)  # of a; b has none
    assert score["micro"]["stderr"] == pytest.approx(error * 6 / 8)
    assert score["macro"]["stderr"] == pytest.approx(error / 2)


def test_mgsm_prints_the_mean_over_languages():
    values = {"metric": "exact_match", "filter_name": "flexible-extract"}
    strict = {"metric": "exact_match", "filter_name": "strict-match"}
    score, (second,) = row_scores(
        ROWS["mgsm"],
        items("en", [1, 1, 1, 0, 0, 0], **values) + items("th", [1, 1], **values) + items("en", [0, 1], **strict),
    )
    assert score["value"] == pytest.approx(75) and second["value"] == 50


def test_seeds_of_a_question_are_averaged_before_the_error():
    score, _ = row_scores(ROWS["gpqa_diamond"], items("g", [1, 0, 1], seed=0) + items("g", [0, 0, 1], seed=1))
    assert score["n"] == 3 and score["value"] == pytest.approx(50)
    assert score["stderr"] == pytest.approx(100 * sqrt(0.25 / 3))  # of 0.5, 0, 1


def test_single_items_per_subtask_share_one_error():
    score, _ = row_scores(ROWS["mmlu"], items("a", [1]) + items("b", [0]))
    assert score["stderr"] == pytest.approx(50)


def test_row_without_its_metric_or_with_nan_is_an_error():
    with pytest.raises(ValueError, match="no item has acc"):
        row_scores(ROWS["mmlu"], items("a", [1], metric="f1"))
    with pytest.raises(ValueError, match="NaN"):
        row_scores(ROWS["mmlu"], items("a", [float("nan"), 1]))


def test_scores_per_task_name_metric_and_filter():
    found = task_scores(items("a", [1, 0]) + items("a", [1, 1], metric="acc_norm"))
    assert found["a"]["acc,none"]["value"] == 50 and found["a"]["acc_norm,none"] == {"value": 100, "stderr": 0, "n": 2}


@pytest.fixture(scope="module")
def measured(mirror_root, tmp_path_factory):
    """Results of two rows."""
    out = tmp_path_factory.mktemp("measured")
    evaluate(
        lm=Scripted(identity="a"), out=out, progress=False, data_dir=mirror_root, suite="gsm8k,gpqa_diamond", seeds=2
    )
    return out


def test_three_tables_agree(measured):
    table = json.loads((measured / "results.json").read_text())
    with (measured / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines] == [row["row"] for row in table["rows"]] == ["gpqa_diamond", "gsm8k"]
    assert list(lines[0]) == [*COLUMNS, "mark"] and float(lines[1]["minus_attnres"]) == pytest.approx(100 - 82.4)
    text = (measured / "results.md").read_text()
    assert "| GSM8K | 100.00 ± 0.00 | 8 | exact_match, strict-match | 5 | 81.7 | 82.4 | +18.3 | +17.6 |" in text
    assert "LIMITED" not in text and table["versions"]["gsm8k"]["lm_eval"].startswith("0.4.13")


def test_unpublished_choices_are_marked_as_ours(measured):
    text = (measured / "results.md").read_text()
    assert "- GSM8K: prompt of lm-eval 0.4.13; decoding greedy; token limit at least 1024" in text


def test_limited_run_is_marked_everywhere(mirror_root, tmp_path):
    out = tmp_path
    evaluate(lm=Scripted(), out=out, data_dir=mirror_root, suite="gsm8k", limit=2, progress=False)
    assert (out / "results.md").read_text().startswith(f"> **{LIMITED}**")
    assert "| GSM8K † |" in (out / "results.md").read_text()
    assert LIMITED in (out / "results.csv").read_text().splitlines()[1]
    assert json.loads((out / "results.json").read_text())["marks"] == [LIMITED]
    assert json.loads((out / "gsm8k" / "result.json").read_text())["limit"] == 2


def test_sample_items_are_marked_as_such(measured):
    result = json.loads((measured / "gsm8k" / "result.json").read_text()) | {"suite": "sample"}
    table = {"marks": [], "rows": [table_row(result)], "failed": {}, "skipped": {}, "of_other_models": [], "model": {}}
    table |= {name: {"gsm8k": result[name]} for name in ("protocol", "versions", "settings")}
    assert SAMPLE in as_csv(table) and "GSM8K ‡" in as_markdown(table) and SAMPLE in as_markdown(table)


def test_rows_of_another_model_do_not_enter_the_table(measured, mirror_root, tmp_path):
    out = shutil.copytree(measured, tmp_path / "out")
    evaluate(lm=Scripted(identity="b"), out=out, data_dir=mirror_root, suite="gsm8k", progress=False)
    table = json.loads((out / "results.json").read_text())
    assert [row["row"] for row in table["rows"]] == ["gsm8k"] and table["of_other_models"] == ["gpqa_diamond"]
