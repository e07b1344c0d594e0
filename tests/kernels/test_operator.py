"""`attnres::mix` as an operator of torch: its schema, its shapes without values, and its gradients."""

import pytest
import torch

import attnres.kernels.operator  # noqa: F401  registers it

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
    values = torch.stack(double[1:], dim=2)
    weights = torch.softmax((values * double[0]).sum(-1) * torch.rsqrt(values.square().mean(-1) + EPS), dim=-1)
    mixed = 2 * (weights.unsqueeze(-1) * values).sum(2)
    normed = mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + EPS) * (given[3].detach().double() + 1)
    expected = torch.autograd.grad((normed, weights)[which].square().sum(), double)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-3, atol=1e-5)
