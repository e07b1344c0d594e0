"""Tests DepthDynamicsCallback: its values against those found by hand, and that training stays the same."""

import math
from functools import cache

import pytest
import torch
from helpers import compiles, random_attnres, random_tokens, short_config
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from attnres import DepthDynamicsCallback
from attnres.analysis.dynamics_runs import layer_name, mixture_names, parse

LAYERS = 5
MODES = ("block", "full", "standard", "plain")
# transformers 5.23 renames the arguments.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)


def model_of(mode):
    """A tiny AttnRes model, or the plain transformers model of the same family."""
    if mode != "plain":
        return random_attnres("qwen3", mode)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(short_config("qwen3", LAYERS))


def trainer_of(model, folder, interval=1, callbacks=(), **options):
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 5,
        **options,
    }
    watch = [] if interval is None else [DepthDynamicsCallback(interval)]
    data = [{"input_ids": row, "labels": row.clone()} for row in random_tokens(16, 10)]
    return Trainer(model, TrainingArguments(**arguments), train_dataset=data, callbacks=[*callbacks, *watch])


def trained(*args, **options):
    trainer = trainer_of(*args, **options)
    trainer.train()
    return trainer


def depth_logs(trainer):
    """What was logged over depth: a dictionary per step."""
    logs = {}
    for entry in trainer.state.log_history:
        values = {name: value for name, value in entry.items() if name.startswith("depth/")}
        if values:
            assert entry["step"] not in logs
            logs[entry["step"]] = values
    return logs


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """What one step of a model of a given mode logs."""
    return cache(lambda mode: depth_logs(trained(model_of(mode), tmp_path_factory.mktemp("one-step")))[1])


def assert_close(values, expected, rel_tol=1e-4):
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert math.isclose(value, expected[name], rel_tol=rel_tol, abs_tol=1e-5), name


def found_by_hand(model, batch):
    """The same measures from retained gradients, parameters and returned depth weights of one batch."""
    seen = []

    def keep(layer, args, output):
        seen.append(output[-1] if isinstance(output, tuple) else output)
        seen[-1].retain_grad()

    handles = [layer.register_forward_hook(keep) for layer in model.model.layers]
    mixes = getattr(model, "depth_mixer", None) is not None
    outputs = model.train()(input_ids=batch, labels=batch, **({"output_depth_weights": True} if mixes else {}))
    outputs.loss.backward()
    for handle in handles:
        handle.remove()
    found = {}
    for index, output in enumerate(seen):
        found[f"depth/output_rms/layer_0{index}"] = output.square().mean().sqrt().item()
        found[f"depth/gradient_norm/layer_0{index}"] = output.grad.square().sum().sqrt().item()
    if mixes:
        mixer = model.depth_mixer
        queries = [score.query[i, 0] for i in range(LAYERS) for score in (mixer.attention_norm, mixer.mlp_norm)]
        places = [f"layer_0{i}_{kind}" for i in range(LAYERS) for kind in ("attention", "mlp")] + ["output"]
        for place, query, weights in zip(
            places, [*queries, mixer.output_norm.query[0]], outputs.depth_weights, strict=True
        ):
            found[f"depth/query_norm/{place}"] = query.square().sum().sqrt().item()
            tokens = [-sum(w * math.log(w) for w in row if w > 0) for row in weights.flatten(0, 1).tolist()]
            found[f"depth/entropy/{place}"] = sum(tokens) / len(tokens)
    return found


@pytest.mark.parametrize("mode", MODES)
def test_logged_values_are_those_found_by_hand(tmp_path, mode):
    trainer = trainer_of(model_of(mode), tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))["input_ids"]
    trainer.train()
    expected = found_by_hand(model_of(mode), batch)
    assert len(expected) == (2 * LAYERS if mode in ("standard", "plain") else 2 * LAYERS + 2 * (2 * LAYERS + 1))
    assert_close(depth_logs(trainer)[1], expected)


@pytest.mark.parametrize("mode", ["block", "full", "plain"])
def test_training_is_the_same_to_the_bit(tmp_path, mode):
    watched, alone = (
        trained(model_of(mode), tmp_path, interval=interval, max_steps=3, learning_rate=1e-2) for interval in (1, None)
    )
    assert len(depth_logs(watched)) == 3 and not depth_logs(alone)
    for name, parameter in alone.model.named_parameters():
        assert torch.equal(parameter, watched.model.get_parameter(name)), name


