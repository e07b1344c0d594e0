"""The variants share one set of weights and compute what they say; a faulty one is not measured."""

import sys
import weakref

import pytest
import torch
from helpers import random_tokens, relative_error, short_config
from reference import Oracle

from attnres.bench import arms
from attnres.bench.arms import build, check, convert, select
from attnres.bench.workloads import hollow

CPU = torch.device("cpu")
ALL = ("plain", "standard", "block", "full", "stacked", "stacked-full")


@pytest.fixture(scope="module")
def built():
    chosen = select(ALL)
    models, left_out = build(chosen, short_config("qwen3"), 2, CPU, seed=0)
    assert not left_out
    return chosen, models


def oracle_of(model, plain, layers_per_block):
    depth = model.depth_mixer
    queries = torch.stack([depth.attention_norm.query, depth.mlp_norm.query], 1).flatten(0, 2)
    gains = torch.stack([depth.attention_norm.weight, depth.mlp_norm.weight], 1).flatten(0, 1)
    queries = torch.cat([queries, depth.output_norm.query]).detach()
    gains = torch.cat([gains, depth.output_norm.weight[None]]).detach()
    return Oracle(plain, queries, gains, layers_per_block and 2 * layers_per_block)


@pytest.mark.parametrize("family", ["llama", "phi3", "granite", "gemma2", "qwen3_moe", "qwen3_next", "kimi_linear"])
def test_all_variants_of_a_family_compute_the_same_logits(family):
    chosen = select(ALL)
    models, _ = build(chosen, short_config(family), 2, CPU, seed=0)
    errors, left_out = check(chosen, models, seed=0)
    assert errors.keys() == {"standard", "block", "full"} and max(errors.values()) < 3e-5 and not left_out


@pytest.mark.parametrize(
    ("name", "mode", "layers_per_block"), [("stacked", "block", 2), ("stacked-full", "full", None)]
)
def test_stacked_variants_match_an_oracle_that_knows_nothing_of_them(name, mode, layers_per_block):
    models, _ = build(select(ALL), short_config("qwen3"), 2, CPU, seed=0)
    ids = random_tokens(2, 7)
    with torch.no_grad():
        expected_plain = models["plain"](ids).logits
        logits = models[name](ids).logits
        oracle = oracle_of(models[mode], models["plain"], layers_per_block)
        assert relative_error(logits, oracle(ids).logits) < 1e-5
    assert relative_error(logits, expected_plain) > 0.1  # the pseudo-queries matter


@pytest.mark.parametrize("name", ALL)
def test_decoding_with_a_cache_made_by_the_plain_model_runs_in_every_variant(built, name):
    """Timing shares one cache; each variant's own cache gives what it computes without one."""
    _, models = built
    ids = random_tokens(1, 9)
    with torch.no_grad():
        whole = models[name](ids, use_cache=False).logits[:, -1]
        cache = models[name](ids[:, :-1], use_cache=True).past_key_values
        assert relative_error(models[name](ids[:, -1:], past_key_values=cache).logits[:, -1], whole) < 1e-5
        shared = models["plain"](ids[:, :-1], use_cache=True).past_key_values
        models[name](ids[:, -1:], past_key_values=shared, use_cache=True)
        assert shared.get_seq_length() == 9


@pytest.mark.parametrize("name", ALL[1:])
def test_variants_share_the_memory_of_all_backbone_weights(built, name):
    _, models = built
    plain = {weight.data_ptr() for weight in models["plain"].parameters()}
    own = {weight.data_ptr() for weight in models[name].parameters()}
    assert plain <= own
    assert len(own - plain) == {"standard": 0, "block": 6, "full": 6}.get(name, 2 * 11)


def test_gradients_of_one_variant_are_not_those_of_another(built):
    _, models = built
    ids = random_tokens(1, 5)
    models["block"](ids, labels=ids).loss.backward()
    assert all(weight.grad is None for name in ("plain", "full", "stacked") for weight in models[name].parameters())
    assert all(weight.grad is not None for weight in models["block"].parameters())
    models["block"].zero_grad(set_to_none=True)


