"""CMath: the answer that follows an example, and the comparison of answers as numbers."""

# ruff: noqa: RUF001 - answers in Chinese have full-width punctuation.

import re
from fractions import Fraction

# A fraction, a number with separators of thousands, or a plain number.
NUMBER = re.compile(r"-?\d+\s*/\s*\d+|-?\d+(?:[,，]\d{3})+(?:\.\d+)?|-?\d+(?:\.\d+)?")
PHRASE = re.compile(r"答案(?:是|为)[：:]?\s*(.*)")


def target(doc: dict) -> str:
    """Returns the worked solution of an example, or the bare answer of a question."""
    return doc.get("solution") or str(doc["golden"])


def process_results(doc: dict, results: list[str]) -> dict[str, int]:
    """Scores 1 if the number after the last "答案是", or else the last number, equals the known answer."""
    phrases = PHRASE.findall(results[0])
    found = NUMBER.findall(phrases[-1]) if phrases else []
    # After the phrase the first number is the answer; without it, the last one.
    answer = found[0] if found else (NUMBER.findall(results[0]) or [None])[-1]
    expected = NUMBER.findall(str(doc["golden"]))
    return {"exact_match": int(bool(answer and expected) and _value(answer) == _value(expected[-1]))}


def _value(number: str) -> Fraction | None:
    try:
        return Fraction(re.sub(r"[,，\s]", "", number))
    except ZeroDivisionError:
        return None