@pytest.mark.parametrize("mode", ["block", "standard"])
def test_all_batches_of_a_step_count(tmp_path, one_step, mode):
    parts = trained(model_of(mode), tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert_close(depth_logs(parts)[1], one_step(mode), rel_tol=1e-3)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mode", ["block", "full", "plain"])
def test_activation_checkpointing_changes_no_value(tmp_path, one_step, mode, use_reentrant):
    options = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": use_reentrant}}
    checkpointed = trained(model_of(mode), tmp_path, **options)
    assert checkpointed.model.model.layers[0].gradient_checkpointing
    assert_close(depth_logs(checkpointed)[1], one_step(mode))


class _LooksFirst(Trainer):
    def compute_loss(self, model, inputs, *args, **options):
        with torch.no_grad():
            model(random_tokens(3, 8, seed=4), use_cache=False)
        return super().compute_loss(model, inputs, *args, **options)


@pytest.mark.parametrize("mode", ["block", "plain"])
def test_a_pass_without_gradients_does_not_count(tmp_path, one_step, mode):
    trainer = trainer_of(model_of(mode), tmp_path)
    trainer.__class__ = _LooksFirst
    trainer.train()
    assert_close(depth_logs(trainer)[1], one_step(mode))


def test_steps_that_are_multiples_of_the_interval_are_measured_and_the_last(tmp_path):
    assert list(depth_logs(trained(model_of("block"), tmp_path, interval=3, max_steps=7))) == [3, 6, 7]


def test_by_default_every_hundredth_step_is_measured(tmp_path):
    trainer = trainer_of(model_of("standard"), tmp_path, interval=None)
    trainer.add_callback(DepthDynamicsCallback)
    assert trainer.callback_handler.callbacks[-1].interval == 100


def test_the_loss_is_still_logged_in_the_steps_that_are_measured(tmp_path):
    trainer = trained(model_of("block"), tmp_path, interval=2, max_steps=4, logging_steps=2)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4]
    assert list(depth_logs(trainer)) == [2, 4]


class _Listener(TrainerCallback):
    def __init__(self):
        self.heard = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.heard.append(set(logs))


def test_whoever_listens_to_the_trainer_receives_the_values(tmp_path):
    """Reporters such as TensorBoard's come before a user's callbacks, as this one does."""
    listener = _Listener()
    trained(model_of("block"), tmp_path, callbacks=[listener])
    (heard,) = (names for names in listener.heard if "depth/output_rms/layer_00" in names)
    assert {"depth/gradient_norm/layer_04", "depth/query_norm/output", "depth/entropy/layer_02_mlp", "epoch"} <= heard


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def asked_before(model):
    """transformers leaves its own hooks where depth weights have been asked for once."""
    model(random_tokens(1, 3), output_depth_weights=True)
    return model


