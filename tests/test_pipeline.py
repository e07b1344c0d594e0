"""Pipelines take an AttnRes model as they take any other."""

import logging

import pytest
from helpers import random_attnres
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from attnres import AttnResForSequenceClassification, AttnResForTokenClassification


@pytest.fixture
def tokenizer():
    words = {"[PAD]": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 97)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="</s>", padding_side="left")


@pytest.fixture
def messages(caplog):
    """What transformers logs as a warning; its logger does not propagate."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("given", ["model", "folder"])
def test_the_text_generation_pipeline_generates_what_generate_does_without_a_warning(
    tmp_path, tokenizer, messages, given
):
    model = random_attnres("qwen3", attn_implementation="sdpa")
    prompts = ["w5 w9 w11", "w7 w3 w30 w31 w32"]
    if given == "folder":
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    else:
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    outputs = generator(prompts, do_sample=False, max_new_tokens=6, return_full_text=False, batch_size=2)
    assert not [message for message in messages() if "AttnRes" in message or "support" in message]

    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    expected = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, max_new_tokens=6
    )
    texts = tokenizer.batch_decode(expected[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [output[0]["generated_text"] for output in outputs] == texts


@pytest.mark.parametrize(
    ("task", "model_class", "keys"),
    [
        ("text-classification", AttnResForSequenceClassification, {"label", "score"}),
        ("token-classification", AttnResForTokenClassification, {"entity", "score", "index", "word", "start", "end"}),
    ],
)
def test_pipelines_take_models_with_other_heads_without_a_warning(tokenizer, messages, task, model_class, keys):
    model = model_class(random_attnres("qwen3").config).eval()
    model.config.pad_token_id = 0
    found = pipeline(task, model=model, tokenizer=tokenizer, device="cpu")("w5 w9 w11")
    assert set(found[0]) == keys
    assert not [message for message in messages() if "AttnRes" in message or "support" in message]
