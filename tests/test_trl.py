"""TRL's trainers take a converted model as they take the plain one: the same first loss, and it trains."""

import pytest
import torch
from datasets import Dataset
from helpers import random_attnres, short_config
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from attnres import AttnResForCausalLM, AttnResForSequenceClassification

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own: deprecations of what it imports, experimental features

TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<end>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<end>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
WORDS = [
    "what",
    "is",
    "the",
    "sum",
    "of",
    "one",
    "and",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "it",
    "was",
    "not",
    "so",
]
ROWS = [(f"what is the sum of {a} and {b}", f"it is {b} {a}") for a in WORDS[6:12] for b in WORDS[8:14]][:16]


@pytest.fixture(scope="module")
def tokenizer():
    special = ["<unk>", "<pad>", "<s>", "<end>", "<user>", "<assistant>"]
    vocabulary = {word: place for place, word in enumerate([*special, *dict.fromkeys(WORDS)])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="<end>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def chats():
    return Dataset.from_list(
        [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in ROWS]
    )


def preferences():
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": question}],
                "chosen": [{"role": "assistant", "content": answer}],
                "rejected": [{"role": "assistant", "content": "it was not so"}],
            }
            for question, answer in ROWS
        ]
    )


def pair(auto_class=AutoModelForCausalLM, ours=AttnResForCausalLM, family="llama", **overrides):
    """A plain model and its conversion."""
    torch.manual_seed(0)
    config = short_config(family, layers=2, initializer_range=0.02, pad_token_id=1, eos_token_id=3, **overrides)
    plain = auto_class.from_config(config)
    return plain, ours.from_backbone(plain, layers_per_block=1)


def first_losses(trainer_class, config_class, models, tokenizer, dataset, out, **options):
    """Returns the loss of the first of two training steps of each model, and checks that the weights changed."""
    losses, extra = [], {name: options.pop(name) for name in ("peft_config", "reward_funcs") if name in options}
    for model in models:
        before = [parameter.detach().clone() for parameter in model.parameters()]
        arguments = config_class(
            out, max_steps=2, logging_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="no",
            report_to=[], use_cpu=True, disable_tqdm=True, bf16=False, seed=0, **options,
        )  # fmt: skip
        trainer = trainer_class(model, args=arguments, train_dataset=dataset, processing_class=tokenizer, **extra)
        trainer.train()
        losses.append(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        assert trained and ("peft_config" in extra or any(map(lambda a, b: not a.equal(b), before, trained)))
    return losses


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2"])  # with logits that are scaled, or capped
def test_sft_with_a_chat_template_and_the_loss_of_the_answers_only(tokenizer, family, tmp_path):
    models = pair(family=family)
    found = {}
    for only in (True, False) if family == "llama" else (True,):
        plain, ours = first_losses(
            trl.SFTTrainer, trl.SFTConfig, models, tokenizer, chats(), tmp_path, assistant_only_loss=only, max_length=32
        )
        assert ours == pytest.approx(plain, rel=1e-4)
        found[only] = ours
        models = pair(family=family)
    assert len(set(found.values())) == len(found)


def test_sft_with_a_lora_that_names_no_targets(tokenizer, tmp_path):
    plain, ours = first_losses(
        trl.SFTTrainer, trl.SFTConfig, pair(), tokenizer, chats(), tmp_path, peft_config=LoraConfig(), max_length=32
    )
    assert ours == pytest.approx(plain, rel=1e-4)


def test_dpo_starts_at_log_2_and_trains(tokenizer, tmp_path):
    models = []
    for place, model in enumerate(pair()):
        model.save_pretrained(tmp_path / str(place))
        models.append(type(model).from_pretrained(tmp_path / str(place)))  # TRL loads the reference from there too
    plain, ours = first_losses(trl.DPOTrainer, trl.DPOConfig, models, tokenizer, preferences(), tmp_path)
    assert ours == pytest.approx(plain, rel=1e-4) == pytest.approx(0.6931, abs=1e-3)


def test_a_reward_model_learns_from_preferences(tokenizer, tmp_path):
    models = pair(AutoModelForSequenceClassification, AttnResForSequenceClassification, num_labels=1)
    plain, ours = first_losses(trl.RewardTrainer, trl.RewardConfig, models, tokenizer, preferences(), tmp_path)
    assert ours == pytest.approx(plain, rel=1e-4)


def test_grpo_rewards_what_a_model_that_is_loaded_by_path_generates(tokenizer, tmp_path):
    random_attnres("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    seen = []

    def length(completions, **kwargs):
        seen.extend(completions)
        return [float(len(completion[0]["content"])) for completion in completions]

    arguments = trl.GRPOConfig(
        tmp_path / "out", max_steps=1, per_device_train_batch_size=4, num_generations=4, max_completion_length=5,
        report_to=[], use_cpu=True, disable_tqdm=True, bf16=False, save_strategy="no",
    )  # fmt: skip
    prompts = preferences().select_columns("prompt")
    trainer = trl.GRPOTrainer(
        str(tmp_path / "model"),
        reward_funcs=length,
        args=arguments,
        train_dataset=prompts,
    )
    assert isinstance(trainer.model, AttnResForCausalLM)
    trainer.train()
    assert len(seen) == 4
