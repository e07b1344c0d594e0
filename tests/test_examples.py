"""Every script in examples/ does what it says, on a tiny model and a short text."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import random_attnres, short_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from attnres.analysis.dynamics_runs import read_runs

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
SPECIAL = ["<pad>", "<bos>", "<eos>"]
CHARACTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
SMALL = ["--steps", "12", "--length", "24", "--batch-size", "2", "--num-blocks", "2"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    # PEFT reads the old name.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with `plain` and `attnres`, checkpoints with a tokenizer of single bytes, and `text.txt`."""
    folder = tmp_path_factory.mktemp("material")
    pieces = {piece: index for index, piece in enumerate(SPECIAL + CHARACTERS)}
    raw = Tokenizer(models.BPE(pieces, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(short_config("qwen3", 4, vocab_size=len(pieces), initializer_range=0.1))
    for name, model in (("plain", plain), ("attnres", random_attnres("qwen3", vocab_size=len(pieces)))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text("Attention over depth: the sublayer reads what came before it. " * 30)
    return folder


def run(script, *arguments, monkeypatch, capsys):
    """Runs a script as `python examples/SCRIPT ARGUMENTS` would, and returns what it prints."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return capsys.readouterr().out


def held_out_losses(printed):
    before, after = re.search(r"held-out loss: ([\d.]+) before, ([\d.]+) after 12 steps", printed).groups()
    return float(before), float(after)


def test_finetune_converts_without_loss_learns_and_saves(material, tmp_path, monkeypatch, capsys):
    out = tmp_path / "result"
    arguments = [material / "plain", material / "text.txt", "--out", out, "--learning-rate", "1e-2", *SMALL]
    printed = run("finetune.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert float(re.search(r"converted: 2 blocks, largest logit difference ([\d.e+-]+)", printed)[1]) < 1e-3
    assert "0 of the depth mixer's 6" in printed
    before, after = held_out_losses(printed)
    assert after < 0.9 * before
    (dynamics,) = read_runs([out])
    assert dynamics.step == 12 and len(dynamics.output_rms) == 4
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.depth_mixer.output_norm.query.any()


def test_finetune_can_train_the_depth_mixer_alone(material, tmp_path, monkeypatch, capsys):
    out = tmp_path / "result"
    arguments = [material / "plain", material / "text.txt", "--out", out, "--freeze-backbone", *SMALL]
    run("finetune.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    plain, model = (AutoModelForCausalLM.from_pretrained(path) for path in (material / "plain", out))
    assert model.depth_mixer.output_norm.query.any()
    for name, parameter in plain.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_finetune_lora_trains_adapter_and_depth_mixer_and_merges(material, tmp_path, monkeypatch, capsys):
    out, merged = tmp_path / "adapter", tmp_path / "merged"
    arguments = [material / "plain", material / "text.txt", "--out", out, "--learning-rate", "1e-2", "--rank", "4"]
    printed = run("finetune_lora.py", *arguments, "--merge", merged, *SMALL, monkeypatch=monkeypatch, capsys=capsys)
    numbers = 2 * (2 * 4 + 1) * 40
    assert f"{numbers:,} of them in the depth mixer" in printed
    assert "0 of the depth mixer's 6" in printed
    before, after = held_out_losses(printed)
    assert after < 0.9 * before
    assert float(re.search(r"loaded again, largest logit difference ([\d.e+-]+)", printed)[1]) < 1e-3
    assert not (out / "model.safetensors").exists() and (out / "adapter_model.safetensors").exists()
    assert AutoModelForCausalLM.from_pretrained(merged).depth_mixer.output_norm.query.any()
    assert read_runs([out])[0].step == 12


@pytest.mark.parametrize("script", ["finetune.py", "finetune_lora.py"])
def test_a_text_that_is_too_short_is_said_in_one_line(material, tmp_path, monkeypatch, capsys, script):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(SystemExit, match="short.txt: 9 tokens make 0 sequences, 2 are needed"):
        run(script, material / "plain", tmp_path / "short.txt", monkeypatch=monkeypatch, capsys=capsys)


def test_read_depth_weights_prints_what_every_mixture_takes(material, tmp_path, monkeypatch, capsys):
    figure = tmp_path / "weights.png"
    arguments = [material / "attnres", material / "text.txt", figure]
    printed = run("read_depth_weights.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert "5 decoder layers, residual_mode block" in printed
    shares = re.search(r"output: 4 sources, mean weights ([\d. ]+)\n", printed)[1].split()
    assert abs(sum(map(float, shares)) - 1) < 0.05
    assert len(re.findall(r"layer \d (?:attention|MLP): newest source", printed)) == 10
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_read_depth_weights_without_paths_says_how_it_is_run(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="python examples/read_depth_weights.py"):
        run("read_depth_weights.py", monkeypatch=monkeypatch, capsys=capsys)


TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] + '; ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize("script", ["sft_trl.py", "dpo_trl.py", "grpo_trl.py"])
def test_trls_trainers_train_and_save_a_folder_that_loads(script, material, tmp_path, monkeypatch, capsys):
    question = [{"role": "user", "content": "what is it?"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("depth", "width")]
    row = {
        "sft_trl.py": {"messages": question + answers[0]},
        "dpo_trl.py": {"prompt": question, "chosen": answers[0], "rejected": answers[1]},
        "grpo_trl.py": {"prompt": question},
    }[script]
    (tmp_path / "data.jsonl").write_text((json.dumps(row) + "\n") * 8)
    folder = tmp_path / "model"
    shutil.copytree(material / "attnres", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    arguments = [folder, tmp_path / "data.jsonl", "--out", tmp_path / "out", "--steps", 2, "--learning-rate", "1e-2"]
    arguments += ["--new-tokens", 4] if script == "grpo_trl.py" else []
    printed = run(script, *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert re.search(r"(loss|reward): -?[\d.]+ first, -?[\d.]+ after 2 steps", printed)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").depth_mixer.output_norm.query.any()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_opens_with_its_command_and_is_listed(script):
    text = (EXAMPLES / script).read_text()
    assert re.match(rf'"""[^\n]+\n\n    (python|torchrun [^\n]+) examples/{script} ', text)
    assert f"]({script})" in (EXAMPLES / "README.md").read_text()
