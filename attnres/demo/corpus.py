"""The demo's corpus: Python's standard library, split by file, tokenised and packed.

Shapes: N sequences, T tokens per sequence.
"""

import hashlib
import json
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..messages import say
from .settings import Settings

# Tests, generated tables, fixtures and bundled third-party code are not text that a person wrote to be read.
SKIPPED = re.compile(
    "__pycache__|config-.*|dist-packages|encodings|ensurepip|idlelib|lib2to3|pydoc_data|site-packages|_sysconfigdata.*"
    "|tests?|turtledemo"
)
HELD_OUT_PERCENT = 8
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Document:
    """A source file: its path below the root, with forward slashes, and its text."""

    name: str
    text: str

    @property
    def num_bytes(self) -> int:
        """Returns the length of the text in UTF-8."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Corpus:
    """Source files to train on and held-out source files; no file and no text is in both."""

    train: list[Document]
    held_out: list[Document]


def standard_library() -> Path:
    """Returns the folder of this interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_corpus(root: Path) -> Corpus:
    """Reads all Python sources below `root`; their order and split depend only on their relative paths."""
    texts: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(SKIPPED.fullmatch(part) for part in parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            texts.setdefault(text, "/".join(parts))
    corpus = Corpus(train=[], held_out=[])
    for text, name in sorted(texts.items(), key=lambda item: _digest(item[1])):
        # The split uses other bytes than the order: otherwise all held-out files would be at one end.
        is_held_out = int.from_bytes(_digest(name)[-4:], "big") % 100 < HELD_OUT_PERCENT
        (corpus.held_out if is_held_out else corpus.train).append(Document(name, text))
    if not corpus.train or not corpus.held_out:
        raise OSError(f"{root}: too few Python sources ({len(texts)} files); the demo trains on the standard library")
    return corpus


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def train_tokenizer(documents: list[Document], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer; `vocab_size` includes the 256 bytes and the end-of-text token."""
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


def pack(
    documents: list[Document], tokenizer: PreTrainedTokenizerBase, num_sequences: int, length: int
) -> torch.Tensor:
    """Joins documents, each after an end-of-text token, and cuts them into sequences `[N, T]`."""
    needed, ids = num_sequences * length, []
    for document in documents:
        # The end-of-text token comes first because lm-eval puts it before each text that it scores.
        ids += [tokenizer.eos_token_id, *tokenizer.encode(document.text)]
        if len(ids) >= needed:
            return torch.tensor(ids[:needed]).view(num_sequences, length)
    raise OSError(f"the corpus has {len(ids)} tokens, but {needed} are needed")


def limit_documents(documents: list[Document], document_bytes: int, total_bytes: int) -> list[Document]:
    """Returns the first documents up to `total_bytes`, each cut to `document_bytes` so that no file dominates."""
    chosen, total = [], 0
    for document in documents:
        cut = Document(document.name, document.text.encode()[:document_bytes].decode(errors="ignore"))
        total += cut.num_bytes
        if chosen and total > total_bytes:
            break
        chosen.append(cut)
    return chosen


def prepare_data(settings: Settings, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> dict:
    """Reads and packs the corpus, and writes the held-out documents to `held-out.jsonl` in `folder`.

    Without a tokenizer, one is trained on the corpus.

    Returns:
        `corpus` (file and byte counts), `tokenizer`, `train` `[steps * batch_size, T]` in the order of training,
        `held_out` `[held_out_sequences, T]`, `evaluated` (the held-out documents) and `documents` (path of their file).
    """
    root = standard_library()
    corpus = read_corpus(root)
    chosen = limit_documents(corpus.held_out, settings.document_bytes, settings.held_out_bytes)
    parts = {"train": corpus.train, "held_out": corpus.held_out, "evaluated": chosen}
    counts = {f"{part}_files": len(documents) for part, documents in parts.items()}
    counts |= {f"{part}_bytes": sum(each.num_bytes for each in documents) for part, documents in parts.items()}
    say(
        f"corpus: {root}: {counts['train_files']} files ({counts['train_bytes'] / 1e6:.1f} MB) to train on, "
        f"{counts['held_out_files']} held-out files, {len(chosen)} of them evaluated"
    )
    if tokenizer is None:
        tokenizer = train_tokenizer(corpus.train, settings.vocab_size, settings.sequence_length)
    train = pack(corpus.train, tokenizer, settings.steps * settings.batch_size, settings.sequence_length)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(settings.seed))
    documents = folder / "held-out.jsonl"
    documents.write_text(
        "".join(json.dumps({"name": each.name, "text": each.text}) + "\n" for each in chosen), encoding="utf-8"
    )
    return {
        "corpus": counts,
        "tokenizer": tokenizer,
        "train": train[order],
        "held_out": pack(chosen, tokenizer, settings.held_out_sequences, settings.sequence_length),
        "evaluated": chosen,
        "documents": documents,
    }
