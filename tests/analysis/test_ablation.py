"""Tests the loss without a source against a model whose weight for that source is removed by hand."""

import json
import re

import pytest
import torch
from helpers import random_attnres, random_tokens

from attnres.analysis.ablation import ablate, passes
from attnres.depth_variants import VARIANTS


def loss_by_hand(model, tokens, sublayer, source, monkeypatch):
    """The loss where `attention_residual` itself, counting its calls, leaves a source out."""
    from attnres import depth_mixer

    equation, calls = depth_mixer.attention_residual, []

    def left_out(sources, query, eps, scale=1.0):
        calls.append(len(sources))
        if len(calls) - 1 != sublayer:
            return equation(sources, query, eps, scale)
        kept = [each for place, each in enumerate(sources) if place != source]
        return equation(kept, query, eps, scale)

    with monkeypatch.context() as patch:
        patch.setattr(depth_mixer, "attention_residual", left_out)
        model.set_depth_implementation("eager")
        found = model(tokens, labels=tokens, use_cache=False).loss.item()
    return found, calls


@pytest.mark.parametrize(("family", "mode"), [("llama", "block"), ("qwen3_moe", "full"), ("gemma2", "block")])
def test_the_loss_without_a_source_is_that_of_the_sources_that_are_left(family, mode, monkeypatch):
    model, tokens = random_attnres(family, mode), random_tokens(2, 7)
    steps = []
    found = ablate(model, tokens, draws=2, progress=steps.append)
    expected = model(tokens, labels=tokens, use_cache=False).loss.item()
    assert found.loss == pytest.approx(expected, rel=1e-5) and found.tokens == 12
    counts = [len(row) for row in found.weights]
    assert len(counts) == 11 and [len(row) for row in found.without] == counts
    assert len(steps) == passes(counts, 2)
    assert found.without[0] == [None] and found.control[0] == []
    for sublayer in range(1, 11):
        assert sum(found.weights[sublayer]) == pytest.approx(1, abs=1e-5)
        for source in range(counts[sublayer]):
            with torch.no_grad():
                by_hand, calls = loss_by_hand(model, tokens, sublayer, source, monkeypatch)
            assert calls == counts
            assert found.without[sublayer][source] == pytest.approx(by_hand - expected, abs=2e-5)
        assert len(found.control[sublayer]) == 2


def test_the_model_is_left_as_it_was_also_when_a_pass_fails(monkeypatch):
    model, tokens = random_attnres("llama").train(), random_tokens(1, 5)
    before = set(VARIANTS)
    ablate(model, tokens, draws=1)
    assert model.training and model.config.depth_variant == "attnres" and set(VARIANTS) == before
    monkeypatch.setattr(model.lm_head, "forward", lambda states: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ablate(model, tokens)
    assert model.training and model.config.depth_variant == "attnres" and set(VARIANTS) == before
    assert not model.depth_mixer._forward_hooks


def test_controls_are_drawn_by_the_seed():
    model, tokens = random_attnres("llama"), random_tokens(2, 7)
    first, again, other = (ablate(model, tokens, draws=1, seed=seed).control for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("options", [{"residual_mode": "standard"}, {"layers_per_block": 2}], ids=str)
def test_a_model_without_a_plain_mixture_is_refused(options):
    model = random_attnres("llama", options.get("residual_mode", "block"))
    if "residual_mode" not in options:
        model.config.depth_variant = "static"
    with pytest.raises(ValueError, match='an ablation needs residual_mode "block" or "full" and depth_variant'):
        ablate(model, random_tokens(1, 5))


def test_what_is_saved_is_json_with_its_format(tmp_path):
    found = ablate(random_attnres("llama"), random_tokens(1, 5), draws=1, name="tiny")
    found.save(tmp_path / "ablation.json")
    content = json.loads((tmp_path / "ablation.json").read_text())
    assert content["format"] == "attnres-ablation/1" and content["model"] == "tiny"
    assert content["without"] == found.without and content["sources"][0] == "embedding"


def test_inspect_writes_what_each_source_is_worth_beside_its_weight(tmp_path, capsys):
    from tiny_inspect import save_checkpoint

    from attnres.cli import main

    folder, text = save_checkpoint(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("every sublayer reads what came before it " * 4)
    assert main(["inspect", str(folder), "--text", str(text), "--out", str(tmp_path / "out"), "--ablate", "20"]) == 0
    assert "ablation.json, ablation.png" in capsys.readouterr().err
    content = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert content["tokens"] == 19 and len(content["without"]) == 11
    assert (tmp_path / "out" / "ablation.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "depth-weights.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    rows = data["models"][0]["mixtures"]
    for row, without, control in zip(rows, content["without"], content["control"], strict=True):
        if control:
            assert row["without"] == pytest.approx(without, abs=1e-5)
            assert row["control"] == pytest.approx(control, abs=1e-5)
        else:
            assert "without" not in row
    cells = re.findall(r"<td>([+-][0-9.]+)</td>", page.split("What each source is worth")[1])
    changes = sorted((change for row in content["without"] for change in row if change is not None), reverse=True)
    assert [float(cell) for cell in cells] == pytest.approx(changes, abs=1e-4)
