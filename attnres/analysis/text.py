"""Reads a text as a stream of tokens, in memory that does not grow with its length."""

import io
from collections.abc import Iterable, Iterator

PIECE = 2**16  # characters tokenised at a time


def read_pieces(file: io.TextIOBase, name: str) -> Iterator[str]:
    """Yields a text in pieces, cut at ends of lines where possible so that most tokens are those of the whole text."""
    try:
        while piece := file.read(PIECE) + file.readline(PIECE):
            if "\0" in piece:
                raise ValueError(f"{name}: contains NUL characters, so it is not a text file.")
            yield piece
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text ({error.reason}); give a text file.") from None


def tokens_of(tokenizer, text: str | Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yields the ids of the tokens of a text, or of its pieces, and the characters that each token stands for."""
    pieces = read_pieces(io.StringIO(text, newline=""), "text") if isinstance(text, str) else text
    for piece in pieces:
        encoded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
        spans = encoded["offset_mapping"] if tokenizer.is_fast else [(0, 0)] * len(encoded["input_ids"])
        for id, (start, end) in zip(encoded["input_ids"], spans, strict=True):
            yield id, piece[start:end] or str(tokenizer.convert_ids_to_tokens(id))


def prefix_of(tokenizer) -> list[int]:
    """Returns the ids that the tokenizer puts before every text, such as a beginning-of-sequence token."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    special = tokenizer("a")["input_ids"]
    starts = range(len(special) - len(plain) + 1)
    return special[: next((start for start in starts if special[start : start + len(plain)] == plain), 0)]


def printable(text: str) -> str:
    """Returns the text on one line, with escape codes in place of characters that cannot be printed."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
