"""The mixing with the norm that follows, and mixtures for several sublayers at once: values and every gradient."""

import pytest
import torch
from families import FAMILIES
from helpers import random_attnres, random_tokens, relative_error
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from attnres import depth_functions
from attnres.bench.memory import saved_bytes
from attnres.depth_functions import Norm, mix_together, mixture, score

EPS = 1e-6


def stacked(sources, logits, query, weight, offset):
    """The same in so many words."""
    if query is not None:
        last = sources[-1]
        key = last * torch.rsqrt(last.square().mean(-1, keepdim=True) + EPS)
        logits = torch.cat([logits, (key @ query[0] / query.shape[-1] ** 0.5).unsqueeze(-1)], dim=-1)
    mixed = torch.einsum("btn,nbtd->btd", torch.softmax(logits, dim=-1), torch.stack(sources))
    if weight is None:
        return mixed
    return mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + EPS) * (weight + offset)


def inputs(num_sources, with_query, with_norm, dtype=torch.float64, shape=(2, 3), hidden_size=7):
    torch.manual_seed(num_sources)

    def leaf(*size):
        return torch.randn(*size, dtype=dtype, requires_grad=True)

    sources = [leaf(*shape, hidden_size) for _ in range(num_sources)]
    query = leaf(1, hidden_size) if with_query else None
    return sources, leaf(*shape, num_sources - with_query), query, leaf(hidden_size) if with_norm else None


CASES = [(1, False, True), (2, True, True), (2, False, True), (5, True, True), (5, True, False), (5, False, False)]


