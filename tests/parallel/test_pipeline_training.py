"""A pipelined model trains as it does in one process: loss, gradients, copies, replicas, files.

Four processes are started once and run all cases. Most run in float64, where one wiring fault stands out from rounding:
in float32 the order in which micro-batches are summed alone moves some gradients of these models by 1e-5.
"""

import json
import shutil

import pipeline_ranks
import pytest
import torch
from helpers import random_attnres
from launching import case, in_ranks
from once import once
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from attnres import AttnResForCausalLM

WORLD = 4
EXACT = 1e-10
LOSS = 1e-6  # transformers computes it in float32
# Neither is a multiple of the stages; blocks of 3 and of 2 straddle them, and the last block is short.
MODELS = {2: {"layers": 7, "per_block": 3}, 4: {"layers": 11, "per_block": 2}}
MATRIX = {
    f"{ranks}-{mode}-{schedule}-{virtual}": case(
        "step",
        ranks=ranks,
        pipeline={"schedule": schedule, "virtual_stages": virtual, "micro_batches": micro_batches},
        model={**MODELS[ranks], "mode": mode},
    )
    for ranks, mode, schedule, virtual, micro_batches in (
        (2, "block", "gpipe", 1, 3),
        (2, "block", "interleaved-1f1b", 2, 3),
        (2, "full", "1f1b", 1, 3),
        (2, "full", "gpipe", 2, 3),
        (2, "standard", "interleaved-1f1b", 1, 4),
        (4, "block", "gpipe", 2, 3),
        (4, "block", "1f1b", 1, 5),
        (4, "block", "interleaved-1f1b", 2, 8),
        (4, "full", "gpipe", 1, 3),
        (4, "full", "interleaved-1f1b", 2, 8),
        (4, "standard", "interleaved-1f1b", 2, 8),
        (4, "standard", "1f1b", 1, 5),
    )
}
INTERLEAVED = {"schedule": "interleaved-1f1b", "virtual_stages": 2, "micro_batches": 4}
SIMPLE = {"schedule": "1f1b", "virtual_stages": 1, "micro_batches": 4}


def one_step(ranks, model, pipeline=INTERLEAVED, **options):
    return case("step", ranks=ranks, pipeline=pipeline, model=model, **options)


