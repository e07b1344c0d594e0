"""A text as tokens, read as a stream: memory does not grow with its length."""

import io
from collections.abc import Iterable, Iterator

PIECE = 2**16  # characters that are tokenised at a time


def read_pieces(file: io.TextIOBase, name: str) -> Iterator[str]:
    """A text in pieces that tokenizers of words read as they read the whole: cut between a word and a space.

    Raises:
        ValueError: it is no text in UTF-8.
    """
    rest = ""
    while True:
        try:
            block = file.read(PIECE)
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: not UTF-8 text ({error.reason}); give a text file.") from None
        if "\0" in block:
            raise ValueError(f"{name}: contains NUL characters, so it is not a text file.")
        if not block:
            break
        piece = rest + block
        cut = _boundary(piece)
        rest = piece[cut:]
        yield piece[:cut]
    if rest:
        yield rest


def pieces_of(text: str | Iterable[str]) -> Iterable[str]:
    """A whole text in pieces; parts as they come."""
    return read_pieces(io.StringIO(text, newline=""), "text") if isinstance(text, str) else text


def tokens_of(tokenizer, pieces: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Token ids with their text."""
    for piece in pieces:
        if tokenizer.is_fast:
            encoded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            for id, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
                yield id, piece[start:end] or token_text(tokenizer, id)
        else:
            for id in tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]:
                yield id, token_text(tokenizer, id)


def token_text(tokenizer, id: int) -> str:
    """How the vocabulary writes a token."""
    return f"<{id}>" if tokenizer is None else str(tokenizer.convert_ids_to_tokens(id))


def prefix_of(tokenizer) -> list[int]:
    """Ids that the tokenizer puts before every text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    special = tokenizer("a")["input_ids"]
    starts = range(len(special) - len(plain) + 1)
    return special[: next((start for start in starts if special[start : start + len(plain)] == plain), 0)]


def printable(text: str) -> str:
    """Text on one line for terminals, figures and pages: what does not print becomes its code."""
    return "".join(character if character.isprintable() else code(character) for character in text)


def code(character: str) -> str:
    """How a character is written that cannot be shown."""
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _boundary(piece: str) -> int:
    """Where to cut: before the last space that follows a letter or digit, if there is one near the end."""
    for index in range(len(piece) - 1, max(0, len(piece) - 4096), -1):
        if piece[index].isspace() and piece[index - 1].isalnum():
            return index
    return len(piece)
