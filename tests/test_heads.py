"""Heads for other tasks, and checkpoints of one task loaded for another, as transformers does it for the backbone."""

import logging
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import random_attnres, random_tokens, relative_error
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from attnres import AttnResForCausalLM, AttnResForSequenceClassification

HEADS = {
    AutoModelForSequenceClassification: ("score", {"labels": torch.tensor([0, 2])}, (2, 3)),
    AutoModelForTokenClassification: ("score", {"labels": torch.ones(2, 7, dtype=torch.long)}, (2, 7, 3)),
    AutoModelForQuestionAnswering: (
        "qa_outputs",
        {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
        (2, 7),
    ),
}


@pytest.mark.parametrize(
    ("family", "mode"),
    [("llama", "block"), ("llama", "full"), ("qwen3_moe", "block"), ("kimi_linear", "block"), ("gemma2", "block")],
)
@pytest.mark.parametrize("auto_class", HEADS, ids=lambda each: each.__name__)
def test_a_language_model_is_loaded_with_a_new_head_trained_saved_and_loaded(auto_class, family, mode, tmp_path):
    head, labels, shape = HEADS[auto_class]
    language_model, tokens = random_attnres(family, mode), random_tokens(2, 7)
    language_model.save_pretrained(tmp_path / "lm")
    options = {} if head == "qa_outputs" else {"num_labels": 3}
    options["attn_implementation"] = "eager"  # as the model has it; older transformers load gemma2 with sdpa
    model = auto_class.from_pretrained(tmp_path / "lm", **options).eval()
    expected = language_model.model(tokens).last_hidden_state
    assert relative_error(model.model(tokens).last_hidden_state, expected) < 1e-3
    output = model(tokens, **labels)
    assert output[1].shape == shape
    output.loss.backward()
    assert model.get_parameter(f"{head}.weight").grad.any()
    assert model.model.depth_mixer.mlp_norm.query.grad.any()
    model.save_pretrained(tmp_path / "task")
    again = auto_class.from_pretrained(tmp_path / "task").eval()
    assert type(again) is type(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_a_plain_classifier_converts_in_memory_and_on_disk(tmp_path):
    from helpers import short_config

    torch.manual_seed(0)
    plain = AutoModelForSequenceClassification.from_config(short_config("llama", num_labels=3)).eval()
    plain.save_pretrained(tmp_path)
    tokens = random_tokens(2, 7)
    for model in (
        AttnResForSequenceClassification.from_backbone(plain),
        AttnResForSequenceClassification.from_pretrained(tmp_path).eval(),
    ):
        assert relative_error(model(tokens).logits, plain(tokens).logits) < 1e-5


def test_a_checkpoint_without_a_head_gets_a_new_one_with_transformers_warning(tmp_path, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    model = random_attnres("llama")
    model.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    logger.removeHandler(caplog.handler)
    assert "lm_head.weight" in caplog.text and "MISSING" in caplog.text
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
    assert torch.equal(loaded.depth_mixer.mlp_norm.query, model.depth_mixer.mlp_norm.query)
    base = AutoModel.from_pretrained(tmp_path)
    tokens = random_tokens(2, 7)
    assert relative_error(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state) < 1e-3


def test_a_checkpoint_without_backbone_tensors_stays_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    random_attnres("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    for auto_class in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        with pytest.raises(ValueError, match=r"missing model\.layers\.2\.mlp\.up_proj\.weight"):
            auto_class.from_pretrained(tmp_path)
    assert AttnResForCausalLM.from_pretrained(tmp_path, strict=False)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"model.layers.2.mlp.up_proj.weight"}
    with pytest.raises(ValueError, match=r"missing model\.layers\.2\.mlp\.up_proj\.weight"):
        AttnResForCausalLM.from_pretrained(tmp_path, strict=True, output_loading_info=True)
    save_file({"tensor": torch.ones(2)}, path, metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {name for name, _ in model.named_parameters()}


REMOTE_HEADS = """
    import sys
    sys.modules["attnres"] = None  # as where the package is not installed
    import torch
    import transformers
    folder = sys.argv[1]
    for name, expected in torch.load(folder + "/expected.pt", weights_only=True).items():
        auto_class = getattr(transformers, name)
        model = auto_class.from_pretrained(folder + "/" + name, trust_remote_code=True)
        with torch.no_grad():
            assert torch.equal(model(expected["tokens"])[0], expected["output"]), name
    model.save_pretrained(folder + "/again")
    again = auto_class.from_pretrained(folder + "/again", trust_remote_code=True)
    assert type(again).__name__ == type(model).__name__
"""


def test_every_head_loads_as_remote_code_where_the_package_is_not_installed(tmp_path):
    random_attnres("qwen3_moe").save_pretrained(tmp_path / "lm")
    tokens, expected = random_tokens(2, 7), {}
    for auto_class in HEADS:
        model = auto_class.from_pretrained(tmp_path / "lm").eval()
        model.save_pretrained(tmp_path / auto_class.__name__)
        model.set_depth_implementation("eager")  # the kernels come with the package
        with torch.no_grad():
            expected[auto_class.__name__] = {"tokens": tokens, "output": model(tokens)[0]}
    torch.save(expected, tmp_path / "expected.pt")
    (tmp_path / "script.py").write_text(textwrap.dedent(REMOTE_HEADS))
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", tmp_path / "script.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("family", ["llama", "kimi_linear"])
def test_a_model_in_memory_without_a_head_gets_a_new_one_with_a_warning(family, caplog):
    from helpers import short_config

    torch.manual_seed(0)
    base = AutoModel.from_config(short_config(family)).eval()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    converted = [
        AttnResForCausalLM.from_backbone(base),
        AttnResForSequenceClassification.from_backbone(AutoModelForCausalLM.from_config(base.config)),
    ]
    logger.removeHandler(caplog.handler)
    assert f"{type(base).__name__} has no lm_head.weight: newly initialized" in caplog.text
    assert "has no score.weight: newly initialized" in caplog.text
    tokens = random_tokens(2, 7)
    assert relative_error(converted[0].model(tokens).last_hidden_state, base(tokens).last_hidden_state) < 1e-5
    for model, head in zip(converted, ("lm_head", "score"), strict=True):
        std = model.get_submodule(head).weight.std().item()
        assert std == pytest.approx(base.config.initializer_range, rel=0.35)
        assert model(tokens).logits.isfinite().all()


def test_a_model_with_a_head_converts_to_one_without(tmp_path):
    from helpers import short_config

    from attnres import AttnResModel

    torch.manual_seed(0)
    plain, tokens = AutoModelForCausalLM.from_config(short_config("llama")).eval(), random_tokens(2, 7)
    found = AttnResModel.from_backbone(plain)(tokens).last_hidden_state
    assert relative_error(found, plain.model(tokens).last_hidden_state) < 1e-5


def test_packed_weights_in_memory_are_refused_by_name():
    from helpers import short_config

    plain = AutoModelForCausalLM.from_config(short_config("llama"))
    projection = plain.model.layers[1].mlp.up_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is torch\.int8: this LlamaForC"):
        AttnResForCausalLM.from_backbone(plain)
