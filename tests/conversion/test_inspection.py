"""What `attnres convert` and `attnres inspect-checkpoint` print, and their exit status."""

import json

import pytest
import torch
from helpers import random_attnres, short_config
from transformers import AutoModelForCausalLM

from attnres import AttnResForCausalLM
from attnres.cli import main
from attnres.conversion.inspection import inspect_checkpoint, shown_size


@pytest.fixture
def plain(tmp_path):
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(short_config("qwen3_moe")).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def test_the_facts_of_a_trained_mixture_of_experts_are_those_of_the_model(tmp_path):
    model = random_attnres("mixtral", layers_per_block=2)
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    facts = inspect_checkpoint(tmp_path / "model")
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert (facts["layout"], facts["family"], facts["residual_mode"]) == ("attnres", "mixtral", "block")
    assert (facts["decoder_layers"], facts["layers_per_block"], facts["blocks"]) == (5, 2, 3)
    assert (facts["parameters"], facts["depth_parameters"]) == (total, 2 * 40 * 11)
    assert facts["active_parameters"] == total - experts + experts * 2 // 5
    assert facts["depth_tensors"] == "trained" and facts["dtypes"] == ["F32"] and facts["shards"] > 1


def test_convert_then_inspect_on_the_command_line(plain, tmp_path, capsys):
    assert main(["convert", str(plain), str(tmp_path / "attnres"), "--num-blocks", "3"]) == 0
    printed = capsys.readouterr()
    assert (
        "prenorm -> attnres (3 blocks of 2 decoder layers), 2 weight files" in printed.out
        and "same most likely token" in printed.out
    )
    assert "weights:" in printed.err and "verify:" in printed.err
    assert main(["inspect-checkpoint", str(tmp_path / "attnres")]) == 0
    assert "pseudo-queries are zero" in capsys.readouterr().out
    assert main(["inspect-checkpoint", str(plain), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["depth_tensors"] == "none"
    assert AttnResForCausalLM.from_pretrained(tmp_path / "attnres").config.layers_per_block == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "result"], "nowhere: no such folder"),
        (["~nobody-here/x", "result"], "~nobody-here/x: no such folder"),
        (["plain", "plain/inside"], "must be a different folder"),
        (["plain", "result", "--layers-per-block", "99"], "got 99"),
        (["plain", "result", "--to", "kimi-k3"], "needs a kimi_linear or kimi_k3 backbone, got qwen3_moe"),
        (["plain", "result", "--to", "prenorm", "--num-blocks", "2"], "num_blocks is an option of an AttnRes result"),
        (["plain", "result", "--from", "kimi-k3"], "is a checkpoint in the layout prenorm, but --from says kimi-k3"),
        (["plain", "plain/config.json/x"], "neither may contain the other"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(arguments, message, plain, monkeypatch, capsys):
    monkeypatch.chdir(plain.parent)
    assert main(["convert", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("attnres: error: ") and message in lines[0]
    assert [path.name for path in plain.parent.iterdir()] == ["plain"]


def test_sizes_are_shown_in_the_unit_that_suits_them():
    assert [shown_size(size) for size in (7, 7300, 7_300_000, 98_200_000_000)] == ["7 B", "7.3 kB", "7.3 MB", "98.2 GB"]
