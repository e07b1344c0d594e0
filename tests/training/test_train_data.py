"""Tests that sequences hold every token of the documents once, in order, with an end of text after each document."""

import gzip
import json

import datasets
import pytest
import torch
from tiny_train import byte_tokenizer, words, write_lines
from torch.utils.data import DataLoader

from attnres.training import data
from attnres.training.data import Source, Stream, collate, digest, sequences

TEXTS = [words(3, 1), words(40, 2), "", words(9, 3)]


def source(*paths, config=None, split="train", text_field="text"):
    return Source(tuple(map(str, paths)), config, split, text_field)


def joined(texts, tokenizer):
    """Returns the tokens of all texts, with an end-of-text token after each."""
    return [token for text in texts if text for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]


def flat(rows):
    return [token for row in rows for token in row["input_ids"]]


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def write_parquet(path, texts):
    datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
    return path


def write_gzip(path, texts):
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    return path


WRITERS = {"jsonl": write_lines, "parquet": write_parquet, "jsonl.gz": write_gzip}


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("length", [7, 16])
def test_sequences_are_the_documents_joined_and_cut(tmp_path, tokenizer, ending, length):
    path = WRITERS[ending](tmp_path / f"documents.{ending}", TEXTS)
    rows = sequences(source(path), tokenizer, length)
    expected = joined(TEXTS, tokenizer)
    assert {len(row["input_ids"]) for row in rows} == {length}
    assert flat(rows) == expected[: len(expected) // length * length]


def test_a_text_file_is_one_document_with_its_line_breaks(tmp_path, tokenizer):
    texts = ["one\n\ntwo\n", "drei"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    rows = sequences(source(tmp_path / "0.txt", tmp_path / "1.txt"), tokenizer, 5)
    assert flat(rows) == joined(texts, tokenizer)[:15]


def test_files_of_several_kinds_are_joined_in_their_order(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    lines = write_lines(tmp_path / "b.jsonl", TEXTS[1:2], field="body")
    rows = sequences(source(lines, text_field="body"), tokenizer, 8)
    both = sequences(source(tmp_path / "a.txt", write_lines(tmp_path / "c.jsonl", TEXTS[1:])), tokenizer, 8)
    expected = joined(TEXTS, tokenizer)
    assert flat(rows) == joined(TEXTS[1:2], tokenizer)[: len(rows) * 8]
    assert flat(both) == expected[: len(both) * 8]


def test_many_batches_lose_nothing(tmp_path, tokenizer):
    texts = [words(2 + number % 7, number) for number in range(257)]
    rows = sequences(source(write_lines(tmp_path / "many.jsonl", texts)), tokenizer, 13)
    expected = joined(texts, tokenizer)
    assert flat(rows) == expected[: len(expected) // 13 * 13]


def test_a_long_text_is_cut_for_the_tokenizer_after_line_breaks(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 10)
    text = "short\nlines\nof a text\nand one that is far longer than a piece\n\nend"
    assert "".join(data._pieces(text)) == text
    assert list(data._pieces(text))[:2] == ["short\n", "lines\n"]
    (tmp_path / "long.txt").write_text(text)
    expected = joined([text], tokenizer)
    assert flat(sequences(source(tmp_path / "long.txt"), tokenizer, 4)) == expected[: len(expected) // 4 * 4]


@pytest.fixture
def repository(tmp_path):
    """A data set with two configurations and two splits, in the layout of the hub."""
    for config in ("small", "large"):
        (tmp_path / config).mkdir()
        for split in ("train", "validation"):
            write_lines(tmp_path / config / f"{split}.jsonl", [f"{config} {split} " * 4])
    lines = ["---", "configs:"]
    for config in ("small", "large"):
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [f"  - split: {split}\n    path: {config}/{split}.jsonl" for split in ("train", "validation")]
    (tmp_path / "README.md").write_text("\n".join([*lines, "---", ""]))
    return tmp_path


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_data_set_is_read_by_its_configuration_and_split(repository, tokenizer, split):
    chosen = source(repository, config="large", split=split)
    expected = joined([f"large {split} " * 4], tokenizer)
    assert flat(sequences(chosen, tokenizer, 6)) == expected[: len(expected) // 6 * 6]
    assert flat(Stream(chosen, tokenizer, 6, endless=False)) == expected[: len(expected) // 6 * 6]


def test_a_stream_gives_the_same_sequences_and_begins_again_where_the_data_end(tmp_path, tokenizer):
    path = write_lines(tmp_path / "documents.jsonl", TEXTS)
    expected = joined(TEXTS, tokenizer)
    once = Stream(source(path), tokenizer, 16, endless=False)
    for _ in range(2):  # every evaluation sees the same data
        assert flat(once) == flat(sequences(source(path), tokenizer, 16))
    endless = iter(Stream(source(path), tokenizer, 16, endless=True))
    several = flat(next(endless) for _ in range(3 * len(expected) // 16))
    assert several == (expected * 3)[: len(several)]


def test_workers_of_a_data_loader_divide_the_files_of_a_stream(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [words(8, 1)])
    rows = flat(sequences(source(path), tokenizer, 16))
    once = Stream(source(path), tokenizer, 16, endless=False)
    loader = DataLoader(once, batch_size=1, num_workers=2, collate_fn=collate)
    assert [token for batch in loader for token in batch["input_ids"].flatten().tolist()] == rows
    endless = iter(DataLoader(Stream(source(path), tokenizer, 16, endless=True), num_workers=2, collate_fn=collate))
    assert [token for _ in range(2) for token in next(endless)["input_ids"].flatten().tolist()] == rows[:32]


def test_every_token_is_a_label():
    batch = collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 0]}])
    assert torch.equal(batch["input_ids"], torch.tensor([[5, 6, 7], [8, 9, 0]]))
    assert torch.equal(batch["labels"], batch["input_ids"]) and batch["labels"] is not batch["input_ids"]


def test_a_beginning_of_text_comes_once_per_document(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 4)
    tokenizer = byte_tokenizer()
    usual = tokenizer.__class__.__call__

    def call(self, texts, add_special_tokens=True, **options):
        return {"input_ids": [[1] * add_special_tokens + row for row in usual(self, texts, **options)["input_ids"]]}

    monkeypatch.setattr(tokenizer.__class__, "__call__", call)
    rows = data._tokenize({"text": ["ab\ncd\nef", "gh"]}, "some", tokenizer)["input_ids"]
    assert [row.count(1) for row in rows] == [1, 1] and [row[0] for row in rows] == [1, 1]
    assert [row.count(0) for row in rows] == [1, 1] and [row[-1] for row in rows] == [0, 0]


def test_a_digest_is_that_of_the_content(tmp_path):
    first, second = (write_lines(tmp_path / name, TEXTS) for name in ("a.jsonl", "b.jsonl"))
    assert digest(source(first)) == digest(source(second))
    write_lines(second, TEXTS[:-1])
    assert digest(source(first)) != digest(source(second))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_digest_of_a_data_set_is_that_of_its_split(repository, split):
    before = digest(source(repository, config="large", split=split))
    write_lines(repository / "large" / "train.jsonl", ["changed"])
    assert (digest(source(repository, config="large", split=split)) == before) == (split == "validation")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.jsonl",
            '{"body": "x"}\n',
            "has no column 'text', only body; name the column with the text",
        ),
        ("a.jsonl", '{"text": 3}\n', "a text is 3; --text-field must name a column of strings"),
        ("a.jsonl", '{"text": "x"}\n{"text": null}\n', "a text is None"),
        ("a.jsonl", '{"text": \n', "cannot be read"),
        ("a.jsonl", "", "cannot be read (it is empty)"),
        ("a.parquet", "no parquet", "cannot be read"),
        ("a.txt", "abc", "4 tokens are too few for one sequence of 16; give more text or lower --sequence-length"),
        ("a.txt", b"\xff\xfe\xff", "cannot be read ('utf-8' codec"),
    ],
)
def test_data_that_cannot_be_used_are_named(tmp_path, tokenizer, name, content, said):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as raised:
        sequences(source(path), tokenizer, 16)
    assert str(path) in str(raised.value) and said in str(raised.value)


@pytest.mark.parametrize("name", ["nowhere.txt", "nowhere.jsonl.gz", "./nowhere", "a/b/nowhere", "/nowhere"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(name, tokenizer, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset_builder", None)
    with pytest.raises(ValueError, match=f"{name}: no such file or folder"):
        sequences(Source((name,), None, "train", "text"), tokenizer, 8)


def test_an_endless_stream_without_text_ends(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(ValueError, match="there is no text"):
        next(iter(Stream(source(path), tokenizer, 16, endless=True)))
