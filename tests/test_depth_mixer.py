"""The equation, its parameters and the depth state, against a loop over tokens and sources in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnres.depth_mixer import DepthMixer, DepthState, Mixing, Norm, PseudoQuery, attention_residual

EPS = 1e-6
IMPLEMENTATIONS = ["eager", "auto"]  # "auto" is the fused operator on this CPU
MIXING = Mixing(EPS, layers_per_block=2)


def mix_per_token(sources, query, gain, eps=EPS):
    """Mixes in float64, one token and one source at a time."""
    mixture = torch.empty_like(sources[0], dtype=torch.float64)
    weights = torch.empty(*sources[0].shape[:2], len(sources), dtype=torch.float64)
    for b in range(mixture.shape[0]):
        for t in range(mixture.shape[1]):
            values = [source[b, t].double() for source in sources]
            keys = [value / (value.square().mean() + eps).sqrt() * gain.double() for value in values]
            logits = torch.stack([query.double() @ key for key in keys])
            weights[b, t] = torch.softmax(logits, 0)
            mixture[b, t] = sum(weight * value for weight, value in zip(weights[b, t], values, strict=True))
    return mixture, weights


def read(sources, query, implementation, norm=None, scale=False):
    state = DepthState(MIXING._replace(implementation=implementation, scale_norm_eps=scale), sources)
    return state.read(PseudoQuery(query), norm)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_sources", [1, 2, 7, 19])
def test_a_mixture_with_nonzero_queries_is_that_of_the_loop(num_sources, dtype, implementation, seed):
    torch.manual_seed(seed)
    sources = [(torch.randn(2, 5, 13) * 1.5**index).to(dtype) for index in range(num_sources)]
    precision = torch.promote_types(dtype, torch.float32)
    query, gain = torch.randn(13, dtype=precision), 1 + 0.3 * torch.randn(13, dtype=precision)
    mixture, weights = read(sources, query * gain, implementation)
    expected, expected_weights = mix_per_token(sources, query, gain)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 4e-3}[dtype]
    assert mixture.dtype == dtype and weights.dtype == precision
    assert (mixture.double() - expected).abs().max() < tolerance * expected.abs().max()
    torch.testing.assert_close(weights.double(), expected_weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("scale", [False, True])
def test_every_gradient_of_the_fused_operator_is_that_of_the_equation(scale, normed, seed):
    torch.manual_seed(seed)
    sources = [torch.randn(2, 5, 13) for _ in range(5)]
    query, gain, side, weight_side = torch.randn(13), torch.randn(13), torch.randn(2, 5, 13), torch.randn(2, 5, 5)

    def gradients(dtype, implementation):
        leaves = [each.to(dtype).requires_grad_() for each in (*sources, query, gain)]
        *values, own_query, own_gain = leaves
        norm = Norm(own_gain, 1.0, EPS) if normed and implementation == "auto" else None
        mixture, weights = read(values, own_query, implementation, norm, scale)
        if normed and norm is None:
            mixture = mixture * torch.rsqrt(mixture.square().mean(-1, keepdim=True) + EPS) * (own_gain + 1)
        loss = (mixture * side.to(dtype)).sum() + (weights * weight_side.to(dtype)).sum()
        return mixture, torch.autograd.grad(loss, leaves, allow_unused=True)

    found, found_gradients = gradients(torch.float32, "auto")
    expected, expected_gradients = gradients(torch.float64, "eager")
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    for gradient, wanted in zip(found_gradients, expected_gradients, strict=True):
        if wanted is not None:
            torch.testing.assert_close(gradient.double(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, of its own decompositions
def test_the_equation_can_be_differentiated_twice_and_forward():
    sources = [torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    query = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def mixture(query, *sources):
        return attention_residual(sources, query, EPS)[0]

    assert torch.autograd.gradcheck(mixture, (query, *sources), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(mixture, (query, *sources))


def test_gradients_of_gradients_of_the_fused_operator_are_those_of_the_equation():
    sources = [torch.randn(1, 3, 7, requires_grad=True) for _ in range(4)]
    query = torch.randn(7, requires_grad=True)
    found = []
    for implementation in IMPLEMENTATIONS:
        mixture, _ = read(sources, query, implementation)
        first = torch.autograd.grad(mixture.square().sum(), [query, *sources], create_graph=True)
        found.append(torch.autograd.grad(sum(each.square().sum() for each in first), [query, *sources]))
    for eager, auto in zip(*found, strict=True):
        torch.testing.assert_close(auto, eager, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("normed", [False, True])
def test_sources_are_kept_for_the_backward_pass_by_reference(normed):
    sources = tuple(torch.randn(1, 11, 64, requires_grad=True) for _ in range(6))
    norm = Norm(torch.randn(64, requires_grad=True), 0.0, EPS) if normed else None
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        read(sources, torch.randn(64, requires_grad=True), "auto", norm)
    for source in sources:
        kept.pop(source.untyped_storage().data_ptr())
    assert sorted(tensor.numel() for tensor in kept.values()) == [64] * (1 + normed) + [11 * 6]  # query, gain, weights


@given(st.integers(1, 9), st.sampled_from(IMPLEMENTATIONS), st.floats(1e-3, 1e3))
def test_depth_weights_are_a_distribution_and_do_not_depend_on_the_scale_of_a_source(count, implementation, scale):
    torch.manual_seed(count)
    sources, query = [torch.randn(1, 3, 17) for _ in range(count)], torch.randn(17)
    weights = [
        DepthState(Mixing(0.0, 2, implementation=implementation), [factor * source for source in sources]).read(
            PseudoQuery(query)
        )[1]
        for factor in (1.0, scale)
    ]
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(1, 3))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_does_not_round_scores(implementation):
    torch.manual_seed(0)
    sources, query = [torch.randn(1, 3, 64) for _ in range(3)], 5 * torch.randn(64)
    expected = read(sources, query, implementation)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = read(sources, query, implementation)[1]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_source_of_zeros_has_score_zero_and_finite_gradients(implementation):
    source = torch.zeros(1, 2, 5, requires_grad=True)
    mixture, weights = read([source, source], torch.randn(5), implementation)
    mixture.sum().backward()
    assert torch.equal(weights, torch.full((1, 2, 2), 0.5)) and torch.isfinite(source.grad).all()


def test_scaled_mixtures_with_zero_queries_are_the_sum_of_the_sources_to_the_last_bit():
    sources = [torch.randn(1, 3, 41) for _ in range(13)]
    total = sources[0]
    for source in sources[1:]:
        total = total + source
    assert torch.equal(read(sources, torch.zeros(41), "auto", scale=True)[0], total)


def test_the_mixer_orders_its_queries_by_sublayer_and_starts_at_zero_and_one():
    mixer = DepthMixer(num_layers=3, hidden_size=5)
    assert not torch.stack([each.query for each in mixer()]).any()
    parts = (mixer.attention_norm, mixer.mlp_norm, mixer.output_norm)
    assert all((part.weight == 1).all() for part in parts)
    with torch.no_grad():
        for value, part in enumerate(parts, 1):
            part.query.fill_(value)
            part.weight.fill_(10)
    assert [each.query[0].item() for each in mixer()] == [10, 20, 10, 20, 10, 20, 30]


# The state of a forward pass


def walked(per_block, layers):
    """Returns the inputs of the decoder layers by index, where each layer adds its index + 1."""
    seen = {}
    state = Mixing(EPS, per_block).start(torch.zeros(1, 2, 3))

    def call(index, layer, partial, *sources):
        seen[index] = ([each[0, 0, 0].item() for each in sources], None if partial is None else partial[0, 0, 0].item())
        own = DepthState(state.mixing, sources, partial)
        for _ in range(2):
            own.add(torch.full((1, 2, 3), index + 1.0))
        return own.new

    state.walk([(index, None) for index in layers], call)
    return seen, [each[0, 0, 0].item() for each in state.sources], state.partial


def test_blocks_are_complete_after_their_last_layer_and_the_short_one_stays_a_partial_sum():
    seen, sources, partial = walked(2, range(5))
    assert seen[0] == ([0], None) and seen[1] == ([0], 2)
    assert seen[2] == ([0, 6], None) and seen[3] == ([0, 6], 6)
    assert seen[4] == ([0, 6, 14], None)
    assert sources == [0, 6, 14] and partial[0, 0, 0] == 10


def test_in_full_mode_every_output_is_a_source():
    seen, sources, partial = walked(0, range(3))
    assert seen[2] == ([0, 1, 1, 2, 2], None) and sources == [0, 1, 1, 2, 2, 3, 3] and partial is None


def test_of_a_block_with_dropped_layers_what_is_left_is_the_block():
    seen, *_ = walked(2, [0, 3, 4])
    assert seen[3] == ([0, 2], None) and seen[4] == ([0, 2, 8], None)


def test_without_sources_the_partial_sum_is_the_residual_stream():
    seen, sources, partial = walked(None, range(3))
    assert seen[2] == ([], 6) and not sources and partial[0, 0, 0] == 12


@pytest.mark.parametrize("per_block", [2, 0, None])
def test_a_layer_that_returns_something_else_is_an_error(per_block):
    state = Mixing(EPS, per_block).start(torch.zeros(1, 2, 3))
    for wrong in ("text", torch.zeros(1, 2), (torch.zeros(1, 2, 3),) * 3, None):
        with pytest.raises(TypeError, match=r"layers\.4 must return"):
            state.walk([(4, None)], lambda *state, wrong=wrong: wrong)
