"""DeepSpeed ZeRO-3 as examples/accelerate/zero3.json configures it, on CPUs.

DeepSpeed is no dependency: `pip install deepspeed`, then `pytest -m deepspeed`. Models are float32, so tolerances are
those of its rounding.
"""

import sys

import pytest
from helpers import random_attnres
from launching import ROOT, largest_error, launcher, outcomes_of, run

from attnres import AttnResForCausalLM

pytestmark = pytest.mark.deepspeed

CONFIG = ROOT / "examples" / "accelerate" / "zero3.yaml"
LAUNCH = launcher("--config_file", CONFIG)
ON_CPUS = {"DS_ACCELERATOR": "cpu", "cwd": CONFIG.parent}  # where zero3.yaml finds zero3.json
SAVING = {"save_strategy": "steps", "save_steps": 2}
MODELS = [(family, mode) for family in ("qwen3", "qwen3_moe") for mode in ("block", "full", "standard")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    for family, mode in MODELS:
        random_attnres(family, mode).save_pretrained(folder / f"{family}-{mode}")
    random_attnres("qwen3_moe", seed=7).save_pretrained(folder / "other")
    return folder


def cases(folder, **options) -> dict[str, dict]:
    # Loaded, not built: with zero3_init_flag a checkpoint's tensors are converted while they are partitioned.
    names = [f"{family}-{mode}" for family, mode in MODELS]
    return {name: {"load": str(folder / name), **options} for name in names}


@pytest.fixture(scope="module")
def alone(folder):
    (outcomes,) = outcomes_of(cases(folder), folder / "alone")
    return outcomes


@pytest.fixture(scope="module")
def ranks(folder):
    resume = str(folder / "ranks" / "qwen3_moe-block" / "checkpoint-2")
    trained = cases(folder, options=SAVING, save=True)
    trained["resumed"] = {"load": str(folder / "other"), "resume": resume, "options": SAVING}
    return outcomes_of(trained, folder / "ranks", LAUNCH, **ON_CPUS)


@pytest.mark.parametrize(("family", "mode"), MODELS)
def test_two_processes_train_as_one_with_the_same_global_batch(alone, ranks, family, mode):
    name = f"{family}-{mode}"
    for outcome in (rank[name] for rank in ranks):
        assert outcome["wrapper"] == "DeepSpeedEngine"
        # The tiny full-mode model multiplies rounding errors from step to step; its first two steps are close.
        assert outcome["losses"][:2] == pytest.approx(alone[name]["losses"][:2], rel=1e-5)
        assert outcome["losses"] == pytest.approx(alone[name]["losses"], rel=1e-2)
        assert largest_error(outcome["weights"], alone[name]["weights"]) < 1e-2


@pytest.mark.parametrize(("family", "mode"), MODELS)
def test_the_saved_model_loads_as_what_was_trained(folder, ranks, family, mode):
    name = f"{family}-{mode}"
    loaded = AttnResForCausalLM.from_pretrained(folder / "ranks" / name / "final")
    assert largest_error(dict(loaded.named_parameters()), ranks[0][name]["weights"]) == 0


def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(ranks):
    for rank in ranks:
        assert rank["resumed"]["losses"] == rank["qwen3_moe-block"]["losses"][2:]
        assert largest_error(rank["resumed"]["weights"], rank["qwen3_moe-block"]["weights"]) == 0


def test_attnres_train_by_the_example_configuration(material, tmp_path):
    command = ["-m", "attnres", "train", material / "model", "--data", material / "book.txt", "--use-cpu"]
    command += ["--sequence-length", 12, "--max-steps", 3, "--learning-rate", "1e-3", "--disable-tqdm", "true"]
    run(sys.executable, *command, "--per-device-train-batch-size", 4, "--out", tmp_path / "one")
    run(*LAUNCH, *command, "--per-device-train-batch-size", 2, "--out", tmp_path / "two", **ON_CPUS)
    one, two = (AttnResForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert largest_error(dict(two.named_parameters()), dict(one.named_parameters())) < 1e-4
