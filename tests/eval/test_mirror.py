"""Tests the local mirror of the hub: how it is read, and the messages when something is missing or damaged."""

import datasets
import evaluate as hf_evaluate
import pytest
from tiny_eval import Scripted, arc_item, gpqa_item, gsm8k_item, write_data_set

from attnres.eval import evaluate, fetch, mirror
from attnres.eval.mirror import Mirror, MissingData, serving_code_eval
from attnres.eval.suites import ROWS


def test_splits_are_read_as_the_front_matter_says(mirror_root):
    data = Mirror(mirror_root).load("openai/gsm8k", "main")
    assert {split: len(part) for split, part in data.items()} == {"train": 30, "test": 5}
    assert data["test"][0] == gsm8k_item(100)


@pytest.mark.parametrize("name", [None, "main"])
def test_one_config_needs_no_name(mirror_root, name):
    assert set(Mirror(mirror_root).load("openai/gsm8k", name)) == {"train", "test"}


def test_missing_data_set_is_named_with_the_folder_that_is_expected(tmp_path):
    with pytest.raises(MissingData, match=f"cais/mmlu is not in .* expected the folder {tmp_path / 'cais' / 'mmlu'}"):
        Mirror(tmp_path).load("cais/mmlu", "anatomy")


def test_missing_config_is_named(mirror_root):
    with pytest.raises(MissingData, match="openai/gsm8k has no config 'socratic'"):
        Mirror(mirror_root).load("openai/gsm8k", "socratic")


def card(data_files: str) -> str:
    return f"---\nconfigs:\n- config_name: main\n  data_files: {data_files}\n---\n"


DAMAGED = {
    "none": (
        None,
        "README.md: cannot be read .FileNotFoundError.*; its front matter must be YAML with a list of configs",
    ),
    "empty": ("no front matter", "README.md: cannot be read"),
    "yaml": ("---\nconfigs: [\n---\n", "README.md: cannot be read .ParserError"),
    "no-configs": ("---\nconfigs: [5]\n---\n", "README.md: cannot be read .ValueError: it has no configs"),
    "no-files": (card("null"), "must be paths in its folder, or a list of split and path; got None"),
    "gone": (card("gone.jsonl"), "gone.jsonl is missing"),
    "damaged": (card("bad.jsonl"), "bad.jsonl: cannot be read"),
    "format": (card("odd.zip"), "data files must be"),
    "number": (card("{test: 5}"), "list of split and path; got {'test'"),
    "numbers": (card("{test: [x, 5]}"), "list of split and path; got .*5"),
    "absolute": (card("/x.jsonl"), "must be paths in its folder"),
    "outside": (card("../name/values.jsonl"), "must be paths in its folder"),
    "binary": (b"---\nconfigs: \xff\n---\n", "README.md: cannot be read .UnicodeDecodeError.*position 13"),
    "values": (card("values.jsonl"), "values.jsonl: cannot be read"),
}


@pytest.mark.parametrize(("readme", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_data_set_is_one_clear_line(tmp_path, readme, message):
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "bad.jsonl").write_text('{"a": 1}\n{"a": ')
    (folder / "odd.zip").touch()
    (folder / "values.jsonl").write_text("5\n6\n")
    if readme is not None:
        (folder / "README.md").write_bytes(readme if isinstance(readme, bytes) else readme.encode())
    with pytest.raises(MissingData, match=message) as error:
        Mirror(tmp_path).load("org/name", "main")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": range(30)}, r"the task gsm8k cannot read its items \(KeyError: .*test.*; compare splits"),
        ({"train": range(30), "test": []}, r"the task gsm8k cannot read its items \(IndexError"),
        (
            {"train": range(3), "test": range(2)},
            "the task gsm8k shows 8 examples, which needs at least 8 items in the split 'train'; it has 3",
        ),
        ({"train": range(30), "test": None}, r"the task gsm8k cannot read its items \(UndefinedError: 'question'"),
    ],
    ids=["split", "no-items", "shots", "field"],
)
def test_items_that_a_task_cannot_read_are_one_line_that_names_them(tmp_path, splits, message):
    items = {
        split: [{"x": 1}] if numbers is None else [gsm8k_item(number) for number in numbers]
        for split, numbers in splits.items()
    }
    write_data_set(tmp_path, "openai/gsm8k", "main", items)
    with pytest.raises(MissingData, match=f"gsm8k: openai/gsm8k, config 'main' {tmp_path}/openai/gsm8k.*{message}"):
        evaluate(suite="gsm8k", lm=Scripted(), out=tmp_path / "out", data_dir=tmp_path, progress=False)


def test_an_example_more_is_needed_where_the_question_is_left_out(tmp_path):
    write_data_set(tmp_path, "Idavidrein/gpqa", "gpqa_diamond", {"train": [gpqa_item(number) for number in range(5)]})
    with pytest.raises(MissingData, match="shows 5 examples, which needs at least 6 items in the split 'train'"):
        evaluate(suite="gpqa_diamond", lm=Scripted(), out=tmp_path / "out", data_dir=tmp_path, progress=False)


