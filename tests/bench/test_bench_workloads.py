"""What is timed is what it says: tokens, caches, gradients."""

import dataclasses

import pytest
import torch
from helpers import short_config

from attnres.bench.arms import build, select
from attnres.bench.settings import DEFAULT_ARMS, Settings
from attnres.bench.workloads import WORKLOADS

SETTINGS = Settings(DEFAULT_ARMS, tokens=(7, 5), batches=(1, 3), context=6, new_tokens=4)


@pytest.fixture(scope="module")
def models():
    built, _ = build(select(["block", "stacked"]), short_config("qwen3", 2), 1, torch.device("cpu"), seed=0)
    return {name: built[name] for name in ("plain", "block", "stacked")}


@pytest.fixture
def passes(models):
    """Per forward pass of any variant the shape of its token ids."""
    shapes = []
    handles = [
        model.model.register_forward_pre_hook(
            lambda module, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
        )
        for model in models.values()
    ]
    yield shapes
    for handle in handles:
        handle.remove()


def test_prefill_is_one_pass_over_each_length(models, passes):
    for workload in WORKLOADS["prefill"](models, SETTINGS):
        passes.clear()
        for sample in workload.samples.values():
            sample.run(sample.prepare())
        assert passes == [(1, workload.parameters["tokens"])] * 3


def test_decode_is_one_token_a_step_after_the_context_however_often_it_runs(models, passes):
    workloads = list(WORKLOADS["decode"](models, SETTINGS))
    assert [workload.parameters["batch"] for workload in workloads] == [1, 3]
    for workload in workloads:
        assert workload.steps == 4
        for sample in [*workload.samples.values()] * 2:
            cache = sample.prepare()
            assert cache.get_seq_length() == 6 and len(cache.layers[0].keys) == workload.parameters["batch"]
            passes.clear()
            sample.run(cache)
            assert cache.get_seq_length() == 10 and passes == [(workload.parameters["batch"], 1)] * 4


def test_compiled_decode_goes_on_after_the_same_context_in_every_run(models, monkeypatch):
    calls = []

    def compile_nothing(model, **options):  # compiling takes minutes; test_compile.py does
        def call(**inputs):
            calls.append((model, tuple(inputs["input_ids"].shape), int(inputs["past_key_values"].get_seq_length())))
            return model(**inputs)

        return call

    monkeypatch.setattr(torch, "compile", compile_nothing)
    for workload, batch in zip(WORKLOADS["compiled-decode"](models, SETTINGS), (1, 3), strict=True):
        for name, sample in [*workload.samples.items()] * 2:
            calls.clear()
            sample.run(sample.prepare())
            assert calls == [(models[name], (batch, 1), length) for length in (6, 7, 8, 9)]


def test_training_makes_gradients_and_leaves_none_behind(models):
    for workload in WORKLOADS["train"](models, dataclasses.replace(SETTINGS, tokens=(7,))):
        for name, sample in workload.samples.items():
            prepared = sample.prepare()
            assert models[name].training
            sample.run(prepared)
            assert any(weight.grad is not None for weight in models[name].parameters())
            sample.finish()
            assert all(weight.grad is None for weight in models[name].parameters()) and not models[name].training


def test_generate_makes_exactly_the_new_tokens_whatever_the_end_token_is(models, passes, monkeypatch):
    (workload,) = WORKLOADS["generate"](models, SETTINGS)
    for name, sample in workload.samples.items():
        vocabulary = range(1, models[name].config.vocab_size)
        monkeypatch.setattr(models[name].generation_config, "eos_token_id", list(vocabulary))
        passes.clear()
        sample.run(sample.prepare())
        assert passes == [(1, 6), (1, 1), (1, 1), (1, 1)]
