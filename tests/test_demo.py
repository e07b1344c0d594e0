"""The demo: its corpus, the fairness of its comparison, its folder, and one quick run from end to end."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from once import once
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnres import AttnResForCausalLM
from attnres.demo import QUICK, backbone_config, build_plain, build_scratch, corpus, run
from attnres.demo.evaluation import compare_logits, held_out_loss, interval_over_files
from attnres.demo.training import batch_trainer, learning_rate_factor, train_model

TINY = replace(
    QUICK,
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    moe_intermediate_size=12,
    num_blocks=2,
    sequence_length=13,
    batch_size=2,
    steps=6,
    warmup_steps=2,
    eval_every=2,
    eval_batch_size=3,
)
# A run without any of the variables that keep libraries offline: whatever asks for a network is found out.
WITHOUT_NETWORK = """
import socket, sys
asked = []
def refuse(*args, **kwargs):
    asked.append(args)
    raise OSError("no network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from attnres.cli import main
status = main(sys.argv[1:])
assert not asked, asked
sys.exit(status)
"""


@pytest.fixture
def sequences() -> torch.Tensor:
    return torch.randint(1, TINY.vocab_size, (TINY.steps * TINY.batch_size, TINY.sequence_length))


@pytest.fixture
def held_out() -> torch.Tensor:
    return torch.randint(1, TINY.vocab_size, (7, TINY.sequence_length))


def write_library(root: Path, num_files: int):
    for index in range(num_files):
        path = root / f"package{index % 7}" / f"module{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Module {index}."""\n', encoding="utf-8")


def test_the_corpus_is_split_by_file_and_the_same_everywhere(tmp_path):
    for root in (tmp_path / "here", tmp_path / "there" / "lib"):
        write_library(root, 150)
    here, there = corpus.read_corpus(tmp_path / "here"), corpus.read_corpus(tmp_path / "there" / "lib")
    assert here == there
    names = [{document.name for document in part} for part in (here.train, here.held_out)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 150
    assert 3 <= len(here.held_out) <= 25


def test_a_new_file_moves_no_other_file_to_the_other_part(tmp_path):
    write_library(tmp_path, 60)
    before = corpus.read_corpus(tmp_path)
    (tmp_path / "zzz.py").write_text("new = 1\n", encoding="utf-8")
    after = corpus.read_corpus(tmp_path)
    assert set(before.train) <= set(after.train) and set(before.held_out) <= set(after.held_out)


def test_tests_bundled_packages_copies_and_undecodable_files_are_left_out(tmp_path):
    write_library(tmp_path, 60)
    before = corpus.read_corpus(tmp_path)
    for name in (
        "test/test_x.py",
        "json/tests/a.py",
        "site-packages/p.py",
        "config-3.11-x/c.py",
        "_sysconfigdata_l.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "copy.py").write_text((tmp_path / "package0" / "module0.py").read_text("utf-8"), encoding="utf-8")
    after = corpus.read_corpus(tmp_path)
    texts = [document.text for document in after.train + after.held_out]
    assert sorted(texts) == sorted(document.text for document in before.train + before.held_out)


def test_a_machine_without_sources_is_an_error(tmp_path):
    with pytest.raises(OSError, match="too few Python sources"):
        corpus.read_corpus(tmp_path)


def test_tokenizer_and_packing_lose_nothing(tmp_path):
    documents = [corpus.Document("a", "def fäñcy():\n\treturn  '\u2603'\n"), corpus.Document("b", "x = 1\n" * 20)]
    tokenizer = corpus.train_tokenizer(documents, vocab_size=270, max_length=64)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    packed = corpus.pack(documents, tokenizer, num_sequences=2, length=20)
    assert packed.shape == (2, 20)
    text = tokenizer.decode(packed.flatten())
    assert ("".join(corpus.END_OF_TEXT + document.text for document in documents)).startswith(text)
    with pytest.raises(OSError, match="tokens, but 2000 are needed"):
        corpus.pack(documents, tokenizer, num_sequences=100, length=20)


def test_documents_are_cut_to_the_budget_between_characters():
    documents = [corpus.Document("a", "ä" * 10), corpus.Document("b", "b" * 4), corpus.Document("c", "c")]
    chosen = corpus.limit_documents(documents, document_bytes=7, total_bytes=10)
    assert chosen == [corpus.Document("a", "äää"), corpus.Document("b", "b" * 4)]


def test_models_start_from_the_same_backbone_weights():
    plain, scratch = build_plain(TINY, 0), build_scratch(TINY, 0)
    weights = scratch.state_dict()
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_learning_rates_rise_to_the_peak_and_fall_to_the_final_ratio():
    factors = [learning_rate_factor(step, QUICK) for step in range(QUICK.steps + 1)]
    assert factors[0] == 1 / QUICK.warmup_steps and max(factors) == factors[QUICK.warmup_steps] == 1
    assert factors[-1] == pytest.approx(QUICK.final_lr_ratio)


def test_a_half_way_start_changes_nothing(tmp_path, sequences, held_out):
    """A plain model that continues half-way, as the converted model does, ends with the weights of the uninterrupted
    one."""
    states = []

    def keep(model, optimizer_state):
        model.save_pretrained(tmp_path / "half-way")
        states.append(optimizer_state)

    data = (sequences, held_out, TINY, tmp_path / "trainer")
    plain = build_plain(TINY, 0)
    history = train_model("plain", plain, *data, at_half_way=keep)
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "half-way")
    resumed_history = train_model("resumed", resumed, *data, start=states[0])
    converted = AttnResForCausalLM.from_backbone(tmp_path / "half-way", num_blocks=TINY.num_blocks)
    converted_history = train_model("converted", converted, *data, start=states[0])

    assert resumed_history.train_steps == converted_history.train_steps == [4, 5, 6]
    assert resumed_history.train_loss == pytest.approx(history.train_loss[3:], rel=1e-5)
    assert resumed_history.held_out_steps == [3, 4, 6] and history.held_out_steps == [0, 2, 4, 6]
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, msg=name)
    assert all(parameter.grad is None or parameter.abs().sum() > 0 for parameter in converted.depth_parameters())
    assert not torch.equal(converted.depth_mixer.mlp_norm.query, torch.zeros_like(converted.depth_mixer.mlp_norm.query))


def test_every_model_is_trained_on_the_sequences_in_their_order(tmp_path, sequences):
    model, seen = build_plain(TINY, 0), []
    model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs["input_ids"]), with_kwargs=True)
    batch_trainer(model, sequences, TINY, tmp_path).train()
    assert torch.equal(torch.cat(seen), sequences)


