"""`attnres::mix` as an operator of torch: its schema, its fake tensors, and its gradients."""

import pytest
import torch
from mix_reference import mix

import attnres.kernels.operator  # noqa: F401  registers the operator

EPS = 1e-6


def arguments(dtype=torch.float32, count=4, normed=True, needs=None):
    torch.manual_seed(0)
    sources = [torch.randn(2, 3, 13, dtype=dtype) for _ in range(count)]
    for source, need in zip(sources, needs or [True] * count, strict=True):
        source.requires_grad_(need)
    gain = torch.randn(13, dtype=dtype, requires_grad=True) if normed else None
    return (sources, torch.randn(13, requires_grad=True), EPS, gain, 1.0, EPS, 2.0, "cpu")


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own parts
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_torchs_rules(dtype, normed):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.attnres.mix.default, arguments(dtype, normed=normed), test_utils=tests)


def test_sources_that_need_no_gradient_get_none():
    needs = [True, False, True, False]
    given = arguments(needs=needs)
    output, weights = torch.ops.attnres.mix(*given)
    (output.square().sum() + weights.square().sum()).backward()
    assert [source.grad is not None for source in given[0]] == needs
    assert given[1].grad is not None and given[3].grad is not None
    everything = arguments()
    output, weights = torch.ops.attnres.mix(*everything)
    (output.square().sum() + weights.square().sum()).backward()
    torch.testing.assert_close(given[0][2].grad, everything[0][2].grad)


def test_a_tensor_that_is_two_sources_gets_its_gradient_once_more_not_twice():
    source, query = torch.randn(1, 2, 13, requires_grad=True), torch.randn(13)
    found = []
    for create_graph in (False, True):
        output, _ = torch.ops.attnres.mix([source, source], query, EPS, None, 0.0, 0.0, 1.0, "cpu")
        found.append(torch.autograd.grad(output.square().sum(), source, create_graph=create_graph)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("which", [0, 1])
def test_one_result_alone_has_its_gradient(which):
    given = arguments()
    found = torch.autograd.grad(torch.ops.attnres.mix(*given)[which].square().sum(), [given[1], *given[0]])
    double = [each.detach().double().requires_grad_() for each in (given[1], *given[0])]
    results = mix(double[1:], double[0], EPS, given[3].detach().double(), *given[4:7])
    expected = torch.autograd.grad(results[which].square().sum(), double)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own parts
@pytest.mark.parametrize("normed", [True, False])
def test_the_backward_operator_keeps_torchs_rules(normed):
    def plain(value):
        if isinstance(value, list):
            return [plain(each) for each in value]
        return value.detach() if isinstance(value, torch.Tensor) else value

    sources, query, eps, gain, *norm, backend = map(plain, arguments(normed=normed))
    output, weights = torch.ops.attnres.mix(sources, query, eps, gain, *norm, backend)
    given = (torch.randn_like(output), torch.randn_like(weights), sources, query, eps, weights, gain, *norm)
    needs = [True, False, True, True]
    torch.library.opcheck(
        torch.ops.attnres.mix_backward.default, (*given, needs, backend), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("normed", [True, False])
def test_gradients_of_gradients_are_those_of_the_equation(normed, seed):
    given = arguments(normed=normed)
    torch.manual_seed(seed)
    side = torch.randn(2, 3, 13)

    def twice(inputs, operator, *options):
        *sources, query, gain = inputs
        output, _ = operator(sources, query, EPS, gain, *options)
        kept = [each for each in inputs if each is not None]
        first = torch.autograd.grad((output * side.to(output.dtype)).sum(), kept, create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in first), kept)

    inputs = [*given[0], given[1], given[3]]
    double = [None if each is None else each.detach().double().requires_grad_() for each in inputs]
    found = twice(inputs, torch.ops.attnres.mix, *given[4:])
    for ours, exact in zip(found, twice(double, mix, *given[4:7]), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)
