"""Two folders of results, compared."""

import hashlib
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_eval import byte_tokenizer, tiny_llama

from attnres.cli import main
from attnres.eval import evaluate, statistics
from attnres.eval.compare import as_markdown, compare, compare_all, matrix_as_markdown

SETTINGS = {"dtype": "float32", "batch_size": 8, "device": "cpu", "device_map": None}
PNG = b"\x89PNG\r\n\x1a\n"


def write_row(folder, row, values, *, metric="acc", average="items", limit=None, suite="paper", **changes):
    """A row's two files; `values` are (task, seed, value), numbered within task and seed."""
    folder = Path(folder) / row
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "row": row, "title": row.upper(), "suite": suite, "limit": limit, "fingerprint": {}, "tasks": {}, "shots": 5,
        "score": {
            "metric": metric, "filter": "none", "average": average, "n": len(values), "value": 0, "stderr": 0,
            "micro": {"value": 0, "stderr": None}, "macro": {"value": 0, "stderr": None},
        },
        "settings": SETTINGS, "versions": {"torch": "2.13.0"}, "protocol": [],
        "model": {"weights": str(folder.parent)}, "seeds": {"fewshot": 1234, "choices": []}, "wall_seconds": 1.5,
        "tokens_per_second": None, "prompts_cut": 0, "answers_short": 0, "samples_sha256": "",
    }  # fmt: skip
    result = {**result, **changes}
    (folder / "result.json").write_text(json.dumps(result))
    numbers, lines = {}, []
    for task, seed, value in values:
        number = numbers[task, seed] = numbers.get((task, seed), -1) + 1
        item = {
            "task": task, "subtask": task, "seed": seed, "doc_id": number, "doc_hash": f"{task}{number}{seed}",
            "prompt_hash": f"p{number}", "target_hash": "t", "filter": "none", "metrics": {metric: value},
        }  # fmt: skip
        # A second filter of the same item, which must not be counted.
        lines += [json.dumps(item), json.dumps({**item, "filter": "other", "metrics": {metric: 1 - value}})]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    seal(folder)


def seal(folder):
    """Makes a row's result one that was computed from its samples as they are now."""
    result = json.loads((folder / "result.json").read_text())
    digest = hashlib.sha256((folder / "samples.jsonl").read_bytes()).hexdigest()
    (folder / "result.json").write_text(json.dumps(result | {"samples_sha256": digest}))


@pytest.fixture
def folders(tmp_path):
    return tmp_path / "a", tmp_path / "b"


def test_right_and_wrong_answers_are_compared_by_mcnemar(folders):
    before, after = [1] * 20 + [0] * 20, [1] * 18 + [0] * 2 + [1] * 9 + [0] * 11
    for folder, values in zip(folders, (before, after), strict=True):
        write_row(folder, "mmlu", [("anatomy", None, value) for value in values])
    (row,) = compare(*folders).rows
    assert (row.items, row.wins, row.losses, row.ties) == (40, 9, 2, 29)
    assert (row.first, row.second) == pytest.approx((50, 67.5)) and row.difference == pytest.approx(17.5)
    assert row.p == row.p_holm == pytest.approx(2 * (1 + 11 + 55) / 2**11)
    assert row.method == "exact McNemar" and row.low < 17.5 < row.high
    assert row.paper_difference == 1.1


def test_items_are_joined_by_their_key_and_not_by_their_order(folders):
    random.seed(1)
    values = [("t", None, float(random.random() < 0.5)) for _ in range(60)]
    for folder in folders:
        write_row(folder, "mmlu", values)
    path = folders[1] / "mmlu" / "samples.jsonl"
    lines = path.read_text().splitlines()
    random.shuffle(lines)
    path.write_text("\n".join(lines))
    seal(path.parent)
    (row,) = compare(*folders).rows
    assert (row.wins, row.losses, row.ties) == (0, 0, 60)


def test_gpqa_averages_the_seeds_of_a_question_first(folders):
    """Eight copies of a question are one question: they must not make the interval narrower."""
    random.seed(2)
    right = [[float(random.random() < chance) for _ in range(30)] for chance in (0.3, 0.5)]
    for folder, values in zip(folders, right, strict=True):
        write_row(folder, "gpqa_diamond", [("gpqa", seed, value) for seed in range(8) for value in values])
    (eight,) = compare(*folders).rows
    for folder, values in zip(folders, right, strict=True):
        write_row(folder, "gpqa_diamond", [("gpqa", 0, value) for value in values])
    (one,) = compare(*folders).rows
    assert (eight.items, eight.difference, eight.low, eight.p) == (30, one.difference, one.low, one.p)
    mixed = [("gpqa", seed, float(seed % 2)) for seed in range(8) for _ in range(30)]
    write_row(folders[0], "gpqa_diamond", mixed)
    write_row(folders[1], "gpqa_diamond", mixed)
    (row,) = compare(*folders).rows
    assert row.first == 50 and row.method.startswith("paired bootstrap")


