"""benchmarks/gpu.py on a CPU: the whole of it at tiny sizes, failing and overrunning stages, and an early end."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from once import once

pytest.importorskip("triton", reason="not on this platform")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
ARMS = ["plain", "block", "full"]

# In place of the script's stages: one that fails after a result, one that takes too long, and one to be interrupted.
DRIVER = """
import runpy, sys, time
module = runpy.run_path(sys.argv.pop(1))

def fails(run):
    run.emit(found=1)
    raise ValueError("a deliberate\\nfailure")

def overruns(run):
    run.emit(found=2)
    while True:
        try:
            time.sleep(60)
        except Exception:
            pass

def waits(run):
    run.emit(child=run.start("sleep", "600").pid)
    time.sleep(600)

module["STAGES"].clear()
module["STAGES"].update(fails=(1, fails), overruns=(1, overruns), waits=(300, waits))
sys.exit(module["main"]())
"""


def rows_of(out: Path) -> list[dict]:
    path = out / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    out = tmp_path_factory.mktemp("trial") / "made" / "here"
    command = [sys.executable, SCRIPT, "--tiny", "--minutes", "5", "--out", out]
    elsewhere = tmp_path_factory.mktemp("elsewhere")  # the package is not installed for the script
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return out, rows_of(out), done.stdout


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    return once(tmp_path_factory, "interrupted", interrupt)


def interrupt(out):
    """The folder, the exit status and the output of a run of `DRIVER` that is told to end in its last stage."""
    command = [sys.executable, "-c", DRIVER, SCRIPT, "--tiny", "--minutes", "5", "--out", out]
    command += ["--stages", "fails,overruns,waits"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        while process.poll() is None and not any("child" in row for row in rows_of(out)):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    return out, process.returncode, output


@pytest.mark.slow
def test_every_stage_has_results_and_nothing_is_left_out_but_what_is_not_installed(trial):
    _, rows, _ = trial
    stages = ["kernels", "overhead", "depth", "bandwidth", "training"]
    assert list(dict.fromkeys(row["stage"] for row in rows)) == stages
    left_out = [(row.get("arm"), row["left_out"].partition(" (")[0]) for row in rows if "left_out" in row]
    reason = "flash-linear-attention cannot be imported"
    assert left_out == ([] if find_spec("fla") else [("fla-fused", reason), ("fla-fused-full", reason)])


@pytest.mark.slow
def test_kernels_are_checked_in_every_dtype_and_the_gpu_tests_are_collected(trial):
    _, rows, _ = trial
    checked = {row["self_check"]: row["result"] for row in rows if "self_check" in row}
    assert checked == dict.fromkeys(("float32", "bfloat16", "float16"), "passed")
    assert [row["exit_status"] for row in rows if "tests" in row] == [0]


@pytest.mark.slow
def test_overhead_is_timed_for_every_workload_and_variant_with_the_kernels(trial):
    _, rows, _ = trial
    timed = [row for row in rows if row["stage"] == "overhead" and "ms" in row]
    workloads = ["prefill", "training step", "decode", "decode, CUDA graph"]
    assert [(row["workload"], row["arm"]) for row in timed] == [(name, arm) for name in workloads for arm in ARMS]
    assert all(row["ms"] > 0 and row["peak_gib"] > 0 and row["mixed_by"] == "triton" for row in timed)
    assert all(row["over_plain"] == 1 for row in timed if row["arm"] == "plain")


@pytest.mark.slow
def test_variants_are_compared_with_the_pseudo_code_before_they_are_timed(trial):
    _, rows, _ = trial
    checks = [(index, row) for index, row in enumerate(rows) if "check" in row]
    assert [row["stage"] for _, row in checks] == ["overhead", "depth"]
    for index, row in checks:
        assert 0 < row["block"] < 1e-3 and 0 < row["full"] < 1e-3
        assert index < min(i for i, each in enumerate(rows) if each["stage"] == row["stage"] and "over_plain" in each)


@pytest.mark.slow
def test_the_depth_part_stands_beside_what_others_published(trial):
    _, rows, _ = trial
    depth = [row for row in rows if row["stage"] == "depth"]
    assert [(row["ms"], row["peak_gib"]) for row in depth if "published" in row] == [(184, 27.5), (4061, 60.9)]
    measured = [row["arm"] for row in depth if "over_plain" in row and not row["arm"].startswith("fla")]
    assert measured == ["plain", "block", "full", "stacked", "stacked-full"]


@pytest.mark.slow
def test_bandwidth_is_over_that_of_a_copy(trial):
    _, rows, _ = trial
    copied = next(row["gb_per_s"] for row in rows if "copy" in row)
    measured = [row for row in rows if "sources" in row]
    assert [row["sources"] for row in measured] == [2, 17]
    for row in measured:
        for name in ("forward", "backward"):
            assert row[f"{name}_over_copy"] == pytest.approx(row[f"{name}_gb_per_s"] / copied)


@pytest.mark.slow
def test_training_starts_from_the_same_loss_and_all_arms_see_the_same_bytes(trial):
    _, rows, _ = trial
    first, last = (row for row in rows if row["stage"] == "training")
    assert (first["steps"], last["steps"], last["bytes"]) == (0, 2, 6)
    assert all(first[arm] == pytest.approx(first["plain"], rel=1e-3) and last[arm] != first[arm] for arm in ARMS)


@pytest.mark.slow
def test_the_table_is_printed_and_has_every_result(trial):
    out, rows, printed = trial
    table = (out / "table.md").read_text(encoding="utf-8")
    assert printed == table + "\n"
    lines = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    headers = sum(line.startswith("| ---") for line in table.splitlines())
    assert len(lines) - headers + table.count("Left out: ") == len(rows)
    assert sorted(path.name for path in out.iterdir()) == ["results.jsonl", "table.md", "tests.log"]


def test_a_stage_that_fails_or_overruns_is_written_down_and_the_next_goes_on(interrupted):
    out, _, _ = interrupted
    rows = rows_of(out)
    assert [row["stage"] for row in rows] == ["fails", "fails", "overruns", "overruns", "waits", "waits"]
    assert rows[0]["found"] == 1 and rows[1]["left_out"] == "the rest, ValueError: a deliberate failure"
    assert rows[2]["found"] == 2 and "were used up" in rows[3]["left_out"]


def test_partial_results_survive_a_sigterm_and_no_process_is_left(interrupted):
    out, status, output = interrupted
    assert status == 128 + signal.SIGTERM
    rows = rows_of(out)
    assert rows[-1] == {"stage": "waits", "left_out": "the rest, as the run was stopped"}
    with pytest.raises(ProcessLookupError):
        os.kill(rows[-2]["child"], 0)
    assert output == (out / "table.md").read_text(encoding="utf-8") + "\n"
    assert "| found |" in output and "Left out: the rest, as the run was stopped" in output


@pytest.fixture
def main(monkeypatch):
    """The script's entry point in this process, for what ends before anything runs."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")

    def run(*arguments) -> int:
        monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
        return runpy.run_path(str(SCRIPT))["main"]()

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiny", "--stages", "depth,width"], "got 'width'"),
        (["--tiny", "--minutes", "0"], "--minutes must be positive; got 0.0"),
    ],
)
def test_options_out_of_range_are_refused_and_nothing_is_written(main, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as raised:
        main(*arguments, "--out", tmp_path / "out")
    assert raised.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_only_the_trial_runs(main, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as raised:
        main("--out", tmp_path / "out")
    assert raised.value.code == 2 and "torch sees no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_results_of_another_run_are_not_touched(main, tmp_path, capsys):
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit) as raised:
        main("--tiny", "--out", tmp_path)
    assert raised.value.code == 2 and "choose another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def test_what_was_left_out_stands_in_the_table_with_its_reason(main):
    tables = runpy.run_path(str(SCRIPT))["tables"]
    rows = [
        {"stage": "one", "arm": "a|b", "ms": 1.23456},
        {"stage": "one", "arm": "c", "left_out": "out of memory"},
        {"stage": "one", "arm": "d", "ms": 2.0},
    ]
    assert tables(rows) == (
        "# GPU measurements\n\n## one\n\nLeft out: arm c: out of memory\n\n"
        "| arm | ms |\n| --- | --- |\n| a/b | 1.235 |\n| d | 2 |\n"
    )
