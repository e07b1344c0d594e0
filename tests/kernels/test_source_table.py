"""The compiled kernels for CPUs against a float64 loop over sources, and how a model comes by them."""

import functools
import subprocess
import sys
import warnings

import pytest
import torch
from families import FAMILIES
from helpers import random_attnres, random_tokens, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from attnres import depth_mixer
from attnres.depth_functions import Norm
from attnres.kernels import mix_cpu, source_table
from attnres.kernels.source_table import SourceTable

EPS = 1e-6
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def loop(sources, query, norm):
    """One source at a time, in float64; the query is scaled, as `DepthMixer` gives it."""
    logits = []
    for source in sources:
        rms = (source.double().square().mean(-1) + EPS).sqrt()
        logits.append((source.double() * query.double()).sum(-1) / query.shape[-1] ** 0.5 / rms)
    highest = functools.reduce(torch.maximum, logits)
    total = sum(torch.exp(logit - highest) for logit in logits)
    mixed = 0
    for source, logit in zip(sources, logits, strict=True):
        mixed = mixed + (torch.exp(logit - highest) / total).unsqueeze(-1) * source.double()
    if norm is None:
        return mixed
    inverse = (mixed.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    return mixed * inverse * (norm.weight.double() + norm.offset)


def random_norm(size, dtype, offset=0.0):
    return Norm(nn.Parameter(torch.randn(size).to(dtype)), offset, 1e-3)


@torch.no_grad()
def check(dtype, shape, size, num_sources, offset=0.0, scale=1.0, seed=0):
    """All readers of sources that come in one by one, two readers after each; newest source and norm in turn."""
    torch.manual_seed(seed)
    sources = [(scale * 1.1**i * torch.randn(*shape, size)).to(dtype) for i in range(num_sources)]
    newest = (scale * torch.randn(*shape, size)).to(dtype)
    queries = torch.randn(2 * num_sources + 1, size)
    table = SourceTable(queries, EPS, sources[0])
    for i, source in enumerate(sources):
        table.commit(source, first_reader=2 * i)
        for reader in range(2 * i, 2 * i + 2):
            last = newest if (i + reader) % 3 else None
            norm = random_norm(size, dtype, offset) if (i + reader) % 2 else None
            handle, (stand_in,) = table.read(reader)
            assert (stand_in.shape, stand_in.dtype) == (source.shape, dtype)
            found = handle.mix(last, norm)
            expected = loop([*sources[: i + 1], *([] if last is None else [last])], queries[reader], norm)
            assert found.dtype == dtype and found.is_contiguous()
            assert relative_error(found.double(), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [1, 13, 131, 257])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 17)], ids="{0[0]}x{0[1]}".format)
