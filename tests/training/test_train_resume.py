"""Tests that a killed and resumed run has the same losses and weights as an uninterrupted one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_train import command_line, log, same_weights

from attnres.training.command import run

KILLED_RUNS = Path(__file__).with_name("killed_runs.py")
ROOT = Path(__file__).parents[2]

# Options of each run and where it is killed. By default, checkpoints are written after steps 2, 4 and 6.
RUNS = {
    "a plain run": ({}, "step", 4),
    "several epochs": ({"max_steps": None, "num_train_epochs": 3, "per_device_train_batch_size": 16}, "step", 7),
    "streaming, several passes": ({"streaming": True, "max_steps": 50, "save_steps": 15}, "step", 49),
    "accumulated gradients": ({"gradient_accumulation_steps": 3, "logging_steps": 2, "save_steps": 3}, "step", 5),
    "evaluation": ({"eval_fraction": 0.2, "eval_steps": 1}, "step", 4),
    "Muon": ({"optimizer": "muon", "weight_decay": 0.1}, "step", 4),
    "experts with Muon": ({"model": "mixture", "optimizer": "muon", "weight_decay": 0.1}, "step", 4),
    "LoRA": ({"train": "lora", "lora_dropout": 0.2}, "step", 4),
    "the depth mixer in bfloat16": ({"train": "depth", "bf16": True}, "step", 4),
    "before the first checkpoint": ({}, "step", 2),
    "while the optimizer is saved": ({}, "before optimizer", 4),
    "while the generators are saved": ({}, "before generators", 4),
    "before a checkpoint has its name": ({"save_total_limit": 1}, "before rename", 4),
    "before the model is in its place": ({}, "end", None),
}


def arguments_of(name, model_of, documents, out):
    options, _, _ = RUNS[name]
    options = dict(options)
    return command_line(model_of[options.pop("model", "plain")], documents, out, **options)


@pytest.fixture(scope="module")
def model_of(plain, mixture):
    return {"plain": plain, "mixture": mixture}


@pytest.fixture(scope="module")
def killed(model_of, documents, data_cache, tmp_path_factory):
    """Folders of the killed runs, by name."""
    top = tmp_path_factory.mktemp("killed")
    folders = {name: top / str(number) for number, name in enumerate(RUNS)}
    orders = [
        {"arguments": arguments_of(name, model_of, documents, folders[name]), "at": at, "number": number}
        for name, (_, at, number) in RUNS.items()
    ]
    done = subprocess.run(
        [sys.executable, KILLED_RUNS, json.dumps(orders)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(data_cache)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folders


# PEFT reads the old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_killed_run_is_resumed_to_the_bit(killed, model_of, documents, tmp_path, subtests):
    runs = {}  # uninterrupted runs by their options, as several runs differ only in where they were killed
    for number, name in enumerate(RUNS):
        with subtests.test(name):
            resumed = killed[name]
            assert not (resumed / "config.json").exists()
            options = str(RUNS[name][0])
            if options not in runs:
                runs[options] = tmp_path / str(number)
                run(arguments_of(name, model_of, documents, runs[options]))
            whole = runs[options]
            run([*arguments_of(name, model_of, documents, resumed), "--resume"])
            assert len(log(whole)) >= 4
            assert log(resumed) == log(whole)
            assert log(resumed, "eval_loss") == log(whole, "eval_loss")
            assert same_weights(resumed, whole)
            assert not (resumed / "unfinished").exists()
