"""Packs documents into sequences of equal length.

Documents are joined, with an end-of-text token after each, and cut every T tokens, as transformers' run_clm does.
Positions do not start over at a document, and attention reaches across documents.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import torch
from datasets.packaged_modules.text.text import Text
from huggingface_hub.utils.sha import sha_fileobj
from transformers import PreTrainedTokenizerBase

from ..messages import one_line

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # by file name; other files are text
PIECE = 1_000_000  # characters per call of a tokenizer, which needs many times as much memory


@dataclass(frozen=True)
class Source:
    """Documents in files, folders or data sets on the hub; configuration and split do not apply to files."""

    names: tuple[str, ...]
    config: str | None
    split: str
    text_field: str


def sequences(source: Source, tokenizer: PreTrainedTokenizerBase, length: int) -> datasets.Dataset:
    """Returns all sequences of a source as rows of `length` `input_ids`, stored in the cache of `datasets`."""
    tokens = datasets.concatenate_datasets(
        [_tokens(_load(name, source, streaming=False), name, tokenizer) for name in source.names]
    )
    packed = tokens.map(
        _Packer(length),
        batched=True,
        batch_size=100,
        remove_columns=tokens.column_names,
        features=tokens.features,
        new_fingerprint=_digest(tokens._fingerprint, str(length)),
        desc="pack",
    )
    if len(packed) == 0:
        count = sum(len(row) for row in tokens["input_ids"])
        raise ValueError(
            f"{', '.join(source.names)}: {count} tokens are too few for one sequence of {length}; give more text or "
            "lower --sequence-length"
        )
    return packed


class Stream(torch.utils.data.IterableDataset):
    """Sequences of a source, read while training; an endless stream starts over at the end of the data."""

    def __init__(self, source: Source, tokenizer: PreTrainedTokenizerBase, length: int, endless: bool):
        self.source, self.length, self.endless = source, length, endless
        self.parts = [_tokens(_load(name, source, streaming=True), name, tokenizer) for name in source.names]

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        packer = _Packer(self.length)
        while True:
            is_empty = True
            for part in self.parts:
                for row in part:
                    is_empty = False
                    for sequence in packer({"input_ids": [row["input_ids"]]})["input_ids"]:
                        yield {"input_ids": sequence}
            if is_empty and self.endless and torch.utils.data.get_worker_info() is None:
                raise ValueError(f"{', '.join(self.source.names)}: there is no text")
            if is_empty or not self.endless:  # a data loader may have more workers than there are files
                return


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Returns a batch of `input_ids` and equal `labels`, both int64 `[B, T]`."""
    ids = torch.tensor([row["input_ids"] for row in rows], dtype=torch.long)
    return {"input_ids": ids, "labels": ids.clone()}


def digest(source: Source) -> str:
    """Returns a digest that identifies documents: files by their content, data on the hub by their revision."""
    parts = []
    for name in source.names:
        if Path(name).is_file():
            parts.append(_file_digest(Path(name)))
        else:
            builder = datasets.load_dataset_builder(name, source.config)
            files = (builder.config.data_files or {}).get(source.split, [])
            parts += [_file_digest(Path(file)) if Path(file).is_file() else str(file) for file in files]
            parts.append(source.split)
    return _digest(source.text_field, *parts)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a digest that identifies a tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = str(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return _digest(content, str(tokenizer.eos_token_id), str(tokenizer.bos_token_id))


def _load(name: str, source: Source, streaming: bool):
    """Returns a data set with the single column `text`; a text file is one document."""
    path = Path(name)
    suffix = Path(re.sub(r"\.(gz|zst|xz|bz2)$", "", name)).suffix.lower()
    # Asking the hub for a file that does not exist would take minutes without a network.
    names_a_file = name.startswith((".", "/", "~")) or name.count("/") > 1 or suffix in (".txt", ".md", *FORMATS)
    if not path.exists() and names_a_file:
        raise ValueError(f"{name}: no such file or folder")
    if path.is_file() and (source.config is not None or source.split != "train"):
        raise ValueError(f"{name}: a file has no configurations and splits; leave out --data-config and splits")
    try:
        place = {"path": name, "name": source.config}
        if path.is_file():
            place = {"path": FORMATS.get(suffix, "text"), "data_files": [name]}
        if isinstance(datasets.load_dataset_builder(**place), Text):
            place["sample_by"] = "document"
        found = datasets.load_dataset(**place, split=source.split, streaming=streaming)
        columns = found.column_names or list(next(iter(found), {}))
    except Exception as error:
        cause = (isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__) or error
        reason = one_line(cause) if str(cause) else "it is empty"
        raise ValueError(f"{name}: cannot be read ({reason})") from error
    if source.text_field not in columns:
        raise ValueError(
            f"{name}: has no column {source.text_field!r}, only {', '.join(columns)}; name the column with the text "
            "with --text-field"
        )
    found = found.select_columns([source.text_field])
    return found if source.text_field == "text" else found.rename_column(source.text_field, "text")


def _tokens(documents, name: str, tokenizer: PreTrainedTokenizerBase):
    features = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))})
    options = {"batched": True, "batch_size": 100, "remove_columns": ["text"], "features": features}
    if isinstance(documents, datasets.Dataset):
        options["new_fingerprint"] = _digest(documents._fingerprint, tokenizer_digest(tokenizer))
        options["desc"] = "tokenize"
    return documents.map(partial(_tokenize, name=name, tokenizer=tokenizer), **options)


def _tokenize(batch: dict[str, list[str]], name: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    """Tokenizes documents with the special tokens of the tokenizer, and an end-of-text token if they have none."""
    for text in batch["text"]:
        if not isinstance(text, str):
            raise ValueError(f"{name}: a text is {text!r}; --text-field must name a column of strings, without gaps")
    pieces = [list(_pieces(text)) for text in batch["text"] if text]
    options = {"return_attention_mask": False, "verbose": False}
    # A fast tokenizer distributes the texts of a call over the cores.
    rows = tokenizer([first for first, *_ in pieces], **options)["input_ids"] if pieces else []
    for row, (_, *rest) in zip(rows, pieces, strict=True):
        if rest:
            for ids in tokenizer(rest, add_special_tokens=False, **options)["input_ids"]:
                row += ids
        if not row or row[-1] != tokenizer.eos_token_id:
            row.append(tokenizer.eos_token_id)
    return {"input_ids": rows}


def _pieces(text: str) -> Iterator[str]:
    """Cuts a text into pieces for the tokenizer, after line breaks where possible."""
    begin = 0
    while len(text) - begin > PIECE:
        end = text.rfind("\n", begin, begin + PIECE) + 1
        end = end if end > begin else begin + PIECE
        yield text[begin:end]
        begin = end
    yield text[begin:]


class _Packer:
    """Joins rows of tokens and cuts them every `length` tokens; the remainder is kept for the next rows."""

    def __init__(self, length: int):
        self.length = length
        self.rest: list[int] = []

    def __call__(self, batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        for row in batch["input_ids"]:
            self.rest += row
        whole = len(self.rest) - len(self.rest) % self.length
        packed = [self.rest[begin : begin + self.length] for begin in range(0, whole, self.length)]
        self.rest = self.rest[whole:]
        return {"input_ids": packed}


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return sha_fileobj(file).hex()
