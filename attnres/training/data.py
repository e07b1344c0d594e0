"""Packs documents into sequences of equal length.

Documents are joined with an end-of-text token after each and cut every T tokens, wherever that falls: the plain
concatenation of transformers' own run_clm. Positions do not start over, and attention reaches across documents.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    import datasets

# How files are read, by what their names end in; others are text.
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")

PIECE = 1_000_000  # characters that a tokenizer is given at once: what it needs is many times that


@dataclass(frozen=True)
class Source:
    """Documents.

    Attributes:
        names: files, folders, hub ids.
        config, split: of folders and hub ids.
        text_field: column with the text.
    """

    names: tuple[str, ...]
    config: str | None
    split: str
    text_field: str


def sequences(source: Source, tokenizer: PreTrainedTokenizerBase, length: int) -> "datasets.Dataset":
    """All sequences of a source, on disk in the cache of `datasets`: rows of `length` `input_ids`.

    Raises:
        ValueError: data are missing, have another form, or make no sequence.
    """
    import datasets

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
            f"{', '.join(source.names)}: {count} tokens are too few for one sequence of {length}; give more "
            "text or lower --sequence-length"
        )
    return packed


class Stream(torch.utils.data.IterableDataset):
    """Sequences of a source, read while training.

    Args:
        endless: begin again where the data end.
    """

    def __init__(self, source: Source, tokenizer: PreTrainedTokenizerBase, length: int, endless: bool):
        self.source, self.length, self.endless = source, length, endless
        self.parts = [_tokens(_load(name, source, streaming=True), name, tokenizer) for name in source.names]

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        packer = _Packer(self.length)
        while True:
            found = 0
            for part in self.parts:
                for row in part:
                    found += len(row["input_ids"])
                    for sequence in packer({"input_ids": [row["input_ids"]]})["input_ids"]:
                        yield {"input_ids": sequence}
            if found == 0 and self.endless and torch.utils.data.get_worker_info() is None:
                raise ValueError(f"{', '.join(self.source.names)}: no text")
            if found == 0 or not self.endless:  # of several workers of a data loader one may have no file to read
                return


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows to a batch `[B, T]`; every token is a label."""
    ids = torch.tensor([row["input_ids"] for row in rows], dtype=torch.long)
    return {"input_ids": ids, "labels": ids.clone()}


def digest(source: Source) -> str:
    """What tells these documents from others: files by content, hub data by revision."""
    from datasets import load_dataset_builder

    parts = []
    for name in source.names:
        if Path(name).is_file():
            parts.append(_file_digest(Path(name)))
        else:
            builder = load_dataset_builder(name, source.config)
            files = (builder.config.data_files or {}).get(source.split, [])
            parts += [_file_digest(Path(file)) if Path(file).is_file() else str(file) for file in files]
            parts.append(source.split)
    return _digest(source.text_field, *parts)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells a tokenizer from others."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = str(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return _digest(content, str(tokenizer.eos_token_id), str(tokenizer.bos_token_id))


def _load(name: str, source: Source, streaming: bool):
    """One data set, with one column `text`. A text file is one document."""
    import datasets
    from datasets.packaged_modules.text.text import Text

    path = Path(name)
    if not path.exists() and _names_a_file(name):
        raise ValueError(f"{name}: no such file or folder")
    if path.is_file() and (source.config is not None or source.split != "train"):
        raise ValueError(f"{name} is a file, without configurations and splits: leave out --data-config and splits")
    try:
        if path.is_file():
            kind = FORMATS.get(_suffix(name), "text")
            options = {"sample_by": "document"} if kind == "text" else {}
            found = datasets.load_dataset(kind, data_files=[name], split="train", streaming=streaming, **options)
        else:
            builder = datasets.load_dataset_builder(name, source.config)
            options = {"sample_by": "document"} if isinstance(builder, Text) else {}
            found = datasets.load_dataset(name, source.config, split=source.split, streaming=streaming, **options)
        columns = found.column_names or list(next(iter(found), {}))
    except Exception as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        reason = " ".join(str(cause or error).split())[:200] or "it is empty"
        raise ValueError(f"{name}: cannot be read ({reason})") from error
    if source.text_field not in columns:
        raise ValueError(
            f"{name}: has no column {source.text_field!r} but {', '.join(columns)}; name the one with the text by "
            "--text-field"
        )
    found = found.select_columns([source.text_field])
    return found if source.text_field == "text" else found.rename_column(source.text_field, "text")


def _names_a_file(name: str) -> bool:
    """Rather than a data set on the hub, which would be asked for over the network, for minutes where there is none."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or _suffix(name) in (".txt", ".md", *FORMATS)


def _suffix(name: str) -> str:
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return Path(name).suffix.lower()


def _tokens(documents, name: str, tokenizer: PreTrainedTokenizerBase):
    import datasets

    features = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))})
    options = {"batched": True, "batch_size": 100, "remove_columns": ["text"], "features": features}
    if isinstance(documents, datasets.Dataset):
        options["new_fingerprint"] = _digest(documents._fingerprint, tokenizer_digest(tokenizer))
        options["desc"] = "tokenize"
    return documents.map(partial(_tokenize, name=name, tokenizer=tokenizer), **options)


def _tokenize(batch: dict[str, list[str]], name: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    """Each document with the tokens that its tokenizer puts around, and an end-of-text token if that puts none."""
    for text in batch["text"]:
        if not isinstance(text, str):
            raise ValueError(f"{name}: a text is {text!r}; --text-field must name a column of strings, without gaps")
    pieces = [list(_pieces(text)) for text in batch["text"] if text]
    rows = _ids(tokenizer, [first for first, *_ in pieces], add_special_tokens=True)
    others = iter(_ids(tokenizer, [piece for _, *rest in pieces for piece in rest], add_special_tokens=False))
    for row, (_, *rest) in zip(rows, pieces, strict=True):
        for _ in rest:
            row += next(others)
        if not row or row[-1] != tokenizer.eos_token_id:
            row.append(tokenizer.eos_token_id)
    return {"input_ids": rows}


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], **options) -> list[list[int]]:
    """All at once, which fast tokenizers share out to the processor's cores."""
    return tokenizer(texts, return_attention_mask=False, verbose=False, **options)["input_ids"] if texts else []


def _pieces(text: str) -> Iterator[str]:
    """A text cut after line breaks, into pieces that a tokenizer can hold."""
    begin = 0
    while len(text) - begin > PIECE:
        end = text.rfind("\n", begin, begin + PIECE) + 1
        end = end if end > begin else begin + PIECE
        yield text[begin:end]
        begin = end
    yield text[begin:]


class _Packer:
    """Joins rows of tokens and cuts them every `length`; what is left over waits for the next rows."""

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
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