def test_a_mean_over_subtasks_stays_one(folders):
    for folder, small in zip(folders, (0.0, 1.0), strict=True):
        write_row(folder, "mgsm", [("de", None, 1.0)] * 30 + [("sw", None, small)] * 10, average="subtasks")
    (row,) = compare(*folders).rows
    assert (row.first, row.second, row.difference) == (50, 100, 50)
    assert row.p == pytest.approx(2 / 2**10)


def test_values_between_0_and_1_are_compared_by_bootstrap(folders):
    numbers = np.random.default_rng(0).random((2, 80))
    for folder, values in zip(folders, numbers, strict=True):
        write_row(folder, "bbh", [(f"t{index % 3}", None, value) for index, value in enumerate(values)])
    (row,) = compare(*folders, bootstrap=500, seed=3).rows
    assert row.method == "paired bootstrap, 500 resamples"
    assert row.difference == pytest.approx(100 * (numbers[1] - numbers[0]).mean())
    assert compare(*folders, bootstrap=500, seed=3).rows == [row] != compare(*folders, bootstrap=500, seed=4).rows


def test_holm_counts_the_rows(folders):
    for name in ("mmlu", "bbh", "ceval"):
        write_row(folders[0], name, [("t", None, 0.0)] * 6)
        write_row(folders[1], name, [("t", None, 1.0)] * 6)
    rows = compare(*folders).rows
    assert [row.row for row in rows] == ["mmlu", "bbh", "ceval"]
    assert [row.p_holm for row in rows] == pytest.approx([3 * row.p for row in rows])