@pytest.mark.parametrize(("num_sources", "with_query", "with_norm"), CASES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_mixtures_and_all_their_gradients_are_those_of_the_stacked_sources(num_sources, with_query, with_norm, offset):
    sources, logits, query, weight = inputs(num_sources, with_query, with_norm)
    norm = None if weight is None else Norm(weight, offset, EPS)
    leaves = [leaf for leaf in (*sources, logits, query, weight) if leaf is not None]
    found, expected = (
        mixture(tuple(sources), logits, query, EPS, norm),
        stacked(sources, logits, query, weight, offset),
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    direction = torch.randn_like(expected)
    pairs = (torch.autograd.grad(each, leaves, direction) for each in (found, expected))
    for gradient, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        again = mixture(tuple(sources), logits, query, EPS, norm)
        torch.testing.assert_close(again, expected, rtol=1e-12, atol=1e-13)
        for source in sources:
            assert again.data_ptr() != source.data_ptr()  # normed in place, but not in a source


@pytest.mark.parametrize("frozen", range(4))
def test_what_is_frozen_gets_no_gradient_and_changes_none(frozen):
    sources, logits, query, weight = inputs(3, True, True)
    leaves = [sources[0], sources[2], query, weight]
    direction = torch.randn_like(sources[0])

    def gradients():
        mixture(tuple(sources), logits, query, EPS, Norm(weight, 0.0, EPS)).backward(direction)
        found = [leaf.grad for leaf in leaves]
        for leaf in (*leaves, sources[1], logits):
            leaf.grad = None
        return found

    expected = gradients()
    leaves[frozen].requires_grad_(False)
    for number, (gradient, wanted) in enumerate(zip(gradients(), expected, strict=True)):
        assert gradient is None if number == frozen else torch.equal(gradient, wanted)


@pytest.mark.parametrize(("num_sources", "with_query", "with_norm"), CASES)
def test_the_gradients_of_mixtures_can_be_differentiated_again(num_sources, with_query, with_norm):
    sources, logits, query, weight = inputs(num_sources, with_query, with_norm, shape=(1, 2), hidden_size=3)
    given = [leaf for leaf in (logits, query, weight) if leaf is not None]

    def function(*leaves):
        rest = list(leaves)
        logits = rest.pop(0)
        query = rest.pop(0) if with_query else None
        norm = Norm(rest.pop(0), 1.0, 0.1) if with_norm else None
        return mixture(tuple(rest), logits, query, 0.1, norm)

    assert torch.autograd.gradcheck(function, (*given, *sources))
    assert torch.autograd.gradgradcheck(function, (*given, *sources))


@pytest.mark.parametrize("piece_bytes", [1, 900, 1 << 23])
@pytest.mark.parametrize("num_sources", [2, 7])
def test_mixtures_for_several_sublayers_are_those_for_each(monkeypatch, num_sources, piece_bytes):
    """However few tokens are taken at a time; one sublayer may not use its mixture, another not its logit."""
    monkeypatch.setattr(depth_functions, "PIECE_BYTES", piece_bytes)
    torch.manual_seed(0)
    sources = [torch.randn(2, 11, 5, dtype=torch.float64, requires_grad=True) for _ in range(num_sources)]
    logits = torch.randn(3, num_sources, 2, 11, dtype=torch.float64, requires_grad=True)
    together, mixtures = mix_together(logits, tuple(sources))
    torch.testing.assert_close(together, torch.logsumexp(logits, dim=1))
    expected = torch.einsum("knbt,nbtd->kbtd", torch.softmax(logits, dim=1), torch.stack(sources))
    for mixed, wanted in zip(mixtures, expected, strict=True):
        torch.testing.assert_close(mixed, wanted)
    direction, by_together = torch.randn_like(expected), torch.randn_like(together)
    loss = (mixtures[0] * direction[0]).sum() + (mixtures[2] * direction[2]).sum() + (together * by_together)[:2].sum()
    by_hand = (expected[::2] * direction[::2]).sum() + (torch.logsumexp(logits, dim=1) * by_together)[:2].sum()
    pairs = (torch.autograd.grad(each, [logits, *sources]) for each in (loss, by_hand))
    for gradient, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("module", [Qwen3RMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fused_norm_is_no_further_from_the_truth_than_the_module(module, dtype):
    torch.manual_seed(0)
    norm = module(64).to(dtype)
    torch.nn.init.normal_(norm.weight)
    offset = 1.0 if module is Gemma2RMSNorm else 0.0
    source = (3 * torch.randn(2, 5, 64)).to(dtype)
    exact = stacked([source.double()], torch.zeros(2, 5, 1).double(), None, norm.weight.double(), offset)
    with torch.no_grad():
        found = mixture((source,), torch.zeros(2, 5, 1), None, EPS, Norm(norm.weight, offset, EPS))
        expected = norm(source)
    assert found.dtype == dtype
    assert (found - exact).norm() <= 1.1 * (expected - exact).norm() + 1e-7 * exact.norm()


def test_scores_are_float32_under_autocast():
    source, queries = torch.randn(1, 3, 64), torch.randn(2, 64)
    logits = torch.zeros(1, 3, 1)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            expected = score(source, queries, EPS), mixture((source, -source), logits, queries[:1], EPS)
            with torch.autocast("cpu", torch.bfloat16):
                found = score(source, queries, EPS), mixture((source, -source), logits, queries[:1], EPS)
        for each, wanted in zip(found, expected, strict=True):
            assert torch.equal(each, wanted)


def norm_calls(model, tokens, grad):
    """How often the norms before the sublayers are called as modules."""
    layer = model.model.layers[0]
    kind, calls = type(layer.get_submodule(layer.pre_norms[0])), []
    forward = kind.forward

    def counted(self, hidden_states):
        calls.append(self)
        return forward(self, hidden_states)

    kind.forward = counted
    try:
        with torch.set_grad_enabled(grad):
            logits = model(tokens).logits
    finally:
        kind.forward = forward
    of_sublayers = {id(layer.get_submodule(name)) for layer in model.model.layers for name in layer.pre_norms}
    return sum(id(each) in of_sublayers for each in calls), logits


@pytest.mark.parametrize("shape", [(1, 1), (2, 7)])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("mode", ["block", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_norm_is_called_only_where_something_hooks_on_to_it_and_computes_the_same(family, mode, grad, shape):
    model, tokens = random_attnres(family, mode), random_tokens(*shape)
    calls, fused = norm_calls(model, tokens, grad)
    assert calls == 0
    seen = []
    for layer in model.model.layers:
        for name in layer.pre_norms:
            layer.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    calls, hooked = norm_calls(model, tokens, grad)
    assert calls == len(seen) == 2 * len(model.model.layers)
    # This qwen3_next multiplies rounding: whatever mixes and norms, its logits are up to 1e-3 from those in float64.
    assert relative_error(fused, hooked) < (2e-3 if family == "qwen3_next" else 1e-4)


def test_inputs_that_are_hooked_on_to_are_seen_before_they_are_normed():
    model, tokens = random_attnres("llama"), random_tokens(2, 7)
    with torch.no_grad():
        expected = model(tokens, output_hidden_states=True).hidden_states
        seen = []
        for layer in model.model.layers:
            layer.mixed_input.register_forward_hook(lambda module, args, output: seen.append(output))
        model(tokens)
    assert len(seen) == len(expected) - 1
    for each, wanted in zip(seen, expected, strict=False):
        torch.testing.assert_close(each, wanted, rtol=1e-4, atol=1e-5)


def test_a_norm_that_has_been_replaced_is_used():
    model, tokens = random_attnres("llama"), random_tokens(2, 7)
    layer = model.model.layers[1]
    layer.input_layernorm = torch.nn.LayerNorm(layer.input_layernorm.weight.shape[0])
    found = model(tokens).logits
    layer.mixed_input.register_forward_hook(lambda *_: None)
    assert torch.isfinite(found).all() and relative_error(model(tokens).logits, found) < 1e-4
    layer.input_layernorm.weight.data.zero_()
    assert relative_error(model(tokens).logits, found) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["block", "full"])
def test_the_backward_pass_needs_no_more_states_than_with_plain_residuals(mode, dtype):
    tokens = random_tokens(2, 67)

    def kept(mode):
        model = random_attnres("qwen3", mode).train().to(dtype)
        model.set_attn_implementation("eager")
        return saved_bytes(lambda: model(tokens, labels=tokens, use_cache=False).loss, model.parameters())

    assert kept(mode) < 1.1 * kept("standard")


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("mode", ["block", "full"])
def test_embeddings_may_have_any_strides(mode, grad):
    model = random_attnres("llama", mode)
    embeddings = torch.randn(3, 5, model.config.hidden_size)
    strided = embeddings.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    with torch.set_grad_enabled(grad):
        found, expected = (model(inputs_embeds=each).logits for each in (strided, embeddings))
    assert relative_error(found, expected) < 1e-5
    if grad:
        weights = model.model.layers[0].self_attn.q_proj.weight
        first, second = (torch.autograd.grad(each.square().mean(), weights)[0] for each in (found, expected))
        assert relative_error(first, second) < 1e-4
