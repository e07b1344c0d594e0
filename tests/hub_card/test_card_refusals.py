"""What never becomes a card: results of something else, placeholders, and folders that are no AttnRes checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_card import save_checkpoint
from tiny_eval import byte_tokenizer, tiny_llama

from attnres import cli
from attnres.eval.identity import checkpoint_identity
from attnres.hub_card import build
from attnres.hub_card import folder as hub_folder


def refused(source, out, *results, match: str, error=ValueError, **options):
    """Builds without loading the model, and sees that nothing is left."""
    with pytest.raises(error, match=match) as caught:
        build(source, out, results, execute_snippets=False, **options)
    assert "\n" not in str(caught.value)
    assert not out.exists() and not list(out.parent.glob(".*.partial"))


def edited(results, tmp_path, row: str, **changes):
    """A copy of results in which one row's file says something else."""
    copy = tmp_path / "edited"
    shutil.copytree(results, copy)
    path = copy / row / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return copy


@pytest.mark.parametrize("limit", [2, 0.5])
def test_limited_results_are_refused(checkpoint, measure, limit, tmp_path):
    refused(checkpoint, tmp_path / "hub", measure("gsm8k", limit=limit), match=r"gsm8k: was run with --limit")


@pytest.mark.parametrize("changes", [{"limit": None}, {"settings": {}}], ids=lambda changes: next(iter(changes)))
def test_a_limit_that_was_taken_out_in_one_place_is_found(checkpoint, measure, changes, tmp_path):
    results = edited(measure("gsm8k", limit=2), tmp_path, "gsm8k", **changes)
    refused(checkpoint, tmp_path / "hub", results, match=r"gsm8k: was run with --limit")


def test_results_of_other_weights_are_refused(checkpoint, measure, tmp_path):
    other = save_checkpoint(tmp_path / "other", seed=1)
    results = measure("gsm8k", checkpoint_identity(other))
    refused(checkpoint, tmp_path / "hub", results, match=r"gsm8k: was measured with other weights than .*SHA-256")


def test_results_with_another_tokenizer_are_refused(checkpoint, measure, tmp_path):
    results = measure("gsm8k", {**checkpoint_identity(checkpoint), "tokenizer": "0" * 64})
    refused(checkpoint, tmp_path / "hub", results, match="another tokenizer")


def test_results_under_another_configuration_are_refused(source, measure, tmp_path):
    """The same weights with another block size are another model."""
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "layers_per_block": 3}))
    refused(source, tmp_path / "hub", measure("gsm8k"), match="configuration or code")


def test_weights_of_a_model_in_memory_are_other_weights(checkpoint, measure, tmp_path):
    refused(checkpoint, tmp_path / "hub", measure("gsm8k", {"weights": "a"}), match="other weights")


def test_a_row_may_not_come_twice(checkpoint, results, measure, tmp_path):
    refused(checkpoint, tmp_path / "hub", results, measure("gsm8k"), match="has the row gsm8k too")


def test_changed_samples_are_refused(checkpoint, measure, tmp_path):
    results = measure("gsm8k")
    with (results / "gsm8k" / "samples.jsonl").open("a") as file:
        file.write("{}\n")
    refused(checkpoint, tmp_path / "hub", results, match="not the samples")


@pytest.mark.parametrize(
    ("content", "match"), [("{", "not valid JSON"), ("[]", "not a result"), ('{"row": "gsm8k"}', "lacks title")]
)
def test_damaged_results_are_refused(checkpoint, results, content, match, tmp_path):
    copy = edited(results, tmp_path, "gsm8k")
    (copy / "gsm8k" / "result.json").write_text(content)
    refused(checkpoint, tmp_path / "hub", copy, match=match)


def test_a_folder_without_results_is_refused(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(checkpoint, tmp_path / "hub", tmp_path / "empty", match="empty: holds no results of `attnres eval`")


def test_plain_checkpoints_are_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "plain")
    refused(tmp_path / "plain", tmp_path / "hub", match="prenorm checkpoint, but a card needs an AttnRes one")


