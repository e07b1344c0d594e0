"""The Triton kernels against a per-token loop in float64, through Triton's interpreter, or on a GPU with `-m gpu`.

Shapes: B batch, T tokens, D hidden size, n sources.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="not on this platform")

from attnres.kernels import triton_backend as backend
from attnres.kernels.triton_backend import GROUP_SIZE, MAX_SIZE, problem

EPS, NORM_EPS = 1e-3, 1e-2  # large enough to matter
SCALE = 1.7
CPU = torch.device("cpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _unwritten_results_are_nan():
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Case:
    sources: list[torch.Tensor]
    query: torch.Tensor
    norm_weight: torch.Tensor | None
    norm_offset: float
    grad_output: torch.Tensor | None
    grad_weights: torch.Tensor | None


def random_case(n, shape, norm_offset=0.0, dtype=torch.float32, device=CPU):
    """Draws a case, without a norm if `norm_offset` is None. Logits have a standard deviation of about 2."""
    return Case(
        sources=[torch.randn(shape).to(device, dtype) for _ in range(n)],
        query=(torch.randn(shape[-1]) * 2 / shape[-1] ** 0.5).to(device),
        norm_weight=None if norm_offset is None else torch.randn(shape[-1]).to(device, dtype),
        norm_offset=norm_offset or 0.0,
        grad_output=torch.randn(shape).to(device, dtype),
        grad_weights=torch.randn(*shape[:-1], n).to(device),
    )


def per_token_loop(sources, query, norm_weight, norm_offset):
    """Computes the expected results one token at a time, by sums and products only."""
    batch, tokens, size = sources[0].shape
    outputs, all_weights = [], []
    for b in range(batch):
        for t in range(tokens):
            rows = [source[b, t] for source in sources]
            logits = [(query * row).sum() / ((row * row).sum() / size + EPS) ** 0.5 for row in rows]
            top = max(logit.item() for logit in logits)
            powers = [(logit - top).exp() for logit in logits]
            weights = [power / sum(powers) for power in powers]
            mixed = SCALE * sum(weight * row for weight, row in zip(weights, rows, strict=True))
            if norm_weight is not None:
                mixed = (norm_weight + norm_offset) * mixed / ((mixed * mixed).sum() / size + NORM_EPS) ** 0.5
            outputs.append(mixed)
            all_weights.append(torch.stack(weights))
    return torch.stack(outputs).reshape(batch, tokens, size), torch.stack(all_weights).reshape(batch, tokens, -1)


def run(case, needs=None):
    """Returns output, weights, and the gradients of the sources, of the query and, with a norm, of its weight."""
    norm = (case.norm_weight, case.norm_offset, NORM_EPS, SCALE)
    needs = needs or [True] * len(case.sources)
    output, weights = backend.forward(case.sources, case.query, EPS, *norm)
    of_sources, *of_parameters = backend.backward(
        case.grad_output, case.grad_weights, case.sources, case.query, EPS, weights, *norm, needs
    )
    assert (of_parameters[1] is None) == (case.norm_weight is None)
    of_parameters = [gradient for gradient in of_parameters if gradient is not None]
    assert {tensor.dtype for tensor in (output, *of_sources)} == {case.sources[0].dtype}
    assert {tensor.dtype for tensor in (weights, *of_parameters)} == {torch.float32}
    return [tensor.cpu() for tensor in (output, weights, *of_sources, *of_parameters)]


def exact(case):
    inputs = [*case.sources, case.query, *([] if case.norm_weight is None else [case.norm_weight])]
    inputs = [tensor.cpu().double().requires_grad_() for tensor in inputs]
    n = len(case.sources)
    results = per_token_loop(inputs[:n], inputs[n], None if case.norm_weight is None else inputs[-1], case.norm_offset)
    sides = [(case.grad_output, results[0]), (case.grad_weights, results[1])]
    loss = sum((side.cpu().double() * result).sum() for side, result in sides if side is not None)
    return [tensor.detach() for tensor in (*results, *torch.autograd.grad(loss, inputs, materialize_grads=True))]


def assert_close(found, expected):
    for index, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        assert value.shape == wanted.shape
        scale = wanted.abs().max()
        if scale < 1e-6:  # the gradient of a logit is a difference of large numbers; of one source nothing is left
            scale = 1
        assert (value.double() - wanted).abs().max() < (1e-5 if index < 2 else 1e-4) * scale, f"result {index}"


def name(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


with_or_without_norm = pytest.mark.parametrize("norm_offset", [None, 0.0, 1.0], ids=["no-norm", "norm", "norm-plus-1"])


@with_or_without_norm
@pytest.mark.parametrize(
    ("n", "shape"),
    [
        (1, (2, 3, 7)),
        (2, (1, 3, 1)),
        (3, (1, 2, 1031)),
        (7, (2, 2, 97)),
        (GROUP_SIZE, (1, 2, 64)),
        (GROUP_SIZE + 1, (2, 1, 11)),
        (2 * GROUP_SIZE + 1, (1, 2, 13)),
    ],
    ids=name,
)
def test_output_weights_and_every_gradient_match_a_per_token_loop(device, n, shape, norm_offset):
    case = random_case(n, shape, norm_offset, device=device)
    found = run(case)
    assert_close(found, exact(case))
    torch.testing.assert_close(found[1].sum(-1), torch.ones(shape[:-1]))


@settings(max_examples=15)
@given(
    n=st.integers(1, 5),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40)),
    norm_offset=st.sampled_from([None, 0.0, 1.0]),
    used=st.sampled_from(["output", "weights", "both"]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_use_matches_a_per_token_loop(n, shape, norm_offset, used, seed):
    torch.manual_seed(seed)
    case = random_case(n, shape, norm_offset)
    if used != "both":
        setattr(case, "grad_weights" if used == "output" else "grad_output", None)
    assert_close(run(case), exact(case))


@with_or_without_norm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "shape"), [(7, (1, 3, 97)), (GROUP_SIZE + 1, (1, 2, 29))], ids=name)
def test_half_precision_is_rounded_once(device, n, shape, dtype, norm_offset):
    case = random_case(n, shape, norm_offset, dtype, device)
    # Half a unit in the last place. The interpreter truncates to bfloat16, where a GPU rounds: twice the error.
    rounding = torch.finfo(dtype).eps / (1 if backend.INTERPRETED and dtype == torch.bfloat16 else 2)
    for value, wanted in zip(run(case), exact(case), strict=True):
        limit = (rounding if value.dtype == dtype else 0) * wanted.abs() + 1e-5 * wanted.abs().max()
        assert ((value.double() - wanted).abs() <= 1.01 * limit).all()


@pytest.mark.parametrize("used", ["output", "weights"])
@pytest.mark.parametrize("n", [3, GROUP_SIZE + 1])
@with_or_without_norm
def test_gradients_are_right_when_only_one_result_is_used(device, n, used, norm_offset):
    case = random_case(n, (1, 2, 17), norm_offset, device=device)
    setattr(case, "grad_weights" if used == "output" else "grad_output", None)
    assert_close(run(case), exact(case))


@pytest.mark.parametrize("frozen", [(0,), (1, 3), (GROUP_SIZE,), tuple(range(GROUP_SIZE + 2))], ids=len)
def test_frozen_sources_get_no_gradient_and_the_others_keep_theirs(device, frozen):
    n = GROUP_SIZE + 2
    case = random_case(n, (1, 2, 19), device=device)
    found, expected = run(case, [i not in frozen for i in range(n)]), exact(case)
    for i in frozen:
        assert found[2 + i].numel() == 0
        found[2 + i] = expected[2 + i]
    assert_close(found, expected)


def test_inputs_and_gradients_need_not_be_contiguous(device):
    n, batch, tokens, size = 3, 2, 3, 23
    case = random_case(n, (batch, tokens, size), device=device)
    case.sources = [torch.randn(tokens, batch, 2 * size).to(device).transpose(0, 1)[..., ::2] for _ in range(n)]
    case.query = torch.randn(3 * size).to(device)[::3]
    case.norm_weight = torch.randn(2 * size).to(device)[::2]
    case.grad_output = torch.randn(batch, tokens, 1).to(device).expand(batch, tokens, size)
    case.grad_weights = torch.randn(tokens, batch, n).to(device).transpose(0, 1)
    assert_close(run(case), exact(case))


@pytest.mark.parametrize("n", [3, GROUP_SIZE + 2])
def test_large_logits_do_not_overflow(device, n):
    case = random_case(n, (1, 3, 19), device=device)
    case.query *= 300
    found, expected = run(case), exact(case)
    assert found[1].max() > 0.999
    for value, wanted in zip(found, expected, strict=True):  # exp(x) is as exact as x is small
        assert (value - wanted).abs().max() < 1e-3 * max(1, wanted.abs().max())


def test_a_program_sums_the_gradients_over_its_rows_and_results_repeat_bit_by_bit(device, monkeypatch):
    monkeypatch.setattr(backend, "RESIDENT_WARPS", 3)
    case = random_case(GROUP_SIZE + 1, (1, 8 if device.type == "cpu" else 1031, 5), 1.0, device=device)
    first = run(case)
    for value, again in zip(first, run(case), strict=True):
        assert torch.equal(value, again)
    assert_close(first, exact(case))


@pytest.mark.parametrize("n", [2, GROUP_SIZE + 1])
def test_an_empty_batch_has_empty_results_and_no_gradient(device, n):
    output, weights, *of_sources, of_query, of_norm = run(random_case(n, (0, 3, 19), device=device))
    assert (output.shape, weights.shape) == ((0, 3, 19), (0, 3, n))
    assert {gradient.shape for gradient in of_sources} == {(0, 3, 19)}
    assert torch.equal(of_query, torch.zeros(19))
    assert torch.equal(of_norm, torch.zeros(19))


def test_a_hidden_size_that_no_program_holds_is_named():
    with pytest.raises(ValueError, match=f"at most {MAX_SIZE}, got {MAX_SIZE + 1}"):
        run(random_case(1, (1, 1, MAX_SIZE + 1)))


@pytest.fixture
def fresh_problem():
    problem.cache_clear()
    yield
    problem.cache_clear()


@pytest.mark.usefixtures("fresh_problem")
@pytest.mark.parametrize("dtype", backend.DTYPES, ids=str)
def test_there_is_no_problem_wherever_it_is_asked_and_nothing_changes(device, dtype):
    state = torch.get_rng_state()
    with torch.device("meta"), torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16):
        assert problem(device, dtype) is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("fresh_problem")
def test_the_problem_names_a_dtype_or_device_without_kernels(monkeypatch):
    assert "not torch.float64" in problem(CPU, torch.float64)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    assert problem(CPU, torch.float32) == "the Triton kernels run on cuda or xpu, not on cpu"


def shifted(function, result):
    """Wraps a function so that 0.1 is added to one of its results, where a list counts as one result."""

    def call(*args):
        results = list(function(*args))
        value = results[result]
        results[result] = [entry + 0.1 for entry in value] if isinstance(value, list) else value + 0.1
        return results

    return call


def failing(*args):
    raise RuntimeError("no kernel image\nis available")


@pytest.mark.usefixtures("fresh_problem")
@pytest.mark.parametrize(
    ("function", "broken", "message"),
    [
        ("forward", shifted(backend.forward, 0), "output in torch.float32 is off by"),
        ("forward", shifted(backend.forward, 1), "weights in torch.float32 is off by"),
        ("backward", shifted(backend.backward, 0), "gradient of source 0 in torch.float32 is off by"),
        ("backward", shifted(backend.backward, 1), "gradient of the query in torch.float32 is off by"),
        ("backward", shifted(backend.backward, 2), "gradient of the norm weight in torch.float32 is off by"),
        ("forward", failing, "RuntimeError: no kernel image is available"),
    ],
    ids=["output", "weights", "source", "query", "norm", "exception"],
)
def test_a_problem_is_said_in_one_line_and_remembered(monkeypatch, function, broken, message):
    monkeypatch.setattr(backend, function, broken)
    verdict = problem(CPU, torch.float32)
    assert message in verdict
    assert "\n" not in verdict
    monkeypatch.undo()
    assert problem(CPU, torch.float32) == verdict


@pytest.mark.gpu
def test_a_cuda_graph_replays_both_passes_on_new_values():
    case = random_case(GROUP_SIZE + 1, (2, 3, 64), 1.0, torch.bfloat16, "cuda")

    def results():
        norm = (case.norm_weight, case.norm_offset, NORM_EPS, SCALE)
        output, weights = backend.forward(case.sources, case.query, EPS, *norm)
        sides = (case.grad_output, case.grad_weights)
        needs = [True] * len(case.sources)
        return output, weights, backend.backward(*sides, case.sources, case.query, EPS, weights, *norm, needs)

    results()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results()
    for source in case.sources:
        source.normal_()
    graph.replay()
    torch.testing.assert_close(captured, results(), rtol=0, atol=0)


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_elements_are_addressed():
    source = torch.zeros(1, 2**31 // MAX_SIZE + 1, MAX_SIZE, dtype=torch.bfloat16, device="cuda")
    source[0, -1] = 1
    query = torch.ones(MAX_SIZE, device="cuda")
    norm = (None, 0.0, NORM_EPS, 1.0)
    output, weights = backend.forward([source], query, EPS, *norm)
    assert torch.equal(output, source)
    (gradient,), *_ = backend.backward(output, None, [source], query, EPS, weights, *norm, [True])
    assert torch.equal(gradient, source)


def test_kernels_compile_for_nvidia_and_amd_without_either(tmp_path):
    """The interpreter accepts more of Python than the compiler does."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {"PYTHONPATH": ":".join(sys.path), "TRITON_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)}
    compiled = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert compiled.returncode == 0, compiled.stderr[-2000:]
    assert compiled.stdout.split() == ["cubin", "hsaco"] * 7
