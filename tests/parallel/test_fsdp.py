"""FSDP2 as examples/accelerate/fsdp2.yaml configures it, and with each of its settings changed.

The depth mixer lives at the root and is used before the decoder layers, which get what it computed: it has to be whole
then, and its gradients have to come from all processes. Models are float64 where equality is claimed.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import random_attnres, short_config
from launching import ROOT, largest_error, launcher, outcomes_of, run, train_options
from once import once
from safetensors.torch import load_file
from training_cases import ACCUMULATION, ALONE, BASE, CHECKPOINTING, EXACT, MIXED, MODELS
from transformers import AutoModelForCausalLM

from attnres import AttnResForCausalLM
from attnres.conversion import convert

CONFIG = ROOT / "examples" / "accelerate" / "fsdp2.yaml"
WEIGHTS = 1e-9
NO_CHECKPOINTING = {"FSDP_ACTIVATION_CHECKPOINTING": "false"}
SAVING = {"save_strategy": "steps", "save_steps": 2}

CASES = {name: ALONE[name] for name in (*MODELS, "tied-embeddings", "frozen-backbone", "clipped")}
# Must not change anything: compared with BASE in one process.
SAME = {
    "layers-stay-whole": {**EXACT, "environment": {"FSDP_RESHARD_AFTER_FORWARD": "false"}},
    "all-load": {**EXACT, "environment": {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}},
    "no-checkpointing": {**EXACT, "environment": NO_CHECKPOINTING},
    **{
        f"trainers-{name}": {**EXACT, "environment": NO_CHECKPOINTING, "options": options}
        for name, options in CHECKPOINTING.items()
    },
    "accumulation": {**EXACT, "options": ACCUMULATION},
}


def saving_cases(out: Path) -> dict[str, dict]:
    """Each saved half-way and at the end; each resumed from half-way with other weights to start from."""
    cases = {}
    for name, environment in (("shards", {}), ("full", {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"})):
        case = {"family": "qwen3_moe", "mode": "block", "environment": environment, "options": SAVING}
        cases[name] = {**case, "save": True}
        cases[f"{name}-resumed"] = {**case, "model": {"seed": 7}, "resume": str(out / name / "checkpoint-2")}
    return cases


@pytest.fixture(scope="module")
def saved_and_ranks(material, tmp_path_factory):
    def make(folder):
        mixed = {name: {**case, "options": {"bf16": True}} for name, case in MIXED.items()}
        options = [*train_options(material, folder / "trained", 2), "--save-steps", "2"]
        cases = {**CASES, **SAME, **mixed, **saving_cases(folder), "command": {"command": ["train", *options]}}
        launch = launcher("--config_file", CONFIG, "--mixed_precision", "no", "--dynamo_backend", "no")
        return folder, outcomes_of(cases, folder, launch)

    return once(tmp_path_factory, "fsdp-ranks", make)


@pytest.fixture(scope="module")
def saved(saved_and_ranks):
    return saved_and_ranks[0]


@pytest.fixture(scope="module")
def ranks(saved_and_ranks):
    return saved_and_ranks[1]


def test_the_example_configuration_wraps_decoder_layers_of_any_model():
    config = yaml.safe_load(CONFIG.read_text())["fsdp_config"]
    assert config["fsdp_transformer_layer_cls_to_wrap"] in AttnResForCausalLM._no_split_modules


@pytest.mark.parametrize("name", [*CASES, *SAME])
def test_two_processes_train_as_one_with_the_same_global_batch(alone, ranks, name):
    expected = alone.get(name, alone[BASE])
    assert len(ranks) == 2
    for outcome in (rank[name] for rank in ranks):
        assert outcome["wrapper"] == "FSDPModule"
        assert len(outcome["losses"]) == 4
        assert outcome["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        assert outcome["norms"] == pytest.approx(expected["norms"], rel=1e-6)
        assert largest_error(outcome["weights"], expected["weights"]) < WEIGHTS


@pytest.mark.parametrize("name", [name for name in (*CASES, *SAME) if "standard" not in name])
def test_the_depth_mixer_is_sharded_whole_where_it_is_used_and_its_gradients_are_reduced(alone, ranks, name):
    expected = alone.get(name, alone[BASE])["gradients"]
    for outcome in (rank[name] for rank in ranks):
        assert outcome["mixers"] == [("Parameter", [11, 40])]
        assert outcome["local_shapes"]["model.depth_mixer.mlp_norm.query"] in ([3, 1, 40], [2, 1, 40])
        found = {key: value for key, value in outcome["gradients"].items() if "depth_mixer" in key}
        assert len(found) == 6 and all(gradient.any() for gradient in found.values())
        assert largest_error(found, {key: expected[key] for key in found}) < WEIGHTS


@pytest.mark.parametrize("name", MIXED)
def test_in_mixed_precision_scores_stay_float32_and_losses_close(alone, ranks, name):
    """Accelerate has FSDP return the loss itself in bfloat16: 0.4 % of it are rounding alone."""
    for outcome in (rank[name] for rank in ranks):
        assert outcome["score_dtypes"] == ["torch.float32"]
        assert {str(tensor.dtype) for tensor in outcome["weights"].values()} == {"torch.float32"}
        assert outcome["losses"][0] == pytest.approx(alone[name]["losses"][0], rel=0.02)


@pytest.mark.parametrize("name", ["shards", "full"])
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(ranks, name):
    for rank in ranks:
        assert rank[f"{name}-resumed"]["losses"] == rank[name]["losses"][2:]
        assert largest_error(rank[f"{name}-resumed"]["weights"], rank[name]["weights"]) == 0


def test_saved_shards_become_a_folder_that_loads(saved, ranks, tmp_path):
    checkpoint = saved / "shards" / "checkpoint-4"
    assert len(list((checkpoint / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2
    random_attnres("qwen3_moe").config.save_pretrained(checkpoint)
    convert(checkpoint, tmp_path / "whole")
    loaded = AttnResForCausalLM.from_pretrained(tmp_path / "whole")
    assert largest_error(dict(loaded.named_parameters()), ranks[0]["shards"]["weights"]) == 0


def test_a_full_save_is_a_folder_with_its_own_code(saved, ranks):
    for folder in (saved / "full" / "final", saved / "full" / "checkpoint-4"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert largest_error(dict(loaded.named_parameters()), ranks[0]["full"]["weights"]) == 0
        assert loaded.config.auto_map["AutoModelForCausalLM"] == "modeling_attnres.AttnResForCausalLM"
        assert (folder / "modeling_attnres.py").is_file() and not list(folder.glob("_fsdp*"))


def test_attnres_train_by_the_example_configuration(saved, trained_alone, tmp_path):
    one, two = (AttnResForCausalLM.from_pretrained(folder) for folder in (trained_alone, saved / "trained"))
    assert largest_error(dict(two.named_parameters()), dict(one.named_parameters())) < 1e-4

    # A sharded checkpoint holds all that is needed, also away from its run.
    convert(shutil.copytree(saved / "trained" / "checkpoint-3", tmp_path / "checkpoint"), tmp_path / "whole")
    assert (tmp_path / "whole" / "tokenizer.json").is_file()
    files = (tmp_path / "whole" / "model.safetensors", saved / "trained" / "model.safetensors")
    joined, saved_whole = map(load_file, files)
    assert joined.keys() == saved_whole.keys()
    assert all(torch.equal(joined[key], saved_whole[key]) for key in joined)


@pytest.mark.slow
def test_transformers_own_fsdp_wraps_what_it_wraps_of_the_plain_model(tmp_path):
    for name, tied in (("untied", False), ("tied", True)):
        plain = AutoModelForCausalLM.from_config(short_config("llama", tie_word_embeddings=tied))
        plain.save_pretrained(tmp_path / f"{name}-plain")
        for mode in ("block", "full"):
            AttnResForCausalLM.from_backbone(plain, residual_mode=mode).save_pretrained(tmp_path / f"{name}-{mode}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = run(*torchrun, Path(__file__).with_name("fsdp_structure.py"), tmp_path)
    ranks = [json.loads(line[line.index("{") :]) for line in output.splitlines() if '"modules"' in line]
    assert len(ranks) == 2
    for found in ranks:
        for name in ("untied", "tied"):
            plain = found[f"{name}-plain"]
            assert ("lm_head" in plain["modules"]) == (name == "untied") and "" in plain["modules"]
            for mode in ("block", "full"):
                ours = found[f"{name}-{mode}"]
                assert ours["modules"] == plain["modules"] and ours["plan"] == plain["plan"]
                assert ours["class"] == "FSDPAttnResForCausalLM"
                assert ours["name"] == "AttnResForCausalLM"  # by which Trainer decides whether labels are shifted
