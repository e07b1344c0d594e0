"""The choice of the implementation, and the fallback where kernels are missing, wrong or of another version."""

import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch
from families import FAMILIES
from helpers import compiles, random_attnres, random_tokens, relative_error, short_config

from attnres import depth_kernels, kernels


@pytest.fixture(autouse=True)
def fresh_choice():
    depth_kernels._find_backend.cache_clear()
    yield
    depth_kernels._find_backend.cache_clear()


def twins(implementation, mode="block", family="qwen3_moe", **options):
    eager = random_attnres(family, mode, **options)
    eager.set_depth_implementation("eager")
    other = copy.deepcopy(eager)
    other.set_depth_implementation(implementation)
    return eager, other


@pytest.mark.parametrize("mode", ["block", "full"])
@pytest.mark.parametrize("implementation", ["auto", "triton"])
def test_logits_weights_and_gradients_are_those_of_eager(mode, implementation):
    if implementation == "triton":
        pytest.importorskip("triton")
    eager, fused = twins(implementation, mode, layers=3)
    tokens = random_tokens(2, 3)
    outputs = [model(tokens, labels=tokens, output_depth_weights=True) for model in (eager, fused)]
    assert relative_error(outputs[1].logits, outputs[0].logits) < 1e-5
    for found, expected in zip(outputs[1].depth_weights, outputs[0].depth_weights, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    for output in outputs:
        output.loss.backward()
    for (name, expected), found in zip(eager.named_parameters(), fused.parameters(), strict=True):
        if expected.grad is not None:
            assert relative_error(found.grad, expected.grad) < 1e-3, name


@torch.no_grad()
@pytest.mark.parametrize("mode", ["block", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_norm_is_fused_to_the_same_logits(family, mode):
    for seed in range(2):
        eager, fused = twins("auto", mode, family, seed=seed)
        tokens = random_tokens(2, 5, seed)
        expected, found = (model(tokens, output_depth_weights=True) for model in (eager, fused))
        assert relative_error(found.logits, expected.logits) < 1e-4
        for ours, theirs in zip(found.depth_weights, expected.depth_weights, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("place", ["input_layernorm", "post_attention_layernorm"])
def test_a_norm_with_a_hook_or_in_place_of_the_familys_is_called(place):
    model, tokens = random_attnres("llama"), random_tokens(2, 5)
    expected, seen = model(tokens).logits, []
    norm = model.model.layers[2].get_submodule(place)
    handle = norm.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    assert relative_error(model(tokens).logits, expected) < 1e-5
    ((mixture, normed),) = seen
    assert relative_error(norm(mixture), normed) < 1e-6
    handle.remove()

    class Doubled(torch.nn.Module):
        def forward(self, hidden_states):
            return 2 * norm(hidden_states)

    model.model.layers[2].set_submodule(place, Doubled())
    doubled = model(tokens).logits
    model.set_depth_implementation("eager")
    assert relative_error(doubled, expected) > 1e-3
    assert relative_error(doubled, model(tokens).logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("mode", ["block", "full"])
def test_bfloat16_costs_no_more_accuracy_than_it_costs_the_plain_model(mode):
    from transformers import AutoModelForCausalLM

    from attnres import AttnResForCausalLM

    tokens, errors = random_tokens(4, 13), {"plain": [], "ours": []}
    for seed in range(3):
        torch.manual_seed(seed)
        plain = AutoModelForCausalLM.from_config(short_config("llama")).eval()
        expected = plain(tokens).logits
        ours = AttnResForCausalLM.from_backbone(plain, residual_mode=mode).eval()
        for name, model in (("plain", plain), ("ours", ours)):
            errors[name].append(relative_error(model.to(torch.bfloat16)(tokens).logits.float(), expected))
    assert sum(errors["ours"]) < 1.3 * sum(errors["plain"])


def test_what_a_first_forward_pass_saves_is_what_every_later_one_saves():
    from attnres.kernels import cpu_backend

    cpu_backend.problem.cache_clear()  # so that the kernels are checked within the first
    model, tokens, counts = random_attnres("llama").train(), random_tokens(1, 5), []
    for _ in range(2):
        counts.append(0)

        def pack(tensor):
            counts[-1] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens, labels=tokens).loss.backward()
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_recomputes_the_same_gradients(use_reentrant):
    model, tokens = random_attnres("qwen3_moe").train(), random_tokens(1, 5)
    checkpointed = copy.deepcopy(model)
    enable = getattr(checkpointed, "activation_checkpointing_enable", None)  # transformers 5.23 renamed it
    (enable or checkpointed.gradient_checkpointing_enable)({"use_reentrant": use_reentrant})
    checkpointed.enable_input_require_grads()
    for each in (model, checkpointed):
        each(tokens, labels=tokens).loss.backward()
    for (name, expected), found in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        if expected.grad is not None:
            assert relative_error(found.grad, expected.grad) < 1e-5, name


@compiles
@pytest.mark.parametrize("implementation", ["auto", "eager", "triton"])
def test_a_compiler_sees_one_graph(implementation):
    if implementation == "triton":
        pytest.importorskip("triton")
    model = random_attnres("llama", layers=3)
    model.set_depth_implementation(implementation)
    tokens = random_tokens(1, 5)
    expected = model(tokens, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(tokens, use_cache=False).logits, expected) < 1e-5


def check_falls_back(implementation, match):
    eager, other = twins(implementation)
    tokens = random_tokens(1, 5)
    with pytest.warns(UserWarning, match=match) as caught:
        found = other(tokens).logits
        other(tokens)
    assert len(caught) == 1
    assert relative_error(found, eager(tokens).logits) < 1e-6


@pytest.mark.parametrize("implementation", ["auto", "triton"])
def test_kernels_of_another_abi_are_not_called_and_one_warning_says_so(implementation, monkeypatch):
    monkeypatch.setattr(kernels, "ABI", depth_kernels.KERNEL_ABI + 1)
    check_falls_back(implementation, f"have ABI {kernels.ABI}, these files need ABI {depth_kernels.KERNEL_ABI}")


def test_kernels_that_fail_their_self_check_are_not_used(monkeypatch):
    from attnres.kernels import cpu_backend

    monkeypatch.setattr(cpu_backend, "problem", lambda device, dtype: "output is off by 3.0e-01")
    check_falls_back("auto", 'falls back to "eager": output is off')


def test_a_device_without_triton_kernels_mixes_by_eager(monkeypatch):
    backend = pytest.importorskip("attnres.kernels.triton_backend")
    monkeypatch.setattr(backend, "INTERPRETED", False)
    backend.problem.cache_clear()
    check_falls_back("triton", "run on cuda or xpu, not on cpu")
    backend.problem.cache_clear()


def test_without_triton_the_warning_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "attnres.kernels.triton_backend", None)
    check_falls_back("triton", r"pip install attention-residuals\[triton\]")


def test_without_numba_the_warning_names_it(monkeypatch):
    from attnres.kernels import cpu_backend

    monkeypatch.setitem(sys.modules, "attnres.kernels.cpu_kernels", None)
    for function in (cpu_backend._kernels, cpu_backend.problem):
        function.cache_clear()
    check_falls_back("auto", r"pip install .attention-residuals\[cpu\]")
    for function in (cpu_backend._kernels, cpu_backend.problem):
        function.cache_clear()


def test_the_default_is_chosen_without_a_word_and_double_precision_mixes_by_the_equation():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eager, auto = twins("auto")
        auto(random_tokens(1, 5))
        eager, auto = eager.double(), auto.double()
        for each in (eager, auto):
            each.set_experts_implementation("eager")
        assert torch.equal(auto(random_tokens(1, 5)).logits, eager(random_tokens(1, 5)).logits)


def test_eager_needs_no_kernels():
    code = (
        "import sys, torch; from attnres.depth_mixer import *; "
        "state = DepthState(Mixing(1e-6, 2), [torch.ones(1, 2, 3)] * 2); state.read(PseudoQuery(torch.ones(3))); "
        "sys.exit(any(name.startswith('attnres.kernels.') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_of_another_abi_loads_as_remote_code_and_mixes_by_the_equation(tmp_path):
    """An old folder brings its own files, but finds the kernels of a newer package."""
    model, tokens = random_attnres("llama"), random_tokens(1, 5)
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.glob("*.py")}
    assert {"depth_mixer.py", "depth_kernels.py", "torch_internals.py"} <= files
    old = (tmp_path / "depth_kernels.py").read_text()
    assert f"KERNEL_ABI = {depth_kernels.KERNEL_ABI}\n" in old
    (tmp_path / "depth_kernels.py").write_text(
        old.replace(f"KERNEL_ABI = {depth_kernels.KERNEL_ABI}\n", f"KERNEL_ABI = {depth_kernels.KERNEL_ABI - 1}\n")
    )
    code = (
        "import sys, warnings, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert type(model).__module__.startswith('transformers_modules')\n"
        "tokens = torch.tensor(eval(sys.argv[2]))\n"
        "with warnings.catch_warnings(record=True) as caught, torch.no_grad():\n"
        "    warnings.simplefilter('always')\n"
        "    logits = model(tokens).logits\n"
        "    model(tokens)\n"
        "found = [str(each.message) for each in caught if 'ABI' in str(each.message)]\n"
        "assert len(found) == 1, found\n"
        "torch.save(logits, sys.argv[3])\n"
    )
    arguments = [str(tmp_path), str(tokens.tolist()), str(tmp_path / "logits.pt")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=environment)
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert relative_error(found, model(tokens).logits) < 1e-4
