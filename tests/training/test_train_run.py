"""Tests whole runs of `attnres train`: what they train, write and print, and what they refuse."""

import json
import math
import shutil

import pytest
import torch
from helpers import random_attnres
from once import once
from tiny_train import (
    LENGTH,
    byte_tokenizer,
    command_line,
    loaded,
    log,
    same_weights,
    train,
    weights,
    words,
    write_lines,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from attnres import AttnResForCausalLM
from attnres.cli import main
from attnres.training.command import run
from attnres.training.run_folder import last_checkpoint
from attnres.training.trainer import RunTrainer

# PEFT reads the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def moved(out, start):
    """Returns the names of the saved tensors that training has changed."""
    before, after = weights(start), weights(out)
    return {name for name, tensor in after.items() if name not in before or not torch.equal(tensor, before[name])}


@pytest.fixture(scope="module")
def converted(plain, tmp_path_factory):
    """The lossless conversion of the plain checkpoint, as a folder."""
    folder = tmp_path_factory.mktemp("converted")
    AttnResForCausalLM.from_backbone(plain, num_blocks=2).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, for a test to change."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def learnt(plain, tmp_path_factory):
    """The folder of a run that is long enough to learn something."""

    def make(top):
        data = write_lines(top / "data.jsonl", [words(60, number) for number in range(30)])
        options = {"max_steps": 40, "save_steps": 20, "eval_fraction": 0.1, "per_device_train_batch_size": 8}
        return train(plain, data, top / "run", num_blocks=2, depth_dynamics_steps=10, logging_steps=20, **options)

    return once(tmp_path_factory, "learnt", make)


def test_training_lowers_both_losses(learnt):
    assert log(learnt)[40] < log(learnt)[20] < 5.2
    assert sorted(log(learnt, "eval_loss")) == [20, 40]
    assert log(learnt, "eval_loss")[40] < log(learnt, "eval_loss")[20]


def test_the_folder_of_a_run_is_a_checkpoint_with_its_tokenizer(learnt):
    model = AutoModelForCausalLM.from_pretrained(learnt)
    assert isinstance(model, AttnResForCausalLM) and model.config.num_blocks == 2
    tokenizer = AutoTokenizer.from_pretrained(learnt)
    ids = tokenizer(words(5), return_tensors="pt")["input_ids"]
    assert model(ids, labels=ids).loss < 4.5
    assert {path.name for path in learnt.glob("checkpoint-*")} == {"checkpoint-20", "checkpoint-40"}
    assert same_weights(learnt, learnt / "checkpoint-40")


def test_dynamics_reads_the_folder_of_a_run(learnt, tmp_path, capsys):
    assert main(["dynamics", str(learnt), "--out", str(tmp_path)]) == 0
    assert "| 40" in capsys.readouterr().out
    assert json.loads((learnt / "trainer_state.json").read_text())["global_step"] == 40


def test_eval_reads_the_folder_of_a_run(learnt, tmp_path, capsys):
    line = ["eval", str(learnt), "--suite", "sample", "--out", str(tmp_path), "--limit", "1", "--max-length", "200"]
    assert main(line) == 0


def test_what_is_said_goes_to_stdout_and_progress_to_stderr(plain, documents, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *command_line(plain, documents, out, eval_fraction=0.1, disable_tqdm="false")]) == 0
    said = capsys.readouterr()
    first, *others = said.out.splitlines()
    assert first.startswith(f"{out}: 6 steps, training loss ") and ", held-out loss " in first
    assert others == [f"next: attnres eval {out}", f"      attnres dynamics {out}"]
    assert "step 3: loss " in said.err and "6/6" in said.err and "depth/" not in said.err


def test_without_dynamics_none_are_logged(plain, documents, tmp_path, capsys):
    out = train(plain, documents, tmp_path / "run", no_depth_dynamics=True)
    assert "attnres dynamics" not in capsys.readouterr().out
    assert "depth/" not in (out / "trainer_state.json").read_text()


def test_a_plain_and_a_converted_checkpoint_train_the_same(plain, converted, documents, tmp_path):
    one = train(plain, documents, tmp_path / "one", num_blocks=2)
    other = train(converted, documents, tmp_path / "other")
    assert log(one) == log(other) and same_weights(one, other)


