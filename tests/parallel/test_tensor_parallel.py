"""Tensor parallelism by the plan of the backbone: two ranks compute what one process computes, gradients included."""

import pytest
from families import FAMILIES
from launching import case, in_ranks
from once import once
from transformers.distributed import DistributedConfig

# A dense family, sandwich norms with a soft cap, routed experts, and linear attention with latent attention.
IN_ALL_MODES = ("llama", "gemma2", "qwen3_moe", "kimi_linear")
EVERY_MODE = [
    *((family, "block") for family in FAMILIES),
    *((family, mode) for family in IN_ALL_MODES for mode in ("standard", "full")),
]
THE_REST = [(family, mode) for family in FAMILIES for mode in ("standard", "full") if family not in IN_ALL_MODES]
IN_FLOAT32 = ("qwen3", "mixtral", "deepseek_v2", "kimi_linear")
FROM_PLAIN = ("qwen2", "mixtral", "kimi_linear", "granitemoe")
# transformers 5.17 cannot gather experts that are divided by width.
GATHERED_EXPERTS = ("mixtral", "kimi_linear") if hasattr(DistributedConfig, "efsdp_size") else ()
SAVED = ("llama", "gemma2", *GATHERED_EXPERTS)
GENERATED = ("smollm3", "qwen3_moe", "kimi_linear")
ROUNDING = 1e-12  # of float64


def equal_cases(pairs) -> dict[str, dict]:
    return {f"equal {family} {mode}": case("equal", family=family, mode=mode) for family, mode in pairs}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    cases = {"outputs": case("outputs"), "refusals": case("refusals"), **equal_cases(EVERY_MODE)}
    for family in IN_FLOAT32:
        cases[f"equal {family} float32"] = case("equal", family=family, mode="block", precision="float32")
    families = {"plain_checkpoint": FROM_PLAIN, "saved": SAVED, "generated": GENERATED, "trained": ("qwen3",)}
    for what in families:
        cases |= {f"{what} {family}": case(what, family=family) for family in families[what]}
    return once(tmp_path_factory, "tensor-ranks", lambda folder: in_ranks(2, "tensor_ranks", cases, folder))


def assert_equal_to_one_process(found: dict, mode: str, tolerance: float):
    for measure in ("logits", "training_logits", *(["depth_weights"] if mode != "standard" else [])):
        assert found[measure] <= tolerance, (measure, found)
    # Norms and decay rates compute in float32 whatever they are given, and round their gradients to it.
    assert found["gradients"] <= 1e-6 and found["one gradient"] <= 3e-5, found
    if mode != "standard":
        assert found["depth_whole"] and found["depth_equal_on_all_ranks"]
        assert found["smallest_depth_gradient"] > 0
    assert found["sharded"] > 0


@pytest.mark.parametrize(("family", "mode"), EVERY_MODE)
def test_logits_depth_weights_and_gradients_are_those_of_one_process(ranks, family, mode):
    for rank in ranks:
        assert_equal_to_one_process(rank[f"equal {family} {mode}"], mode, ROUNDING)


@pytest.mark.parametrize("family", IN_FLOAT32)
def test_float32_with_default_implementations_differs_by_rounding_only(ranks, family):
    for rank in ranks:
        found = rank[f"equal {family} float32"]
        assert found["logits"] <= 1e-5 and found["training_logits"] <= 1e-5 and found["gradients"] <= 1e-5, found


@pytest.mark.parametrize("family", FROM_PLAIN)
def test_a_plain_checkpoint_loads_sharded_as_its_lossless_conversion(ranks, family):
    for rank in ranks:
        found = rank[f"plain_checkpoint {family}"]
        assert found["plain_sharded"] <= ROUNDING and found["standard"] <= ROUNDING, found
        assert found["block"] <= 1e-5 and found["full"] <= 1e-5, found  # norms of means, rounded to float32


@pytest.mark.parametrize("family", SAVED)
def test_a_sharded_model_saves_the_checkpoint_it_came_from(ranks, family):
    for rank in ranks:
        found = rank[f"saved {family}"]
        assert found["same_tensors"] and found["logits"] == 0, found
        # Gathered apart, a tied head is no longer known to be the embedding: transformers writes both.
        assert found["names"] == (["lm_head.weight"] if family == "gemma2" else [])
        assert not found["config_mentions_the_devices"]


@pytest.mark.parametrize("family", GENERATED)
def test_generate_gives_the_tokens_of_one_process(ranks, family):
    for rank in ranks:
        assert all(rank[f"generated {family}"].values()), rank[f"generated {family}"]


def test_training_steps_give_the_parameters_of_one_process(ranks):
    for rank in ranks:
        found = rank["trained qwen3"]
        assert found["parameters"] <= 1e-9 and found["parameters, checkpointed"] <= 1e-9, found
        assert found["same depth mixer"] and found["same depth mixer, checkpointed"]


def test_all_outputs_are_whole_and_equal_to_one_process(ranks):
    for rank in ranks:
        found = rank["outputs"]
        for name in ("hidden_states", "router_logits", "aux_loss", "loss", "base_model"):
            assert found[name] <= ROUNDING, (name, found)


def test_tp_plan_auto_shards_by_the_plan_of_the_backbone_and_leaves_the_depth_mixer_whole(ranks):
    for rank in ranks:
        found = rank["outputs"]
        assert found["tp_plan_argument"] <= 1e-5
        assert found["rows_of_a_query_projection"] == 20 and found["depth_mixer_is_whole"]
        assert found["plan"]["model.layers.*.self_attn.q_proj"] == "colwise" and "lm_head" in found["plan"]
        assert not any("depth_mixer" in name for name in found["plan"])


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        ("key heads", "must divide num_key_value_heads=1, as model.layers.*.self_attn.k_proj is sharded by heads"),
        ("heads of latent attention", "must divide num_attention_heads=5"),
        ("pipeline", "Use attnres.parallel.Pipeline"),
        ("world", "world_size"),
        ("from_backbone", "from_pretrained and the same distributed_config"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(ranks, refused, says):
    for rank in ranks:
        message = rank["refusals"][refused]
        assert says in message and "\n" not in message


@pytest.mark.slow
def test_every_family_equals_one_process_in_every_mode(tmp_path):
    ranks = in_ranks(2, "tensor_ranks", equal_cases(THE_REST), tmp_path)
    for rank in ranks:
        for family, mode in THE_REST:
            assert_equal_to_one_process(rank[f"equal {family} {mode}"], mode, ROUNDING)
