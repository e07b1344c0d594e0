"""The mixing itself: scores, softmax and weighted sums against a loop over tokens, and what must not happen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnres.depth_mixer import DepthMixer, mix, score

EPS = 1e-6


def mix_per_token(sources, query, gain):
    """float64, one token and one source at a time."""
    mixture = torch.empty_like(sources[0], dtype=torch.float64)
    weights = torch.empty(*sources[0].shape[:2], len(sources), dtype=torch.float64)
    for b in range(mixture.shape[0]):
        for t in range(mixture.shape[1]):
            values = [source[b, t].double() for source in sources]
            keys = [value / (value.square().mean() + EPS).sqrt() * gain.double() for value in values]
            logits = torch.stack([query.double() @ key for key in keys])
            weights[b, t] = torch.softmax(logits, 0)
            mixture[b, t] = sum(weight * value for weight, value in zip(weights[b, t], values, strict=True))
    return mixture, weights


@pytest.mark.parametrize("num_sources", [1, 2, 7], ids="n{}".format)
def test_mixing_with_nonzero_queries_matches_a_per_token_loop(num_sources):
    sources = [torch.randn(2, 5, 13) * 3**index for index in range(num_sources)]
    query, gain = torch.randn(13), 1 + 0.3 * torch.randn(13)
    logits = [score(source, (query * gain).unsqueeze(0), EPS)[0] for source in sources]
    mixture, weights = mix(sources, logits, "eager")
    expected_mixture, expected_weights = mix_per_token(sources, query, gain)
    torch.testing.assert_close(mixture.double(), expected_mixture, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights.double(), expected_weights, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 9), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.floats(1e-3, 1e3))
def test_depth_weights_are_a_distribution_and_do_not_depend_on_the_scale_of_a_source(num_sources, dtype, scale):
    torch.manual_seed(num_sources)
    sources = [torch.randn(1, 3, 17) for _ in range(num_sources)]
    queries = torch.randn(2, 17)
    logits = [score(source.to(dtype), queries, 0.0)[1] for source in sources]
    scaled = [score((scale * source).to(dtype), queries, 0.0)[1] for source in sources]
    mixture, weights = mix([source.to(dtype) for source in sources], logits, "eager")
    assert mixture.dtype == dtype and weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 3))
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.05}[dtype]
    torch.testing.assert_close(torch.stack(scaled), torch.stack(logits), rtol=tolerance, atol=tolerance)


def test_half_precision_sources_that_are_large_do_not_overflow_their_scores():
    source = torch.full((1, 1, 4096), 60.0, dtype=torch.float16)
    (logits,) = score(source, torch.ones(1, 4096), EPS)
    torch.testing.assert_close(logits, torch.tensor([[4096.0]]), rtol=1e-3, atol=0)


def test_double_precision_sources_are_scored_and_mixed_in_double_precision():
    sources = [torch.randn(2, 3, 13, dtype=torch.float64) for _ in range(4)]
    query, gain = torch.randn(13, dtype=torch.float64), torch.rand(13, dtype=torch.float64)
    logits = [score(source, (query * gain).unsqueeze(0), EPS)[0] for source in sources]
    mixture, _ = mix(sources, logits, "eager")
    torch.testing.assert_close(mixture, mix_per_token(sources, query, gain)[0], rtol=1e-12, atol=1e-12)


def test_a_source_of_zeros_has_score_zero_and_finite_gradients():
    source = torch.zeros(1, 2, 5, requires_grad=True)
    (logits,) = score(source, torch.randn(1, 5), EPS)
    logits.sum().backward()
    assert not logits.any() and torch.isfinite(source.grad).all()


def test_one_source_is_passed_through_without_a_gradient_to_its_score():
    source = torch.randn(2, 3, 5)
    logits = torch.randn(2, 3, requires_grad=True)
    mixture, weights = mix([source], [logits], "eager")
    assert mixture is source and not weights.requires_grad
    assert torch.equal(weights, torch.ones(2, 3, 1))


def test_the_mixer_orders_its_queries_by_sublayer_and_starts_at_zero_and_one():
    mixer = DepthMixer(num_layers=3, hidden_size=5)
    assert not mixer().any()
    assert all((part.weight == 1).all() for part in mixer.children())
    with torch.no_grad():
        for value, part in enumerate((mixer.attention_norm, mixer.mlp_norm, mixer.output_norm), 1):
            part.query.fill_(value)
            part.weight.fill_(10)
    assert mixer()[:, 0].tolist() == [10, 20, 10, 20, 10, 20, 30]
