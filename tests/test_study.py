"""The study: its corpus, its fairness between arms, what makes it resumable, and the arithmetic of its report."""

import json
import os
import re
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _repository_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def grid():
    from benchmarks.study import train

    grid = yaml.safe_load((train.HERE / "grid.yaml").read_text(encoding="utf-8"))
    grid |= {"sequence_length": 13, "batch_size": 2, "evaluations": 2, "validation_sequences": 3}
    grid |= {"held_out_sequences": 5, "sizes": {"tiny": {"layers": 2, "hidden": 16, "steps": 3}}}
    sweep = {"sizes": ["tiny"], "arms": ["plain"], "seeds": [0], "learning_rates": [0.001, 0.01]}
    return grid | {"stages": [sweep, {"sizes": ["tiny"], "arms": ["plain", "block", "full"], "seeds": [1, 2]}]}


@pytest.fixture
def corpus(tmp_path):
    from benchmarks.study.corpus import build

    rng = np.random.default_rng(0)
    texts = {f"{i}.txt": " ".join(map(str, rng.integers(0, 10**6, 40))) for i in range(200)}
    folder = tmp_path / "corpus"
    folder.mkdir()
    return folder, build(texts | {"copy.txt": texts["7.txt"] + " end"}, folder, vocabulary=300)


@pytest.fixture
def inline(monkeypatch):
    from benchmarks.study import train

    class Inline:  # this process in place of others
        def __init__(self, *args, **kwargs):
            pass

        def shutdown(self):
            pass

        def submit(self, function, *arguments):
            future = Future()
            try:
                future.set_result(function(*arguments))
            except RuntimeError as error:
                future.set_exception(error)
            return future

    monkeypatch.setattr(train, "ProcessPoolExecutor", Inline)


def test_a_near_duplicate_is_removed_and_the_splits_hold_every_other_file(corpus):
    folder, manifest = corpus
    assert (manifest["files"], manifest["near_duplicates_removed"]) == (200, 1)
    ends = [int((np.load(folder / f"{split}.npy") == 0).sum()) for split in ("train", "validation", "held_out")]
    assert sum(ends) == 200
    assert all(ends)


def test_bytes_of_tokens_add_up_to_the_bytes_of_the_corpus(corpus):
    folder, manifest = corpus
    lengths = np.load(folder / "token_bytes.npy")
    read = sum(lengths[np.load(folder / f"{split}.npy")].sum() for split in ("train", "validation", "held_out"))
    assert read == manifest["bytes"]


def test_arms_see_the_same_batches_and_only_final_runs_read_the_held_out_text(grid, corpus, monkeypatch):
    from benchmarks.study.train import expand, train

    folder, _ = corpus
    opened = []
    load = np.load
    monkeypatch.setattr(np, "load", lambda path, **options: opened.append(Path(path).stem) or load(path, **options))
    runs = expand(grid)
    sweep = train(runs[0], grid, str(folder))
    assert "held_out" not in opened
    assert "held_out_loss" not in sweep
    plain, block = (train(run | {"learning_rate": 0.01}, grid, str(folder)) for run in runs[2:4])
    assert opened.count("held_out") == 2
    assert (plain["arm"], block["arm"]) == ("plain", "block")
    assert plain["batches"] == block["batches"] != sweep["batches"]
    assert plain["held_out_loss"] != block["held_out_loss"]


def test_a_size_may_replace_a_setting_of_the_grid(grid, corpus):
    from benchmarks.study.train import expand, train

    grid["sizes"]["tiny"] |= {"sequence_length": 29, "batch_size": 1}
    result = train(expand(grid)[0], grid, str(corpus[0]))
    assert (result["sequence_length"], result["tokens"]) == (29, 3 * 29)


def test_a_study_goes_on_where_it_was_and_uses_the_best_rate_of_the_plain_arm(
    grid, corpus, tmp_path, monkeypatch, inline
):
    from benchmarks.study import train

    trained = []
    losses = {0.001: 2.0, 0.01: 3.0}

    def fake(run, grid, corpus):
        trained.append(train.key(run))
        return run | {"curve": [{"validation_loss": losses[run["learning_rate"]]}], "wall_seconds": 0}

    monkeypatch.setattr(train, "train", fake)
    path = tmp_path / "results.jsonl"
    train.study(grid, path, corpus[0], 1, 1.0)
    lines = path.read_text().splitlines()
    assert len(lines) == len(set(trained)) == 8
    assert {json.loads(line)["learning_rate"] for line in lines[2:]} == {0.001}
    path.write_text("\n".join(lines[:-2]) + "\n")
    train.study(grid, path, corpus[0], 1, 1.0)
    assert trained[8:] == trained[6:8]
    assert path.read_text().splitlines() == lines