class _Interruption(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


class _CountHooks(TrainerCallback):
    def __init__(self):
        self.counts = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.counts[state.global_step + 1] = hooks_of(model)


def test_hooks_are_there_only_in_the_steps_that_are_measured(tmp_path):
    model, counter = asked_before(model_of("block")), _CountHooks()
    before = hooks_of(model)
    trained(model, tmp_path, interval=2, max_steps=4, callbacks=[counter])
    during = before + LAYERS + 1 + 1 + 3  # layers, the decoder before and after, three places of pseudo-queries
    assert counter.counts == {1: before, 2: during, 3: before, 4: during}
    assert hooks_of(model) == before


def test_hooks_of_an_interrupted_training_go_when_the_next_one_begins(tmp_path):
    model = asked_before(model_of("block"))
    before = hooks_of(model)
    interruption = _Interruption()
    trainer = trainer_of(model, tmp_path, callbacks=[interruption])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert hooks_of(model) > before
    trainer.remove_callback(interruption)
    trainer.train()
    assert hooks_of(model) == before


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("mode", ["block", "plain"])
def test_an_adapter_is_looked_through(tmp_path, one_step, mode):
    saved = ["depth_mixer"] if mode == "block" else None
    model = get_peft_model(model_of(mode), LoraConfig(r=3, target_modules=["v_proj"], modules_to_save=saved))
    values = depth_logs(trained(model, tmp_path, max_steps=2, learning_rate=1e-2))
    assert_close(values[1], one_step(mode))  # an adapter starts as the identity
    if saved:  # the copy that is trained, not the original
        assert values[2]["depth/query_norm/output"] != values[1]["depth/query_norm/output"]


def test_a_layer_without_gradient_has_no_gradient_norm(tmp_path):
    model = model_of("plain")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers.4." in name)
    values = depth_logs(trained(model, tmp_path))[1]
    assert [name for name in values if "gradient_norm" in name] == ["depth/gradient_norm/layer_04"]
    assert sum("output_rms" in name for name in values) == LAYERS


def test_a_frozen_backbone_is_measured_too(tmp_path):
    values = depth_logs(trained(model_of("block").freeze_backbone(), tmp_path))[1]
    assert sum("gradient_norm" in name for name in values) == LAYERS


def test_bfloat16_is_measured_in_float32(tmp_path, one_step):
    half = depth_logs(trained(model_of("block"), tmp_path, bf16=True))[1]
    assert_close(half, one_step("block"), rel_tol=0.15)


def test_the_factor_of_a_gradient_scaler_is_taken_out(tmp_path, one_step):
    trainer = trainer_of(model_of("block"), tmp_path, max_grad_norm=0)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.train()
    assert_close(depth_logs(trainer)[1], one_step("block"))


@compiles
def test_a_compiled_model_trains_and_it_is_said_once_that_nothing_is_logged(tmp_path, caplog):
    with caplog.at_level("WARNING", "transformers"):
        trainer = trained(
            model_of("standard"), tmp_path, max_steps=2, torch_compile=True, torch_compile_backend="eager"
        )
    said = [record.message for record in caplog.records if "DepthDynamicsCallback" in record.message]
    assert said == ["DepthDynamicsCallback logs nothing: torch.compile hides what the decoder layers return."]
    assert trainer.state.global_step == 2 and not depth_logs(trainer)


def test_under_data_parallel_it_is_said_once_that_nothing_is_logged(tmp_path, caplog):
    trainer = trainer_of(model_of("block"), tmp_path, max_steps=2)
    trainer.args._n_gpu = 2  # as with two GPUs; without any, DataParallel calls the model itself
    with caplog.at_level("WARNING", "transformers"):
        trainer.train()
    assert isinstance(trainer.model_wrapped, torch.nn.DataParallel)
    said = [record.message for record in caplog.records if "DepthDynamicsCallback" in record.message]
    assert len(said) == 1
    assert "DataParallel runs copies of the decoder layers" in said[0]
    assert trainer.state.global_step == 2 and not depth_logs(trainer)


def test_a_model_without_decoder_layers_is_refused_by_name(tmp_path):
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2}
    with pytest.raises(ValueError, match="no decoder layers in GPT2LMHeadModel.*leave the callback out"):
        trained(GPT2LMHeadModel(GPT2Config(**sizes)), tmp_path)


def test_without_a_trainer_it_says_where_it_belongs(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="logs through a Trainer; pass it as"):
        DepthDynamicsCallback().on_train_begin(arguments, TrainerState(), TrainerControl(), model=model_of("block"))


@pytest.mark.parametrize("interval", [0, -1, 2.5, "10", True, None])
def test_an_interval_is_a_positive_whole_number(interval):
    with pytest.raises(ValueError, match="interval must be a whole number of at least 1, in optimiser steps, got"):
        DepthDynamicsCallback(interval)


@pytest.mark.parametrize("layers", [1, 12, 100, 101, 1000])
def test_names_sort_by_depth_and_are_read_back(layers):
    names = [layer_name("output_rms", layer, layers) for layer in range(layers)]
    assert sorted(names) == names
    assert [parse(name) for name in names] == [("output_rms", layer) for layer in range(layers)]
    mixtures = mixture_names("entropy", layers)
    assert len({parse(name) for name in mixtures}) == 2 * layers + 1
    assert parse(mixtures[-1]) == ("entropy", "output") and parse(mixtures[0])[1].endswith("_attention")


@pytest.mark.parametrize("name", ["loss", "depth/output_rms/output", "depth/other/layer_01", "depth/entropy/"])
def test_other_names_are_not_taken_for_dynamics(name):
    assert parse(name) is None
