"""`attnres bench` as users run it, on a model of a few thousand weights: files, tables, sweeps and errors."""

import json
import math

import matplotlib.image
import pytest
from families import tiny_config
from helpers import random_attnres, short_config
from once import once

from attnres import cli
from attnres.bench import report, runner, settings, workloads
from attnres.bench.runner import backbone_config, with_depth
from attnres.bench.settings import DepthShape

SMALL = ["--context", "5", "--new-tokens", "2", "--tokens", "7", "--rounds", "2", "--depth-shape", "8,4,6,16"]
TIMED = ["prefill", "decode", "decode", "train", "generate", "depth forward", "depth forward+backward"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    short_config("qwen3", 4).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """The files of a whole run with two depths and two numbers of blocks."""

    def make(top):
        out = top / "made" / "here"
        sizes, arms = ["--depths", "2,4", "--num-blocks", "2,1", "--batches", "1,3"], "standard,block,full,stacked"
        assert cli.main(["bench", "--model", str(folder), "--out", str(out), *SMALL, *sizes, "--arms", arms]) == 0
        return out, json.loads((out / "bench.json").read_text())

    return once(tmp_path_factory, "bench", make)


def test_bench_writes_its_three_files_and_nothing_else(run):
    out, _ = run
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.md", "overhead.png"]
    assert matplotlib.image.imread(out / "overhead.png").shape[1] == 1800


def test_json_says_what_was_measured_on_what(run):
    _, result = run
    assert result["format"] == "attnres-bench/1"
    assert result["machine"].keys() >= {"cpu", "threads", "device", "load_average", "load_average_at_end", "versions"}
    assert result["machine"]["versions"].keys() >= {"python", "attnres", "torch", "transformers"}
    assert result["settings"]["rounds"] == 2 and result["backbone"]["model_type"] == "qwen3"
    assert list(result["arms"]) == ["plain", "standard", "block", "full", "stacked"] and result["left_out"] == {}


def test_every_combination_is_timed_in_every_variant(run):
    _, result = run
    sizes = [(2, 1, 2), (2, 2, 1), (4, 2, 2), (4, 4, 1)]  # decoder layers, of them per block, blocks
    models = [each for each in result["timings"] if not each["workload"].startswith("depth")]
    found = [(each["decoder_layers"], each["layers_per_block"], each["blocks"]) for each in models]
    assert found == [size for size in sizes for _ in TIMED[:5]]
    assert [each["workload"] for each in result["timings"]] == TIMED[:5] * 4 + TIMED[5:]
    assert [each["batch"] for each in result["timings"] if each["workload"] == "decode"] == [1, 3] * 4
    for timing in result["timings"]:
        assert list(timing["arms"]) == list(result["arms"])
        for arm in timing["arms"].values():
            assert len(arm["samples"]) == 2 and all(second > 0 for second in arm["samples"])
            assert arm["ratio"]["q1"] <= arm["ratio"]["median"] <= arm["ratio"]["q3"]
        assert timing["arms"]["plain"]["ratio"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}


def test_memory_of_standard_is_that_of_the_plain_model_and_stacking_keeps_most(run):
    _, result = run
    assert len(result["memory"]) == 4
    for point in result["memory"]:
        saved = {name: arm["saved_bytes"] for name, arm in point["arms"].items()}
        assert saved["standard"] == saved["plain"] < saved["stacked"]
        # Sources are kept by reference, and a fused norm keeps less than the family's: sometimes less than plain.
        assert saved["block"] < 1.1 * saved["plain"]
        for arm in point["arms"].values():
            # Gradients of all weights come on top of what backward needs.
            assert arm["peak_bytes_train"] > arm["peak_bytes_prefill"] > 0


def test_the_check_before_the_run_is_recorded(run):
    _, result = run
    assert len(result["check"]) == 5
    for check in result["check"]:
        assert check["relative_errors"].keys() == {"standard", "block", "full"}
        assert max(check["relative_errors"].values()) < 1e-5


def test_table_shows_ratios_first_and_the_common_sizes_once(run):
    out, result = run
    text = (out / "bench.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert [heading.split(":")[0] for heading in headings] == [
        "## Overhead over plain residuals",
        "## Time",
        "## Memory",
        "## Memory",
        "## Memory",
    ]
    overheads = text.split("## Overhead")[1].split("## Time")[0]
    (row,) = (
        line
        for line in overheads.splitlines()
        if "decode, layers 4, blocks 1, layers per block 4" in line and "batch 3" in line
    )
    (timing,) = (
        each
        for each in result["timings"]
        if each["workload"] == "decode" and (each["batch"], each.get("layers_per_block")) == (3, 4)
    )
    ratio = timing["arms"]["block"]["ratio"]
    low, median, high = (f"{100 * (ratio[name] - 1):+.1f}" for name in ("q1", "median", "q3"))
    assert row.split(" | ")[2] == f"{median} % ({low} to {high})"
    assert "All: float32." in overheads


def test_the_table_is_printed_and_progress_goes_to_stderr(folder, tmp_path, capsys):
    arguments = ["bench", "--model", str(folder), *SMALL, "--measure", "memory", "--arms", "block"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out == (tmp_path / "bench.md").read_text()
    assert "building the variants" in said.err and "wrote bench.json, bench.md to" in said.err


def test_low_precision_and_a_named_implementation_run(folder, tmp_path, monkeypatch):
    seen, prefill = set(), workloads.WORKLOADS["prefill"]

    def watched(models, options):
        seen.update(weight.dtype for model in models.values() for weight in model.parameters())
        return prefill(models, options)

    monkeypatch.setitem(workloads.WORKLOADS, "prefill", watched)
    arguments = ["bench", "--model", str(folder), *SMALL, "--measure", "prefill,depth", "--dtype", "bfloat16"]
    assert cli.main([*arguments, "--arms", "block", "--implementations", "eager", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert {timing["dtype"] for timing in result["timings"]} == {"bfloat16"} and seen == {runner.torch.bfloat16}
    assert list(result["timings"][0]["arms"]) == ["plain", "block", "block:eager"]


def test_a_faulty_variant_is_one_line_and_leaves_no_files(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("attnres.bench.arms.CHECK_TOLERANCE", -1.0)
    assert cli.main(["bench", "--model", str(folder), *SMALL, "--out", str(tmp_path / "out")]) == 2
    assert "does not compute the same as" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--arms block,x", "variant must be one of plain, standard"),
        (
            "--measure x",
            "measure must be one of prefill, decode, compiled-decode, train, generate, memory, depth; got 'x'",
        ),
        ("--dtype int8", "dtype must be one of float32, bfloat16, float16; got 'int8'"),
        ("--implementations x", "implementation must be one of auto"),
        ("--layers-per-block 13", "layers_per_block must be between 1 and num_hidden_layers=12, got 13"),
        ("--device tpu", "device: must be cpu, cuda or cuda:N; got 'tpu'"),
        ("--device cuda:99", "device: 'cuda:99' does not exist; torch sees"),
        ("--model ./nothing", "model ./nothing: no such folder or file"),
    ],
)
def test_values_out_of_range_are_one_line_and_status_2(arguments, message, tmp_path, capsys):
    assert cli.main(["bench", "--quick", "--out", str(tmp_path / "out"), *arguments.split()]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--depths 12,0", "'--depths': must be whole numbers of at least 1, joined by commas, got 12,0"),
        ("--tokens many", "'--tokens': must be whole numbers of at least 1, joined by commas, got many"),
        ("--num-blocks 2 --layers-per-block 2", "exclude each other; leave one out"),
        ("--depth-shape 8,4,6", "must be four whole numbers of at least 1: L,S,T,D, got 8,4,6"),
        ("--depth-shape 7,2,6,16", "sublayers must be even, because a decoder layer is two sublayers; got 7"),
        ("--depth-shape 4,8,6,16", "sublayers_per_block must be at most sublayers=4, got 8"),
        ("--rounds 0", "'--rounds': 0 is not in the range x>=1"),
    ],
)
def test_malformed_options_are_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *arguments.split()])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err.count("\n") == 1 and message in said.err


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["bench", "--out", str(tmp_path / "file" / "out")]) == 2
    said = capsys.readouterr().err
    assert "cannot be written" in said and said.count("\n") == 1


