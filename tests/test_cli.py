"""The command line: help, versions, and what users see when something is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import random_attnres

import attnres
import attnres.demo
from attnres import cli


def error_of(capsys, *arguments: str) -> str:
    """Returns the single line on stderr of a command that ends with status 2."""
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
    assert "[default:demo-out]" in text and "[default:0;" in text and "minutes" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "Missing command"),
        ("nonsense", "'nonsense'"),
        ("eval --nonsense", "--nonsense"),
        ("demo --seed -1", "'--seed': -1 is not in the range 0<=x<=4294967295"),
        ("compare a b --seed x", "'--seed': 'x' is not a valid integer"),
        ("eval m --batch-size many", "'--batch-size': must be a whole number of at least 1, or auto, got many"),
        ("eval m --batch-size 0", "at least 1, or auto, got 0"),
        ("eval m --max-length 0", "'--max-length': 0 is not in the range x>=1"),
        ("eval m --limit 0", "'--limit': must be a whole number of items, or a share between 0 and 1, got 0"),
        ("eval m --limit 1.5", "got 1.5"),
        ("eval m --limit inf", "got inf"),
        ("eval m --limit few", "got few"),
        ("bench --tokens 8,0", "'--tokens': must be whole numbers of at least 1, joined by commas, got 8,0"),
        ("bench --num-blocks 2 --layers-per-block 2", "--num-blocks and --layers-per-block exclude each other"),
        ("bench --depth-shape 1,2,3", "'--depth-shape': must be four whole numbers of at least 1: L,S,T,D, got 1,2,3"),
        ("bench pipeline", "Got unexpected extra argument (pipeline)"),
        ("inspect m --text t --ablate 1", "'--ablate': 1 is not in the range x>=2"),
        ("card", "Missing argument 'MODEL'"),
        ("card m --results", "'--results' requires an argument"),
        ("convert a b --depth-variant --link", "'--depth-variant' requires an argument"),
        ("bench --out --quick", "'--out' requires an argument"),
        ("card m --results --link", "'--results' requires an argument"),
        ("eval m --dtype int8", "'--dtype': 'int8' is not one of 'auto'"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments.split())
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.err.startswith("attnres") and ": error: " in said.err and message in said.err
    assert said.err.count("\n") == 1 and "--help" in said.err and not said.out


def test_an_option_for_several_values_takes_all_up_to_the_next_option(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr("attnres.hub_card.build", lambda *places, **options: asked.update(options, places=places))
    command = [
        "card",
        str(tmp_path),
        "--results",
        "a",
        "b",
        "--link",
        "--language",
        "en",
        "--results=c",
        "--language",
        "zh",
        "de",
    ]
    assert cli.main(command) == 0
    assert asked["places"] == (tmp_path, "card-out", ["a", "b", "c"])
    assert asked["language"] == ["en", "zh", "de"] and asked["link"] and asked["dynamics"] == []


@pytest.mark.parametrize(("words", "tokens"), [([], None), (["--ablate"], 512), (["--ablate", "20"], 20)])
def test_the_number_of_an_ablation_may_be_left_out(words, tokens, monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr("attnres.analysis.inspection.inspect", lambda *_, **options: asked.update(options) or ([], []))
    assert cli.main(["inspect", str(tmp_path), *words, "--text", "t"]) == 0
    assert asked["ablation_tokens"] == tokens


@pytest.mark.parametrize(("given", "limit"), [("5", 5), ("1", 1), ("0.25", 0.25), ("1e3", 1000)])
def test_a_limit_is_a_number_of_items_or_a_share(given, limit, monkeypatch):
    asked = {}
    outcome = {"writes": False, "failed": {}}
    monkeypatch.setattr("attnres.eval.evaluate", lambda *_, **options: asked.update(options) or outcome)
    assert cli.main(["eval", "m", "--limit", given]) == 0
    assert asked["limit"] == limit and type(asked["limit"]) is type(limit)


@pytest.mark.parametrize("arguments", [["eval", "--help"], ["inspect-checkpoint", "model"]], ids=" ".join)
def test_a_reader_that_has_gone_ends_the_command_silently(arguments, tmp_path):
    if "model" in arguments:
        random_attnres("llama").save_pretrained(tmp_path / "model")
        arguments = [arguments[0], str(tmp_path / "model")]
    # Buffered, as it is unless the environment says otherwise: then the failure waits for the last flush.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as gone:
        result = subprocess.run(
            [sys.executable, "-m", "attnres", *arguments],
            stdout=gone,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
    assert result.returncode == 141 and result.stderr == ""


def test_a_folder_in_use_is_one_line(tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    assert f"{tmp_path}: is not empty; --overwrite replaces it" in error_of(capsys, "demo", "--out", str(tmp_path))


def test_a_missing_package_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr("attnres.cli.process.find_spec", lambda name: None if name == "lm_eval" else object())
    error = error_of(capsys, "demo")
    assert "lm_eval" in error and "matplotlib" not in error and "pip install 'attention-residuals[eval]'" in error


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


@pytest.mark.parametrize(
    ("how", "arguments"),
    [
        (["-m", "attnres"], "--help"),
        (["-mattnres"], "convert --help"),
        (["-Im", "attnres"], "--help"),
        ([Path(sys.executable).with_name("attnres")], "bench --help"),
    ],
    ids=["module", "one word", "isolated", "script"],
)
def test_help_imports_neither_torch_nor_transformers(how, arguments):
    script = [sys.executable, "-X", "importtime", *how, *arguments.split()]
    done = subprocess.run(script, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 0 and "attnres.cli" in imported
    assert not imported & {"torch", "transformers", "numpy", "huggingface_hub"}


def test_in_the_command_too_whoever_asks_for_a_class_gets_a_registered_one():
    code = (
        "import sys; sys.argv = ['attnres']; import attnres; assert 'torch' not in sys.modules\n"
        "from attnres import AttnResForCausalLM\n"
        "from transformers import AutoModelForCausalLM\n"
        "assert any(c is AttnResForCausalLM for c in AutoModelForCausalLM._model_mapping.values())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]


def test_a_name_that_the_package_does_not_have_is_an_attribute_error():
    import attnres

    with pytest.raises(AttributeError, match="module 'attnres' has no attribute 'Nothing'"):
        attnres.Nothing  # noqa: B018
