"""Tests `attnres inspect`: the files it writes, and its messages when something is wrong."""

import io
import json
import os
import sys
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from families import tiny_config
from tiny_inspect import TEXT, made_up, save_checkpoint, tiny_model
from transformers import AutoModelForCausalLM

from attnres import cli, plots
from attnres.analysis import DepthWeights
from attnres.analysis.inspection import as_markdown, named, panels


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A block and a full model, beside a text."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_checkpoint(folder / "blocky", "block")
    save_checkpoint(folder / "fully", "full")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def error_of(capsys, *arguments) -> str:
    """The single line on stderr of a command that ends with status 2."""
    status = cli.main(["inspect", *map(str, arguments)])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("attnres: ")]
    assert status == 2 and captured.out == "" and len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


def test_two_models_give_numbers_figure_and_page(checkpoints, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    models = [str(checkpoints / "blocky"), str(checkpoints / "fully")]
    assert cli.main(["inspect", *models, "--text", str(checkpoints / "text.txt"), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert sorted(path.name for path in out.iterdir()) == [
        "depth-weights-2.json",
        "depth-weights.html",
        "depth-weights.json",
        "depth-weights.png",
    ]
    block, full = (DepthWeights.load(out / f"depth-weights{suffix}.json") for suffix in ("", "-2"))
    assert (block.residual_mode, full.residual_mode) == ("block", "full")
    assert (block.model, full.model, block.text) == ("blocky", "fully", "text.txt")
    assert "# blocky" in said.out and "# fully" in said.out and "before MLP" in said.out
    assert "wrote depth-weights.json, depth-weights-2.json, depth-weights.png, depth-weights.html" in said.err
    page = (out / "depth-weights.html").read_text(encoding="utf-8")
    assert "blocky" in page and "fully" in page
    for path in out.iterdir():
        assert str(checkpoints).encode() not in path.read_bytes()  # nothing of this machine


def test_options_reach_the_measurement_and_a_byte_order_mark_is_no_part_of_the_text(checkpoints, tmp_path):
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    options = ["--max-tokens", "50", "--tokens", "7", "--context", "16", "--dtype", "bfloat16", "--device", "cpu"]
    arguments = [str(checkpoints / "blocky"), "--text", str(tmp_path / "text"), "--out", str(tmp_path)]
    assert cli.main(["inspect", *arguments, *options]) == 0
    weights = DepthWeights.load(tmp_path / "depth-weights.json")
    assert (weights.num_tokens, len(weights.tokens), weights.context) == (50, 7, 16)
    assert weights.tokens[0].text == "T"


def test_standard_input_serves_several_models(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(TEXT.encode())))
    models = [str(checkpoints / "blocky"), str(checkpoints / "fully")]
    assert cli.main(["inspect", *models, "--text", "-", "--out", str(tmp_path)]) == 0
    first, second = (DepthWeights.load(tmp_path / f"depth-weights{suffix}.json") for suffix in ("", "-2"))
    assert first.num_tokens == second.num_tokens > 100
    assert first.text == "standard input"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "text: a mean and its spread need at least 2 tokens, got 0"),
        (b"a", "text: a mean and its spread need at least 2 tokens, got 1"),
        (b"\x89PNG\r\n\x1a\n\xff", "text: not UTF-8 text"),
        (b"ELF\0\0\0", "text: contains NUL characters"),
        (None, "No such file"),
    ],
    ids=["empty", "one-token", "binary", "nul", "missing"],
)
def test_a_text_that_is_none_is_one_line_and_leaves_nothing(checkpoints, tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    out = tmp_path / "out"
    assert message in error_of(capsys, checkpoints / "blocky", "--text", tmp_path / "text", "--out", out)
    assert not out.exists()


def make_plain(folder):
    AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=2)).save_pretrained(folder)


def make_standard(folder):
    save_checkpoint(folder, "standard")


def make_kimi_k3(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "kimi_linear", "attn_res_block_size": 12}))


def make_without_tokenizer(folder):
    tiny_model().save_pretrained(folder)


def make_without_weights(folder):
    save_checkpoint(folder)
    (folder / "model.safetensors").unlink()


def make_pickled(folder):
    make_without_weights(folder)
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")