def test_a_model_is_a_folder_its_config_json_or_an_attnres_checkpoint(folder, tmp_path):
    for name in (folder, folder / "config.json"):
        assert backbone_config(settings.Settings(("plain",), model=str(name))).num_hidden_layers == 4
    random_attnres("llama").config.save_pretrained(tmp_path)
    assert backbone_config(settings.Settings(("plain",), model=str(tmp_path))).model_type == "llama"


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "bert"}', '{"model_type": "olmo2"}'])
def test_a_model_of_another_kind_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError) as error:
        backbone_config(settings.Settings(("plain",), model=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_another_depth_repeats_the_pattern_of_layer_types():
    config = tiny_config("gemma3_text")
    kinds = config.layer_types
    deeper = with_depth(config, 2 * len(kinds) + 1)
    assert deeper.layer_types == [*kinds, *kinds, kinds[0]] and deeper.num_hidden_layers == 2 * len(kinds) + 1
    assert with_depth(config, 2).layer_types == kinds[:2]


def test_overhead_panels_hold_the_other_axis_at_its_first_value():
    def timing(layers, blocks, ratio):
        arm = {"ratio": {"median": ratio, "q1": ratio - 0.01, "q3": ratio + 0.02}}
        size = {"decoder_layers": layers, "blocks": blocks, "layers_per_block": layers // blocks, "batch": 1}
        return {"workload": "prefill", **size, "tokens": 7, "dtype": "float32", "arms": {"plain": {}, "block": arm}}

    (panel,) = report.overhead_panels([timing(24, 8, 1.1), timing(24, 2, 1.2), timing(12, 8, 1.3), timing(12, 2, 1.4)])
    assert panel["title"] == "prefill (batch 1, tokens 7, float32)"
    assert panel["depth"]["block"]["x"] == [12, 24] and panel["blocks"]["block"]["x"] == [2, 8]
    assert [round(each) for each in panel["depth"]["block"]["median"]] == [30, 10]
    assert [round(each) for each in panel["blocks"]["block"]["median"]] == [20, 10]
    assert [round(each) for each in panel["depth"]["block"]["q3"]] == [32, 12]
    assert panel["depth_note"] == "8 blocks" and panel["blocks_note"] == "24 decoder layers"


def test_depth_shape_is_checked():
    with pytest.raises(ValueError, match="sublayers_per_block must be even"):
        DepthShape(8, 3, 6, 16)


def test_default_model_is_qwen3_like_and_quick_is_smaller():
    full, quick = (backbone_config(each) for each in (settings.FULL, settings.QUICK))
    assert (full.model_type, full.hidden_size, full.num_hidden_layers) == ("qwen3", 1024, 12)
    assert quick.hidden_size < full.hidden_size and math.prod(settings.QUICK.tokens) < math.prod(settings.FULL.tokens)


def test_threads_are_put_back(folder, tmp_path):
    before = runner.torch.get_num_threads()
    arguments = ["bench", "--model", str(folder), *SMALL, "--measure", "prefill", "--arms", "plain"]
    assert cli.main([*arguments, "--threads", str(before + 1), "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["machine"]["threads"] == before + 1 and runner.torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "config.json: no configuration of a transformers model"),
        ('{"model_type": "qwen3", "hidden_size": "wide"}', "config.json: no configuration of a transformers model"),
        ('{"model_type": "qwen3", "hidden_size": -4}', "model: its configuration makes no qwen3 model"),
    ],
    ids=["nested", "no number", "negative"],
)
def test_a_configuration_that_makes_no_model_is_one_line_and_status_2(content, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text(content)
    arguments = ["--quick", "--out", str(tmp_path / "out"), "--model", str(tmp_path / "config.json")]
    assert cli.main(["bench", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err.splitlines()[-1] and "Traceback" not in said.err
    assert not (tmp_path / "out").exists()