VARIANTS = {
    "naive": one_step(4, {"layers": 11}, {**INTERLEAVED, "caching": False}),
    "one-block": one_step(4, {"layers": 9, "per_block": 9}),
    "layer-blocks": one_step(2, {"layers": 6, "per_block": 1}),
    "split": one_step(2, {"layers": 7}, {**INTERLEAVED, "split": [1, 3, 2, 1]}),
    "checkpointed": one_step(2, {}, checkpointing={"use_reentrant": False}),
    "checkpointed-reentrant": one_step(2, {"mode": "full"}, checkpointing={"use_reentrant": True}),
    "frozen": one_step(2, {}, frozen=True),
    "biggest": one_step(2, {"layers": 9}, {"schedule": "interleaved-1f1b", "virtual_stages": 4, "micro_batches": 4}),
    "granite": one_step(2, {"family": "granite"}),
}
# What these families compute in float32 whatever the model's dtype, among it routers and delta rules.
FLOAT32_INSIDE = {
    "gemma3_text": one_step(2, {"family": "gemma3_text"}),
    "qwen3_moe": one_step(2, {"family": "qwen3_moe", "experts_implementation": "eager"}),
    "kimi_linear": one_step(2, {"family": "kimi_linear", "layers": 5, "experts_implementation": "eager"}),
    "qwen3_next": one_step(2, {"family": "qwen3_next", "experts_implementation": "eager"}, SIMPLE),
}
OTHERS = {
    "posted": case("posted_bytes", ranks=4, pipeline=INTERLEAVED, model={"layers": 11}),
    "posted-1f1b": case("posted_bytes", ranks=2, pipeline=SIMPLE, model={"mode": "full"}),
    "several-steps": case("several_steps", ranks=4, pipeline=INTERLEAVED, model={"layers": 9}),
    "peaks": case(
        "peaks",
        ranks=4,
        pipeline={"schedule": "interleaved-1f1b", "virtual_stages": 2},
        model={"layers": 8, "per_block": 1},
        numbers=(12, 24),
    ),
    "replicas": case("replicas", pipeline=INTERLEAVED, model={}),
    "tied": case("tied", ranks=2, pipeline=INTERLEAVED, steps=3),
}
REFUSED = {
    "layers": ({"layers": 3}, INTERLEAVED, {}, "num_hidden_layers=3 are fewer than the 4 stages"),
    "split": ({"layers": 7}, {**INTERLEAVED, "split": [3, 3, 3, 3]}, {}, "split must be 4 numbers of decoder layers"),
    "schedule": ({}, {**INTERLEAVED, "schedule": "zb"}, {}, "schedule must be one of gpipe, 1f1b, interleaved-1f1b"),
    "stages": ({}, {**INTERLEAVED, "virtual_stages": 0}, {}, "virtual_stages must be a whole number of at least 1"),
    "1f1b": ({}, {**SIMPLE, "micro_batches": 1}, {}, "at least as many micro_batches as ranks=2, got 1"),
    "rounds": ({}, {**INTERLEAVED, "micro_batches": 5}, {}, "micro_batches=5 must be a multiple of 2"),
    "rows": ({}, INTERLEAVED, {"input_ids": (6, 9), "labels": (6, 9)}, "6 rows must be a multiple of micro_batches=4"),
    "shape": ({}, INTERLEAVED, {"labels": (4, 8)}, "labels must have the shape of input_ids, [4, 9], got [4, 8]"),
    "routers": (
        {"family": "qwen3_moe", "output_router_logits": True, "router_aux_loss_coef": 0.1},
        INTERLEAVED,
        {},
        "Set output_router_logits=False",
    ),
    "folder": ("no/such/folder", INTERLEAVED, {}, "no/such/folder has no config.json"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return once(tmp_path_factory, "pipeline-folders", write_folders)


def write_folders(top):
    """Checkpoints of one process."""
    for name, family, layers in (("plain", "llama", 7), ("experts", "qwen3_moe", 6), ("tied", "qwen3", 7)):
        model = random_attnres(family, layers=layers, tie_word_embeddings=name == "tied", seed=3)
        model.save_pretrained(top / name, max_shard_size="60KB" if name == "experts" else "1GB")
    index = shutil.copytree(top / "experts", top / "lacking") / "model.safetensors.index.json"
    stored = json.loads(index.read_text())
    del stored["weight_map"]["model.layers.5.self_attn.o_proj.weight"]
    index.write_text(json.dumps(stored))
    return top


@pytest.fixture(scope="module")
def results(folders, tmp_path_factory):
    """What each rank returned for each case."""
    cases = all_cases(folders)
    return once(tmp_path_factory, "pipeline-results", lambda _: in_ranks(WORLD, "pipeline_ranks", cases))


def all_cases(folders):
    cases = {**MATRIX, **VARIANTS, **FLOAT32_INSIDE, **OTHERS}
    for name in ("plain", "experts", "tied"):
        cases[f"from-{name}"] = case("from_folder", ranks=2, folder=str(folders / name), pipeline=INTERLEAVED)
    hybrid = {"layers": 9, "family": "kimi_linear"}
    cases["save"] = case("save", ranks=4, pipeline=INTERLEAVED, model=hybrid, folder=str(folders / "saved"))
    tied = {"tie_word_embeddings": True}
    cases["save-tied"] = case("save", ranks=2, pipeline=SIMPLE, model=tied, folder=str(folders / "saved-tied"))
    cases["scratch"] = case(
        "from_scratch", ranks=4, pipeline=INTERLEAVED, family="gpt_oss", folder=str(folders / "scratch")
    )
    for name, (model, pipeline, batch, _) in REFUSED.items():
        cases[f"refused-{name}"] = case("refusal", ranks=2, model=model, pipeline=pipeline, batch=batch)
    cases["lacking"] = case("refusal", ranks=2, model=str(folders / "lacking"), pipeline=INTERLEAVED)
    cases["differs"] = case("refusal", ranks=4, model={"layers": 9}, pipeline=INTERLEAVED, differs={"micro_batches": 8})
    return cases


def worst(results, name) -> float:
    return max(error for rank in results for error in rank[name]["errors"].values())


@pytest.mark.parametrize("name", MATRIX)
def test_loss_and_every_gradient_are_those_of_one_process(results, name):
    covered = set()
    for rank in results:
        assert rank[name]["loss"] < LOSS
        covered |= {key.split(".", 1)[1] for key in rank[name]["errors"]}
    assert covered == results[0][name]["parameters"]
    assert worst(results, name) < EXACT


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_those_of_one_process_with(results, name):
    assert max(rank[name]["loss"] for rank in results) < LOSS and worst(results, name) < EXACT


@pytest.mark.parametrize("name", FLOAT32_INSIDE)
def test_gradients_are_those_of_one_process_for_the_family(results, name):
    assert max(rank[name]["loss"] for rank in results) < LOSS and worst(results, name) < 1e-5


@pytest.mark.parametrize("name", [*MATRIX, *VARIANTS])
def test_nothing_is_left_of_a_step(results, name):
    assert [rank[name]["left"] for rank in results] == [(0, 0, 0)] * WORLD


@pytest.mark.parametrize("name", [name for name in MATRIX if "standard" not in name])
def test_a_block_crosses_to_a_rank_at_most_once(results, name):
    ranks = MATRIX[name]["options"]["ranks"]
    arrived = {}
    for result in results[:ranks]:
        for (micro_batch, source, stage), times in result[name]["crossings"].items():
            key = (micro_batch, source, stage % ranks)
            arrived[key] = arrived.get(key, 0) + times
    assert arrived and set(arrived.values()) == {1}
    homes = results[0][name]["homes"]
    assert not [key for key in arrived if homes[key[1]] == key[2]]  # and never to where it was completed


def test_without_caching_all_blocks_cross_every_time(results):
    sent = [rank["naive"]["crossings"] for rank in results]
    to_last = {source for crossings in sent for (_, source, stage) in crossings if stage == 7}
    assert to_last == set(range(6))  # the embedding and the 5 blocks that are complete after 10 layers
    total = sum(sum(crossings.values()) for crossings in sent)
    assert total == 4 * sum(1 + end // 2 for end in (2, 4, 6, 7, 8, 9, 10))


@pytest.mark.parametrize("name", ["posted", "posted-1f1b"])
def test_bytes_are_counted_as_torch_posts_them(results, name):
    for rank in results:
        assert rank[name]["posted"] == rank[name]["counted"] > 0


@pytest.mark.parametrize("name", [*MATRIX, *VARIANTS])
def test_gradients_go_back_over_the_way_the_blocks_came(results, name):
    ranks = {**MATRIX, **VARIANTS}[name]["options"]["ranks"]
    forward, backward = (sum(rank[name][way] for rank in results[:ranks]) for way in ("forward", "backward"))
    assert forward == backward > 0


def test_blocks_in_memory_do_not_grow_with_the_number_of_micro_batches(results):
    for rank in results:
        (alive, stored), (twice_alive, twice_stored) = rank["peaks"][12], rank["peaks"][24]
        assert 0 < twice_alive <= alive and 0 < twice_stored <= stored


def test_gradients_add_up_over_steps_of_any_shape_and_evaluation_leaves_none(results):
    for rank in results:
        assert max(rank["several-steps"]["losses"]) < LOSS
        assert rank["several-steps"]["left"] == (0, 0, 0)
    assert worst(results, "several-steps") < EXACT


def test_replicas_train_on_the_mean_over_all_their_tokens(results):
    assert worst(results, "replicas") < EXACT
    for rank in results:
        assert rank["replicas"]["loss"] < LOSS and rank["replicas"]["norm"] < LOSS


def test_tied_embeddings_stay_equal_bit_by_bit_and_train_as_in_one_process(results):
    first, last = (next(iter(rank["tied"]["copies"].values())) for rank in results[:2])
    assert torch.equal(first, last)
    for rank in results:
        assert max(rank["tied"]["losses"]) < LOSS and max(rank["tied"]["norms"]) < LOSS
        assert rank["tied"]["error"] < 1e-8


@pytest.mark.parametrize("name", ["plain", "experts", "tied"])
def test_every_rank_reads_its_own_tensors_of_a_folder(results, folders, name):
    key = f"from-{name}"
    assert worst(results, key) < 5e-5 and max(rank[key]["loss"] for rank in results) < 1e-5
    assert results[0][key]["dtypes"] == {torch.float32} and results[0][key]["training"]
    read = [set(rank[key]["read"]) for rank in results[:2]]
    stored = set()
    for file in (folders / name).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            stored |= set(tensors.keys())
    assert read[0] | read[1] == stored
    assert read[0] & read[1] == ({"model.embed_tokens.weight"} if name == "tied" else set())


def test_saved_shards_are_a_folder_that_from_pretrained_loads(results, folders):
    loaded = AutoModelForCausalLM.from_pretrained(folders / "saved")
    expected = pipeline_ranks.model_of(family="kimi_linear", layers=9, dtype=torch.float32)
    assert isinstance(loaded, AttnResForCausalLM) and loaded.config.to_dict()["residual_mode"] == "block"
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    written = {path.name for path in (folders / "saved").iterdir()}
    expected.save_pretrained(folders / "one-process")
    one_process = {path.name for path in (folders / "one-process").iterdir()}
    shards = {f"model-0000{number}-of-00008.safetensors" for number in range(1, 9)}
    assert written == (one_process - {"model.safetensors"}) | shards | {"model.safetensors.index.json"}
    assert not list(folders.glob(".saved*"))


def test_tied_embeddings_are_saved_once(results, folders):
    loaded = AttnResForCausalLM.from_pretrained(folders / "saved-tied" / "0")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    expected = pipeline_ranks.model_of(tie_word_embeddings=True, dtype=torch.float32)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())


def test_a_model_from_scratch_is_never_whole_on_a_rank_and_trains(results, folders):
    losses = {rank["scratch"]["loss"] for rank in results}
    assert len(losses) == 1 and len({rank["scratch"]["norm"] for rank in results}) == 1
    for rank in results:
        assert rank["scratch"]["devices"] == {"cpu"} and rank["scratch"]["norm"] > 0
        assert abs(rank["scratch"]["evaluated"] - rank["scratch"]["loss"]) < 1e-6
    model = AttnResForCausalLM.from_pretrained(folders / "scratch")
    assert not model.depth_mixer.attention_norm.query.any() and (model.depth_mixer.mlp_norm.weight == 1).all()
    loss = model(**pipeline_ranks.batch_of(4), use_cache=False).loss
    assert abs(loss.item() - losses.pop()) < 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(results, name):
    for rank in results:
        refused = rank[f"refused-{name}"]
        assert refused["type"] == "ValueError" and REFUSED[name][3] in refused["line"]
        assert "\n" not in refused["line"]


def test_ranks_that_were_given_different_things_are_named(results):
    for rank in results:
        assert rank["differs"]["type"] == "PipelineError"
        assert rank["differs"]["line"] == "micro_batches must be the same on all ranks, but ranks 0 and 1 differ."


def test_a_rank_that_cannot_build_or_save_its_stages_is_named_on_all_ranks(results, folders):
    for number, rank in enumerate(results):
        assert rank["lacking"]["type"] == "PipelineError"
        assert rank["lacking"]["line"] == (
            f"rank {1 if number < 2 else 3} cannot build its stages: ValueError: checkpoint {folders / 'lacking'} "
            "lacks model.layers.5.self_attn.o_proj.weight, needed by the stage with decoder layers 5 to 5."
        )
        assert rank["save"]["refused"].startswith("rank 0 cannot save its stages: FileExistsError: ")
