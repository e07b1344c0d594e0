"""The Triton kernels against a per-token loop in float64, through Triton's interpreter, or on a GPU with `-m gpu`.

Shapes: B batch, T tokens, D hidden size, n sources, m logits given (n, or n - 1 with a query).
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import compiles
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

pytest.importorskip("triton", reason="not on this platform")

from attnres.kernels import mix_triton as module
from attnres.kernels.mix_triton import GROUP_SIZE, is_supported, mix_triton, self_check

EPS = 1e-3  # large enough to matter
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _unwritten_results_are_nan():
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    yield
    torch.use_deterministic_algorithms(False)


def per_token_loop(sources, logits, query, eps=EPS):
    """The oracle: one token at a time, nothing but sums and products."""
    batch, tokens, size = sources[0].shape
    mixtures, all_weights = [], []
    for b in range(batch):
        for t in range(tokens):
            rows = [source[b, t] for source in sources]
            row_logits = list(logits[b, t])
            if query is not None:
                mean_square = (rows[-1] * rows[-1]).sum() / size
                row_logits.append((query * rows[-1]).sum() / (mean_square + eps) ** 0.5)
            top = max(logit.item() for logit in row_logits)
            powers = [(logit - top).exp() for logit in row_logits]
            weights = [power / sum(powers) for power in powers]
            mixtures.append(sum(weight * row for weight, row in zip(weights, rows, strict=True)))
            all_weights.append(torch.stack(weights))
    shape = (batch, tokens, -1)
    return torch.stack(mixtures).reshape(shape), torch.stack(all_weights).reshape(shape)


def eager(sources, logits, query, eps=EPS):
    """The mixing as it would be written with PyTorch's operations, in the dtype of the sources."""
    if query is not None:
        inverse_rms = torch.rsqrt(sources[-1].float().square().mean(-1) + eps)
        scored = (sources[-1] @ query.to(sources[-1].dtype)).float() * inverse_rms
        logits = torch.cat([logits, scored.unsqueeze(-1)], dim=-1)
    weights = torch.softmax(logits, dim=-1)
    mixture = torch.zeros_like(sources[0])
    for source, weight in zip(sources, weights.to(sources[0].dtype).split(1, dim=-1), strict=True):
        mixture = torch.addcmul(mixture, source, weight)
    return mixture, weights


def problem(n, shape, with_query, dtype=torch.float32, device="cpu"):
    """Random sources, logits and a query: leaves that require gradients."""
    sources = [torch.randn(shape) for _ in range(n)]
    inputs = [
        *(source.to(dtype) for source in sources),
        torch.randn(*shape[:-1], n - with_query) * 2,
        *([torch.randn(shape[-1]) * 2 / shape[-1] ** 0.5] if with_query else []),
    ]
    return [tensor.to(device).requires_grad_() for tensor in inputs]


def arguments(inputs, with_query):
    return (inputs[:-2], inputs[-2], inputs[-1]) if with_query else (inputs[:-1], inputs[-1], None)


def run(function, inputs, with_query, sides):
    """Mixture, weights and the gradient of every input; `sides` are the gradients of the mixture and the weights."""
    outputs = function(*arguments(inputs, with_query))
    pairs = [(output, side) for output, side in zip(outputs, sides, strict=True) if side is not None]
    gradients = torch.autograd.grad(
        [output for output, _ in pairs],
        inputs,
        [side.to(output.device, output.dtype) for output, side in pairs],
        materialize_grads=True,
    )
    return [tensor.detach().cpu() for tensor in (*outputs, *gradients)]


triton_mix = partial(mix_triton, eps=EPS)


def sides_for(inputs, n):
    shape = inputs[0].shape
    return torch.randn(shape), torch.randn(*shape[:-1], n)


def exact(inputs, with_query, sides):
    doubles = [tensor.detach().cpu().double().requires_grad_() for tensor in inputs]
    return run(per_token_loop, doubles, with_query, sides)


def error(value, expected):
    """Relative to the largest value; what is zero has to be."""
    return ((value.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-9)).item()


def assert_exact(inputs, with_query, sides):
    found, expected = run(triton_mix, inputs, with_query, sides), exact(inputs, with_query, sides)
    for index, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        assert value.shape == wanted.shape
        if value.numel():
            # The gradient of a logit is a difference of large numbers, and with one source nothing is left of it.
            scale = wanted if wanted.abs().max() > 1e-6 else torch.ones(1)
            limit = 1e-5 if index < 2 else 1e-4
            assert ((value.double() - wanted).abs().max() / scale.abs().max()) < limit, f"result {index}"
    return found