def test_stacked_variant_learns_its_pseudo_queries_and_gains(built):
    _, models = built
    ids = random_tokens(1, 5)
    models["stacked"](ids, labels=ids).loss.backward()
    gradients = [weight.grad for name, weight in models["stacked"].named_parameters() if "depth_" in name]
    # The first sublayer has one source: nothing to mix, nothing to learn.
    assert [gradient is None for gradient in gradients] == [True, *[False] * 10] * 2
    models["stacked"].zero_grad(set_to_none=True)


def test_another_dtype_keeps_weights_shared_and_variants_runnable():
    models, _ = build(select(ALL), short_config("qwen3"), 2, CPU, seed=0)
    convert(models, torch.bfloat16)
    plain = {weight.data_ptr() for weight in models["plain"].parameters()}
    for model in models.values():
        assert plain <= {weight.data_ptr() for weight in model.parameters()}
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        assert model(random_tokens(1, 5)).logits.dtype == torch.bfloat16


def test_a_variant_that_computes_something_else_is_refused(built):
    chosen, models = built
    query = models["block"].depth_mixer.mlp_norm.query
    before = query.detach().clone()
    with torch.no_grad():
        query[1] += 0.1
    with pytest.raises(ValueError, match="variant block does not compute the same as stacked: the relative error"):
        check(chosen, models, seed=0)
    with torch.no_grad():
        query.copy_(before)


def test_an_optional_variant_that_cannot_run_is_left_out_with_its_reason():
    def needs_a_gpu(*_):
        raise ValueError("CUDA tensors needed\nand more")

    fused = arms.Variant("peer", "block", mixing=lambda: needs_a_gpu, reference="stacked")
    chosen = {"plain": arms.ARMS["plain"], "fla-fused": fused}
    models, _ = build(chosen, short_config("qwen3"), 2, CPU, seed=0)
    assert check(chosen, models, seed=0) == ({}, {"fla-fused": "cannot run here (CUDA tensors needed and more)"})


def test_a_variant_of_a_package_that_is_missing_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.ops.attnres.naive", None)
    models, left_out = build(select(["fla-naive"]), short_config("qwen3"), 2, CPU, seed=0)
    assert left_out["fla-naive"].startswith("flash-linear-attention cannot be imported (")
    assert "fla-naive" not in models


def test_plain_is_always_there_and_implementations_repeat_block_and_full():
    assert list(select(["block"])) == ["plain", "block"]
    chosen = select(["block", "full"], ["eager"])
    assert list(chosen) == ["plain", "block", "full", "block:eager", "full:eager"]
    models, _ = build(chosen, short_config("qwen3"), 2, CPU, seed=0)
    assert models["block:eager"].config.depth_implementation == "eager"


def test_stacked_variant_lets_go_of_its_sources_after_a_pass(built):
    _, models = built
    outputs = []
    handle = (
        models["stacked"]
        .model.layers[-1]
        .register_forward_hook(lambda layer, args, output: outputs.append(weakref.ref(output)))
    )
    with torch.no_grad():
        models["stacked"](random_tokens(1, 5))
    handle.remove()
    assert outputs[0]() is None


@pytest.mark.parametrize(
    ("names", "implementations", "message"),
    [
        (["blocks"], [], "variant must be one of plain, .*; got 'blocks'"),
        ([], ["x"], "implementation must be .*; got 'x'"),
    ],
)
def test_unknown_names_are_refused(names, implementations, message):
    with pytest.raises(ValueError, match=message):
        select(names, implementations)


def test_hollow_models_mix_and_do_nothing_else():
    models, _ = build(select(ALL), short_config("qwen3"), 2, CPU, seed=0)
    inputs = torch.randn(1, 3, models["plain"].config.hidden_size)
    states = {}
    for name, model in models.items():
        hollow(model)
        if name in ("plain", "standard"):
            model.model.norm = torch.nn.Identity()
        with torch.no_grad():
            states[name] = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    assert torch.equal(states["plain"], inputs * 2**10)  # each of 10 sublayers doubles the sum
    assert torch.equal(states["standard"], states["plain"])
    assert relative_error(states["block"], states["stacked"]) < 1e-5
    assert relative_error(states["full"], states["stacked-full"]) < 1e-5
    # Identities add up to multiples of the embedding, of which the final norm sees the direction only.
    normed = models["block"].model.norm(inputs)
    assert relative_error(states["block"], normed) < 1e-5
