"""The mixing itself: scores, softmax and weighted sums against a loop over tokens, and what must not happen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnres.depth_functions import Norm, depth_weights, mix_together, score
from attnres.depth_mixer import DepthMixer, mix

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


def scaled(query, gain=1.0):
    """As `DepthMixer` gives pseudo-queries to the functions."""
    return query * gain * query.shape[-1] ** 0.5


def score_and_mix(sources, query, form):
    """The mixture in each of the forms in which sources come, and its weights where there are some to see."""
    query = query.unsqueeze(0)
    logits = torch.cat([score(source, query, EPS) for source in sources], dim=-1)
    if form == "list":
        return mix(tuple(sources), logits, "eager"), depth_weights(logits)
    if form == "list and partial sum":
        weights = depth_weights(logits[..., :-1], sources[-1], query, EPS)
        return mix(tuple(sources), logits[..., :-1], "eager", query, EPS), weights
    logits = logits.movedim(-1, 0).unsqueeze(0)
    if form == "together":
        return mix_together(logits, tuple(sources))[1][0], None
    together, (complete,) = mix_together(logits[:, :-1], tuple(sources[:-1]))
    return mix((complete, sources[-1]), together[0].unsqueeze(-1), "eager", query, EPS), None


FORMS = ["list", "list and partial sum", "together", "together and partial sum"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 41)], ids="tokens{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("num_sources", [1, 2, 7], ids="n{}".format)
def test_mixing_with_nonzero_queries_matches_a_per_token_loop(num_sources, shape, form):
    if num_sources == 1 and form.endswith("partial sum"):
        num_sources = 3
    sources = [torch.randn(*shape, 13) * 3**index for index in range(num_sources)]
    query, gain = torch.randn(13), 1 + 0.3 * torch.randn(13)
    mixture, weights = score_and_mix(sources, scaled(query, gain), form)
    expected_mixture, expected_weights = mix_per_token(sources, query, gain)
    assert (mixture - expected_mixture).abs().max() < 1e-5 * expected_mixture.abs().max()
    if weights is not None:
        torch.testing.assert_close(weights.double(), expected_weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS[:2])
def test_every_gradient_is_that_of_the_stacked_sum(form):
    sources = [torch.randn(2, 5, 13, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    query = torch.randn(13, dtype=torch.float64, requires_grad=True)
    direction, weight_direction = torch.randn(2, 5, 13, dtype=torch.float64), torch.randn(2, 5, 5, dtype=torch.float64)

    def stacked():
        values = torch.stack(sources)
        keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + EPS)
        weights = torch.softmax(torch.einsum("d,nbtd->btn", query, keys), dim=-1)
        return torch.einsum("btn,nbtd->btd", weights, values), weights

    def gradients(mixture, weights):
        loss = (mixture * direction).sum() + (weights * weight_direction).sum()
        return torch.autograd.grad(loss, [*sources, query])

    expected = gradients(*stacked())
    for gradient, wanted in zip(gradients(*score_and_mix(sources, scaled(query), form)), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)


def test_the_gradient_of_the_sum_can_be_differentiated_again():
    sources = [torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    logits = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda logits, *values: mix(values, logits, "eager"), (logits, *sources))


@pytest.mark.parametrize("normed", [False, True])
def test_sources_are_kept_for_the_backward_pass_by_reference(normed):
    """With a norm the mixture in place of the first source: plain residuals keep what the norm takes, too."""
    sources = tuple(torch.randn(1, 11, 64, requires_grad=True) for _ in range(6))
    logits = torch.randn(1, 11, 6, requires_grad=True)
    norm = Norm(torch.randn(64, requires_grad=True), 0.0, EPS) if normed else None
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mix(sources, logits, "eager", norm=norm)
    for source in sources[normed:]:
        kept.pop(source.untyped_storage().data_ptr())
    sizes = sorted(tensor.numel() for tensor in kept.values())
    assert sizes == ([64, 11 * 6, 11 * 64] if normed else [11 * 6])  # gain, weights, mixture


@given(st.integers(1, 9), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.floats(1e-3, 1e3))
def test_depth_weights_are_a_distribution_and_do_not_depend_on_the_scale_of_a_source(num_sources, dtype, scale):
    torch.manual_seed(num_sources)
    sources = [torch.randn(1, 3, 17) for _ in range(num_sources)]
    queries = scaled(torch.randn(2, 17))

    def logits_at(scale):
        return torch.cat([score((scale * source).to(dtype), queries, 0.0)[..., 1:] for source in sources], dim=-1)

    mixture = mix(tuple(source.to(dtype) for source in sources), logits_at(1.0), "eager")
    weights = depth_weights(logits_at(1.0))
    assert mixture.dtype == dtype and weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 3))
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.05}[dtype]
    torch.testing.assert_close(logits_at(scale), logits_at(1.0), rtol=tolerance, atol=tolerance)


def test_half_precision_sources_that_are_large_do_not_overflow_their_scores():
    source = torch.full((1, 1, 4096), 60.0, dtype=torch.float16)
    logits = score(source, scaled(torch.ones(1, 4096)), EPS)
    torch.testing.assert_close(logits, torch.tensor([[[4096.0]]]), rtol=1e-3, atol=0)


def test_double_precision_sources_are_scored_and_mixed_in_double_precision():
    sources = [torch.randn(2, 3, 13, dtype=torch.float64) for _ in range(4)]
    query, gain = torch.randn(13, dtype=torch.float64), torch.rand(13, dtype=torch.float64)
    for form in FORMS:
        mixture, _ = score_and_mix(sources, scaled(query, gain), form)
        torch.testing.assert_close(mixture, mix_per_token(sources, query, gain)[0], rtol=1e-12, atol=1e-12)


def test_a_source_of_zeros_has_score_zero_and_finite_gradients():
    source = torch.zeros(1, 2, 5, requires_grad=True)
    logits = score(source, torch.randn(1, 5), EPS)
    logits.sum().backward()
    assert not logits.any() and torch.isfinite(source.grad).all()


def test_one_source_is_passed_through_without_a_gradient_to_its_score():
    source = torch.randn(2, 3, 5)
    logits = torch.randn(2, 3, 1, requires_grad=True)
    assert mix((source,), logits, "eager") is source
    weights = depth_weights(logits)
    assert torch.equal(weights, torch.ones(2, 3, 1))
    assert not torch.autograd.grad(weights.sum(), logits)[0].any()


def test_the_mixer_orders_its_queries_by_sublayer_and_starts_at_zero_and_one():
    mixer = DepthMixer(num_layers=3, hidden_size=5)
    assert not mixer().any()
    assert all((part.weight == 1).all() for part in mixer.children())
    with torch.no_grad():
        for value, part in enumerate((mixer.attention_norm, mixer.mlp_norm, mixer.output_norm), 1):
            part.query.fill_(value)
            part.weight.fill_(10)
    torch.testing.assert_close(mixer()[:, 0], 5**0.5 * torch.tensor([10.0, 20, 10, 20, 10, 20, 30]))