CASES = [
    (1, (2, 3, 7)),
    (2, (1, 3, 1)),
    (3, (2, 5, 97)),
    (9, (1, 3, 64)),
    (3, (1, 2, 1031)),
    (GROUP_SIZE, (1, 2, 11)),
    (GROUP_SIZE + 1, (1, 2, 11)),
    (40, (1, 1, 13)),
    (193, (1, 1, 5)),
]


def name(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else f"n{value}"


with_or_without_query = pytest.mark.parametrize("with_query", [False, True], ids=["logits", "query"])


@with_or_without_query
@pytest.mark.parametrize(("n", "shape"), CASES, ids=name)
def test_mixture_weights_and_every_gradient_match_a_per_token_loop(device, n, shape, with_query):
    inputs = problem(n, shape, with_query, device=device)
    _, weights, *_ = assert_exact(inputs, with_query, sides_for(inputs, n))
    torch.testing.assert_close(weights.sum(-1), torch.ones(shape[:-1]))


@settings(max_examples=10)
@given(
    n=st.integers(1, 5),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40)),
    with_query=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_matches_a_per_token_loop(n, shape, with_query, seed):
    torch.manual_seed(seed)
    inputs = problem(n, shape, with_query)
    assert_exact(inputs, with_query, sides_for(inputs, n))


@with_or_without_query
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("n", "shape"), [(3, (1, 2, 1031)), (9, (2, 3, 97)), (35, (1, 2, 29))], ids=name)
def test_half_precision_is_no_less_exact_than_separate_operations(device, n, shape, dtype, with_query):
    inputs = problem(n, shape, with_query, dtype, device)
    sides = sides_for(inputs, n)
    sides = (sides[0].to(dtype).float(), sides[1])
    expected = exact(inputs, with_query, sides)
    found = run(triton_mix, inputs, with_query, sides)
    separate = run(eager, inputs, with_query, sides)
    # The interpreter truncates to bfloat16, where a GPU rounds: twice the error.
    factor = 2 if module.INTERPRETED and dtype == torch.bfloat16 else 1
    assert [value.dtype for value in found] == [value.dtype for value in separate]

    def errors(results):
        differences = [value.double() - wanted for value, wanted in zip(results, expected, strict=True)]
        of_sources = torch.stack(differences[2 : 2 + n])
        return [torch.linalg.norm(part) for part in (*differences[:2], of_sources, *differences[2 + n :])]

    for own, other in zip(errors(found), errors(separate), strict=True):
        assert own <= 1.5 * factor * other + 1e-6
    # Rounded once: half a unit in the last place, which an accumulation in half precision exceeds.
    rounding = factor * torch.finfo(dtype).eps / 2
    assert ((found[0].double() - expected[0]).abs() <= rounding * expected[0].abs() * 1.01 + 1e-5).all()


@with_or_without_query
@pytest.mark.parametrize("used", ["mixture", "weights"])
def test_gradients_are_right_when_only_one_result_is_used(device, used, with_query):
    n, shape = 3, (1, 3, 17)
    inputs = problem(n, shape, with_query, device=device)
    mixture_side, weights_side = sides_for(inputs, n)
    sides = (mixture_side, None) if used == "mixture" else (None, weights_side)
    assert_exact(inputs, with_query, sides)


@pytest.mark.parametrize("frozen", [(0,), (1, 3), (0, 1, 2, 3)], ids=str)
def test_frozen_sources_get_no_gradient_and_the_others_keep_theirs(device, frozen):
    n, shape = 4, (1, 3, 19)
    inputs = problem(n, shape, True, device=device)
    sides = sides_for(inputs, n)
    expected = exact(inputs, True, sides)[2:]
    for index in frozen:
        inputs[index].requires_grad_(False)
    mixture, weights = triton_mix(*arguments(inputs, True))
    torch.autograd.backward([mixture, weights], [side.to(device) for side in sides])
    for index, (tensor, gradient) in enumerate(zip(inputs, expected, strict=True)):
        if index in frozen:
            assert tensor.grad is None
        else:
            assert error(tensor.grad.cpu(), gradient) < 1e-4, index


def test_a_frozen_query_leaves_the_other_gradients(device):
    inputs = problem(3, (1, 3, 19), True, device=device)
    sides = sides_for(inputs, 3)
    expected = exact(inputs, True, sides)[2:]
    inputs[-1].requires_grad_(False)
    torch.autograd.backward(triton_mix(*arguments(inputs, True)), [side.to(device) for side in sides])
    assert inputs[-1].grad is None
    for tensor, gradient in zip(inputs[:-1], expected, strict=False):
        assert error(tensor.grad.cpu(), gradient) < 1e-4


