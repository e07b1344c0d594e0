"""The CPU kernels against the equation in float64, and under conditions that must not change a result."""

import importlib
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from mix_reference import mix

from attnres import kernels
from attnres.kernels import cpu_backend

EPS, NORM_EPS = 1e-5, 1e-6
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


def random_case(count, size, dtype, normed, seed, tokens=(2, 5)):
    torch.manual_seed(seed)
    sources = [torch.randn(*tokens, size).to(dtype) for _ in range(count)]
    query = torch.randn(size) / size**0.5
    return sources, query, torch.randn(size).to(dtype) if normed else None


def close(value, expected, dtype):
    assert (value.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm().clamp_min(1e-6)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("dtype", cpu_backend.DTYPES)
@pytest.mark.parametrize("size", [1, 7, 131, 577])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 17, 61])
def test_outputs_and_every_gradient_are_those_of_the_equation(count, size, dtype, normed):
    for seed, offset, scale in ((0, 0.0, 1.0), (1, 1.0, float(count)), (2, 0.0, 0.5)):
        sources, query, gain = random_case(count, size, dtype, normed, seed)
        exact = [each.double().requires_grad_() for each in (*sources, query, *([gain] if normed else []))]
        expected = mix(exact[:count], exact[count], EPS, exact[count + 1] if normed else None, offset, NORM_EPS, scale)
        sides = torch.randn(expected[0].shape).to(dtype), torch.randn(expected[1].shape)
        norm = gain, offset, NORM_EPS, scale
        output, weights = cpu_backend.forward(sources, query, EPS, *norm)
        of_sources, *of_parameters = cpu_backend.backward(*sides, sources, query, EPS, weights, *norm, [True] * count)
        found = [output, weights]
        wanted = [*expected, *torch.autograd.grad(expected, exact, [side.double() for side in sides])]
        if size > 1:  # a number is its own norm: its gradients are differences of equal numbers
            found += [*of_sources, *of_parameters]
        for value, correct in zip(found, wanted, strict=False):  # without a norm the last one is None
            close(value, correct, dtype)


def test_gradients_that_are_not_wanted_are_empty_and_do_not_change_the_others():
    sources, query, gain = random_case(4, 13, torch.float32, True, 0)
    _, weights = cpu_backend.forward(sources, query, EPS, gain, 0.0, NORM_EPS, 1.0)
    side = torch.randn_like(sources[0])
    arguments = (side, None, sources, query, EPS, weights, gain, 0.0, NORM_EPS, 1.0)
    every, by_query, _ = cpu_backend.backward(*arguments, [True] * 4)
    some, again, _ = cpu_backend.backward(*arguments, [False, True, False, True])
    assert [each.numel() > 0 for each in some] == [False, True, False, True]
    assert torch.equal(some[1], every[1]) and torch.equal(some[3], every[3]) and torch.equal(again, by_query)


