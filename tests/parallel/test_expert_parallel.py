"""Expert parallelism by the plan of the backbone, with tensor parallelism beside it: equal to one process.

In float64 by loops over experts, which leaves nothing of rounding, where transformers can: not before 5.21, whose loops
do not know experts of another rank, and not for gpt_oss. There in float32 by grouped products.
"""

import pytest
from families import MOE_FAMILIES, tiny_config
from launching import case, in_ranks
from once import once
from transformers.distributed import DistributedConfig

# Those with a plan in transformers: since 5.23 all.
PLANNED = tuple(family for family in MOE_FAMILIES if getattr(tiny_config(family), "base_model_ep_plan", None))
EVERY_MODE = [
    *((family, "block") for family in PLANNED),
    *((family, mode) for family in ("mixtral", "kimi_linear") for mode in ("standard", "full")),
]
SAVED = ("mixtral", "qwen3_moe", "kimi_linear")


def precision(family: str) -> str:
    loops_know = hasattr(DistributedConfig, "efsdp_size") and family != "gpt_oss"
    return "exact" if loops_know else "float32"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    cases = {"refusals": case("expert_refusals")}
    for family, mode in EVERY_MODE:
        cases[f"equal {family} {mode}"] = case("equal", family=family, mode=mode, how="ep", precision=precision(family))
    cases |= {f"saved {family}": case("saved", family=family, how="ep") for family in SAVED}
    return once(tmp_path_factory, "expert-ranks", lambda folder: in_ranks(2, "tensor_ranks", cases, folder))


@pytest.mark.parametrize(("family", "mode"), EVERY_MODE)
def test_logits_depth_weights_and_gradients_are_those_of_one_process(ranks, family, mode):
    tolerance = 1e-12 if precision(family) == "exact" else 1e-5
    for rank in ranks:
        found = rank[f"equal {family} {mode}"]
        assert found["experts_here"] == 2  # of 4
        for measure in ("logits", "training_logits", *(["depth_weights"] if mode != "standard" else [])):
            assert found[measure] <= tolerance, (measure, found)
        # Norms and decay rates compute in float32 whatever they are given, and round their gradients to it.
        assert found["gradients"] <= max(tolerance, 1e-6) and found["one gradient"] <= 3e-5, found
        if mode != "standard":
            assert found["depth_whole"] and found["depth_equal_on_all_ranks"]
            assert found["smallest_depth_gradient"] > 0


@pytest.mark.parametrize("family", SAVED)
def test_a_model_with_experts_on_several_ranks_saves_the_checkpoint_it_came_from(ranks, family):
    for rank in ranks:
        found = rank[f"saved {family}"]
        assert found["same_tensors"] and not found["names"] and found["logits"] == 0, found


@pytest.mark.parametrize(
    ("refused", "says"), [("experts", "5 experts across 2 expert-parallel ranks"), ("no experts", "base_model_ep_plan")]
)
def test_what_cannot_be_is_refused_in_one_line(ranks, refused, says):
    for rank in ranks:
        message = rank["refusals"][refused]
        assert says in message and "\n" not in message
