"""Errors name a folder that cannot be written in one line, before the work starts."""

import os

import pytest
from families import tiny_config
from transformers import AutoModelForCausalLM

from attnres.cli import main
from attnres.folders import check_writable


@pytest.fixture
def plain(tmp_path):
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize(
    "command",
    [
        "convert {model} {out}",
        "demo --quick --out {out}",
        "bench --quick --out {out}",
        "train {model} --data {model} --out {out}",
    ],
    ids=lambda command: command.split()[0],
)
def test_a_file_where_a_folder_is_needed_is_one_line_and_status_2(command, plain, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    capsys.readouterr()
    assert main(command.format(model=plain, out=tmp_path / "file" / "out").split()) == 2
    captured = capsys.readouterr()
    assert not captured.out and captured.err.count("\n") == 1
    assert f"cannot be written, because {tmp_path / 'file'} is a file, not a folder; choose another" in captured.err
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "folder")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(OSError, match=f"no permission to write to {tmp_path}; choose another place$"):
        check_writable(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
