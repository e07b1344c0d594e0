"""Sequence-sharded prefill: four ranks keep a quarter of the sources each, and compute what one process computes."""

import pytest
from families import LINEAR_FAMILIES
from launching import case, in_ranks
from once import once

ROUNDING = 1e-12  # of float64
IN_FLOAT32 = ("gemma2", *LINEAR_FAMILIES)  # which compute in it here and there, whatever they are given
# Tokens that 4 ranks share evenly, unevenly, one each, and too few to share.
PREFILLS = [
    *(("qwen3", "block", tokens, "tensor parallel") for tokens in (12, 23, 4, 3)),
    ("qwen3", "standard", 12, "tensor parallel"),
    ("gemma2", "block", 14, "tensor parallel"),
    ("mixtral", "full", 14, "tensor parallel"),
    ("kimi_linear", "block", 23, "tensor parallel"),
    ("granite", "block", 14, "whole weights"),
    ("qwen3", "full", 23, "whole weights"),
]
LAYERS, PER_BLOCK, D = 5, 2, 40
MEMORY = [("block", 1, 67), ("block", 2, 48), ("block", 4, 67), ("full", 2, 67), ("full", 4, 48)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    cases = {what: case(what) for what in ("generated", "division", "refusals")}
    for family, mode, tokens, how in PREFILLS:
        cases[f"prefill {family} {mode} {tokens} {how}"] = case(
            "prefill", family=family, mode=mode, tokens=tokens, how=how
        )
    for mode, number, tokens in MEMORY:
        cases[f"memory {mode} {number} {tokens}"] = case("memory", mode=mode, ranks=number, tokens=tokens)
    return once(tmp_path_factory, "sequence-ranks", lambda folder: in_ranks(4, "sequence_ranks", cases, folder))


@pytest.mark.parametrize(("family", "mode", "tokens", "how"), PREFILLS)
def test_prefill_cache_decoding_and_all_outputs_are_those_of_one_process(ranks, family, mode, tokens, how):
    for rank in ranks:
        found = rank[f"prefill {family} {mode} {tokens} {how}"]
        assert max(found.values()) <= (1e-5 if family in IN_FLOAT32 else ROUNDING), found
        assert ("cache" in found) == (how == "whole weights") and ("depth_weights" in found) == (mode != "standard")


@pytest.mark.parametrize(("mode", "number", "tokens"), MEMORY)
def test_a_rank_keeps_the_sources_of_its_own_tokens_only(ranks, mode, number, tokens):
    # When the last of 5 decoder layers is called: the embedding, and 2 blocks or 8 sublayer outputs.
    sources = 1 + (LAYERS // PER_BLOCK if mode == "block" else 2 * (LAYERS - 1))
    for rank in ranks:
        found = rank[f"memory {mode} {number} {tokens}"]
        own = tokens // number + (found["rank"] < tokens % number)
        assert found["bytes"] == sources * own * D * 4


@pytest.mark.parametrize("how", ["whole", "in chunks"])
def test_generate_gives_the_tokens_of_one_process(ranks, how):
    assert all(rank["generated"][how] for rank in ranks)


@pytest.mark.parametrize("tokens", [4, 5, 7, 8, 23])
def test_every_token_belongs_to_one_rank_and_parts_differ_by_one_at_most(ranks, tokens):
    for number, rank in enumerate(ranks):
        found = rank["division"][str(tokens)]
        assert found["back"] and sum(found["sizes"]) == tokens and max(found["sizes"]) - min(found["sizes"]) <= 1
        assert found["own"] == found["sizes"][number] and found["bytes"] == 2 * found["own"] * 3 * 4


def test_what_cannot_be_is_refused_in_one_line(ranks):
    for rank in ranks:
        refusals = rank["refusals"]
        assert "need an AttnRes model, got Linear" in refusals["another model"]
        assert "or give a group" in refusals["no group"] and "call it under torch.no_grad()" in refusals["autograd"]
        assert not any("\n" in message for message in refusals.values())