@with_or_without_query
def test_a_tensor_that_is_two_sources_gets_both_gradients(device, with_query):
    inputs = problem(2, (1, 3, 19), with_query, device=device)
    logits = problem(4, (1, 3, 1), with_query, device=device)[4]
    inputs = [*inputs[:2], logits, *inputs[3:]]

    def twice(function, sources, *others):
        return function([sources[0], sources[1], sources[0], sources[1]], *others)

    sides = sides_for(inputs, 4)
    found = run(partial(twice, triton_mix), inputs, with_query, sides)
    doubles = [tensor.detach().cpu().double().requires_grad_() for tensor in inputs]
    for value, wanted in zip(found, run(partial(twice, per_token_loop), doubles, with_query, sides), strict=True):
        assert error(value, wanted) < 1e-4


def test_inputs_and_gradients_need_not_be_contiguous(device):
    n, (batch, tokens, size) = 3, (2, 3, 23)
    wide = [torch.randn(tokens, batch, 2 * size, device=device).transpose(0, 1)[..., ::2] for _ in range(n)]
    logits = torch.randn(batch, tokens, 5, device=device)[..., 1:3]
    query = torch.randn(3 * size, device=device)[::3]
    inputs = [tensor.requires_grad_() for tensor in (*wide, logits, query)]
    assert not any(tensor.is_contiguous() for tensor in inputs)
    spread = [torch.randn(batch, tokens, 1).expand(batch, tokens, size), torch.randn(tokens, batch, n).transpose(0, 1)]
    assert_exact(inputs, True, spread)


@with_or_without_query
@pytest.mark.parametrize("n", [3, GROUP_SIZE + 2], ids=name)
def test_large_logits_do_not_overflow(device, n, with_query):
    inputs = problem(n, (1, 3, 19), with_query, device=device)
    with torch.no_grad():
        inputs[n].mul_(300)
        if with_query:
            inputs[n + 1].mul_(300)
    found = assert_exact(inputs, with_query, sides_for(inputs, n))
    assert found[1].max() > 0.999


def test_the_epsilon_counts(device):
    inputs = [tensor.detach() for tensor in problem(2, (1, 3, 19), True, device=device)]
    inputs[1] *= 1e-3  # its mean square is that of epsilon and less
    for eps in (1e-6, 1e-2):
        doubles = [tensor.cpu().double() for tensor in inputs]
        _, expected = per_token_loop(*arguments(doubles, True), eps=eps)
        _, weights = mix_triton(*arguments(inputs, True), eps)
        assert error(weights.cpu(), expected) < 1e-5


@with_or_without_query
def test_results_repeat_bit_by_bit(device, with_query):
    tokens = 2 if device.type == "cpu" else 1031  # the interpreter runs one program after the other
    inputs = problem(GROUP_SIZE + 1, (1, tokens, 5), with_query, device=device)
    sides = sides_for(inputs, GROUP_SIZE + 1)
    first = run(triton_mix, inputs, with_query, sides)
    for value, again in zip(first, run(triton_mix, inputs, with_query, sides), strict=True):
        assert torch.equal(value, again)


def test_query_gradient_sums_over_more_rows_than_one_program_takes(device):
    inputs = problem(2, (1, 67, 3), True, device=device)
    assert_exact(inputs, True, sides_for(inputs, 2))


@with_or_without_query
def test_an_empty_batch_has_empty_results_and_no_gradient(device, with_query):
    inputs = problem(2, (0, 3, 19), with_query, device=device)
    mixture, weights, *gradients = run(triton_mix, inputs, with_query, sides_for(inputs, 2))
    assert (mixture.shape, weights.shape) == ((0, 3, 19), (0, 3, 2))
    assert not gradients[-1].any()


@with_or_without_query
def test_only_the_sources_themselves_the_weights_and_the_query_are_saved(device, with_query):
    inputs = problem(3, (2, 3, 19), with_query, device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda nothing: nothing):
        _, weights = triton_mix(*arguments(inputs, with_query))
    kept = [*inputs[:3], weights, *inputs[4:]]
    assert [tensor.data_ptr() for tensor in saved] == [tensor.data_ptr() for tensor in kept]


