"""Answers of the arithmetic items, computed rather than written down."""

import ast
import operator
import re
from fractions import Fraction

_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def evaluate(expression: str) -> Fraction:
    """Exact value of an expression of numbers, + - * / and parentheses."""

    def value(node) -> Fraction:
        if isinstance(node, ast.BinOp):
            return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
        return Fraction(ast.get_source_segment(expression, node))  # from the text: 0.1 is a tenth

    return value(ast.parse(expression, mode="eval").body)


def number(value: Fraction) -> str:
    """A whole number without a point, another one as a decimal without trailing zeros."""
    if value.denominator == 1:
        return str(value.numerator)
    text = repr(float(value))
    if Fraction(text) != value:
        raise ValueError(f"{value} is no short decimal number")
    return text


def with_annotations(text: str) -> tuple[str, str]:
    """GSM8K's way of writing: "{9*4}" becomes "9*4=<<9*4=36>>36". Also returns the last value."""
    last = ""

    def annotated(match: re.Match) -> str:
        nonlocal last
        last = number(evaluate(match[1]))
        return f"{match[1]}=<<{match[1]}={last}>>{last}"

    text = re.sub(r"\{([^}]*)\}", annotated, text)
    return text, last


def operators(expression: str) -> int:
    return sum(isinstance(node, ast.BinOp) for node in ast.walk(ast.parse(expression)))


def digits(expression: str) -> int:
    """Most digits of a number in the expression or of its value."""
    found = [*re.findall(r"[\d.]+", expression), number(evaluate(expression))]
    return max(sum(letter.isdigit() for letter in text) for text in found)
