"""Training with transformers' Trainer: checkpoints, exact resumption, optimiser groups, evaluation."""

import math

import pytest
import torch
from families import FAMILIES
from helpers import random_attnres, random_tokens
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.trainer_utils import load_sharded_checkpoint

from attnres import AttnResForCausalLM


def examples(count, length=10, seed=0):
    return [{"input_ids": row, "labels": row.clone()} for row in random_tokens(count, length, seed)]


def trainer_of(model, folder, **options):
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 5,
        **options,
    }
    return Trainer(
        model=model, args=TrainingArguments(**arguments), train_dataset=examples(16), eval_dataset=examples(4, seed=9)
    )


def logged(trainer, key="loss"):
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


@pytest.mark.parametrize(("family", "mode"), [("qwen3", "full"), ("qwen3_moe", "block")])
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(tmp_path, family, mode):
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer_of(random_attnres(family, mode), tmp_path / "whole", **options)
    whole.train()
    losses = logged(whole)
    assert len(losses) == 6
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.4.mlp_res_proj.weight" in names
    assert ("model.layers.1.mlp.experts.3.gate_proj.weight" in names) == (family == "qwen3_moe")

    # Other weights: all of them have to come from the checkpoint.
    resumed = trainer_of(random_attnres(family, mode, seed=7), tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert {step: loss for step, loss in logged(resumed).items() if step > 3} == {
        step: loss for step, loss in losses.items() if step > 3
    }
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), parameter), name


@pytest.mark.parametrize(
    ("family", "shards"),
    # In several files, depth tensors, experts and convolutions are cut in the middle.
    [*((family, 1) for family in FAMILIES), ("kimi_linear", "several")],
)
def test_a_state_dict_is_loaded_under_the_names_on_disk(tmp_path, family, shards):
    model, other = random_attnres(family), random_attnres(family, seed=7)
    model.save_pretrained(tmp_path, max_shard_size="5GB" if shards == 1 else "60KB")
    if shards == 1:
        result = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        assert (set(result.missing_keys), result.unexpected_keys) == (tied, [])
    else:
        assert len(list(tmp_path.glob("*.safetensors"))) > 3
        load_sharded_checkpoint(other, tmp_path, strict=False)
    for name, parameter in model.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter), name


def test_a_state_dict_that_lacks_one_layers_depth_tensor_is_refused(tmp_path):
    model = random_attnres("llama")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp_res_proj.weight"]
    with pytest.raises(RuntimeError, match="size mismatch for model.depth_mixer.mlp_norm.query"):
        model.load_state_dict(tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_parameters_get_no_weight_decay_and_the_rest_is_decayed_as_on_the_plain_backbone(tmp_path, family):
    model = random_attnres(family)
    trainer = trainer_of(model, tmp_path, weight_decay=0.1)
    decayed = set(trainer.get_decay_parameter_names(model))
    assert not [name for name in decayed if "depth_mixer" in name]
    assert "model.layers.0.mlp_res_proj.weight" not in decayed
    assert "model.embed_tokens.weight" in decayed

    groups = trainer.create_optimizer().param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_decay = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}
    depth = {name for name in names.values() if "depth_mixer" in name}
    assert len(depth) == 6
    assert depth <= by_decay[0.0]
    assert by_decay[0.1] == decayed & set(names.values())


def test_weight_decay_alone_leaves_the_depth_mixer_where_it_is(tmp_path):
    """Without gradients only weight decay changes the weights."""
    model = random_attnres("qwen3")
    trainer = trainer_of(model, tmp_path, weight_decay=0.5, learning_rate=0.1, optim="adamw_torch")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = trainer.create_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("norm" in name), name


def test_evaluation_reports_the_mean_loss_and_prediction_returns_only_logits(tmp_path):
    model = random_attnres("qwen3_moe")
    model.config.output_hidden_states = False
    trainer = trainer_of(model, tmp_path, per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    batch = torch.stack([example["input_ids"] for example in examples(4, seed=9)])
    with torch.no_grad():
        output = model(batch, labels=batch)
    assert math.isclose(metrics["eval_loss"], output.loss.item(), rel_tol=1e-4)

    prediction = trainer.predict(examples(4, seed=9))
    assert prediction.predictions.shape == (4, 10, 97)  # one array: no cache, no depth weights beside it
    torch.testing.assert_close(torch.from_numpy(prediction.predictions), output.logits, rtol=1e-3, atol=1e-4)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    trainer = trainer_of(
        random_attnres("qwen3_moe"),
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the best is not the last
    )
    trainer.train()
    losses = logged(trainer, "eval_loss")
    best = max(losses, key=losses.get)
    assert best < 4
    expected = AttnResForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}")
    for name, parameter in expected.named_parameters():
        assert torch.equal(trainer.model.get_parameter(name), parameter), name
    assert math.isclose(trainer.evaluate()["eval_loss"], losses[best], rel_tol=1e-5)


# transformers 5.23 renames the arguments.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)


def test_gradient_checkpointing_trains_the_same(tmp_path):
    plain = trainer_of(random_attnres("qwen3"), tmp_path / "plain", max_steps=3)
    plain.train()
    checkpointed = trainer_of(
        random_attnres("qwen3"),
        tmp_path / "checkpointed",
        max_steps=3,
        **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
    )
    checkpointed.train()
    assert checkpointed.model.model.layers[0].gradient_checkpointing
    for step, loss in logged(plain).items():
        assert math.isclose(logged(checkpointed)[step], loss, rel_tol=1e-3)
    for name, parameter in plain.model.named_parameters():
        other = checkpointed.model.get_parameter(name)
        torch.testing.assert_close(other, parameter, rtol=1e-2, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_accumulated_batches_of_unequal_length_give_the_loss_of_one_batch(tmp_path):
    """The loss is divided by the number of tokens of all batches, `num_items_in_batch`."""
    data = examples(4)
    for example, padding in zip(data, (0, 3, 6, 8), strict=True):
        example["labels"][:padding] = -100
    losses = []
    for size, steps in ((4, 1), (1, 4)):
        trainer = trainer_of(
            random_attnres("llama"),
            tmp_path / str(size),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        trainer.train_dataset = data
        trainer.train()
        losses.append(logged(trainer)[1])
    assert math.isclose(*losses, rel_tol=1e-3)


def test_training_with_a_frozen_backbone_moves_only_the_depth_mixer(tmp_path):
    model = random_attnres("qwen3").freeze_backbone()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = trainer_of(model, tmp_path, weight_decay=0.1)
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "depth_mixer" in name}
    assert len(changed) == 6


def test_the_language_modelling_collator_pads_and_trains(tmp_path):
    words = {"[PAD]": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 97)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="</s>")
    texts = ["w3 w4 w5", "w9 w8 w7 w6 w5", "w3 w4", "w10 w11 w12 w13"]
    model = random_attnres("gemma3_text")
    trainer = trainer_of(model, tmp_path, max_steps=2)
    trainer.data_collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer.train_dataset = [dict(tokenizer(text)) for text in texts]
    trainer.train()
    assert all(math.isfinite(loss) for loss in logged(trainer).values())
    trainer.save_model(tmp_path / "saved")
    loaded = AttnResForCausalLM.from_pretrained(tmp_path / "saved")
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