def test_a_model_takes_the_learning_rate_of_the_plain_model_that_it_names(grid):
    from benchmarks.study.train import expand, tuned_rate

    grid["arms"]["full"] |= {"rate_of": "plain, 4 layers"}
    grid["stages"][0]["arms"] = ["plain", "plain, 4 layers"]
    runs = expand(grid)
    best = {"plain": 0.001, "plain, 4 layers": 0.01}
    swept = [run for run in runs if run["sweep"]]
    results = [run | {"curve": [{"validation_loss": abs(run["learning_rate"] - best[run["arm"]])}]} for run in swept]
    assert [tuned_rate("tiny", arm, runs, results, grid) for arm in ("block", "full")] == [0.001, 0.01]
    assert tuned_rate("tiny", "full", runs, results[:-1], grid) is None


def test_a_run_that_fails_is_named_and_the_others_go_on(grid, corpus, tmp_path, monkeypatch, capsys, inline):
    from benchmarks.study import train

    def fake(run, grid, corpus):
        if run["arm"] == "block":
            raise RuntimeError("out of\nmemory")
        return run | {"curve": [{"validation_loss": run["learning_rate"]}], "wall_seconds": 0}

    monkeypatch.setattr(train, "train", fake)
    assert train.study(grid, tmp_path / "results.jsonl", corpus[0], 1, 1.0) == 2
    assert "tiny block 1 3 False failed and has to be run again: RuntimeError: out of memory" in capsys.readouterr().err
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 6


BROKEN_GRIDS = {
    "size": (
        "sizes of stage 2 of GRID must be a list of different entries, each one of tiny, got ['tine']",
        lambda g: g["stages"][1].update(sizes=["tine"]),
    ),
    "rate": ("learning_rates of stage 1", lambda g: g["stages"][0].update(learning_rates=[0.1, "high"])),
    "sweep": ("never sweeps the learning rate of plain at size 'tiny'", lambda g: g["stages"].pop(0)),
    "heads": (
        "hidden of size 'tiny' of GRID must be a multiple of 8, got 20",
        lambda g: g["sizes"]["tiny"].update(hidden=20),
    ),
    "field": ("size 'tiny' of GRID has an unknown field 'depth'", lambda g: g["sizes"]["tiny"].update(depth=2)),
    "missing": ("GRID lacks batch_size", lambda g: g.pop("batch_size")),
    "option": (
        "arm 'block' of GRID cannot be built at size 'tiny': ",
        lambda g: g["arms"]["block"].update(residual_mode="blocks"),
    ),
    "typing": ("arm 'block' of GRID has an unknown field 'mode'", lambda g: g["arms"]["block"].update(mode="full")),
    "layers": ("arm 'block' of GRID cannot be built at size", lambda g: g["arms"]["block"].update(layers_per_block=0)),
    "plain": ("has no runs of plain at size 'tiny'", lambda g: g["stages"][1].update(arms=["block"])),
    "budget": ("has learning_rates and budgets", lambda g: g["stages"][0].update(budgets=[2])),
    "large": ("steps of size 'tiny'", lambda g: g["sizes"]["tiny"].update(steps=10**400)),
    "share": ("warmup of GRID must be a share of the steps below 1, got 1.5", lambda g: g.update(warmup=1.5)),
}


@pytest.mark.parametrize("name", BROKEN_GRIDS)
def test_a_grid_that_cannot_be_trained_to_its_end_is_refused_in_a_line(
    name, grid, corpus, tmp_path, monkeypatch, capsys
):
    from benchmarks.study import train

    message, breaks = BROKEN_GRIDS[name]
    breaks(grid)
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid), encoding="utf-8")
    results = tmp_path / "results.jsonl"
    arguments = ["--grid", str(path), "--corpus", str(corpus[0]), "--results", str(results)]
    monkeypatch.setattr("sys.argv", ["train", *arguments])
    with pytest.raises(SystemExit) as exit:
        train.main()
    assert exit.value.code == 2
    assert message.replace("GRID", str(path)) in capsys.readouterr().err.splitlines()[-1]
    assert not results.exists()