def damage(folder, name, change):
    path = folder / "mmlu" / name
    path.write_text(change(path.read_text()))
    if name == "samples.jsonl":
        seal(path.parent)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("samples.jsonl", lambda text: text[text.index("\n") + 1 :], r"not the same items.* 1 only in .*a, 0 only in"),
        ("samples.jsonl", lambda text: text.replace('"p1"', '"px"'), r"hashes of its text, prompt and target"),
        ("samples.jsonl", lambda text: text.replace('"t1', '"tx'), r"1 only in .*a, 1 only in .*b, such as t #1"),
        ("result.json", lambda text: text[:50], "not valid JSON"),
        ("result.json", lambda text: "[]", "not a result"),
        ("result.json", lambda text: text.replace('"filter": "none"', '"other": 1'), "it lacks score.filter"),
        ("result.json", lambda text: text.replace('"row": "mmlu"', '"row": "bbh"'), "row must be 'mmlu', the name"),
        ("result.json", lambda text: text.replace('"batch_size": 8', '"batch_size": 4'), r"batch_size \(8 and 4\)"),
        ("result.json", lambda text: text.replace('"limit": null', '"limit": 5'), r"limit \(None and 5\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_paired_is_refused_in_one_line(folders, name, change, message, capsys, tmp_path):
    for folder in folders:
        write_row(folder, "mmlu", [("t", None, 1.0)] * 5)
    damage(folders[1], name, change)
    with pytest.raises((ValueError, OSError), match=message):
        compare(*folders)
    out = tmp_path / "out"
    assert main(["compare", *map(str, folders), "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("attnres: error: ") and said.err.count("\n") == 1 and not said.out and not out.exists()


@pytest.mark.parametrize(
    "change", [lambda text: text[: text[:-1].rindex("\n") + 1], lambda text: text.replace("1.0", "0.5")]
)
def test_samples_that_a_result_was_not_computed_from_are_refused(folders, change):
    """Such as those of two evaluations that wrote into one folder at the same time."""
    for folder in folders:
        write_row(folder, "mmlu", [("t", None, 1.0)] * 5)
    path = folders[1] / "mmlu" / "samples.jsonl"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=r"b/mmlu/samples.jsonl: not the samples that result.json"):
        compare(*folders)


def test_missing_folders_and_files_are_refused(folders):
    write_row(folders[0], "mmlu", [("t", None, 1.0)])
    with pytest.raises(ValueError, match="b: no such folder"):
        compare(*folders)
    write_row(folders[1], "bbh", [("t", None, 1.0)])
    with pytest.raises(ValueError, match=r"no row is in both .*a \(mmlu\) and .*b \(bbh\)"):
        compare(*folders)
    write_row(folders[1], "mmlu", [("t", None, 1.0)])
    assert compare(*folders).left_out == ["bbh"]
    (folders[1] / "mmlu" / "samples.jsonl").unlink()
    with pytest.raises(ValueError, match="samples.jsonl: is missing"):
        compare(*folders)
    for resamples in (1, 10**9):
        with pytest.raises(ValueError, match=f"must be 100 to 1000000 resamples, got {resamples}"):
            compare(*folders, bootstrap=resamples)


def test_a_folder_is_not_compared_with_itself(folders):
    write_row(folders[0], "mmlu", [("t", None, 1.0)])
    with pytest.raises(ValueError, match="a: the same folder was given twice"):
        compare(folders[0], folders[0].parent / "." / "a")


@pytest.mark.parametrize(
    ("changes", "mark"),
    [
        ({"versions": {"torch": "2.12.0"}}, "OTHER PACKAGES, which change scores: torch 2.13.0 and 2.12.0"),
        ({"model": {"weights": "a"}}, "THE SAME WEIGHTS on both sides"),
        ({"settings": SETTINGS | {"device": "cuda:1"}}, "OTHER DEVICES, which change scores: cpu and cuda"),
        ({"settings": SETTINGS | {"device_map": "auto"}}, "OTHER DEVICE MAPS, which change scores: None and auto"),
        ({"model": {"weights": "a", "quantization": "bitsandbytes"}}, "OTHER QUANTISATION: none and bitsandbytes"),
        ({"batch_sizes_found": [64, 8]}, "OTHER BATCH SIZES FOUND, which change scores, in mmlu: none and 64, 8"),
    ],
    ids=("packages", "weights", "device", "map", "4-bit", "batch-sizes"),
)
def test_what_a_reader_must_know_stands_above_the_table(folders, changes, mark):
    for folder in folders:
        write_row(folder, "mmlu", [("t", None, 1.0)], model={"weights": folder.name})
    write_row(folders[1], "mmlu", [("t", None, 1.0)], **{"model": {"weights": "b"}, **changes})
    found = compare(*folders)
    assert [each[: len(mark)] for each in found.marks] == [mark] and as_markdown(found).startswith(f"> **{mark}")
    assert found.models[1] == {"weights": "b", **changes.get("model", {})}


def test_prompts_that_were_cut_are_said_beside_the_method(folders):
    for folder, cut in zip(folders, (0, 3), strict=True):
        write_row(folder, "mmlu", [("t", None, 1.0)], prompts_cut=cut)
    assert "- MMLU: acc, none; exact McNemar; prompts cut to the context: 0 and 3" in as_markdown(compare(*folders))


def test_subtasks_of_one_size_are_compared_exactly(folders):
    """Their mean is the mean over items; resampling would find no spread where all agree, and claim certainty."""
    for folder in folders:
        write_row(folder, "mgsm", [("de", None, 1.0)] * 10 + [("sw", None, 0.0)] * 10, average="subtasks")
    (row,) = compare(*folders).rows
    assert row.method == "exact McNemar" and row.average == "subtasks" and row.low < -3 and row.high > 3


def test_an_unwritable_folder_is_named(folders, tmp_path, capsys):
    for folder in folders:
        write_row(folder, "mmlu", [("t", None, 1.0)])
    (tmp_path / "file").touch()
    assert main(["compare", *map(str, folders), "--out", str(tmp_path / "file")]) == 2
    assert f"{tmp_path / 'file'}: cannot be written, because " in capsys.readouterr().err


def test_two_checkpoints_that_the_driver_measured_are_compared(mirror_root, tmp_path, capsys):
    """The whole way: two evaluations of a likelihood and a generation row, then the command."""
    folders = [tmp_path / name for name in ("plain", "other")]
    for seed, folder in enumerate(folders):
        evaluate(
            tiny_llama(seed=seed), "arc_challenge,gsm8k", tokenizer=byte_tokenizer(eos_token="<eos>"), out=folder,
            data_dir=mirror_root, limit=4, max_length=1100, progress=False,
        )  # fmt: skip
    out = tmp_path / "compared"
    assert main(["compare", *map(str, folders), "--out", str(out), "--bootstrap", "200"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("> **LIMITED RUN") and "SAME WEIGHTS" not in printed and "PACKAGES" not in printed
    content = json.loads((out / "comparison.json").read_text())
    assert [row["row"] for row in content["rows"]] == ["arc_challenge", "gsm8k"]
    assert [row["items"] for row in content["rows"]] == [4, 4]
    for row, side in ((row, side) for row in content["rows"] for side in (0, 1)):
        measured = json.loads((folders[side] / row["row"] / "result.json").read_text())
        assert row[("first", "second")[side]] == pytest.approx(measured["score"]["value"])
        assert content["models"][side] == measured["model"]


@pytest.mark.parametrize(
    ("facts", "mark"),
    [({"limit": 5}, "LIMITED RUN"), ({"suite": "sample"}, "SAMPLE ITEMS"), ({}, None)],
    ids=("limit", "sample", "full"),
)
def test_the_command_writes_table_data_and_figure_with_their_marks(folders, facts, mark, capsys, tmp_path):
    for folder, value in zip(folders, (0.0, 1.0), strict=True):
        write_row(folder, "humaneval", [("t", None, value)] * 8 + [("t", None, 1.0)] * 3, **facts)
    out = tmp_path / "out"
    assert main(["compare", *map(str, folders), "--out", str(out), "--bootstrap", "200", "--seed", "7"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == (out / "comparison.md").read_text().strip() == as_markdown(compare(*folders)).strip()
    assert "| HUMANEVAL | 11 | 27.27 | 100.00 | +72.73 |" in printed and "| 8 | 0 | +3.1 |" in printed
    content = json.loads((out / "comparison.json").read_text())
    assert content["rows"][0]["wins"] == 8
    assert (out / "forest.png").read_bytes().startswith(PNG)
    assert printed.startswith(f"> **{mark}") if mark else "**" not in printed
    assert bool(content["marks"]) == bool(mark)


def write_models(tmp_path, *accuracies, items=211, rows=("mmlu", "gsm8k")):
    folders = [tmp_path / f"model-{number}" for number in range(len(accuracies))]
    for folder, accuracy in zip(folders, accuracies, strict=True):
        for place, row in enumerate(rows):
            draws = np.random.default_rng(place).random(items)
            write_row(folder, row, [("t", None, float(draw < accuracy)) for draw in draws])
    return folders


def test_several_evaluations_become_a_matrix_whose_pairs_are_those_of_two(tmp_path):
    folders = write_models(tmp_path, 0.5, 0.52, 0.7)
    write_row(folders[1], "math", [("t", None, 1.0)] * 3)

    matrix = compare_all(folders)

    assert [(pair.first, pair.second) for pair in matrix.pairs] == [
        (str(folders[one]), str(folders[other])) for one, other in ((0, 1), (0, 2), (1, 2))
    ]
    assert matrix.left_out == ["math"]
    p_values = [row.p for pair in matrix.pairs for row in pair.rows]
    assert [row.p_holm for pair in matrix.pairs for row in pair.rows] == statistics.holm(p_values)
    for pair in matrix.pairs:
        alone = compare(pair.first, pair.second, rows=["mmlu", "gsm8k"])
        assert [replace(row, p_holm=0) for row in alone.rows] == [replace(row, p_holm=0) for row in pair.rows]


def test_several_evaluations_are_shown_with_where_a_model_is_clearly_better(tmp_path):
    folders = write_models(tmp_path, 0.5, 0.5, 0.7)
    text = matrix_as_markdown(compare_all(folders, equivalence=5))
    assert text.count("| 2 minus 1 | +0.00 | 0 | 0 | 2 |") == 1
    (mean,) = {re.search(rf"\| {pair} \| \+(\S+) \| 2 \| 0 \| 0 \|", text)[1] for pair in ("3 minus 1", "3 minus 2")}
    assert float(mean) > 10


def test_sameness_is_shown_or_not_per_row_and_for_all(tmp_path):
    folders = write_models(tmp_path, 0.5, 0.5, items=164)
    same = compare(*folders, equivalence=2)
    assert all(row.equivalent and row.p_equivalence < 0.05 for row in same.rows)
    assert "All rows: yes" in as_markdown(same) and "Tango" in as_markdown(same)
    narrow = compare(*folders, equivalence=1)
    assert not any(row.equivalent for row in narrow.rows)
    assert "All rows: not shown" in as_markdown(narrow)
    without = compare(*folders)
    assert [row.p_equivalence for row in without.rows] == [None, None] and "Same within" not in as_markdown(without)


def test_the_command_takes_any_number_of_folders(tmp_path, capsys):
    folders = write_models(tmp_path, 0.5, 0.5, 0.7)
    assert main(["compare", *map(str, folders), "--equivalence", "5", "--out", str(tmp_path / "out")]) == 0
    assert "## 3 minus 2" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"comparison.json", "comparison.md", "forest-2.png", "forest-3.png"}
    assert (tmp_path / "out" / "forest-3.png").read_bytes().startswith(PNG)
    assert len(json.loads((tmp_path / "out" / "comparison.json").read_text())["pairs"]) == 3


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (1, [], "at least two folders, got 1"),
        (2, ["--equivalence", "0"], "--equivalence must be a margin above 0 and below 100 points, got 0"),
        (3, ["--equivalence", "nan"], "got nan"),
    ],
)
def test_a_mistake_in_the_folders_or_the_margin_is_one_line(tmp_path, capsys, count, options, message):
    folders = write_models(tmp_path, *[0.5] * count)
    assert main(["compare", *map(str, folders), *options, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
