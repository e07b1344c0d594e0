"""What the evaluation's tests share: a mirror of three rows, a tiny checkpoint, and a model that knows the answers."""

import json

import torch
from lm_eval.api.model import LM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONFIGS = {
    "openai/gsm8k": ("main", ("train", "test")),
    "allenai/ai2_arc": ("ARC-Challenge", ("train", "validation", "test")),
    "Idavidrein/gpqa": ("gpqa_diamond", ("train",)),
}


def gsm8k_item(number: int) -> dict:
    return {
        "question": f"Ann has {number} pears and buys 3. How many pears has she?",
        "answer": f"She has {number}+3={number + 3}.\n#### {number + 3}",
    }


def arc_item(number: int) -> dict:
    words = ["zero", "one", "two", "three"]
    return {
        "id": f"arc-{number}",
        "question": f"Which word is number {number % 4}, in question {number}?",
        "choices": {"text": words, "label": ["A", "B", "C", "D"]},
        "answerKey": "ABCD"[number % 4],
    }


def gpqa_item(number: int) -> dict:
    wrong = {f"Incorrect Answer {index}": f"{number + index} metres" for index in (1, 2, 3)}
    return {"Question": f"How long is rod {number}?", "Correct Answer": f"{number} metres", **wrong}


ITEMS = {"openai/gsm8k": gsm8k_item, "allenai/ai2_arc": arc_item, "Idavidrein/gpqa": gpqa_item}


def write_data_set(root, repository: str, config: str, splits: dict[str, list[dict]]):
    """A data set in the layout of a mirror."""
    folder = root / repository
    folder.mkdir(parents=True)
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split, items in splits.items():
        lines += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
        (folder / config).mkdir(exist_ok=True)
        text = "".join(json.dumps(item) + "\n" for item in items)
        (folder / config / f"{split}.jsonl").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def byte_tokenizer(**special) -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special.values(), *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tiny_llama(length: int = 3000, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=length,
            bos_token_id=None,
            eos_token_id=0,
        )
    )


class Scripted(LM):
    """Answers every request as told, knowing its item.

    Args:
        choose: the log-likelihood of a choice, given (item, the choice's index, whether it is right).
        write: the text generated for an item.
        identity: hashes, so that results can be reused.
    """

    def __init__(self, choose=None, write=None, identity=None):
        super().__init__()
        self.choose = choose or (lambda doc, index, right: float(right))
        self.write = write or (lambda doc: doc["answer"])
        self.requests = []
        if identity:
            self.identity = {"weights": identity}

    def loglikelihood(self, requests):
        self.requests += requests
        return [(self.choose(request.doc, request.idx, self._right(request)), False) for request in requests]

    def generate_until(self, requests):
        self.requests += requests
        return [self.write(request.doc) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    @staticmethod
    def _right(request) -> bool:
        choice = request.args[1].strip()
        doc = request.doc
        if "answerKey" in doc:
            return doc["choices"]["text"].index(choice) == doc["choices"]["label"].index(doc["answerKey"])
        return choice == doc["answer"]
