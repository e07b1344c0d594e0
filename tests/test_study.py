"""The study: its corpus, its fairness between arms, what makes it resumable, and the arithmetic of its report."""

import json
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import yaml

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


def test_a_study_goes_on_where_it_was_and_uses_the_best_rate_of_the_plain_arm(grid, corpus, tmp_path, monkeypatch):
    from benchmarks.study import train

    class Inline:  # this process in place of others
        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, function, *arguments):
            future = Future()
            future.set_result(function(*arguments))
            return future

    trained = []
    losses = {0.001: 2.0, 0.01: 3.0}

    def fake(run, grid, corpus):
        trained.append(train.key(run))
        return run | {"curve": [{"validation_loss": losses[run["learning_rate"]]}], "wall_seconds": 0}

    monkeypatch.setattr(train, "ProcessPoolExecutor", Inline)
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


def test_a_power_law_is_recovered_with_its_compute_advantage():
    from benchmarks.study.report import advantage, power_law, resampled_fits

    cost = np.array([1e3, 1e4, 1e5])
    assert power_law(cost, 7 * cost**-0.1) == pytest.approx((7, 0.1))
    plain = [[(c, 7 * c**-0.1)] for c in cost]
    better = [[(c, 7 * (1.25 * c) ** -0.1)] for c in cost]  # as if 1.25 times the cost had been paid
    fits = [resampled_fits(points, np.random.default_rng(0)) for points in (better, plain)]
    assert advantage(*fits, 1e4) == pytest.approx((1.25, 1.25, 1.25))


def test_a_size_of_another_depth_or_length_is_reported_and_not_part_of_the_fits(tmp_path):
    from benchmarks.study.report import draw, report

    run = {"arm": "plain", "seed": 1, "steps": 5, "sweep": False, "learning_rate": 0.01, "corpus": "c", "batches": "b"}
    run |= {"hidden": 8, "parameters": 9, "tokens": 10, "bits_per_byte": 1.0, "wall_seconds": 1.0}
    run |= {"core_seconds": 1.0, "tokens_per_second": 10, "sequence_length": 13}
    widths = [
        run | {"size": str(cost), "layers": 12, "flops": cost, "core_seconds": cost, "held_out_loss": 7 * cost**-0.1}
        for cost in (1e3, 1e4, 1e5)
    ]
    deep = run | {"size": "deep", "layers": 24, "flops": 1e4, "held_out_loss": 0.5}
    long = deep | {"size": "long", "layers": 12, "sequence_length": 17}
    runs = [each | {"arm": arm} for each in (*widths, deep, long) for arm in ("plain", "block")]
    text = report(runs)
    assert "| plain | FLOPs (6 N tokens) | 7 | 0.1000 (0.1000 to 0.1000) | 1 |" in text
    assert "| plain | 24 | 9 | 1 | 0.500 |" in text
    assert "10 tokens in sequences of 17" in text
    draw(runs, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_runs_on_different_text_are_not_compared():
    from benchmarks.study.report import differences

    plain = {1: {"arm": "plain", "batches": "a", "corpus": "c", "held_out_loss": 3.0}}
    block = {1: plain[1] | {"arm": "block", "held_out_loss": 2.5}}
    assert differences(block, plain).tolist() == [-0.5]
    with pytest.raises(ValueError, match="saw different text"):
        differences({1: block[1] | {"batches": "b"}}, plain)


def test_the_document_holds_the_table_that_the_results_give():
    from benchmarks.study.report import report
    from benchmarks.study.train import HERE, read_results

    document = (ROOT / "docs/study.md").read_text(encoding="utf-8")
    assert report(read_results(HERE / "results.jsonl")) in document


def test_the_document_holds_the_tables_of_the_retrofit():
    from benchmarks.study.retrofit import report
    from benchmarks.study.train import HERE, read_results

    document = (ROOT / "docs/study.md").read_text(encoding="utf-8")
    assert report(read_results(HERE / "retrofit.jsonl")) in document


@pytest.fixture
def retrofit_runs():
    run = {"tuning": "lora", "steps": 24, "core_seconds": 1.0}
    plain = [run | {"arm": "plain", "depth_rate": None, "seed": seed, "held_out_loss": 3.0} for seed in (1, 2)]
    block = [
        run | {"arm": "block", "depth_rate": 1e-4, "seed": seed, "held_out_loss": loss}
        for seed, loss in ((1, 2.8), (2, 2.9))
    ]
    sweep = [
        run | {"arm": "block", "depth_rate": rate, "seed": 0, "validation_loss": loss}
        for rate, loss in ((1e-2, float("nan")), (1e-4, 2.9), (1e-3, 3.5))
    ]
    return [each | {"batches": str(each["seed"])} for each in plain + block + sweep]


def test_a_retrofit_is_reported_against_the_plain_model_of_the_same_batches(retrofit_runs):
    from benchmarks.study.retrofit import best_rate, report

    text = report(retrofit_runs)
    assert "| LoRA | block |  | 2.900 | 3.500 | diverged |" in text
    assert "| LoRA | block | 0.0001 | 2 | 2.850 | 0.071 | -0.150 ± 0.635 | 1 |" in text
    assert best_rate({"arm": "full", "tuning": "lora"}, retrofit_runs) == 1e-4
    retrofit_runs[0]["batches"] = "other"
    with pytest.raises(ValueError, match="saw different text"):
        report(retrofit_runs)


def test_retrofits_run_in_order_with_a_sweep_before_what_it_decides():
    from benchmarks.study.retrofit import expand
    from benchmarks.study.train import HERE

    grid = yaml.safe_load((HERE / "retrofit.yaml").read_text(encoding="utf-8"))
    runs = expand(grid)
    assert len({tuple(run.values()) for run in runs}) == len(runs)
    for place, run in enumerate(runs):
        if run["depth_rate"] == "best":
            earlier = [each for each in runs[:place] if each["tuning"] == run["tuning"] and each["seed"] == 0]
            assert any(each["arm"] in (run["arm"], "block") and each["depth_rate"] for each in earlier), run


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
    text = report(runs)
    assert "against plain, scaled init" in text
    assert "| block, scaled init | 12 | 9 | 1 | 2.750 |  | 1.000 | -0.250 |" in text
    draw(runs, tmp_path / "figure.png")