@pytest.mark.parametrize(("dtype", "with_query"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_operators_keep_the_rules_of_pytorch(device, dtype, with_query):
    torch.use_deterministic_algorithms(False)  # opcheck compares what an empty result holds
    inputs = problem(3, (1, 2, 7), with_query, dtype, device)
    sources, logits, query = arguments(inputs, with_query)
    torch.library.opcheck(torch.ops.attnres.mix.default, (sources, logits, query, EPS))
    sources, query = [source.detach() for source in sources], None if query is None else query.detach()
    weights = torch.softmax(torch.randn(1, 2, 3, device=device), dim=-1)
    for weights_gradient in (None, torch.randn_like(weights)):
        sample = (torch.randn_like(sources[0]), weights_gradient, sources, weights, query, EPS, [True, False, True])
        torch.library.opcheck(torch.ops.attnres.mix_backward.default, sample)


@compiles
@with_or_without_query
def test_a_training_step_compiles_into_one_graph_with_equal_gradients(device, with_query):
    torch._dynamo.reset()
    inputs = problem(3, (2, 3, 19), with_query, device=device)
    inputs[0].requires_grad_(False)

    def step(inputs):
        mixture, weights = triton_mix(*arguments(inputs, with_query))
        return (mixture * 2).sin().sum() + weights.square().sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = function(inputs)
        results.append((loss, *torch.autograd.grad(loss, inputs[1:])))
    for value, again in zip(*results, strict=True):
        torch.testing.assert_close(value, again)


def test_an_exported_program_holds_one_operation(device):
    class Mix(torch.nn.Module):
        def forward(self, first, second, logits):
            return mix_triton([first, second], logits, None, EPS)

    inputs = tuple(tensor.detach() for tensor in problem(2, (2, 3, 19), False, device=device))
    program = torch.export.export(Mix(), inputs)
    operations = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.attnres.mix.default in operations
    for value, wanted in zip(program.module()(*inputs), Mix()(*inputs), strict=True):
        assert torch.equal(value, wanted)


class Calls(TorchDispatchMode):
    """The arguments of every call of an operator."""

    def __init__(self, operator):
        super().__init__()
        self.operator, self.arguments = operator, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is self.operator:
            self.arguments.append(args)
        return function(*args, **(kwargs or {}))


def test_a_gradient_that_nobody_asks_for_is_neither_allocated_nor_read(device):
    inputs = problem(2, (1, 2, 7), False, device=device)
    inputs[0].requires_grad_(False)
    mixture, _ = triton_mix(*arguments(inputs, False))
    with Calls(torch.ops.attnres.mix_backward.default) as backward:
        mixture.sum().backward()
    ((_, weights_gradient, *_, source_needs),) = backward.arguments
    assert weights_gradient is None
    assert source_needs == [False, True]


def keep_the_mixture(context, operation, *args, **kwargs):
    kept = operation is torch.ops.attnres.mix.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(
    ("options", "runs"),
    [
        ({"use_reentrant": True}, 2),
        ({"use_reentrant": False}, 2),
        (
            {
                "use_reentrant": False,
                "context_fn": partial(create_selective_checkpoint_contexts, keep_the_mixture),
            },
            1,
        ),
    ],
    ids=["reentrant", "non-reentrant", "selective"],
)
def test_checkpointing_gives_the_same_gradients_and_may_keep_the_mixture(device, options, runs):
    inputs = problem(3, (2, 3, 19), True, device=device)

    def block(*inputs):
        mixture, weights = triton_mix(*arguments(list(inputs), True))
        return mixture.sin().sum() + weights.square().sum()

    expected = torch.autograd.grad(block(*inputs), inputs)
    with Calls(torch.ops.attnres.mix.default) as forward:
        checkpoint(block, *inputs, **options).backward()
    assert len(forward.arguments) == runs
    for tensor, wanted in zip(inputs, expected, strict=True):
        torch.testing.assert_close(tensor.grad, wanted)


def test_a_second_derivative_is_refused(device):
    inputs = problem(2, (1, 3, 5), False, device=device)
    mixture, _ = triton_mix(*arguments(inputs, False))
    (gradient,) = torch.autograd.grad(mixture.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"attnres\.mix_backward.*no autograd formula"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, z, q: ([x.double() for x in v], z, q), r"got torch\.float64 on .* depth_implementation=\"eager\""),
        (lambda v, z, q: ([*v[:-1], v[-1].half()], z, q), r"one shape, dtype and device, got .*float32.*float16"),
        (lambda v, z, q: ([*v[:-1], v[-1][:, :2]], z, q), r"one shape, dtype and device, got \(2, 3, 5\).*\(2, 2, 5\)"),
        (lambda v, z, q: (v, z[..., :1], q), r"logits must be \(2, 3, 2\) .*3 sources but the last.* \(2, 3, 1\)"),
        (lambda v, z, q: (v, z, None), r"logits must be \(2, 3, 3\) .*3 sources; got \(2, 3, 2\)"),
        (lambda v, z, q: (v, z.half(), q), r"logits must be .* torch\.float32,.* torch\.float16"),
        (lambda v, z, q: (v, z, q[:4]), r"query must be \(5,\), got \(4,\)"),
    ],
    ids=["float64", "mixed-dtypes", "mixed-shapes", "too-few-logits", "no-query", "half-logits", "short-query"],
)
def test_inputs_it_cannot_mix_are_named_in_one_line(change, message):
    inputs = problem(3, (2, 3, 5), True)
    with pytest.raises(ValueError, match=message) as caught:
        mix_triton(*change(*arguments(inputs, True)), EPS)
    assert "\n" not in str(caught.value)


