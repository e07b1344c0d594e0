"""The demo's corpus: Python's standard library, split by file, tokenised and packed.

Shapes: N sequences, T tokens per sequence.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

# Tests, generated tables, bundled third-party code and fixtures: not text that a person wrote to be read.
SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
HELD_OUT_PERCENT = 8
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Document:
    """One source file: its path below the root, with forward slashes, and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Source files, those to train on and those held out; no file and no text is in both."""

    train: list[Document]
    held_out: list[Document]

    def describe(self) -> dict[str, int]:
        """Number of files and of UTF-8 bytes in either part."""
        return {
            f"{part}_{unit}": count
            for part, documents in (("train", self.train), ("held_out", self.held_out))
            for unit, count in (("files", len(documents)), ("bytes", _num_bytes(documents)))
        }


def standard_library() -> Path:
    """The folder of this interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_corpus(root: Path) -> Corpus:
    """All Python sources below `root` in an order and a split that depend on nothing but their relative paths.

    Raises:
        OSError: there are not both training and held-out files below `root`.
    """
    documents, seen = [], set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.intersection(parts) or any(part.startswith(SKIPPED_PREFIXES) for part in parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and text not in seen:
            seen.add(text)
            documents.append(Document("/".join(parts), text))
    documents.sort(key=lambda document: _digest(document.name))
    corpus = Corpus(
        train=[document for document in documents if not _is_held_out(document.name)],
        held_out=[document for document in documents if _is_held_out(document.name)],
    )
    if not corpus.train or not corpus.held_out:
        raise OSError(
            f"too few Python sources in {root}: {len(documents)} files. The demo trains on the standard library."
        )
    return corpus


def train_tokenizer(documents: list[Document], vocab_size: int, max_length: int):
    """A byte-level BPE tokenizer trained on `documents`, with an end-of-text token, as transformers loads it.

    Args:
        vocab_size: entries, the 256 bytes and the end-of-text token included.
        max_length: tokens that the model takes, written into the tokenizer's configuration.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=max_length
    )


def pack(documents: list[Document], tokenizer, num_sequences: int, length: int) -> torch.Tensor:
    """Documents one after the other, each opened by the end-of-text token, cut into sequences `[N, T]`.

    Raises:
        OSError: the documents have fewer than N * T tokens.
    """
    needed, ids = num_sequences * length, []
    for document in documents:
        # An end of text opens a document because that is what lm-eval puts before a text that it scores.
        ids += [tokenizer.eos_token_id, *tokenizer.encode(document.text)]
        if len(ids) >= needed:
            return torch.tensor(ids[:needed]).view(num_sequences, length)
    raise OSError(f"the corpus has {len(ids)} tokens, {needed} are needed")


def limit_documents(documents: list[Document], document_bytes: int, total_bytes: int) -> list[Document]:
    """The first documents up to `total_bytes`, each cut to `document_bytes` so that no single file dominates."""
    chosen, total = [], 0
    for document in documents:
        text = document.text.encode()[:document_bytes].decode(errors="ignore")
        total += len(text.encode())
        if chosen and total > total_bytes:
            break
        chosen.append(Document(document.name, text))
    return chosen


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _is_held_out(name: str) -> bool:
    # Not the bytes that order the documents: the held-out part would be sorted to one end.
    return int.from_bytes(_digest(name)[-4:], "big") % 100 < HELD_OUT_PERCENT


def _num_bytes(documents: list[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)