def test_an_item_without_a_field_fails_its_row_and_not_the_others(tmp_path):
    arc, gsm8k = [arc_item(number) for number in range(30)], [gsm8k_item(number) for number in range(30)]
    odd = {**arc_item(2), "choices": None}
    write_data_set(
        tmp_path, "allenai/ai2_arc", "ARC-Challenge", {"train": arc, "validation": arc, "test": [arc[0], odd]}
    )
    write_data_set(tmp_path, "openai/gsm8k", "main", {"train": gsm8k, "test": gsm8k[:1]})
    options = {"out": tmp_path / "out", "data_dir": tmp_path, "progress": False}
    outcome = evaluate(suite="arc_challenge,gsm8k", lm=Scripted(), **options)
    assert list(outcome["rows"]) == ["gsm8k"]
    assert outcome["failed"] == {"arc_challenge": "UndefinedError: 'None' has no attribute 'text'"}


def test_front_matter_is_read_once_in_a_run(mirror_root, monkeypatch):
    data, read = Mirror(mirror_root), []
    front_matter = mirror._front_matter
    monkeypatch.setattr(mirror, "_front_matter", lambda readme: read.append(readme) or front_matter(readme))
    for _ in range(3):
        data.load("openai/gsm8k", "main")
        data.digest("openai/gsm8k", "main")
    assert read == [mirror_root / "openai/gsm8k/README.md"]


@pytest.mark.parametrize("suffix", ["parquet", "csv", "json"])
def test_other_formats_of_the_hub_are_read(tmp_path, suffix):
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    data = datasets.Dataset.from_dict({"text": ["a, b", "c"], "number": ["1", "2"]})
    if suffix == "json":
        (folder / "x.json").write_text('[{"text": "a, b", "number": "1"}, {"text": "c", "number": "2"}]')
    else:
        getattr(data, f"to_{suffix}")(folder / f"x.{suffix}")
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: c\n  data_files:\n    test: x.{suffix}\n---\n")
    assert Mirror(tmp_path).load("org/name")["test"].to_list() == data.to_list()


def test_line_separators_inside_a_text_do_not_end_the_line(tmp_path):
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "x.jsonl").write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: c\n  data_files: x.jsonl\n---\n")
    assert Mirror(tmp_path).load("org/name")["train"]["text"] == ["a\u2028b"]


def test_digest_follows_the_items(tmp_path):
    items = [gsm8k_item(number) for number in range(3)]
    for place, changed in (("a", items), ("b", items), ("c", items[::-1])):
        write_data_set(tmp_path / place, "openai/gsm8k", "main", {"test": changed})
    first, second, third = (Mirror(tmp_path / place).digest("openai/gsm8k", "main") for place in "abc")
    assert first == second != third


def test_code_eval_is_ours_in_the_block_even_if_it_fails():
    before = hf_evaluate.load
    with pytest.raises(RuntimeError), serving_code_eval("sandbox"):
        assert hf_evaluate.load("code_eval") == "sandbox"
        raise RuntimeError
    assert hf_evaluate.load == before


def hub(failures: dict):
    """Returns a stand-in for `datasets.load_dataset` on a machine with a network."""

    def load(repository, name=None, revision=None):
        if repository in failures and revision is None:
            raise failures[repository]
        return {"test": datasets.Dataset.from_list([{"question": f"{name}?"}])}

    return load


def test_fetched_mirror_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", hub({}))
    assert fetch.fetch([ROWS["gsm8k"], ROWS["mgsm"]], tmp_path) == {}
    assert Mirror(tmp_path).load("juletxara/mgsm", "sw")["test"][0] == {"question": "sw?"}
    monkeypatch.setattr(datasets, "load_dataset", None)  # what is there is not fetched again
    assert fetch.fetch([ROWS["gsm8k"]], tmp_path) == {}


def test_fetch_takes_the_hubs_conversion_of_a_loading_script_and_says_so(tmp_path, monkeypatch, capsys):
    script = RuntimeError("Dataset scripts are no longer supported, but found mgsm.py")
    monkeypatch.setattr(datasets, "load_dataset", hub({"juletxara/mgsm": script}))
    assert fetch.fetch([ROWS["mgsm"]], tmp_path) == {}
    assert "juletxara/mgsm: 11 configs, converted from a loading script" in capsys.readouterr().err


def test_gated_data_set_is_said_and_does_not_stop_the_others(tmp_path, monkeypatch):
    gated = datasets.exceptions.DatasetNotFoundError("Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub.")
    monkeypatch.setattr(datasets, "load_dataset", hub({"Idavidrein/gpqa": gated}))
    missing = fetch.fetch([ROWS["gpqa_diamond"], ROWS["gsm8k"]], tmp_path)
    assert list(missing) == ["Idavidrein/gpqa"] and "is a gated dataset" in missing["Idavidrein/gpqa"]
    assert Mirror(tmp_path).load("openai/gsm8k", "main") and not (tmp_path / "Idavidrein" / "gpqa").exists()
