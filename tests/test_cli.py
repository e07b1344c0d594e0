"""The command line: help, versions, and what users see when something is wrong."""

import subprocess
import sys

import pytest

import attnres
import attnres.demo
from attnres import cli


def error_of(capsys, *arguments: str) -> str:
    """The single line on stderr of a command that ends with status 2."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("attnres: error: ")
    return captured.err


def test_the_module_is_the_command():
    result = subprocess.run([sys.executable, "-m", "attnres", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"attnres {attnres.__version__}\n"


def test_help_of_demo_shows_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--help"])
    assert stop.value.code == 0
    text = "".join(capsys.readouterr().out.split())
    assert "(default:demo-out)" in text and "(default:0)" in text and "minutes" in text


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["demo", "--seed", "-1"], ["demo", "--seed", "x"]], ids=" ".join
)
def test_bad_arguments_exit_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_a_folder_in_use_is_one_line(tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    assert "was not made by attnres demo" in error_of(capsys, "demo", "--out", str(tmp_path), "--overwrite")


def test_a_missing_package_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "lm_eval" else object())
    error = error_of(capsys, "demo")
    assert "lm_eval" in error and "matplotlib" not in error and "pip install 'attnres[eval]'" in error


@pytest.mark.parametrize("error", [ValueError("two\nlines"), OSError("two lines")], ids=["value", "os"])
def test_user_errors_have_no_traceback(error, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(attnres.demo, "run", fail)
    assert error_of(capsys, "demo") == "attnres: error: two lines\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(attnres.demo, "run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["demo"])


def test_interruption_exits_with_status_130(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(attnres.demo, "run", interrupt)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "attnres: interrupted\n"
