"""Joins the shards of a run; errors name what is hostile or damaged in them, and nothing of it is run."""

import dataclasses
import enum
import importlib
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers import random_attnres
from safetensors import safe_open
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from attnres import AttnResForCausalLM
from attnres.cli import main
from attnres.conversion import CheckpointError, convert
from attnres.conversion.sharded import SHARDS_NAME, UNPICKLED

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # where shards are saved


def save_shards(model, run, wrap=True):
    """Writes the folder that a Trainer with sharded saves leaves, with the configuration beside the checkpoint."""
    shards = run / "checkpoint-3" / SHARDS_NAME
    state = {"model": model.state_dict()} if wrap else model.state_dict()
    dcp.save(state, storage_writer=dcp.FileSystemWriter(shards), no_dist=True)
    model.config.save_pretrained(run)
    (run / "tokenizer.json").write_text("{}")
    (run / "training_args.bin").write_bytes(b"pickle")
    return run / "checkpoint-3"


@pytest.fixture
def checkpoint(tmp_path):
    return save_shards(random_attnres("qwen3"), tmp_path / "run")


def metadata_of(checkpoint):
    return pickle.loads((checkpoint / SHARDS_NAME / ".metadata").read_bytes())


def write_metadata(checkpoint, metadata):
    (checkpoint / SHARDS_NAME / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gemma3_text", "kimi_linear"])
@pytest.mark.parametrize("wrap", [True, False], ids=["as-accelerate-saves", "bare-names"])
def test_joined_shards_load_as_the_model_that_was_saved(tmp_path, family, wrap):
    model = random_attnres(family).to(torch.bfloat16)
    checkpoint = save_shards(model, tmp_path / "run", wrap)
    outcome = convert(checkpoint, tmp_path / "whole")
    assert (outcome.from_layout, outcome.to_layout, outcome.depth) == (
        "shards",
        "attnres",
        "3 blocks of 2 decoder layers",
    )
    loaded = AttnResForCausalLM.from_pretrained(tmp_path / "whole")
    state = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    with safe_open(tmp_path / "whole" / "model.safetensors", "pt") as file:
        assert "model.layers.4.mlp_res_proj.weight" in set(file.keys())  # the names on disk
    assert (tmp_path / "whole" / "modeling_attnres.py").is_file()
    assert (tmp_path / "whole" / "tokenizer.json").is_file()
    assert not (tmp_path / "whole" / "training_args.bin").exists()


def test_the_command_takes_the_checkpoint_or_the_folder_of_shards_in_it(checkpoint, tmp_path, capsys):
    for number, source in enumerate((checkpoint, checkpoint / SHARDS_NAME)):
        assert main(["convert", str(source), str(tmp_path / str(number))]) == 0
        assert "joined the tensors of the shards" in capsys.readouterr().out
        assert (tmp_path / str(number) / "model.safetensors").is_file()


@pytest.mark.parametrize("option", [{"num_blocks": 2}, {"to": "prenorm"}, {"link": True}])
def test_options_for_whole_checkpoints_are_refused(checkpoint, tmp_path, option):
    with pytest.raises(CheckpointError, match=f"{next(iter(option))} is for whole checkpoints. Join them first"):
        convert(checkpoint, tmp_path / "whole", **option)
    assert not (tmp_path / "whole").exists()


class Payload:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize(
    "payload",
    [
        (os.mkdir, "pwned"),
        (eval, "__import__('os').mkdir('pwned')"),
        (getattr, "a", "join"),
        (getattr, _MEM_FORMAT_ENCODING, "__subclasses__"),
        (torch.load, "x.pt"),
    ],
    ids=["os", "eval", "getattr", "getattr of an enumeration", "torch.load"],
)
@pytest.mark.parametrize("place", ["top", "planner_data"])
def test_code_in_the_metadata_is_not_run(checkpoint, tmp_path, monkeypatch, payload, place):
    monkeypatch.chdir(tmp_path)
    content = Payload(*payload)
    if place == "planner_data":
        content = metadata_of(checkpoint)
        content.planner_data["x"] = Payload(*payload)
    write_metadata(checkpoint, content)
    with pytest.raises(
        CheckpointError, match=r"\.metadata: (names .*A pickle can run code; this one is|not the metadata)"
    ):
        convert(checkpoint, "whole")
    assert not Path("pwned").exists() and not Path("whole").exists()


def test_only_what_describes_tensors_is_unpickled():
    for module, name in UNPICKLED - {("torch", "Size"), ("torch.serialization", "_get_layout")}:
        found = getattr(importlib.import_module(module), name)
        is_record = isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum))
        assert isinstance(found, torch.dtype) or is_record, (module, name)


