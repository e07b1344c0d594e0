"""Tensor parallelism inside pipeline stages: 2 pipeline ranks of 2 compute what one process computes.

In float64, where norms and routers round to float32 whatever they are given: a sum in another order is rounded to the
next float32 now and then, which shows in some gradients.
"""

import pytest
from helpers import random_attnres
from launching import case, in_ranks
from once import once

LOSS = 1e-6  # transformers computes it in float32
EXACT = 1e-12
STEPS = {
    "llama block": {"mode": "block"},
    "llama full": {"mode": "full"},
    "qwen3_moe block": {"family": "qwen3_moe", "mode": "block", "experts_implementation": "eager"},
    "tied": {"family": "qwen3", "tie_word_embeddings": True, "steps": 2},
}
REFUSED = {
    "heads": "must divide num_key_value_heads=1",
    "divided": 'a mesh with a dimension "tp"',
    "dimensions": 'mesh must have one dimension, or one named "pp"',
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return once(tmp_path_factory, "pipeline-tensor", run_all)


def run_all(folder):
    # Grouped matrix products on a CPU take multiples of 16 bytes.
    random_attnres("mixtral", layers=5, seed=3, intermediate_size=64, vocab_size=98).save_pretrained(folder / "stored")
    cases = {name: case("step", folder=str(folder / name / "saved"), **options) for name, options in STEPS.items()}
    cases["folder"] = case("from_folder", folder=str(folder / "stored"))
    cases["scratch"] = case("from_scratch", folder=str(folder / "scratch"))
    cases |= {name: case("refusal", wanted=name) for name in REFUSED}
    return in_ranks(4, "pipeline_tensor_ranks", cases)


@pytest.mark.parametrize("name", STEPS)
def test_loss_and_every_gradient_are_those_of_one_process(ranks, name):
    covered = set()
    for rank in ranks:
        assert max(rank[name]["loss"]) < LOSS
        assert max(rank[name]["errors"].values()) < EXACT, rank[name]["errors"]
        covered |= {key.split(".", 1)[1] for key in rank[name]["errors"]}
    assert covered - {"lm_head.weight"} == ranks[0][name]["names"] - {"lm_head.weight"}


@pytest.mark.parametrize("name", STEPS)
def test_what_is_not_divided_stays_the_same_on_all_ranks_of_a_stage(ranks, name):
    for rank in ranks:
        assert rank[name]["divided"] > 0
        assert rank[name]["gradients alike"] and rank[name]["parameters alike"]


@pytest.mark.parametrize("name", STEPS)
def test_a_rank_keeps_its_part_in_memory_only(ranks, name):
    for rank in ranks:
        assert rank[name]["memory"] == rank[name]["elements"]


@pytest.mark.parametrize("name", STEPS)
def test_gradients_are_clipped_by_the_norm_of_one_process(ranks, name):
    for rank in ranks:
        assert rank[name]["clipped"] and max(rank[name]["norm"]) < EXACT


@pytest.mark.parametrize("name", STEPS)
def test_a_saved_folder_holds_the_model_that_one_process_has_trained(ranks, name):
    for rank in ranks:
        assert rank[name]["logits"] < EXACT
        shards = [f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)]
        assert rank[name]["files"] == shards and rank[name]["left"] == []


def test_a_checkpoint_folder_is_divided_as_a_model_in_memory(ranks):
    for rank in ranks:
        # One process mixes complete sources in groups, stages one by one: in float32 both round otherwise.
        assert rank["folder"]["loss"] < LOSS and max(rank["folder"]["errors"].values()) < 5e-4


def test_a_model_from_scratch_is_one_model_whatever_each_rank_draws(ranks):
    for rank in ranks:
        assert rank["scratch"]["loss"] < 1e-6 and rank["scratch"]["alike"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(ranks, name):
    for rank in ranks:
        assert REFUSED[name] in rank[name] and "\n" not in rank[name]
