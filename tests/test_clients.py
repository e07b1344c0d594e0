"""Libraries that decide by class names and tables of model types treat an AttnRes model as its backbone."""

import pytest
import torch
from datasets import Dataset
from families import FAMILIES
from helpers import random_attnres, random_tokens, short_config
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.models.auto import modeling_auto

from attnres import AttnResConfig

peft = pytest.importorskip("peft")


def smoothed(model, tokens, tmp_path):
    """Returns the loss that Trainer computes with label smoothing, and the loss by definition."""
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_dict({"input_ids": tokens.tolist()}))
    found = trainer.compute_loss(model, {"input_ids": tokens, "labels": tokens.clone()})
    logs = model(tokens).logits[:, :-1].log_softmax(-1)
    nll = -logs.gather(-1, tokens[:, 1:, None]).mean()
    return found.item(), (0.9 * nll - 0.1 * logs.mean()).item()


@pytest.mark.parametrize("mode", ["block", "full", "standard"])
def test_label_smoothing_shifts_the_labels(mode, tmp_path):
    tokens = random_tokens(2, 9)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(short_config("llama")).eval()
    for model in (plain, random_attnres("llama", mode)):
        found, expected = smoothed(model, tokens, tmp_path)
        assert found == pytest.approx(expected, rel=1e-5)


def test_every_class_stands_in_transformers_table_for_what_it_does():
    import attnres
    from attnres.client_tables import CLASSES

    assert {*CLASSES.values()} == {name for name in attnres.__all__ if name.startswith(("AttnResModel", "AttnResFor"))}
    for table, name in CLASSES.items():
        assert getattr(modeling_auto, table)["attnres"] == name


METHODS = {
    "lora": peft.LoraConfig(task_type="CAUSAL_LM"),
    "ia3": peft.IA3Config(task_type="CAUSAL_LM"),
    "vera": peft.VeraConfig(task_type="CAUSAL_LM"),
    "oft": peft.OFTConfig(task_type="CAUSAL_LM", oft_block_size=5),
    "layer norms": peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
    "adaption prompt": peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=2),
}


def adapted(model, method):
    """Returns the names of the parameters that PEFT trains and the loss, or the error that it raises."""
    import copy

    tokens = random_tokens(2, 9)
    try:
        model = peft.get_peft_model(model, copy.deepcopy(METHODS[method]))
    except ValueError as error:
        return str(error).split(":")[0], None, None
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    generated = model.generate(input_ids=tokens, max_new_tokens=3, do_sample=False)
    return names, loss.item(), generated.shape


@pytest.mark.filterwarnings("ignore")  # PEFT's own, of its methods
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma2", "phi3"])
@pytest.mark.parametrize("method", METHODS)
def test_a_peft_method_without_targets_takes_those_of_the_backbone(method, family):
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(short_config(family))
    expected, _, shape = adapted(plain, method)
    names, loss, found_shape = adapted(random_attnres(family).train(), method)
    if isinstance(expected, str):  # PEFT knows no defaults for this family, or needs another attention
        assert isinstance(names, str)
    else:
        assert names == expected and found_shape == shape and loss == loss


@pytest.mark.filterwarnings("ignore")  # PEFT asks by a name that transformers deprecates
def test_defaults_are_those_of_the_model_at_hand_whatever_was_built_before():
    first, second = random_attnres("llama"), random_attnres("qwen3")
    for model, keys in ((first, "k_proj"), (second, "q_proj"), (random_attnres("llama"), "k_proj")):
        adapter = peft.get_peft_model(model, peft.IA3Config(task_type="CAUSAL_LM"))
        assert keys in adapter.peft_config["default"].target_modules


@pytest.mark.filterwarnings("ignore")
def test_an_adaption_prompt_looks_its_model_up_also_after_a_default_configuration_was_made():
    method = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2)
    adapter = peft.get_peft_model(random_attnres("llama"), method)
    assert AttnResConfig().to_dict()["model_type"] == "attnres"  # as transformers does to compare with
    assert adapter(random_tokens(1, 5)).logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dictionary_of_a_configuration_has_the_backbones_sizes_and_its_file_has_not(family, tmp_path):
    import json

    model = random_attnres(family)
    content = model.config.to_dict()
    assert content["hidden_size"] == model.config.hidden_size
    assert type(model.config)(**content).to_dict() == content
    model.config.save_pretrained(tmp_path)
    assert "hidden_size" not in json.loads((tmp_path / "config.json").read_text())
