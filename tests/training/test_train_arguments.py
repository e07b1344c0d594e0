"""Tests the parsing of command lines and YAML files, and the messages for mistakes in them."""

import pytest
from transformers import TrainingArguments

from attnres.cli import main
from attnres.training.arguments import RULES, parse


def write(path, text):
    path.write_text(text)
    return str(path)


def of(*words, data=True):
    return parse(["model", *(["--data", "book.txt"] if data else []), *words])


@pytest.mark.parametrize("name", ["--learning-rate", "--learning_rate"])
@pytest.mark.parametrize("joined", [False, True])
def test_names_are_taken_with_either_dash(name, joined):
    assert of(*([f"{name}=3e-4"] if joined else [name, "3e-4"])).training.learning_rate == 3e-4


def test_trainers_name_of_the_folder_is_taken():
    parsed = of("--output-dir", "runs/a")
    assert parsed.arguments.out == parsed.training.output_dir == "runs/a"


def test_yaml_has_the_same_names_and_flags_win(tmp_path):
    path = write(
        tmp_path / "run.yaml",
        """
        model: here
        data: [a.jsonl, b.jsonl]
        learning-rate: 3e-4
        max_steps: 7
        bf16: false
        eval_strategy: no
        save_strategy: no
        lr_scheduler_type: linear
        train: depth
        no_depth_dynamics: true
        lr_scheduler_kwargs: {}
        include_for_metrics: [loss]
        report_to: [none]
        run_name:
        """,
    )
    run = parse(["--config", path, "--max-steps", "9", "--data", "c.txt"])
    assert (run.model, run.arguments.data, run.arguments.train) == ("here", ["c.txt"], "depth")
    assert (run.training.learning_rate, run.training.max_steps) == (3e-4, 9)
    assert run.training.save_strategy == run.training.eval_strategy == "no"
    assert run.training.lr_scheduler_type == "linear"
    assert not run.arguments.depth_dynamics
    assert run.training.report_to == [] and run.training.include_for_metrics == ["loss"]
    assert parse(["there", "--config", path]).model == "there"
    assert parse(["--config", path]).arguments.data == ["a.jsonl", "b.jsonl"]


def test_data_may_be_said_several_times():
    assert of("--data", "c.jsonl", "d.jsonl").arguments.data == ["book.txt", "c.jsonl", "d.jsonl"]


def test_every_field_of_training_arguments_is_a_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for name in TrainingArguments.__dataclass_fields__.values():
        if name.init:
            assert f"--{name.name.replace('_', '-')} " in said, name.name


@pytest.mark.parametrize(
    ("words", "kind", "warmup"),
    [
        ([], "cosine_with_min_lr", 0.05),
        (["--schedule", "wsd"], "warmup_stable_decay", 0.05),
        (["--schedule", "wsd", "--warmup-steps", "3"], "warmup_stable_decay", 3),
        (["--lr-scheduler-type", "linear"], "linear", 0),
    ],
)
def test_a_schedule_has_a_warm_up_and_transformers_own_name(words, kind, warmup):
    training = of(*words).training
    assert (training.lr_scheduler_type, training.warmup_steps) == (kind, warmup)


def test_held_out_data_are_evaluated_as_often_as_checkpoints_are_saved_unless_said_otherwise():
    assert of().training.eval_strategy == "no"
    training = of("--eval-fraction", "0.1", "--save-steps", "30").training
    assert (training.eval_strategy, training.eval_steps) == ("steps", 30)
    training = of("--eval-data", "x.txt", "--eval-steps", "7").training
    assert (training.eval_strategy, training.eval_steps) == ("steps", 7)
    assert of("--eval-data", "x.txt", "--eval-strategy", "epoch").training.eval_strategy == "epoch"


MISTAKES = {
    "--lerning-rate 1": "unknown argument --lerning-rate; did you mean --learning-rate?",
    "--learning-rate fast": "argument --learning-rate: invalid float value: 'fast'",
    "--learning-rate nan": "--learning-rate must be above 0, got nan",
    "--max-steps 0": "--max-steps must be at least 1, got 0",
    "--train some": "argument --train: invalid choice: 'some'",
    "--bf16 --fp16": "At most one of fp16 and bf16",
    "--lr-scheduler-kwargs {a": "--lr-scheduler-kwargs: must be a JSON object, got {a",
    "--liger-kernel-config [1]": "must be a JSON object, got [1]",
    "--streaming --max-steps 9 --eval-fraction 0.1": "--eval-fraction does not work with --streaming",
    "--eval-fraction 0.1 --eval-data x": "--eval-fraction excludes --eval-data and --eval-split; leave one out",
    "--schedule wsd --lr-scheduler-type linear": "--schedule excludes --lr-scheduler-type; leave one out",
    "--optimizer muon --optim sgd": "--optimizer muon excludes --optim and --optim-args; leave one out",
    "--optimizer muon --train lora": "--optimizer muon needs --train all",
    "--out a --output-dir b": "--out and --output-dir are the same; leave one out",
    "--lora-rank 4": "--lora-... needs --train lora",
    "--resume-from-checkpoint a": "use --resume",
    "--resume --save-only-model": "--resume needs what --save-only-model leaves out",
    "--train lora --push-to-hub": "use `attnres card --push`",
    "extra": "unknown argument extra",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(words, capsys):
    assert main(["train", "model", *words.split(), "--data", "book.txt"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("attnres: error: ") and MISTAKES[words] in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("lerning_rate: 1", "unknown argument --lerning-rate; did you mean --learning-rate?"),
        ("learning_rate: fast", "argument --learning-rate: invalid float value: 'fast'"),
        ("learning_rate: [1, 2]", "argument --learning-rate: invalid float value: '[1, 2]'"),
        ("bf16: perhaps", "Truthy value expected: got perhaps"),
        ("no_depth_dynamics: 3", "argument --no-depth-dynamics: ignored explicit argument '3'"),
        ("- a", "must have lines of names and values, such as learning_rate: 3e-4"),
        ("", "must have lines of names and values"),
        ("a: [", "while parsing a flow node"),
        (None, "No such file or directory"),
    ],
)
def test_a_mistake_in_yaml_is_one_line_that_names_the_file(tmp_path, capsys, content, said):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content)
    assert main(["train", "model", "--data", "book.txt", "--config", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"attnres: error: --config {path}: ") and said in line


@pytest.mark.parametrize("words", [[], ["model"]])
def test_what_is_missing_is_asked_for(words, capsys):
    assert main(["train", *words]) == 2
    assert ("the first argument must be a MODEL" if not words else "--data is missing") in capsys.readouterr().err


@pytest.mark.parametrize("name", RULES)
def test_a_number_out_of_its_range_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be"):
        of(f"--{name.replace('_', '-')}=-1")