def test_a_configuration_starts_from_random_weights_of_its_seed(plain, documents, tmp_path):
    config = plain / "config.json"
    options = {"residual_mode": "full", "save_strategy": "no", "max_steps": 2}
    one, same, other = (
        train(config, documents, tmp_path / str(number), **options, seed=seed) for number, seed in enumerate((1, 1, 2))
    )
    assert log(one) == log(same) != log(other)
    assert loaded(one).config.residual_mode == "full"
    assert math.isclose(log(one)[1], math.log(257), rel_tol=0.1)
    assert not list(one.glob("checkpoint-*"))


def test_a_configuration_takes_the_tokenizer_that_is_named(plain, documents, tmp_path):
    (tmp_path / "config.json").write_text((plain / "config.json").read_text())
    with pytest.raises(ValueError, match="has no tokenizer that can be loaded .*; use --tokenizer"):
        train(tmp_path / "config.json", documents, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(tmp_path / "config.json", documents, tmp_path / "run", tokenizer=plain)


def test_the_depth_mixer_alone_is_trained(plain, converted, documents, tmp_path):
    out = train(plain, documents, tmp_path / "run", train="depth", num_blocks=2, weight_decay=0.1)
    assert moved(out, converted) and all("_res_" in name for name in moved(out, converted))


@pytest.fixture
def created(monkeypatch):
    """The models and optimizers of all runs of a test."""
    seen, create = [], RunTrainer.create_optimizer

    def note(self, model=None):
        seen.append((self.model, create(self, model)))
        return seen[-1][1]

    monkeypatch.setattr(RunTrainer, "create_optimizer", note)
    return seen


@pytest.mark.parametrize("options", [{"optimizer": "muon"}, {"train": "lora"}], ids=str)
def test_the_depth_mixer_has_the_learning_rate_that_is_given_for_it(plain, documents, tmp_path, created, options):
    train(plain, documents, tmp_path / "run", num_blocks=2, max_steps=2, depth_learning_rate=2e-4, **options)
    model, optimizer = created[0]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    initial = {names[id(each)]: group["initial_lr"] for group in optimizer.param_groups for each in group["params"]}
    assert initial.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, rate in initial.items():
        assert rate == (2e-4 if "depth_mixer" in name else 3e-3), name
    assert sum("depth_mixer" in name for name in initial) == 6
    assert all(group["params"] for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("model", "options", "rate"),
    [
        ("converted", {}, 1e-4),
        ("converted", {"learning_rate": 2e-5}, 2e-5),
        ("converted", {"train": "depth"}, 3e-3),
        ("new", {}, 3e-3),
    ],
)
def test_the_depth_mixer_of_a_converted_model_learns_slowly(plain, documents, tmp_path, created, model, options, rate):
    source = plain if model == "converted" else plain / "config.json"
    train(source, documents, tmp_path / "run", num_blocks=2, max_steps=2, **options)
    trained, optimizer = created[0]
    depth = {id(parameter) for name, parameter in trained.named_parameters() if "depth_mixer" in name}
    rates = {group["initial_lr"] for group in optimizer.param_groups for each in group["params"] if id(each) in depth}
    assert rates == {rate}


def test_lora_trains_adapters_with_the_depth_mixer_and_leaves_a_merged_model(plain, converted, documents, tmp_path):
    """PEFT would load the adapter of a converted model onto the plain model, without the depth mixer."""
    from peft import AutoPeftModelForCausalLM

    options = {"train": "lora", "lora_rank": 4, "depth_learning_rate": 1e-2}
    out = train(plain, documents, tmp_path / "run", num_blocks=2, **options)
    changed = moved(out, converted)
    assert {name for name in changed if "_res_" not in name} == {
        name for name in weights(out) if name.endswith("_proj.weight") and "_res_" not in name
    }
    assert any("_res_proj" in name for name in changed)
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["r"] == 4
    again = train(converted, documents, tmp_path / "again", **options)
    assert (out / "base").exists() and not (again / "base").exists()
    ids = torch.arange(1, 30).unsqueeze(0)
    for folder in (out, again):
        adapted = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()
        with torch.no_grad():
            torch.testing.assert_close(adapted(ids).logits, loaded(folder).eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_damaged_checkpoint_is_named_before_a_run_is_resumed(plain, documents, copied, capsys):
    last = copied / "checkpoint-6"
    for name in ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"):
        content = (last / name).read_bytes()
        (last / name).write_bytes(content[: len(content) // 2])
        assert main(["train", *command_line(plain, documents, copied), "--resume"]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("attnres: ")]
        assert f"{last / name}: is damaged" in line and f"remove {last} to resume from the checkpoint before" in line
        (last / name).write_bytes(content)
    shutil.rmtree(last)
    run([*command_line(plain, documents, copied), "--resume"])


def test_a_stream_without_text_to_evaluate_on_is_refused_before_training(plain, documents, tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty\.txt: has too little text for one held-out sequence"):
        train(plain, documents, tmp_path / "run", eval_data=tmp_path / "empty.txt", streaming=True)
    assert not (tmp_path / "run").exists()


def test_lora_without_peft_names_the_command_that_installs_it(plain, documents, tmp_path, monkeypatch):
    monkeypatch.setattr("attnres.training.lora.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'attention-residuals\[train\]'"):
        train(plain, documents, tmp_path / "run", train="lora")


# transformers 5.23 renames the argument.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)


@pytest.mark.parametrize("options", [{"bf16": True}, {CHECKPOINTING: True}, {"dtype": "bfloat16"}])
def test_a_run_in_less_memory_learns_nearly_the_same(plain, documents, finished, tmp_path, options):
    usual = log(finished)
    spared = log(train(plain, documents, tmp_path / "spared", **options))
    tolerance = 1e-6 if CHECKPOINTING in options else 0.02
    assert usual.keys() == spared.keys()
    for step, loss in usual.items():
        assert math.isclose(spared[step], loss, rel_tol=tolerance)
    assert loaded(tmp_path / "spared").dtype == (torch.bfloat16 if "dtype" in options else torch.float32)


def test_evaluation_changes_nothing_in_training(plain, documents, finished, tmp_path):
    """The model has dropout, so that a random number drawn by the evaluation would show."""
    held_out = write_lines(tmp_path / "held_out.jsonl", [words(40, 99)])
    evaluated = train(plain, documents, tmp_path / "evaluated", eval_data=held_out, eval_steps=1, eval_on_start=True)
    assert log(finished) == log(evaluated) and same_weights(finished, evaluated)
    assert len(log(evaluated, "eval_loss")) == 7


def test_the_last_sequences_are_held_out(plain, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [words(50, 1), words(50, 2)])
    tokens = sum(len(byte_tokenizer()(words(50, seed))["input_ids"]) + 1 for seed in (1, 2)) // LENGTH
    options = {"train_sampling_strategy": "sequential", "max_steps": 1, "per_device_train_batch_size": 1}
    train(plain, data, tmp_path / "run", eval_fraction=0.25, num_train_epochs=1, **options)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["epoch"] == pytest.approx(1 / (tokens - round(0.25 * tokens)))


def test_a_stream_is_evaluated_alike_each_time(plain, documents, tmp_path):
    options = {"eval_data": documents, "eval_steps": 3, "streaming": True, "learning_rate": 1e-12}
    losses = log(train(plain, documents, tmp_path / "run", **options), "eval_loss")
    assert len(losses) == 2 and math.isclose(*losses.values(), rel_tol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("cosine", {1: 0.0, 2: 1.0, 11: 0.587, 20: 0.106}),
        ("wsd", {1: 0.0, 2: 1.0, 11: 1.0, 17: 1.0, 18: 0.75, 20: 0.25}),
    ],
)
def test_a_schedule_has_its_shape(plain, documents, tmp_path, schedule, rates):
    out = train(plain, documents, tmp_path / "run", schedule=schedule, max_steps=20, learning_rate=1e-3)
    found = log(out, "learning_rate")
    for step, rate in rates.items():
        assert found[step] == pytest.approx(rate * 1e-3, abs=1e-6), step


def test_the_best_checkpoint_becomes_the_model(plain, documents, tmp_path):
    options = {"load_best_model_at_end": True, "save_total_limit": 1, "learning_rate": 0.3}  # the loss gets worse
    out = train(plain, documents, tmp_path / "run", eval_fraction=0.2, eval_steps=2, **options)
    losses = log(out, "eval_loss")
    best = out / f"checkpoint-{min(losses, key=losses.get)}"
    assert json.loads((out / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    assert same_weights(out, best)


def test_a_finished_run_is_resumed_to_what_it_was(plain, documents, finished, copied, capsys):
    # What leaves the weights as they are may change.
    options = {"logging_steps": 3, "save_steps": 5, "save_total_limit": 2, "no_depth_dynamics": True}
    assert main(["train", *command_line(plain, documents, copied, **options), "--resume"]) == 0
    assert f"{copied}: 6 steps" in capsys.readouterr().out
    assert same_weights(copied, finished)
    assert {path.name for path in copied.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


CHANGES = {
    "learning_rate": (1e-4, "--learning-rate was 0.003 when the run began and is 0.0001 now"),
    "max_steps": (8, "--max-steps was 6"),
    "sequence_length": (8, "--sequence-length was 16"),
    "num_blocks": (2, "--num-blocks was None"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_is_not_resumed_as_another_one(finished, plain, documents, name):
    value, said = CHANGES[name]
    with pytest.raises(ValueError) as raised:
        run([*command_line(plain, documents, finished, **{name: value}), "--resume"])
    assert str(raised.value).startswith(f"{finished}: {said}")
    assert str(raised.value).endswith("resume with the old value, or start a new run with another --out")


def test_a_run_is_not_resumed_on_other_data_or_with_another_tokenizer(copied, plain, documents, tmp_path):
    text = documents.read_text()
    same, other = tmp_path / "same.jsonl", tmp_path / "other.jsonl"
    same.write_text(text)
    other.write_text(text.replace("tree", "wood"))
    run([*command_line(plain, same, copied), "--resume"])  # data are compared by content
    with pytest.raises(ValueError, match=": training data was"):
        run([*command_line(plain, other, copied), "--resume"])
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "A"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=": tokenizer was"):
        run([*command_line(plain, documents, copied, tokenizer=tmp_path / "tokenizer"), "--resume"])


def test_a_folder_that_only_has_the_name_of_a_checkpoint_is_not_taken(tmp_path):
    for name in ("checkpoint-9", "checkpoint-old", "unfinished/checkpoint-10"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("checkpoint-old", "unfinished/checkpoint-10"):
        (tmp_path / name / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-7"


def test_a_run_that_is_asked_to_stop_is_not_finished_and_goes_on(
    plain, documents, finished, tmp_path, monkeypatch, capsys
):
    usual = RunTrainer.training_step

    def step(self, *args, **kwargs):
        self.control.should_training_stop |= self.state.global_step == 3
        return usual(self, *args, **kwargs)

    out = tmp_path / "run"
    with monkeypatch.context() as stopping:
        stopping.setattr(RunTrainer, "training_step", step)
        assert main(["train", *command_line(plain, documents, out)]) == 1
    said = f"attnres: stopped: step 4 of 6 was the last; the last good checkpoint is {out}/checkpoint-4"
    assert said in capsys.readouterr().err
    assert not (out / "config.json").exists()
    run([*command_line(plain, documents, out), "--resume"])
    assert log(out) == log(finished)


def test_a_folder_with_something_in_it_is_left_alone(plain, documents, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["train", *command_line(plain, documents, tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}: is not empty; use --resume to continue the run in it, or start in another --out" in said
    assert main(["train", *command_line(plain, documents, tmp_path), "--resume"]) == 2
    assert "holds no run to resume" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


MISTAKES = {
    "model": ("nowhere", "nowhere: is no checkpoint folder, hub id or config.json"),
    "data": ("/nowhere.txt", "/nowhere.txt: no such file or folder"),
    "sequence_length": (300, "--sequence-length 300: the model takes at most 256 tokens"),
    "num_blocks": (9, "num_blocks must be a whole number between 1 and num_hidden_layers=3, got 9"),
    "lr_scheduler_kwargs": ('{"foo": 1}', "--lr-scheduler-kwargs {'foo': 1}: "),
    "adam_beta1": (2, "Invalid beta parameter"),
    "eval_fraction": (0.999, "leaves none to train on"),
    "eval_strategy": ("steps", "you didn't pass an `eval_dataset`"),
    "data_config": ("x", "a file has no configurations and splits"),
    "eval_split": ("x", "a file has no configurations and splits"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_nothing_is_written_where_a_mistake_is_found(plain, documents, tmp_path, capsys, name):
    value, said = MISTAKES[name]
    places = {"model": plain, "data": documents, name: value}
    options = {name: value} if name not in ("model", "data") else {}
    line = command_line(places["model"], places["data"], tmp_path / "run", **options)
    assert main(["train", *line]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("attnres: ")]
    assert said in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_model_without_depth_mixer_has_none_to_train(tmp_path, documents):
    random_attnres("qwen3", "standard", vocab_size=257, layers=2).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="residual_mode standard has no depth mixer; use --train all"):
        train(tmp_path / "model", documents, tmp_path / "run", train="depth")
    train(tmp_path / "model", documents, tmp_path / "run", max_steps=2)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, documents):
    random_attnres("qwen3", layers=2).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="the tokenizer has 257 tokens, but the model has 97 embeddings"):
        train(tmp_path / "model", documents, tmp_path / "run")