def test_a_failed_run_leaves_the_old_result_and_no_rest(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result").write_text("old")
    with pytest.raises(FileExistsError, match="is not empty; --overwrite replaces it"):
        run(tmp_path / "out", quick=True)

    def fail(folder, settings):
        (folder / "result").write_text("new")
        raise RuntimeError

    monkeypatch.setattr("attnres.demo.pretraining.run_in", fail)
    with pytest.raises(RuntimeError):
        run(tmp_path / "out", quick=True, overwrite=True)
    assert (tmp_path / "out" / "result").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_held_out_loss_is_the_mean_over_tokens_without_the_balancing_loss(held_out):
    model = build_plain(TINY, 0)
    logits = model(held_out).logits[:, :-1].log_softmax(-1)
    expected = -logits.gather(-1, held_out[:, 1:, None]).mean().item()
    assert held_out_loss(model, held_out, batch_size=3) == pytest.approx(expected, rel=1e-5)


def test_compare_logits_sees_a_difference(held_out):
    model, other = build_plain(TINY, 0), build_plain(replace(TINY, seed=1), 0)
    assert compare_logits(model, model, held_out)["max_abs_logit_difference"] == 0
    assert compare_logits(model, other, held_out)["max_abs_logit_difference"] > 0


def test_the_backbone_is_a_mixture_of_experts_deep_enough_for_blocks():
    config = backbone_config(QUICK, 0)
    assert config.num_experts > config.num_experts_per_tok and config.num_hidden_layers >= QUICK.num_blocks


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One `attnres demo --quick` in a process without network: the finished process, its folder and its home."""

    def make(folder):
        home, out = folder / "home", folder / "demo" / "out"
        home.mkdir()
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
        process = subprocess.run(
            [sys.executable, "-c", WITHOUT_NETWORK, "demo", "--quick", "--out", str(out)],
            env=environment | {"HOME": str(home), "MPLCONFIGDIR": str(home / "matplotlib")},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        return process, out, home

    return once(tmp_path_factory, "quick-demo", make)


def test_quick_demo_writes_everything_and_leaves_nothing_else(quick):
    process, out, home = quick
    expected = {"plain", "half-way", "converted", "from-scratch", "held-out.jsonl", "hub"}
    expected |= {"results.md", "results.json", "loss-curves.png", "depth-weights.png"}
    assert {path.name for path in out.iterdir()} == expected
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    card = (out / "hub" / "README.md").read_text(encoding="utf-8")
    assert "model-index" not in card
    assert f"open {out / 'hub' / 'README.md'}" in process.stdout
    written = [path for path in out.rglob("*") if path.suffix in (".json", ".md", ".csv")]
    assert not [path for path in written if ".partial" in path.read_text(encoding="utf-8")]
    assert not list(home.rglob("*.arrow")) and not (home / ".cache" / "huggingface" / "datasets").exists()
    for figure in ("loss-curves.png", "depth-weights.png"):
        assert min(matplotlib.image.imread(out / figure).shape[:2]) > 400


def test_quick_demo_results_are_finite_and_the_same_in_every_place(quick):
    process, out, _ = quick
    results = json.loads((out / "results.json").read_text("utf-8"), parse_constant=pytest.fail)
    rows = dict(
        re.findall(r"^\| ([a-z-]+) \| (\d.*) \|$", (out / "results.md").read_text("utf-8").split("\n## ")[0], re.M)
    )
    assert list(rows) == list(results["arms"]) == ["half-way", "plain", "converted", "from-scratch"]
    for name, row in results["arms"].items():
        assert f"| {name} | {rows[name]} |" in process.stdout
        cells = rows[name].split(" | ")
        assert len(cells) == 9
        assert [int(cells[0]), float(cells[2]), float(cells[3])] == [
            row["steps"],
            pytest.approx(row["held_out_loss"], abs=1e-4),
            pytest.approx(row["bits_per_byte"], abs=1e-4),
        ]
        assert 0.5 < row["bits_per_byte"] < 5
    assert results["lossless_start"]["max_abs_logit_difference"] < 0.01 * results["lossless_start"]["logit_std"]
    assert results["arms"]["plain"]["bits_per_byte"] < results["arms"]["half-way"]["bits_per_byte"]
    for name in ("converted", "from-scratch"):
        assert [sum(row) for row in results["depth_weights"][name]] == pytest.approx([1.0] * 9, abs=1e-4)


def test_quick_demo_says_how_sure_bits_per_byte_are(quick):
    _, out, _ = quick
    results = json.loads((out / "results.json").read_text("utf-8"))
    documents = [json.loads(line) for line in (out / "held-out.jsonl").read_text("utf-8").splitlines()]
    total = sum(len(document["text"].encode()) for document in documents)
    for row in results["arms"].values():
        assert sum(row["file_bits"]) / total == pytest.approx(row["bits_per_byte"], rel=1e-9)
        assert len(row["file_bits"]) == len(documents)
        assert row["interval"][0] < row["bits_per_byte"] < row["interval"][1]
    assert results["arms"]["plain"]["minus_plain_interval"] == [0, 0]
    assert results["arms"]["half-way"]["minus_plain_interval"][0] > 0


def test_intervals_over_files_are_those_of_whole_files():
    generator = np.random.default_rng(0)
    sizes = generator.integers(100, 5000, 211)
    bits = sizes * generator.normal(2.5, 0.4, 211)
    low, high = interval_over_files(bits, sizes, replace(TINY, resamples=4000))
    # The ratio's standard error by linearisation.
    ratio = bits.sum() / sizes.sum()
    error = np.sqrt(((bits - ratio * sizes) ** 2).sum()) / sizes.sum()
    assert (low, high) == pytest.approx((ratio - 1.96 * error, ratio + 1.96 * error), abs=0.15 * error)


def test_quick_demo_models_reload_and_predict_what_was_measured(quick):
    _, out, _ = quick
    results = json.loads((out / "results.json").read_text("utf-8"))
    documents = [json.loads(line) for line in (out / "held-out.jsonl").read_text("utf-8").splitlines()]
    documents = [corpus.Document(document["name"], document["text"]) for document in documents]
    for name, row in results["arms"].items():
        tokenizer = AutoTokenizer.from_pretrained(out / name)
        model = AutoModelForCausalLM.from_pretrained(out / name)
        assert isinstance(model, AttnResForCausalLM) == (name in ("converted", "from-scratch"))
        sequences = corpus.pack(documents, tokenizer, QUICK.held_out_sequences, QUICK.sequence_length)
        assert held_out_loss(model, sequences, QUICK.eval_batch_size) == pytest.approx(row["held_out_loss"], rel=1e-5)


def test_quick_demo_keeps_progress_and_results_apart(quick):
    process, out, _ = quick
    assert "train plain" in process.stderr and "lm-eval converted" in process.stderr
    assert "step/s" not in process.stdout and "Conversion: " in process.stdout and "from_backbone" in process.stdout
    assert str(out) in process.stdout
    assert "Warning" not in process.stderr and "Traceback" not in process.stderr
