"""Checkpoints that transformers does not load as they are, and models spread over devices."""

import json
import os
import shutil

import pytest
from helpers import random_attnres
from safetensors.torch import load_file, save_file
from tiny_eval import byte_tokenizer

from attnres import cli
from attnres.conversion import convert
from attnres.eval import evaluate, identity, records, subject


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An AttnRes checkpoint, and the same in Kimi K3's layout."""
    top = tmp_path_factory.mktemp("layouts")
    model = random_attnres("kimi_linear", layers=4, vocab_size=257, eos_token_id=0, bos_token_id=0, pad_token_id=0)
    model.save_pretrained(top / "attnres", max_shard_size="60KB")
    byte_tokenizer(eos_token="<end>").save_pretrained(top / "attnres")
    convert(top / "attnres", top / "k3", to="kimi-k3", verify="none")
    return top / "attnres", top / "k3"


@pytest.fixture
def run(mirror_root, tmp_path):
    def run(model, out="out", **options):
        options = {"limit": 2, "max_length": 48, "data_dir": mirror_root, **options}
        return evaluate(str(model), "arc_challenge", out=tmp_path / out, **options)

    return run


@pytest.mark.parametrize("links", [True, False], ids="links{}".format)
def test_kimi_k3_folder_has_the_scores_of_the_attnres_folder(folders, run, tmp_path, monkeypatch, capsys, links):
    def no_links(*_):
        raise OSError("other file system")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    attnres, k3 = folders
    before = {path.name: path.read_bytes() for path in k3.iterdir()}
    run(attnres, "one", progress=False)
    outcome = run(k3, "two")
    one, two = ((tmp_path / out / "arc_challenge" / "samples.jsonl").read_bytes() for out in ("one", "two"))
    assert one == two and outcome["rows"]["arc_challenge"]["model"]["model_type"] == "attnres"
    assert f"`attnres convert {k3} DST` makes it permanent" in capsys.readouterr().err
    assert not list((tmp_path / "two").glob(".kimi-k3*"))
    assert {path.name: path.read_bytes() for path in k3.iterdir()} == before
    own = identity.checkpoint_identity(k3)
    assert records.read_result(tmp_path / "two" / "arc_challenge")["fingerprint"]["model"] == own


def test_the_text_part_of_a_multimodal_kimi_k3_folder_is_measured(folders, run, tmp_path):
    nested = tmp_path / "nested"
    shutil.copytree(folders[1], nested, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    text = json.loads((folders[1] / "config.json").read_text())
    (nested / "config.json").write_text(json.dumps({"model_type": "kimi_k3", "text_config": text}))
    tensors = {name: tensor for path in folders[1].glob("*.safetensors") for name, tensor in load_file(path).items()}
    save_file({f"language_model.{name}": tensor for name, tensor in tensors.items()}, nested / "model.safetensors")
    run(folders[0], "one", progress=False)
    run(nested, "two", progress=False)
    one, two = ((tmp_path / out / "arc_challenge" / "samples.jsonl").read_bytes() for out in ("one", "two"))
    assert one == two


def test_a_finished_kimi_k3_folder_is_not_converted_again(folders, run, monkeypatch):
    run(folders[1], progress=False)
    monkeypatch.setattr(subject, "converted", None)
    assert run(folders[1], progress=False)["reused"] == ["arc_challenge"]


def test_a_kimi_k3_folder_that_does_not_load_leaves_nothing(folders, run, tmp_path, monkeypatch):
    monkeypatch.setattr(subject.Origin, "load", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(folders[1], progress=False)
    assert not list((tmp_path / "out").iterdir())


def changed(folder, target, **options):
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **options}))
    return target


def test_what_cannot_be_converted_is_one_line_before_hashing(folders, mirror_root, tmp_path, monkeypatch, capsys):
    predicting = changed(folders[1], tmp_path / "k3", num_nextn_predict_layers=1)
    monkeypatch.setattr(identity, "checkpoint_identity", None)
    assert cli.main(["eval", *map(str, [predicting, "--suite", "gsm8k", "--data-dir", mirror_root])]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("attnres: error: ")]
    assert "multi-token prediction (num_nextn_predict_layers=1)" in error


def test_trusted_code_of_a_kimi_k3_folder_loads_it(folders, tmp_path):
    own = changed(folders[1], tmp_path / "k3", auto_map={"AutoModelForCausalLM": "modeling.Own"})
    assert subject._is_kimi_k3(own, trust_remote_code=False)
    assert not subject._is_kimi_k3(own, trust_remote_code=True)


def test_a_device_map_changes_no_score(checkpoint, folders, run, tmp_path):
    for number, model in enumerate((checkpoint, folders[0])):
        run(model, f"plain{number}", progress=False)
        run(model, f"mapped{number}", progress=False, device_map="auto")
        plain, mapped = (tmp_path / f"{out}{number}" / "arc_challenge" for out in ("plain", "mapped"))
        assert (plain / "samples.jsonl").read_bytes() == (mapped / "samples.jsonl").read_bytes()