def test_a_missing_tokenizer_is_named(source, tmp_path):
    for path in source.glob("*token*"):
        path.unlink()
    refused(source, tmp_path / "hub", match="has no tokenizer")


def test_a_damaged_checkpoint_is_named(source, tmp_path):
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-5])
    refused(source, tmp_path / "hub", match="not a complete safetensors file")


@pytest.mark.parametrize("place", ["", "inside", ".."])
def test_the_result_is_never_the_checkpoint(checkpoint, place, tmp_path):
    before = sorted(checkpoint.iterdir())
    with pytest.raises(ValueError, match="must be a different folder from"):
        build(checkpoint, checkpoint / place, execute_snippets=False, overwrite=True)
    assert sorted(checkpoint.iterdir()) == before


def test_code_that_needs_the_package_is_never_published(checkpoint, monkeypatch, tmp_path):
    write_code = hub_folder.write_code

    def leaning(config, folder):
        write_code(config, folder)
        with (folder / "depth_mixer.py").open("a") as file:
            file.write("\nfrom attnres import AttnResConfig\n")

    monkeypatch.setattr(hub_folder, "write_code", leaning)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # as if it were installed
    with pytest.raises(ValueError, match="usage snippets fail on the new folder .*No module named 'attnres'"):
        build(checkpoint, tmp_path / "hub")
    assert not list(tmp_path.iterdir())


def test_a_text_that_is_not_there_is_one_line(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="no such text file"):
        build(checkpoint, tmp_path / "hub", text=tmp_path / "text")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--license", "Apache 2"], "license must be an identifier"),
        (["--language", "English!"], "language must be codes"),
        (["--base-model", "../secret"], "Repo id"),
        (["--push", "a/b/c", "--yes"], "Repo id"),
        (["--results", "nowhere"], "nowhere: no such folder of results"),
        (["--public"], "name a repository with --push"),
    ],
)
def test_bad_options_are_one_line_and_status_2(checkpoint, options, message, capsys, tmp_path):
    arguments = ["card", str(checkpoint), "--out", str(tmp_path / "hub"), "--no-run", *options]
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("attnres: error: ") and message in said[-1]
    assert not (tmp_path / "hub").exists()


def test_a_plain_checkpoint_is_one_line_and_status_2(capsys, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "plain")
    byte_tokenizer(eos_token="<end>").save_pretrained(tmp_path / "plain")
    capsys.readouterr()
    assert cli.main(["card", str(tmp_path / "plain"), "--out", str(tmp_path / "hub")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("kind", ["current", "home"])
@pytest.mark.parametrize("place", [".", "below"])
def test_no_folder_that_the_user_stands_or_lives_in_is_replaced(checkpoint, tmp_path, monkeypatch, kind, place):
    out = tmp_path / "project"
    (out / "below").mkdir(parents=True)
    if kind == "current":
        monkeypatch.chdir(out / place)
    else:
        monkeypatch.setattr(Path, "home", lambda: out / place)
    with pytest.raises(FileExistsError, match=f"is or holds the {kind} folder"):
        build(checkpoint, out, execute_snippets=False, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["below"]


def test_a_file_in_the_place_of_results_is_named(checkpoint, tmp_path):
    (tmp_path / "results").touch()
    refused(checkpoint, tmp_path / "hub", tmp_path / "results", match="results: no such folder of results")


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("license: 'mit <script>'", "README.md: license must be an identifier of the Hub .*--license sets it"),
        ('license: "mit\\nevil: 1"', "README.md: license must be an identifier of the Hub"),
        ("base_model: '](x) y'\ntags: [attention-residuals]", "base model must be a hub id .*--base-model sets it"),
        ("a: " + "[" * 3000, "README.md: its front matter is not valid YAML"),
    ],
    ids=["license", "license of two lines", "base model", "nested"],
)
def test_a_card_that_states_nonsense_is_named(source, tmp_path, card, message):
    (source / "README.md").write_text(f"---\n{card}\n---\n")
    refused(source, tmp_path / "hub", match=message)