@pytest.mark.parametrize("text", ["a: [", "", "- 3", "3", "\x00", None])
def test_a_file_that_is_no_grid_is_refused(text, tmp_path):
    from benchmarks.study import retrofit, train

    path = tmp_path / "grid.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    for read in (train.read_grid, retrofit.read_grid):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read(path)


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), st.lists, max_leaves=4)
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=15)
def test_no_value_in_a_grid_causes_anything_but_a_message(grid, tmp_path, value):
    from benchmarks.study.train import read_grid

    for place in (grid, grid["sizes"]["tiny"], grid["stages"][0], grid["arms"]["block"]):
        for name in list(place):
            kept = place[name]
            place[name] = value
            (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid), encoding="utf-8")
            place[name] = kept
            try:
                read_grid(tmp_path / "grid.yaml")
            except ValueError as error:
                assert "\n" not in str(error)


def test_a_line_of_results_that_is_no_run_is_named(tmp_path):
    from benchmarks.study.files import read_results

    path = tmp_path / "results.jsonl"
    for broken, said in (('{"size": ', "is not valid JSON"), ("3", "is not a run")):
        path.write_text(f'{{"size": "tiny"}}\n{broken}\n', encoding="utf-8")
        with pytest.raises(ValueError, match=f"line 2 of .*{said}"):
            read_results(path)
    path.write_text('{"size": "tiny"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 of .* lacks seed"):
        read_results(path, ["size", "seed"])


def test_a_run_is_added_after_a_last_line_without_an_end(tmp_path):
    from benchmarks.study.files import append, read_results

    path = tmp_path / "results.jsonl"
    append(path, {"seed": 1})
    path.write_bytes(path.read_bytes().rstrip())
    append(path, {"seed": 2})
    assert read_results(path) == [{"seed": 1}, {"seed": 2}]


def test_a_killed_process_costs_only_what_it_was_training(grid, corpus, tmp_path, monkeypatch):
    """The pool is one of real processes, of which the first run kills its own."""
    from benchmarks.study import train

    results = tmp_path / "results.jsonl"
    sweep = {"size": "tiny", "arm": "plain", "seed": 0, "steps": 3, "sweep": True}
    for rate in (0.001, 0.01):
        line = sweep | {"learning_rate": rate, "curve": [{"validation_loss": rate}]}
        with results.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")
    grid["stages"][1] |= {"arms": ["plain"], "seeds": [1, 2]}
    expanded = train.expand(grid)
    monkeypatch.setattr(train, "expand", lambda _: [{**expanded[2], "killer": Kill()}, *expanded[:2], expanded[3]])
    assert train.study(grid, results, corpus[0], 1, 5.0) == 1
    assert [json.loads(line)["seed"] for line in results.read_text().splitlines()[2:]] == [2]


class Kill:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_power_law_is_recovered_with_its_compute_advantage():
    from benchmarks.study.report import advantages, factor, power_law, resampled_exponents

    cost = np.array([1e3, 1e4, 1e5])
    assert power_law(cost, 7 * cost**-0.1) == pytest.approx((7, 0.1))
    seeds = {1: 7.0, 2: 7.5, 3: 6.5}
    plain = [{seed: (c, a * c**-0.1) for seed, a in seeds.items()} for c in cost]
    better = [  # as if 1.25 times the cost had been paid, or twice at the largest size
        {seed: (c, a * (gain * c) ** -0.1) for seed, a in seeds.items()}
        for c, gain in zip(cost, (1.25, 1.25, 2.0), strict=True)
    ]
    ratios = advantages(better, plain)
    assert ratios == pytest.approx(np.array([[1.25, 1.25, 2.0]] * 3))
    assert factor(np.log(ratios).mean(1)) == "1.46 (1.46 to 1.46)"
    assert resampled_exponents(plain, np.random.default_rng(0)).mean() == pytest.approx(0.1, abs=0.01)


def test_the_difference_that_is_detected_has_a_power_of_four_fifths():
    """Against a simulation of the test itself, not its formula."""
    from scipy.stats import ttest_1samp

    from benchmarks.study.report import smallest_difference

    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, (2000, 3))
    runs = {f"m{i}": {s: {"held_out_loss": value} for s, value in enumerate(row)} for i, row in enumerate(noise)}
    plain = {s: {"held_out_loss": 0.0} for s in range(3)}
    found, seeds = smallest_difference({"plain": plain, **runs})
    assert seeds == 3
    assert np.mean(ttest_1samp(noise + found, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.03)


def test_a_gain_is_compared_between_depths_by_seed():
    from benchmarks.study.report import depth_lines

    def arms(layers: int, gain: float) -> dict:
        run = {"hidden": 8, "steps": 5, "sequence_length": 13, "layers": layers, "batches": "b"}
        plain = {seed: run | {"held_out_loss": 3.0 + seed / layers} for seed in (1, 2, 3)}
        return {
            "plain": plain,
            "block": {seed: each | {"held_out_loss": each["held_out_loss"] - gain} for seed, each in plain.items()},
        }

    groups = {("small", 5): arms(12, 0.125), ("deep", 5): arms(24, 0.25), ("deepest", 5): arms(48, 1.0)}
    lines = depth_lines(groups)
    assert "| 8 | block less plain | 12 to 24 | -0.125 ± 0.000 |" in lines
    assert "| 8 | block less plain | 24 to 48 | -0.750 ± 0.000 |" in lines
    assert "| 8 | block less plain | 12 to 48 | -0.875 ± 0.000 |" in lines
    assert "| 8 | loss of plain | 12 to 24 | -0.083 ± 0.104 |" in lines


def test_another_depth_length_budget_or_ratio_of_data_is_reported_and_not_part_of_the_fits(tmp_path):
    from benchmarks.study.report import draw, report

    run = {"arm": "plain", "seed": 1, "steps": 5, "sweep": False, "learning_rate": 0.01, "corpus": "c", "batches": "b"}
    run |= {"hidden": 8, "parameters": 9, "tokens": 10, "bits_per_byte": 1.0, "wall_seconds": 1.0}
    run |= {"core_seconds": 1.0, "tokens_per_second": 10, "sequence_length": 13}
    widths = [
        run
        | {"size": f"{cost:.0f}", "layers": 12, "flops": cost, "held_out_loss": 7 * cost**-0.1}
        | {"hidden": width, "tokens": 10 * width}
        for width, cost in ((1, 1e3), (2, 1e4), (3, 1e5))
    ]
    deep = run | {"size": "deep", "layers": 24, "flops": 1e4, "held_out_loss": 0.5}
    long = deep | {"size": "long", "layers": 12, "sequence_length": 17}
    longer = widths[0] | {"steps": 20, "flops": 4e3, "held_out_loss": 1.5}
    wider = widths[2] | {
        "size": "wider",
        "hidden": 4,
        "flops": 2e5,
        "held_out_loss": 2.125,
    }  # on the data of a narrower
    runs = [each | {"arm": arm} for each in (*widths, deep, long, longer, wider) for arm in ("plain", "block")]
    ratio = {"plain": dict.fromkeys(("median", "q1", "q3"), 1.0), "block": {"median": 1.5, "q1": 1.25, "q3": 1.75}}
    speed = [
        {"size": each["size"], "arm": arm, "seconds": each["flops"] / 1e4 / 5, "against": "plain", "ratio": ratio[arm]}
        for each in widths
        for arm in ("plain", "block")
    ]
    text = report(runs, speed)
    assert "| plain | FLOPs (6 N tokens) | 7 | 0.1000 (0.1000 to 0.1000) | 1 |" in text
    assert "| plain | seconds (one thread) | 2.79 | 0.1000 (0.1000 to 0.1000) | 1 |" in text  # 7 / 10^0.4
    assert "| block | 12 | 9 | 1 | 3.508 |  | 1.000 | +0.000 | 30.0 | 1.50 (1.25 to 1.75) | 67 |" in text
    assert "| plain | 24 | 9 | 1 | 0.500 |" in text
    assert "| plain | seconds (one thread) |" not in report(runs, speed[2:])  # the time of two sizes makes no fit
    assert "10 tokens in sequences of 17" in text
    assert "20 steps" in text
    draw(runs, speed, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_step_is_timed_for_every_model_of_a_size_against_its_plain_one(grid):
    from benchmarks.study.speed import measure

    grid["sizes"]["tiny"] |= {"sequence_length": 7}
    plain, block = measure(grid, "tiny", ["plain", "block"], vocabulary=300, rounds=2)
    assert (plain["arm"], block["arm"], block["against"]) == ("plain", "block", "plain")
    assert plain["ratio"] == {"median": 1, "q1": 1, "q3": 1}
    assert plain["seconds"] > 0
    assert 0 < block["ratio"]["q1"] <= block["ratio"]["median"] <= block["ratio"]["q3"]


def test_runs_on_different_text_are_not_compared():
    from benchmarks.study.report import differences

    plain = {1: {"arm": "plain", "batches": "a", "corpus": "c", "held_out_loss": 3.0}}
    block = {1: plain[1] | {"arm": "block", "held_out_loss": 2.5}}
    assert differences(block, plain).tolist() == [-0.5]
    with pytest.raises(ValueError, match="saw different text"):
        differences({1: block[1] | {"batches": "b"}}, plain)


def test_the_document_and_the_readme_hold_the_tables_that_the_results_give():
    from benchmarks.study.files import read_results
    from benchmarks.study.report import report, summary
    from benchmarks.study.train import HERE

    document = (ROOT / "docs/study.md").read_text(encoding="utf-8")
    results = read_results(HERE / "results.jsonl")
    assert report(results, read_results(HERE / "speed.jsonl")) in document
    assert summary(results) in document
    assert summary(results) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_control_of_a_model_has_its_depth_and_initialisation():
    from benchmarks.study.report import control

    names = {"block": "plain", "block of 4": "plain", "mhc, 4 streams": "plain", "plain, 4 layers": "plain"}
    names |= {"full, 4 layers": "plain, 4 layers", "static, scaled init": "plain, scaled init"}
    assert {name: control(name) for name in [*names, "plain, scaled init"]} == names | {"plain, scaled init": "plain"}


def test_the_summary_marks_what_excludes_zero():
    from benchmarks.study.report import summary

    run = {
        "size": "s",
        "steps": 5,
        "sweep": False,
        "corpus": "c",
        "flops": 8,
        "hidden": 8,
        "layers": 12,
        "batches": "b",
    }
    losses = {"plain": (3.0, 3.0), "block": (2.75, 2.75), "full": (2.5, 3.25), "static": (2.875,)}
    runs = [
        run | {"arm": arm, "seed": seed, "held_out_loss": loss}
        for arm, each in losses.items()
        for seed, loss in enumerate(each)
    ]
    assert "| 8 | 12 | **-0.250 ± 0.000** | -0.125 ± 4.765 | -0.125 (one seed) |  |" in summary(runs).splitlines()


def test_the_document_holds_the_tables_of_the_retrofit():
    from benchmarks.study.files import read_results
    from benchmarks.study.retrofit import report
    from benchmarks.study.train import HERE

    document = (ROOT / "docs/study.md").read_text(encoding="utf-8")
    assert report(read_results(HERE / "retrofit.jsonl")) in document


@pytest.fixture
def retrofit_runs():
    run = {"tuning": "lora", "steps": 24, "core_seconds": 1.0, "rate": 5e-4, "depth_rate": None}
    plain = [run | {"arm": "plain", "seed": seed, "held_out_loss": 3.0} for seed in (1, 2)]
    block = [
        run | {"arm": "block", "depth_rate": 1e-4, "seed": seed, "held_out_loss": loss}
        for seed, loss in ((1, 2.8), (2, 2.9))
    ]
    sweep = [
        run | {"arm": "block", "depth_rate": rate, "seed": 0, "validation_loss": loss}
        for rate, loss in ((1e-2, float("nan")), (1e-4, 2.9), (1e-3, 3.5))
    ]
    sweep += [
        run | {"arm": "plain", "rate": rate, "seed": 0, "validation_loss": loss}
        for rate, loss in ((1e-3, 2.5), (5e-4, 2.75))
    ]
    return [each | {"batches": str(each["seed"])} for each in plain + block + sweep]


def test_a_retrofit_is_reported_against_the_plain_model_of_the_same_batches_and_rate(retrofit_runs):
    from benchmarks.study.retrofit import report

    text = report(retrofit_runs)
    assert "| LoRA | 2.750 | 2.500 |" in text
    assert "| LoRA | block | 0.0005 | 2.900 | 3.500 | diverged |" in text
    assert "| LoRA | block | 0.0005 | 0.0001 | 2 | 2.850 | 0.071 | -0.150 ± 0.635 | 1 |" in text
    other = [run | {"rate": 1e-3} if run["arm"] == "plain" else run for run in retrofit_runs]
    assert "| LoRA | block | 0.0005 | 0.0001 | 2 | 2.850 | 0.071 |  | 1 |" in report(other)
    retrofit_runs[0]["batches"] = "other"
    with pytest.raises(ValueError, match="saw different text"):
        report(retrofit_runs)


def test_a_retrofit_takes_the_rates_that_were_best_for_plain_and_for_its_mixer(retrofit_runs):
    from benchmarks.study.retrofit import with_best_rates

    run = {"arm": "full", "tuning": "lora", "rate": "best", "depth_rate": "best"}
    assert with_best_rates(run, retrofit_runs) == run | {"rate": 1e-3, "depth_rate": 1e-4}
    assert with_best_rates(run | {"rate": 0.5}, retrofit_runs) == run | {"rate": 0.5, "depth_rate": 1e-4}
    assert with_best_rates(run | {"tuning": "full"}, retrofit_runs)["rate"] is None


def test_retrofits_run_once_each_and_a_sweep_before_what_it_decides(tmp_path):
    from benchmarks.study.retrofit import HERE, expand, key, read_grid

    runs = expand(read_grid(HERE / "retrofit.yaml"))
    assert len({key(run) for run in runs}) == len(runs)
    text = (HERE / "retrofit.yaml").read_text(encoding="utf-8")
    for removed, said in (
        ("rates: [2.0e-4", "needs a rate for plain"),
        ("depth_rates", "needs a depth rate for block"),
    ):
        kept = [line for line in text.splitlines() if removed not in line and "1.0e-5" not in line]
        (tmp_path / "grid.yaml").write_text("\n".join(kept), encoding="utf-8")
        with pytest.raises(ValueError, match=said):
            read_grid(tmp_path / "grid.yaml")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("num_blocks: 8", "blocks: 8", "unknown field 'blocks'"),
        ("{tuning: frozen, arms: [block]", "{tuning: frozen, arms: [plain]", "'plain' has none"),
        ("train_rows: 256", "train_rows: 40", "train_rows .* must be at least"),
        ("seeds: [0, 1]", "seeds: [1, 1]", "a list of different entries"),
    ],
)
def test_a_retrofit_that_cannot_be_run_is_refused(before, after, said, tmp_path):
    from benchmarks.study.retrofit import HERE, read_grid

    text = (HERE / "retrofit.yaml").read_text(encoding="utf-8")
    (tmp_path / "grid.yaml").write_text(text.replace(before, after, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        read_grid(tmp_path / "grid.yaml")


def test_every_arm_of_the_grid_builds_and_every_stage_names_arms_and_sizes_of_it():
    from benchmarks.study.train import HERE, build_model, expand

    grid = yaml.safe_load((HERE / "grid.yaml").read_text(encoding="utf-8"))
    assert {run["arm"] for run in expand(grid)} == set(grid["arms"])
    for arm in grid["arms"].values():
        build_model(grid, grid["sizes"]["middle"], arm, 17)


def test_a_size_without_the_plain_model_is_compared_to_the_one_with_scaled_initialisation(tmp_path):
    from benchmarks.study.report import draw, report

    run = {"seed": 1, "steps": 5, "sweep": False, "learning_rate": 0.01, "corpus": "c", "batches": "b", "flops": 8}
    run |= {"hidden": 8, "parameters": 9, "tokens": 10, "bits_per_byte": 1.0, "wall_seconds": 1.0, "layers": 12}
    run |= {"core_seconds": 1.0, "tokens_per_second": 10, "size": "wide", "sequence_length": 13}
    losses = {"plain, scaled init": 3.0, "block, scaled init": 2.75}
    runs = [run | {"arm": arm, "held_out_loss": loss} for arm, loss in losses.items()]
    text = report(runs, [])
    assert "against plain, scaled init" in text
    assert "| block, scaled init | 12 | 9 | 1 | 2.750 |  | 1.000 | -0.250 |" in text
    draw(runs, [], tmp_path / "figure.png")
