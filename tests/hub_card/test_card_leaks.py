"""No token and no path of the machine ends up in a folder: planted ones are found, wherever they are."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attnres.hub_card import build
from attnres.hub_card.leaks import check_folder, find_leaks

# Put together here, so that nobody who searches this repository finds one.
SECRETS = {
    "a Hugging Face token": "hf_" + "aBcD" * 8,
    "an AWS key": "AKIA" + "A1B2" * 4,
    "a GitHub token": "ghp_" + "x1Y2" * 9,
    "an API key": "sk-" + "abcd" * 10,
    "a private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "a path of a home folder": "/home" + "/someone/models",
}


def found(folder) -> str:
    with pytest.raises(ValueError, match="not fit to be published") as caught:
        check_folder(folder)
    return str(caught.value)


def test_a_finished_folder_has_none(finished, checkpoint):
    assert find_leaks(finished, (checkpoint, finished, Path.cwd())) == []


def test_planted_secrets_are_found_in_every_text_file(folder):
    names = ("README.md", "depth_mixer.py", "LICENSE", ".eval_results/a.yaml", "merges.txt")
    for name in names:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write("".join(f"\n# see {secret}\n" for secret in SECRETS.values()))
    message = found(folder)
    for what, secret in SECRETS.items():
        assert all(f"{name}: {what}" in message for name in names) and secret not in message


def test_a_damaged_weight_file_is_named(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match="model.safetensors: not a safetensors file, or a damaged one"):
        check_folder(folder)


def test_a_pickle_is_found(folder):
    (folder / "training_args.bin").write_bytes(b"x")
    assert "training_args.bin: a pickle can run code" in found(folder)


@pytest.mark.parametrize("escaped", [False, True])
def test_planted_secrets_are_found_in_every_json_file_however_they_are_escaped(folder, escaped):
    names = ("config.json", "tokenizer_config.json", "generation_config.json")
    for name in names:
        path = folder / name
        text = json.dumps({**json.loads(path.read_text()), "note": list(SECRETS.values())})
        for secret in SECRETS.values() if escaped else ():
            letters = "".join(f"\\u{ord(letter):04x}" for letter in secret)
            text = text.replace(json.dumps(secret)[1:-1], letters)
        path.write_text(text)
    message = found(folder)
    assert all(f"{name}: {what}" in message for name in names for what in SECRETS)


def test_a_secret_in_the_metadata_of_the_weights_is_found(folder):
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "made_by": SECRETS["a Hugging Face token"]})
    assert "model.safetensors: a Hugging Face token" in found(folder)


def test_weights_themselves_are_not_taken_for_text(tmp_path):
    text = torch.tensor(list(SECRETS["a Hugging Face token"].encode()), dtype=torch.uint8)
    save_file({"weight": text}, tmp_path / "model.safetensors")
    assert find_leaks(tmp_path) == []


@pytest.mark.parametrize(
    "path",
    [
        "C:" + "\\Users\\ann\\model",
        "c:" + "/Users/ann/model",
        "/Us" + "ers/ann/model",
        "/ro" + "ot/model",
        "/home" + "/a",
    ],
)
def test_home_folders_of_every_system_are_found(tmp_path, path):
    (tmp_path / "a.json").write_text(json.dumps({"path": path}))
    (tmp_path / "b.md").write_text(f"`{path}`")
    assert {each.partition(":")[0] for each in find_leaks(tmp_path)} == {"a.json", "b.md"}


@pytest.mark.parametrize(
    "text", ["https://example.org/home/page", "~/home/x", "hf_short", "sk-learn", "the /home folder"]
)
def test_what_only_looks_alike_is_let_through(tmp_path, text):
    (tmp_path / "a.md").write_text(text)
    assert find_leaks(tmp_path) == []


def test_folders_of_this_machine_are_found(tmp_path, monkeypatch):
    home, work = tmp_path / "ann", tmp_path / "work" / "model"
    monkeypatch.setattr(Path, "home", lambda: home)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "a.md").write_text(f"from {home}/model")
    (tmp_path / "hub" / "b.json").write_text(json.dumps({"at": str(work)}))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(Path("/nowhere")))
    assert [each.partition(" (")[0] for each in find_leaks(tmp_path / "hub", (work,))] == [
        "a.md: a path of this home folder",
        "b.json: the path of model",
    ]


def test_a_name_or_path_is_found_in_a_tokenizer_and_dropped_from_a_configuration(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    config["_name_or_path"] = config["backbone_config"]["_name_or_path"] = "./runs/17"
    (source / "config.json").write_text(json.dumps(config))
    folder = build(source, tmp_path / "hub", execute_snippets=False)
    assert "_name_or_path" not in (folder / "config.json").read_text()
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "_name_or_path": "./runs/17"}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: a _name_or_path"):
        build(source, tmp_path / "hub", execute_snippets=False, overwrite=True)