def test_a_table_mixes_and_norms_as_a_loop_over_its_sources_does(dtype, shape, size):
    check(dtype, shape, size, num_sources=7, offset=1.0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("many", [2, 5, source_table.MANY_SOURCES])
def test_many_sources_are_mixed_for_several_sublayers_at_once(monkeypatch, dtype, many):
    monkeypatch.setattr(source_table, "MANY_SOURCES", many)
    counts = []
    together = SourceTable._mix_together

    def counted(self, reader):
        together(self, reader)
        counts.append(self._early_count)

    monkeypatch.setattr(SourceTable, "_mix_together", counted)
    check(dtype, (2, 3), 131, num_sources=29)
    complete = range(1, 30, source_table.READERS_AT_ONCE // 2)  # when the first of each group reads
    assert counts == [count if count >= many else 0 for count in complete]


@given(
    st.sampled_from(list(TOLERANCE)),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(1, 31),
    st.floats(1e-3, 1e3),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_number_of_sources_and_scale_will_do(dtype, batch, tokens, size, num_sources, scale, seed):
    check(dtype, (batch, tokens), size, num_sources, scale=scale, seed=seed)


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_threads_change_no_bit(monkeypatch, dtype):
    torch.manual_seed(0)
    sources = [torch.randn(3, 7, 131).to(dtype) for _ in range(15)]
    queries, norm = torch.randn(31, 131), random_norm(131, dtype)

    def mixtures():
        table = SourceTable(queries, EPS, sources[0])
        for source in sources[:13]:
            table.commit(source, 0)
        return [table.mix(reader, sources[14], norm) for reader in range(4)]

    expected = mixtures()
    monkeypatch.setattr(mix_cpu, "NUMBERS_PER_THREAD", 1)
    for openmp in (mix_cpu._OPENMP, None):  # its threads, or a pool's
        monkeypatch.setattr(mix_cpu, "_OPENMP", openmp)
        for threads in (2, 5, 40):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            for found, wanted in zip(mixtures(), expected, strict=True):
                assert torch.equal(found, wanted)


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP's functions have other names there")
def test_torch_threads_are_found():
    assert mix_cpu._OPENMP is not None


@torch.no_grad()
def test_every_bfloat16_comes_back_as_it_was():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    for source in every.view(1, 256, 256), every.view(1, 1, -1):
        table = SourceTable(torch.zeros(1, source.shape[-1]), EPS, source)
        table.commit(torch.where(source.isfinite(), source, 0.0), 0)  # with others, a mixture is undefined
        found = table.mix(0, None, None)
        assert torch.equal(found.view(torch.uint16), torch.where(source.isfinite(), source, 0.0).view(torch.uint16))


@torch.no_grad()
def test_a_mixture_is_rounded_to_the_nearest_even_bfloat16():
    torch.manual_seed(0)
    one, other = ((torch.randn(1, 300, 64) * 2.0 ** torch.randint(-3, 3, (1, 300, 1))).bfloat16() for _ in range(2))
    table = SourceTable(torch.zeros(1, 64), EPS, one)
    table.commit(one, 0)
    assert torch.equal(table.mix(0, other, None), (0.5 * one.float() + 0.5 * other.float()).bfloat16())


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_undefined_numbers_spread_over_their_token_and_no_other(dtype, bad):
    torch.manual_seed(0)
    sources = [torch.randn(1, 3, 13).to(dtype) for _ in range(3)]
    queries, norm = torch.randn(3, 13), random_norm(13, dtype)
    for where in range(3):
        spoilt = [source.clone() for source in sources]
        spoilt[where][0, 1, 5] = bad
        table = SourceTable(queries, EPS, spoilt[0])
        for source in spoilt[:2]:
            table.commit(source, 0)
        found = table.mix(1, spoilt[2], norm)
        assert found[0, 1].isnan().any() and found[0, [0, 2]].isfinite().all()


@torch.no_grad()
def test_no_undefined_number_is_rounded_to_a_defined_one():
    """float32 has some that adding half a unit of bfloat16 would turn into zero."""
    queries = torch.full((3, 13), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    table = SourceTable(queries, EPS, torch.ones(1, 5, 13).bfloat16())
    table.commit(torch.ones(1, 5, 13).bfloat16(), 0)
    assert table.mix(1, torch.ones(1, 5, 13).bfloat16(), None).isnan().all()


@torch.no_grad()
def test_extreme_logits_neither_overflow_nor_lose_the_largest():
    torch.manual_seed(0)
    sources = [torch.randn(1, 5, 13) for _ in range(4)]
    queries = 1e4 * torch.randn(3, 13)
    table = SourceTable(queries, EPS, sources[0])
    for source in sources[:3]:
        table.commit(source, 0)
    assert relative_error(table.mix(2, sources[3], None).double(), loop(sources, queries[2], None)) < 1e-5


class Subclass(torch.Tensor):
    pass


ODD = {
    "strides": lambda source: source.transpose(0, 1).contiguous().transpose(0, 1),
    "another dtype": lambda source: source.double(),
    "a subclass": lambda source: source.as_subclass(Subclass),
    "a negative view": lambda source: torch._neg_view(-source),
    "zeros without memory": lambda source: torch._efficientzerotensor(source.shape),
}


@torch.no_grad()
@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_sources_and_norms_come_in_any_form(odd):
    torch.manual_seed(0)
    first, second, newest = (torch.randn(2, 3, 13) for _ in range(3))
    queries = torch.randn(5, 26)[:, ::2]
    weight = torch.randn(26)[::2]
    table = SourceTable(queries, EPS, ODD["strides"](first))
    for source in (first, second):
        table.commit(odd(source), 0)
    found = table.mix(1, odd(newest), Norm(weight, 0.0, EPS))
    plain = [odd(source).clone() for source in (first, second, newest)]
    assert torch.allclose(found.double(), loop(plain, queries[1], Norm(weight, 0.0, EPS)), rtol=1e-5, atol=1e-6)
    narrow = Norm(torch.ones(1), 0.0, EPS)
    expected = loop(plain, queries[1], Norm(torch.ones(13), 0.0, EPS))
    assert torch.allclose(table.mix(1, odd(newest), narrow).double(), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_what_does_not_fit_is_refused_and_never_read():
    states = torch.randn(2, 3, 13)
    for shape in ((3, 13), (1, 2, 3, 13)):
        with pytest.raises(ValueError, match=r"embedding must be \[B, T, D\] on a CPU"):
            SourceTable(torch.randn(5, 13), EPS, torch.randn(shape))
    with pytest.raises(ValueError, match="on a CPU, got .* on meta"):
        SourceTable(torch.randn(5, 13), EPS, states.to("meta"))
    with pytest.raises(ValueError, match=r"queries must be \[Q, 13\], got \[5, 12\]"):
        SourceTable(torch.randn(5, 12), EPS, states)
    table = SourceTable(torch.randn(5, 13), EPS, states)
    with pytest.raises(ValueError, match="no source is complete"):
        table.mix(0, states, None)
    for bad in (states[..., :12], states[:1], states[0], states.long(), states + 0j):
        with pytest.raises(ValueError, match=r"a source must be \[2, 3, 13\] of a floating dtype, got"):
            table.commit(bad, 0)
    table.commit(states, 2)
    with pytest.raises(ValueError, match=r"got \[2, 2, 13\] torch.float32"):
        table.mix(2, states[:, :2], None)
    with pytest.raises(RuntimeError):
        table.mix(2, None, Norm(torch.ones(12), 0.0, EPS))
    for reader in (-1, 1, 5):
        with pytest.raises(ValueError, match=f"sublayer must be from 2 to 4, got {reader}"):
            table.mix(reader, None, None)


def test_a_forked_child_has_threads_of_its_own():
    script = """
import os, torch
from attnres.kernels import mix_cpu, source_table
mix_cpu.NUMBERS_PER_THREAD = 1
mix_cpu._OPENMP = None  # whose threads no child has, torch's operations included
torch.get_num_threads = lambda: 3
def mix():
    table = source_table.SourceTable(torch.ones(3, 5), 1e-6, torch.ones(1, 9, 5))
    table.commit(torch.ones(1, 9, 5), 0)
    return table.mix(0, None, None)
with torch.no_grad():
    mix()
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(mix(), torch.ones(1, 9, 5)) else 1)
    assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)


def test_kernels_are_compiled_where_no_folder_can_keep_them(monkeypatch):
    cfunc = mix_cpu.cfunc

    def no_folder(*inputs, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return cfunc(*inputs, **options)

    monkeypatch.setattr(mix_cpu, "cfunc", no_folder)
    mix_cpu.kernels.cache_clear()
    try:
        check(torch.float32, (1, 2), 13, 3)
    finally:
        mix_cpu.kernels.cache_clear()


@pytest.fixture
def _fresh_choice():
    for cached in (depth_mixer._cpu_kernels, depth_mixer._warn_once, source_table.self_check):
        cached.cache_clear()
    yield
    for cached in (depth_mixer._cpu_kernels, source_table.self_check):
        cached.cache_clear()


@pytest.fixture
def tables(monkeypatch):
    """The tables that are made."""
    made = []
    init = SourceTable.__init__

    def recorded(self, *inputs):
        made.append(self)
        init(self, *inputs)

    monkeypatch.setattr(SourceTable, "__init__", recorded)
    return made


@pytest.mark.parametrize("mode", ["block", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_family_are_those_with_autograd(monkeypatch, tables, family, mode):
    monkeypatch.setattr(source_table, "MANY_SOURCES", 3)
    model = random_attnres(family, mode)
    depth_mixer.cpu_kernels("auto", torch.ones(1, 1, 1))  # its self-check makes a table
    tables.clear()
    for shape in ((1, 1), (2, 17)):
        tokens = random_tokens(*shape)
        expected = model(tokens).logits
        # This qwen3_next multiplies rounding: whatever mixes, its logits are up to 1e-3 from those in float64.
        with torch.no_grad():
            assert relative_error(model(tokens).logits, expected) < (2e-3 if family == "qwen3_next" else 1e-4)
    assert len(tables) == 2


def test_only_the_automatic_choice_without_autograd_in_two_dtypes_has_tables(tables):
    model, tokens = random_attnres("llama"), random_tokens(1, 3)
    depth_mixer.cpu_kernels("auto", torch.ones(1, 1, 1))
    tables.clear()
    model(tokens)
    with torch.no_grad():
        model(tokens, output_depth_weights=True)
        model.double()(tokens)
        model.half()(tokens)
        model.float().set_depth_implementation("eager")
        model(tokens)
        assert not tables
        model.set_depth_implementation("auto")
        model(tokens)
    assert len(tables) == 1


@pytest.mark.usefixtures("_fresh_choice")
@pytest.mark.parametrize(
    ("missing", "warning"),
    [("numba", "pip install numba"), ("attnres.kernels.source_table", None)],
    ids=["without numba", "in a Hub folder without the package"],
)
def test_without_kernels_eager_mixes(monkeypatch, missing, warning):
    for name in ("attnres.kernels.source_table", "attnres.kernels.mix_cpu"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    model, tokens = random_attnres("llama"), random_tokens(1, 5)
    expected = model(tokens).logits
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert relative_error(model(tokens).logits, expected) < 1e-4
    assert len(caught) == (warning is not None)
    assert warning is None or warning in str(caught[0].message)


@pytest.mark.usefixtures("_fresh_choice")
@pytest.mark.parametrize("fault", ["wrong", "failing"])
def test_kernels_that_fail_their_self_check_are_not_used(monkeypatch, tables, fault):
    if fault == "wrong":
        mix = SourceTable.mix
        monkeypatch.setattr(SourceTable, "mix", lambda self, *inputs: mix(self, *inputs) * 1.001)
        match = "mixing on the CPU is slower than it could be: a mixture in torch.float32 is off by 1.0e-03"
    else:
        monkeypatch.setattr(source_table, "kernels", lambda dtype: 1 / 0)
        match = "ZeroDivisionError: division by zero"
    model, tokens = random_attnres("llama"), random_tokens(1, 5)
    expected = model(tokens).logits
    with torch.no_grad(), pytest.warns(UserWarning, match=match) as caught:
        assert relative_error(model(tokens).logits, expected) < 1e-4
        count = len(tables)
        model(tokens)
    assert len(caught) == 1 and len(tables) == count


def fake(model, tokens):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        assert model(mode.from_tensor(tokens)).logits.shape == (2, 5, 97)


def counted(model, tokens):
    with FlopCounterMode(display=False) as flops:
        model(tokens)
    assert flops.get_total_flops() > 0


def transformed(model, tokens):
    weights = {name: torch.stack([weight, weight]) for name, weight in model.named_parameters()}
    options = {"attention_mask": {"full_attention": None}, "use_cache": False}
    options["inputs_embeds"] = model.get_input_embeddings()(tokens)
    found = torch.func.vmap(lambda weights: torch.func.functional_call(model, weights, (), options).logits)(weights)
    assert relative_error(found[1], model(**options).logits) < 1e-4


def traced(model, tokens):
    embeddings = model.get_input_embeddings()(tokens)
    options = {"attention_mask": {"full_attention": None}, "use_cache": False}

    def logits(embeddings):
        return model(inputs_embeds=embeddings, **options).logits

    trace = torch.jit.trace(logits, (embeddings,))
    assert relative_error(trace(-embeddings), logits(-embeddings)) < 1e-4


def dual(model, tokens):
    embeddings = model.get_input_embeddings()(tokens)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):  # as eager; what must not happen is no tangent
        model(inputs_embeds=forward_ad.make_dual(embeddings, embeddings))


@pytest.mark.usefixtures("_fresh_choice")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap
@pytest.mark.parametrize("first", [True, False], ids=["first of all", "after other calls"])
@pytest.mark.parametrize("watch", [fake, counted, transformed, traced, dual])
def test_who_looks_at_operations_sees_them_and_spoils_nothing(tables, watch, first):
    model, tokens = random_attnres("llama").requires_grad_(False), random_tokens(2, 5)
    expected = model(tokens).logits
    with torch.no_grad():
        if not first:
            model(tokens)
        watch(model, tokens)
        tables.clear()
        assert relative_error(model(tokens).logits, expected) < 1e-4
        assert tables  # the kernels are used as before
        assert type(model.eval()(tokens).logits) is torch.Tensor
        model.set_depth_implementation("eager")
        assert type(model(tokens).logits) is torch.Tensor


@torch.no_grad()
@pytest.mark.usefixtures("_fresh_choice")
def test_the_first_call_may_have_another_default_device():
    model, tokens = random_attnres("llama"), random_tokens(2, 5)
    with torch.device("meta"):
        found = model(tokens, position_ids=torch.arange(5, device="cpu")[None]).logits
    assert relative_error(found, model(tokens).logits) < 1e-6


@torch.no_grad()
def test_inputs_without_a_batch_are_an_error():
    model = random_attnres("llama")
    embeddings = model.get_input_embeddings()(random_tokens(1, 21))
    for wrong in (embeddings[0], embeddings[None]):
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            model(inputs_embeds=wrong)
