"""Tests `attnres dynamics`: how it reads what trainings logged, and its messages when something is wrong."""

import json
import os

import matplotlib.image
import pytest

from attnres import cli
from attnres.analysis.dynamics_runs import read_runs


def entry(step, layers=3, scale=1.0, **others):
    """A line of a Trainer's log."""
    rms = {f"depth/output_rms/layer_0{i}": scale * (i + 1) for i in range(layers)}
    gradients = {f"depth/gradient_norm/layer_0{i}": scale / (i + 1) for i in range(layers)}
    return {**rms, **gradients, "depth/entropy/output": 0.5, "depth/query_norm/output": 0.25, "step": step, **others}


def save(folder, history, global_step=20, **others):
    folder.mkdir(parents=True, exist_ok=True)
    state = {"global_step": global_step, "log_history": history, **others}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


HISTORY = [
    {"loss": 3.5, "step": 5},
    {"eval_loss": 3.0, "step": 5},
    entry(10),
    {"eval_loss": 2.5, "step": 10},
    entry(20, scale=2.0),
    {"eval_loss": 2.0, "step": 20},
    {"train_runtime": 1.0, "step": 20},
]


def test_the_last_measurement_and_all_validation_losses_are_read(tmp_path):
    (run,) = read_runs([save(tmp_path / "one", HISTORY)])
    assert run.name == "one" and run.step == 20
    assert run.output_rms == [2, 4, 6] and run.gradient_norm == [2, 1, 2 / 3]
    assert run.entropy == {"output": 0.5} and run.query_norm == {"output": 0.25}
    assert run.validation == {"steps": [5, 10, 20], "loss": [3.0, 2.5, 2.0]}


@pytest.mark.parametrize(("step", "found"), [(10, 10), (19, 10), (20, 20), (1000, 20)])
def test_step_chooses_the_last_measurement_up_to_it(tmp_path, step, found):
    (run,) = read_runs([save(tmp_path, HISTORY)], step)
    assert run.step == found


@pytest.mark.parametrize("newest", ["folder", "checkpoint-10", "checkpoint-9"])
def test_the_state_with_the_most_steps_counts(tmp_path, newest):
    save(tmp_path / "checkpoint-9", [entry(9)], global_step=9)
    if newest != "checkpoint-9":
        save(tmp_path / "checkpoint-10", [entry(10)], global_step=10)
    save(tmp_path, [entry(12 if newest == "folder" else 3)], global_step=12 if newest == "folder" else 3)
    (tmp_path / "checkpoint-99").mkdir()  # one that is being written
    (run,) = read_runs([tmp_path])
    assert run.step == {"folder": 12, "checkpoint-10": 10, "checkpoint-9": 9}[newest]


def test_a_damaged_older_checkpoint_does_no_harm(tmp_path):
    for step in (9, 10):
        save(tmp_path / f"checkpoint-{step}", [entry(step)], global_step=step)
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text("{")
    (run,) = read_runs([tmp_path])
    assert run.step == 10


def test_runs_are_named_by_as_much_of_their_path_as_tells_them_apart(tmp_path):
    folders = [save(tmp_path / name, HISTORY) for name in ("a/run", "b/run", "c/other")]
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run", "c/other"]
    assert [run.name for run in read_runs([folders[2] / "."])] == ["other"]


def test_values_that_are_missing_or_not_finite_are_gaps(tmp_path):
    history = [entry(10, **{"depth/output_rms/layer_01": float("nan"), "depth/gradient_norm/layer_02": float("-inf")})]
    del history[0]["depth/output_rms/layer_00"]
    history.append({"eval_loss": float("inf"), "step": 10})
    (run,) = read_runs([save(tmp_path, history)])
    assert run.output_rms == [None, None, 3] and run.gradient_norm == [1, 0.5, None]
    assert run.validation == {"steps": [], "loss": []}


def test_the_command_draws_runs_side_by_side_and_writes_their_numbers(tmp_path, capsys):
    first, second = (save(tmp_path / name, HISTORY) for name in ("_plain", "block $\\x$"))
    out = tmp_path / "made" / "figure"
    assert cli.main(["dynamics", str(first), str(second), "--step", "15", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert "| _plain | 10 | 2 (20) | 1 to 3 | 3 | 1 to 0.3333 |" in captured.out
    assert "wrote dynamics.json, dynamics.png" in captured.err
    assert matplotlib.image.imread(out / "dynamics.png").shape[1] == 2100
    written = json.loads((out / "dynamics.json").read_text())
    assert [run["name"] for run in written] == ["_plain", "block $\\x$"]
    assert written[0]["output_rms"] == [1, 2, 3] and written[0]["step"] == 10
    assert sorted(path.name for path in out.iterdir()) == ["dynamics.json", "dynamics.png"]


def test_a_run_that_was_not_evaluated_is_drawn_and_named(tmp_path, capsys):
    run = save(tmp_path / "alone", [entry(10)])
    assert cli.main(["dynamics", str(run), "--out", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "alone: has no eval_loss; evaluate during training (eval_strategy=" in captured.err
    assert "| alone | 10 | none |" in captured.out


def refused(capsys, *arguments):
    """The single line on stderr of a command that ends with status 2 and writes nothing."""
    assert cli.main(["dynamics", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("attnres: error: ")
    return captured.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a state that Trainer saved"),
        (b"\xff\xfe", "not a state that Trainer saved"),
        (b"[" * 100_000, "not a state that Trainer saved"),
        (b"[]", "not a state that Trainer saved"),
        (b'{"log_history": []}', "or a damaged one (KeyError: 'global_step')"),
        (b'{"global_step": null, "log_history": []}', "or a damaged one (TypeError: "),
        (b'{"global_step": 1, "log_history": []}', "no depth dynamics were logged; train with Trainer("),
        (b'{"global_step": 1, "log_history": [{"loss": 1, "step": 1}]}', "no depth dynamics were logged"),
        (b'{"global_step": 1, "log_history": [7]}', "or a damaged one (AttributeError: 'int'"),
        (b'{"global_step": 1, "log_history": [{"eval_loss": 1}]}', "or a damaged one (KeyError: 'step')"),
        (b'{"global_step": 1, "log_history": [{"step": 1, "eval_loss": "high"}]}', "a damaged one (TypeError: must be"),
    ],
)
def test_a_damaged_or_useless_state_is_one_line(tmp_path, capsys, content, message):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "trainer_state.json").write_bytes(content)
    error = refused(capsys, folder, "--out", tmp_path / "out")
    assert message in error and "trainer_state.json" in error
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_state_says_how_to_get_one(tmp_path, capsys):
    assert "let the Trainer save a checkpoint" in refused(capsys, tmp_path)
    assert "not a folder; RUN is the output_dir of a Trainer" in refused(capsys, tmp_path / "nothing")


def test_a_step_before_the_first_measurement_names_it(tmp_path, capsys):
    assert "the first measurement is at step 10" in refused(capsys, save(tmp_path, HISTORY), "--step", 9)


def test_an_output_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    run = save(tmp_path / "run", HISTORY)
    (tmp_path / "file").write_text("")
    assert "file, not a folder; choose another place" in refused(capsys, run, "--out", tmp_path / "file")


def test_a_folder_whose_name_does_not_print_is_drawn_with_its_code(tmp_path, capsys):
    folder = save(tmp_path / os.fsdecode(b"a\n\xff"), HISTORY)
    assert cli.main(["dynamics", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert "| a\\n\\udcff | 20 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "dynamics.json").read_text())[0]["state"].isprintable()