def make_empty(folder):
    folder.mkdir()


def make_broken(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{")


def make_nested(folder):
    folder.mkdir()
    (folder / "config.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_plain, "model: model_type must be 'attnres', got 'llama'"),
        (make_standard, 'model: depth weights need residual_mode "block" or "full"'),
        (
            make_kimi_k3,
            "model: model_type must be 'attnres', got 'kimi_linear'; inspect the result of `attnres convert`",
        ),
        (make_without_tokenizer, "model: no tokenizer can be loaded"),
        (make_without_weights, "model: cannot be loaded"),
        (make_pickled, "model: cannot be loaded"),
        (make_empty, "model: no folder with a valid config.json"),
        (make_broken, "model: no folder with a valid config.json"),
        (make_nested, "model: no folder with a valid config.json"),
        (lambda folder: None, "model: no such folder"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_model_without_depth_weights_is_one_line_and_leaves_nothing(checkpoints, tmp_path, capsys, make, message):
    make(tmp_path / "model")
    out = tmp_path / "out"
    capsys.readouterr()
    assert message in error_of(capsys, tmp_path / "model", "--text", checkpoints / "text.txt", "--out", out)
    assert not out.exists()


def test_all_models_are_checked_before_the_first_is_read(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("attnres.analysis.inspection.depth_weights", None)
    make_plain(tmp_path / "plain")
    models = [checkpoints / "blocky", tmp_path / "plain"]
    assert "plain: model_type" in error_of(capsys, *models, "--text", checkpoints / "text.txt", "--out", tmp_path / "o")


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--device", "abacus"], "--device abacus: torch cannot use it"), (["--context", "65"], "got 65")],
    ids=["device", "context"],
)
def test_a_bad_option_is_one_line(checkpoints, tmp_path, capsys, options, message):
    arguments = [checkpoints / "blocky", "--text", checkpoints / "text.txt", "--out", tmp_path / "out"]
    assert message in error_of(capsys, *arguments, *options)


def test_a_file_in_the_place_of_the_folder_is_one_line(checkpoints, tmp_path, capsys):
    (tmp_path / "out").touch()
    arguments = [checkpoints / "blocky", "--text", checkpoints / "text.txt", "--out", tmp_path / "out"]
    assert "is a file, not a folder; choose another place" in error_of(capsys, *arguments)


def test_names_tell_nothing_of_the_machine(tmp_path):
    for name in ("a/model", "b/model"):
        (tmp_path / name).mkdir(parents=True)
    given = [os.fspath(tmp_path / "a/model"), os.fspath(tmp_path / "b/model") + "/", "org/model"]
    assert list(named(given, [1, 2, 3])) == ["model", "model (2)", "org/model"]


def test_the_terminal_shows_the_summary_numbers():
    table = as_markdown(made_up(2))
    assert "| before MLP | 0.500 | 0.312 |" in table
    assert table.endswith(
        "A source is ignored: mean weight below 0.1/n, n the number of sources that the mixture sees.\n"
    )


@pytest.mark.parametrize("num_layers", [1, 24])
def test_the_figure_leaves_a_margin_at_every_depth(tmp_path, num_layers):
    models = [panels(made_up(num_layers, f"$ _{mode}", mode)) for mode in ("block", "full")]
    plots.depth_panels(tmp_path / "panels.png", models)
    image = matplotlib.image.imread(tmp_path / "panels.png")[..., :3]
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (border == 1).all()  # nothing is cut off
    yellow = np.array([0xFE, 0xE8, 0x38]) / 255
    assert (np.abs(image - yellow).max(-1) < 0.02).sum() > 100  # the weight of a source that is alone is 1


def test_the_figure_refuses_what_does_not_fit_its_labels(tmp_path):
    with pytest.raises(ValueError, match="could not broadcast"):
        plots.depth_panels(tmp_path / "x.png", [panels(made_up(2)) | {"columns": ["emb"]}])
    assert not list(tmp_path.iterdir())


def test_a_name_that_does_not_print_is_shown_as_its_code():
    assert list(named(["a\n\x1b[31m\udcff", "模"], [1, 2])) == ["a\\n\\x1b[31m\\udcff", "模"]