def storage(metadata, part):
    return next(value for key, value in metadata.storage_data.items() if part in key.fqn)


def test_a_shard_elsewhere_is_not_read(checkpoint, tmp_path):
    shutil.copy(checkpoint / SHARDS_NAME / "__0_0.distcp", tmp_path / "outside.distcp")
    metadata = metadata_of(checkpoint)
    storage(metadata, "lm_head").relative_path = "../../../outside.distcp"
    write_metadata(checkpoint, metadata)
    with pytest.raises(CheckpointError, match="not a plain file name in the folder"):
        convert(checkpoint, tmp_path / "whole")

    storage(metadata, "lm_head").relative_path = "link.distcp"
    write_metadata(checkpoint, metadata)
    (checkpoint / SHARDS_NAME / "link.distcp").symlink_to(tmp_path / "outside.distcp")
    with pytest.raises(CheckpointError, match="is a link that leads out of the folder"):
        convert(checkpoint, tmp_path / "whole")


def test_what_no_shard_covers_is_named(checkpoint, tmp_path):
    metadata = metadata_of(checkpoint)
    metadata.state_dict_metadata["model.lm_head.weight"].chunks.clear()
    write_metadata(checkpoint, metadata)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is NaN, or the shards do not cover it"):
        convert(checkpoint, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shards: (shards / "__0_0.distcp").unlink(), "a shard cannot be read .*__0_0.distcp"),
        (lambda shards: (shards / "__0_0.distcp").write_bytes(b"x" * 900), "cannot be read"),
        (lambda shards: (shards / ".metadata").write_bytes(b"x" * 900), "not the metadata of a sharded save"),
        (lambda shards: (shards / ".metadata").write_bytes(b""), "not the metadata of a sharded save"),
        (lambda shards: (shards / ".metadata").write_bytes(pickle.dumps({})), "not the metadata of a sharded save"),
        (lambda shards: (shards.parents[1] / "config.json").unlink(), "there is no config.json there or in the two"),
        (lambda shards: (shards.parents[1] / "config.json").write_text('{"model_type": "llama"}'), "merge-weights"),
    ],
    ids=["shard-missing", "shard-damaged", "metadata-noise", "metadata-empty", "metadata-other", "no-config", "llama"],
)
def test_damage_is_named_in_one_line(checkpoint, tmp_path, capsys, damage, message):
    damage(checkpoint / SHARDS_NAME)
    with pytest.raises(CheckpointError, match=message):
        convert(checkpoint, tmp_path / "whole")
    assert main(["convert", str(checkpoint), str(tmp_path / "whole")]) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("attnres: error:")]) == 1
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize(
    ("saved", "configured", "message"),
    [
        ({"residual_mode": "standard"}, {}, r"missing: model.depth_mixer.attention_norm.query, .* and 3 more"),
        ({}, {"residual_mode": "standard"}, r"surplus: model.depth_mixer.attention_norm.query, .* and 3 more"),
        ({}, {"vocab_size": 101}, r"misshapen: lm_head.weight \[97, 40\] instead of \[101, 40\], model.embed_tokens"),
    ],
    ids=["lacks", "has-more", "misshapen"],
)
def test_the_configuration_of_another_run_is_refused(tmp_path, saved, configured, message):
    checkpoint = save_shards(random_attnres("qwen3", **saved), tmp_path / "run")
    random_attnres("qwen3", **configured).config.save_pretrained(tmp_path / "run")
    with pytest.raises(CheckpointError, match=message):
        convert(checkpoint, tmp_path / "whole")


def test_the_optimizers_shards_are_refused(checkpoint, tmp_path):
    folder = checkpoint / "optimizer_0"
    state = {"optimizer": {"step": 3, "exp_avg": torch.ones(2)}}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    with pytest.raises(CheckpointError, match="optimizer.step is not a tensor but an object"):
        convert(folder, tmp_path / "whole")
