"""Tests that a run with NaN or infinite numbers stops at once and names its last good checkpoint."""

import pytest
import torch
from tiny_train import command_line, log
from transformers import Trainer

from attnres.cli import main


def checkpoints(out):
    return sorted(path.name for path in out.glob("checkpoint-*"))


def spoil_loss(monkeypatch, call, spoil, training=True):
    """Replaces the result of one call of the loss, counted from 1."""
    usual, calls = Trainer.compute_loss, []

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = usual(self, model, inputs, *args, **kwargs)
        if model.training is not training:
            return loss
        calls.append(model)
        first = loss[0] if isinstance(loss, tuple) else loss
        spoiled = spoil(first, model) if len(calls) == call else first
        return (spoiled, *loss[1:]) if isinstance(loss, tuple) else spoiled

    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)


def times_nan(loss, model):
    return loss * torch.nan


def with_nan_gradient(loss, model):
    """Adds a root at zero, whose slope is infinite, so that the product with zero is NaN."""
    return loss + (next(model.parameters()) * 0).abs().sum().sqrt()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (times_nan, "the loss is NaN or infinite"),
        (with_nan_gradient, "a gradient is NaN or infinite"),
    ],
)
def test_a_step_that_is_not_finite_ends_the_run_before_the_weights_change(
    plain, documents, tmp_path, monkeypatch, capsys, spoil, said
):
    spoil_loss(monkeypatch, 5, spoil)
    out = tmp_path / "run"
    status = main(["train", *command_line(plain, documents, out, logging_steps=100)])
    assert status == 1
    last = [line for line in capsys.readouterr().err.splitlines() if line.startswith("attnres:")]
    assert last == [f"attnres: stopped: step 5: {said}; the last good checkpoint is {out / 'checkpoint-4'}"]
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-2", "checkpoint-4", "run.json"]


def test_the_first_of_several_accumulated_batches_is_enough(plain, documents, tmp_path, monkeypatch, capsys):
    spoil_loss(monkeypatch, 4, times_nan)
    out = tmp_path / "run"
    status = main(["train", *command_line(plain, documents, out, gradient_accumulation_steps=3)])
    assert status == 1
    assert "step 2: the loss is NaN or infinite; there is no checkpoint yet" in capsys.readouterr().err
    assert checkpoints(out) == []


def test_weights_that_are_not_finite_are_not_saved(plain, documents, tmp_path, monkeypatch, capsys):
    usual = torch.optim.AdamW.step
    calls = []

    def step(self, closure=None):
        usual(self, closure)
        calls.append(self)
        if len(calls) == 4:
            with torch.no_grad():
                self.param_groups[0]["params"][-1].view(-1)[0] = torch.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    out = tmp_path / "run"
    assert main(["train", *command_line(plain, documents, out)]) == 1
    assert f"step 4: weights are NaN or infinite; the last good checkpoint is {out}" in capsys.readouterr().err
    assert checkpoints(out) == ["checkpoint-2"]


def test_a_held_out_loss_that_is_not_finite_ends_the_run_before_it_is_saved(
    plain, documents, tmp_path, monkeypatch, capsys
):
    spoil_loss(monkeypatch, 1, times_nan, training=False)
    out = tmp_path / "run"
    assert main(["train", *command_line(plain, documents, out, eval_fraction=0.1, eval_steps=2)]) == 1
    assert "step 2: the loss on the held-out data is NaN or infinite; there is no" in capsys.readouterr().err
    assert checkpoints(out) == []


def test_a_learning_rate_that_is_far_too_high_ends_the_run_by_itself(plain, documents, tmp_path, capsys):
    out = tmp_path / "run"
    line = command_line(plain, documents, out, learning_rate=1e30, warmup_steps=0, logging_steps=100)
    assert main(["train", *line]) == 1
    assert "step 2: " in capsys.readouterr().err
    assert checkpoints(out) == []


def test_a_stopped_run_is_resumed_from_its_last_good_checkpoint(plain, documents, finished, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as spoiled:
        spoil_loss(spoiled, 5, times_nan)
        assert main(["train", *command_line(plain, documents, out)]) == 1
    assert main(["train", *command_line(plain, documents, out), "--resume"]) == 0
    assert log(out) == log(finished)