def test_it_supports_what_it_has_kernels_for(monkeypatch):
    source = torch.ones(1, 1, 3)
    assert all(is_supported([source.to(dtype)]) for dtype in (torch.float32, *HALVES))
    assert not is_supported([source.double()])
    monkeypatch.setattr(module, "INTERPRETED", False)
    assert not is_supported([source])


@pytest.fixture
def fresh_self_check():
    module._verdict.cache_clear()
    yield
    module._verdict.cache_clear()


@pytest.mark.usefixtures("fresh_self_check")
def test_self_check_passes_wherever_it_is_called_from_and_changes_nothing(device):
    state = torch.get_rng_state()
    with torch.device("meta"), torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16):
        assert self_check(device) is None
    assert torch.equal(torch.get_rng_state(), state)


@compiles
@pytest.mark.usefixtures("fresh_self_check")
def test_self_check_may_choose_the_implementation_inside_a_compiled_function(device):
    torch._dynamo.reset()
    sources, logits, _ = arguments(problem(2, (1, 2, 7), False, device=device), False)

    def choose(sources, logits):
        function = mix_triton if self_check(sources[0].device) is None else eager
        return function(sources, logits, None, EPS)[0]

    operations = []

    def backend(graph, inputs):
        operations.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(choose, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(sources, logits), eager(sources, logits, None)[0])
    assert torch.ops.attnres.mix in operations or torch.ops.attnres.mix.default in operations


def shift(result):
    return lambda *args: [output + 0.01 * (index == result) for index, output in enumerate(mix_triton(*args))]


def detach_query(sources, logits, query, eps):
    return mix_triton(sources, logits, None if query is None else query.detach() + 0 * query, eps)


def fail(*args):
    raise RuntimeError("no kernel image\nis available")


@pytest.mark.usefixtures("fresh_self_check")
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (shift(0), "mixture in torch.float32 is off by"),
        (shift(1), "weights in torch.float32 is off by"),
        (detach_query, "gradient of query in torch.float32 is off by"),
        (
            lambda *args: [output * float("nan") for output in mix_triton(*args)],
            "mixture in torch.float32 is off by nan",
        ),
        (fail, "RuntimeError: no kernel image is available"),
    ],
    ids=["mixture", "weights", "gradient", "nan", "exception"],
)
def test_self_check_says_in_one_line_what_is_wrong_and_keeps_its_verdict(monkeypatch, broken, message):
    monkeypatch.setattr(module, "mix_triton", broken)
    verdict = self_check(torch.device("cpu"))
    assert message in verdict
    assert "\n" not in verdict
    monkeypatch.undo()
    assert self_check(torch.device("cpu")) == verdict


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_mixing_on_new_values():
    inputs = problem(GROUP_SIZE + 1, (2, 3, 64), True, torch.bfloat16, "cuda")
    sources, logits, query = arguments([tensor.detach() for tensor in inputs], True)
    triton_mix(sources, logits, query)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mixture, weights = triton_mix(sources, logits, query)
    for source in sources:
        source.normal_()
    graph.replay()
    torch.testing.assert_close((mixture, weights), triton_mix(sources, logits, query), rtol=0, atol=0)


def test_kernels_compile_for_nvidia_and_amd_without_either(tmp_path):
    """The interpreter takes more Python than the compiler does."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {"PYTHONPATH": ":".join(sys.path), "TRITON_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)}
    compiled = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert compiled.returncode == 0, compiled.stderr[-2000:]
    assert compiled.stdout.split() == ["cubin", "hsaco"] * 7