@pytest.mark.parametrize("dtype", cpu_backend.DTYPES)
def test_a_token_does_not_depend_on_the_others_nor_on_threads(dtype):
    sources, query, gain = random_case(6, 577, dtype, True, 0, (3, 401))
    norm = gain, 0.0, NORM_EPS, 1.0
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(cpu_backend.forward(sources, query, EPS, *norm)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    alone = cpu_backend.forward([source[1:2, 7:8] for source in sources], query, EPS, *norm)[0]
    assert torch.equal(alone[0, 0], found[0][1, 7])


@pytest.mark.parametrize("dtype", cpu_backend.DTYPES)
def test_outputs_are_the_same_where_weights_are_not_kept(dtype):
    for tokens in ((1, 1), (3, 401)):
        sources, query, gain = random_case(6, 577, dtype, True, 0, tokens)
        expected, _ = cpu_backend.forward(sources, query, EPS, gain, 0.0, NORM_EPS, 1.0)
        output, weights = cpu_backend.forward(sources, query, EPS, gain, 0.0, NORM_EPS, 1.0, keep_weights=False)
        assert weights is None
        assert torch.equal(output, expected)


def test_sources_may_lie_in_memory_in_any_way():
    sources, query, gain = random_case(3, 14, torch.float32, True, 0, (4, 5))
    expected = cpu_backend.forward(sources, query, EPS, gain, 0.0, NORM_EPS, 1.0)
    strided = [torch.stack([each, each], dim=-1)[..., 0] for each in sources]
    transposed = [each.transpose(0, 1).contiguous().transpose(0, 1) for each in sources]
    for form in (strided, transposed):
        assert not form[0].is_contiguous()
        for value, wanted in zip(
            cpu_backend.forward(form, query, EPS, gain, 0.0, NORM_EPS, 1.0), expected, strict=True
        ):
            assert torch.equal(value, wanted)


@pytest.mark.parametrize("which", range(5))  # one alone: the signs of several would cancel
@pytest.mark.parametrize("form", ["negative", "imaginary", "zero"])
def test_negative_views_and_zero_tensors_are_read_as_what_they_are(form, which):
    sources, query, gain = random_case(2, 14, torch.float32, True, 0)
    plain = [*sources, query, gain, torch.randn_like(sources[0])]
    odd = list(plain)
    if form == "negative":  # contiguous
        odd[which] = torch._neg_view(-plain[which])
    elif form == "imaginary":  # and this is not
        odd[which] = torch.complex(plain[which], -plain[which]).conj().imag
    else:
        plain[which], odd[which] = torch.zeros_like(plain[which]), torch._efficientzerotensor(plain[which].shape)
    assert odd[which].is_neg() == (form != "zero")
    found = []
    for *mixed, q, g, given in (plain, odd):
        norm = g, 0.0, NORM_EPS, 1.0
        output, weights = cpu_backend.forward(mixed, q, EPS, *norm)
        by_sources, *others = cpu_backend.backward(given, None, mixed, q, EPS, weights, *norm, [True] * 2)
        found.append((output, weights, *by_sources, *others))
    for value, wanted in zip(*found, strict=True):
        assert torch.equal(value, wanted)


def test_another_default_device_changes_nothing():
    sources, query, gain = random_case(3, 14, torch.float32, True, 0)
    norm = gain, 0.0, NORM_EPS, 1.0
    side, changes = torch.randn_like(sources[0]), torch.randn(2, 5, 3)
    strided = [torch.stack([each, each], dim=-1)[..., 0] for each in sources]
    cpu_backend.problem.cache_clear()
    with torch.device("meta"):
        assert cpu_backend.problem(torch.device("cpu"), torch.float32) is None
        _, weights = cpu_backend.forward(strided, query, EPS, *norm)
        for given in ((side, changes), (None, changes), (side, None)):
            by_sources, *others = cpu_backend.backward(*given, strided, query, EPS, weights, *norm, [True] * 3)
            assert all(each.device.type == "cpu" for each in (weights, *by_sources, *others))


@pytest.mark.parametrize("dtype", cpu_backend.DTYPES)
def test_gradients_repeat_bit_by_bit_and_many_tokens_add_up(dtype):
    sources, query, gain = random_case(4, 131, dtype, True, 0, (2, 1500))
    norm = gain, 1.0, NORM_EPS, 1.0
    exact = [each.double().requires_grad_() for each in (*sources, query, gain)]
    expected, _ = mix(exact[:4], exact[4], EPS, exact[5], 1.0, NORM_EPS, 1.0)
    side = torch.randn_like(sources[0])
    wanted = torch.autograd.grad(expected, exact, side.double())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        _, weights = cpu_backend.forward(sources, query, EPS, *norm)
        arguments = (side, None, sources, query, EPS, weights, *norm, [True] * 4)
        for _ in range(3):
            by_sources, *others = cpu_backend.backward(*arguments)
            again, *others_again = cpu_backend.backward(*arguments)
            assert all(map(torch.equal, (*by_sources, *others), (*again, *others_again)))
    finally:
        torch.set_num_threads(threads)
    for value, gradient in zip((*by_sources, *others), wanted, strict=True):
        close(value, gradient, dtype)


def test_a_mixture_is_rounded_to_the_nearest_even_bfloat16():
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    every = bits.view(torch.bfloat16).view(1, -1, 1)
    every = every[every.abs() < 1e15].view(1, -1, 1)  # whose squares are finite
    query = torch.zeros(1)
    same, _ = cpu_backend.forward([every], query, EPS, None, 0.0, 0.0, 1.0)
    assert torch.equal(same, every)
    scaled, _ = cpu_backend.forward([every], query, EPS, None, 0.0, 0.0, 1.00390625)  # ties among them
    assert torch.equal(scaled, (every.float() * 1.00390625).bfloat16())


def test_no_tokens_give_empty_results_and_zero_gradients():
    sources, query, gain = random_case(3, 14, torch.float32, True, 0, (0, 5))
    output, weights = cpu_backend.forward(sources, query, EPS, gain, 0.0, NORM_EPS, 1.0)
    assert output.shape == (0, 5, 14) and weights.shape == (0, 5, 3)
    arguments = (output, None, sources, query, EPS, weights, gain, 0.0, NORM_EPS, 1.0, [True] * 3)
    by_sources, by_query, by_gain = cpu_backend.backward(*arguments)
    assert by_sources[0].shape == (0, 5, 14) and not by_query.any() and not by_gain.any()


@pytest.mark.parametrize("dtype", cpu_backend.DTYPES)
@pytest.mark.parametrize("size", [1e-20, 1e15])
def test_huge_and_tiny_sources_are_mixed(size, dtype):
    sources, query, _ = random_case(3, 37, dtype, False, 0)
    sources = [(each * size).to(dtype) for each in sources]
    output, _ = cpu_backend.forward(sources, query, EPS, None, 0.0, 0.0, 1.0)
    expected, _ = mix([each.double() for each in sources], query.double(), EPS, None, 0.0, 0.0, 1.0)
    close(output / size, expected / size, dtype)


@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_logits_neither_overflow_nor_vanish(sign):
    sources, query, _ = random_case(5, 37, torch.float32, False, 0)
    query = sign * 1000 * query  # far beyond what exp can take
    _, weights = cpu_backend.forward(sources, query, EPS, None, 0.0, 0.0, 1.0)
    _, expected = mix([each.double() for each in sources], query.double(), EPS, None, 0.0, 0.0, 1.0)
    torch.testing.assert_close(weights.double(), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", cpu_backend.DTYPES)
def test_what_is_not_finite_stays_within_its_token(dtype, bad):
    sources, query, gain = random_case(3, 37, dtype, True, 0)
    sources[1][0, 2, 5] = bad
    output, _ = cpu_backend.forward(sources, query, EPS, gain, 0.0, NORM_EPS, 1.0)
    finite = torch.isfinite(output).all(-1)
    assert not finite[0, 2] and finite.sum() == finite.numel() - 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking beside threads, which is the point
def test_a_forked_child_mixes_too():
    sources, query, gain = random_case(6, 577, torch.float32, True, 0, (1, 900))
    expected = cpu_backend.forward(sources, query, EPS, gain, 0.0, NORM_EPS, 1.0)[0]
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        same = torch.equal(cpu_backend.forward(sources, query, EPS, gain, 0.0, NORM_EPS, 1.0)[0], expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_kernels_are_compiled_where_no_folder_can_keep_them(monkeypatch):
    from attnres.kernels import cpu_kernels

    tried, compiled = [], SimpleNamespace(address=1)

    def cfunc(*arguments, **options):
        tried.append(options.get("cache", False))
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: compiled

    monkeypatch.setattr(cpu_kernels, "cfunc", cfunc)
    kernel = cpu_kernels._compile(cpu_kernels._mix, cpu_kernels.DTYPES[torch.float32])
    assert tried == [True, False] and kernel.compiled is compiled


def test_without_numba_the_module_is_there_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(kernels, "cpu_backend", cpu_backend)  # is put back, too, after another import
    for name in ("cpu_kernels", "cpu_backend"):
        monkeypatch.delitem(sys.modules, f"attnres.kernels.{name}", raising=False)
    found = importlib.import_module("attnres.kernels.cpu_backend").problem(torch.device("cpu"), torch.float32)
    assert found.endswith("pip install 'attention-residuals[cpu]'") and len(found.splitlines()) == 1


def test_devices_and_dtypes_without_kernels_are_named():
    assert "not on cuda" in cpu_backend.problem(torch.device("cuda"), torch.float32)
    assert "not torch.float16" in cpu_backend.problem(torch.device("cpu"), torch.float16)
    assert cpu_backend.problem(torch.device("cpu"), torch.float32) is None
