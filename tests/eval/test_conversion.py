"""A conversion is judged by sameness: every item, not the score."""

import json

import pytest
import torch
from families import tiny_config
from tiny_eval import byte_tokenizer
from transformers import AutoModelForCausalLM

from attnres import AttnResForCausalLM
from attnres.eval import evaluate
from attnres.eval.compare import compare

ROWS = ("arc_challenge", "gsm8k")


def answers(folder, row):
    items = [json.loads(line) for line in (folder / row / "samples.jsonl").read_text().splitlines()]
    return {(item["task"], item["doc_id"], item["filter"]): item for item in items}


def test_a_converted_model_answers_every_item_as_the_plain_one(mirror_root, tmp_path):
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    plain = AutoModelForCausalLM.from_config(
        tiny_config("llama", vocab_size=257, max_position_embeddings=900, num_hidden_layers=5, **ends)
    )
    folders = tmp_path / "plain", tmp_path / "converted"
    plain.save_pretrained(folders[0])
    AttnResForCausalLM.from_backbone(folders[0], layers_per_block=2).save_pretrained(folders[1])
    for folder in folders:
        byte_tokenizer(eos_token="<end>").save_pretrained(folder)
        evaluate(
            str(folder), ",".join(ROWS), out=folder / "results", data_dir=mirror_root, dtype="float32", limit=3,
            progress=False,
        )  # fmt: skip
    results = [folder / "results" for folder in folders]
    for row in compare(*results, equivalence=50).rows:
        assert (row.wins, row.losses, row.first - row.second) == (0, 0, 0)
    for row in ROWS:
        before, after = (answers(folder, row) for folder in results)
        assert before.keys() == after.keys()
        for key, item in before.items():
            assert item["metrics"] == after[key]["metrics"]
            if row == "gsm8k":
                assert item["resps"] == after[key]["resps"]
            else:
                scores, others = ([value for ((value, _),) in each["resps"]] for each in (item, after[key]))
                assert scores == pytest.approx(others, rel=1e-5)
