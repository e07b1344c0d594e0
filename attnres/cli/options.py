"""Option types and command classes that the sub-commands share."""

import math
from collections.abc import Callable
from itertools import zip_longest

import click


class Parsed(click.ParamType):
    """A type whose values are parsed by a function, which raises ValueError with the rule and the value."""

    def __init__(self, name: str, parse: Callable[[str], object]):
        self.name = name
        self._parse = parse

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Several(click.Option):
    """An option that takes one or more values: `--results A B`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, multiple=True, **kwargs)


class Maybe(click.Option):
    """An option whose value can be omitted."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, is_flag=False, **kwargs)


class Command(click.Command):
    """A command that parses `Several` options, refuses the name of an option as a value, and registers AttnRes models.

    The models are registered, which imports torch, when the command runs but not for `--help`.
    """

    def parse_args(self, ctx, args):
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        names = {name for each in options for name in each.opts}
        several = {name for each in options if isinstance(each, Several) for name in each.opts}
        need = {name for each in options if not (each.is_flag or isinstance(each, Maybe)) for name in each.opts}
        result, option = [], None
        for word, following in zip_longest(args, args[1:]):
            if word in need and (following is None or following in names):
                raise click.BadOptionUsage(word, f"Option {word!r} requires an argument.", ctx)
            if word in several:  # rewrites `--results A B` to `--results A --results B`, which click can parse
                option = word
            elif option is not None and not word.startswith("-"):
                result += [option, word]
            else:
                result, option = [*result, word], None
        return super().parse_args(ctx, result)

    def invoke(self, ctx):
        from .. import registration  # noqa: F401

        return super().invoke(ctx)


def whole(value: str, least: int, most: int | None, rule: str) -> int:
    """Parses a whole number from `least` to `most`.

    Raises:
        ValueError: the value breaks the rule, which the message quotes.
    """
    try:
        number = int(value)
    except ValueError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        raise ValueError(f"must be {rule}, got {value}")
    return number


def at_least(least: int) -> Parsed:
    """Returns the type of whole numbers with a lower bound."""
    return Parsed("integer", lambda value: whole(value, least, None, f"a whole number of at least {least}"))


def _numbers(value: str) -> tuple[int, ...]:
    rule = "whole numbers of at least 1, joined by commas"
    return tuple(dict.fromkeys(whole(each, 1, None, rule) for each in value.split(",")))


def _limit(value: str) -> int | float:
    try:
        limit = float(value)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf or (limit > 1 and not limit.is_integer()):
        raise ValueError(f"must be a whole number of items, or a share between 0 and 1, got {value}")
    return int(limit) if limit >= 1 else limit


SEED = Parsed("integer", lambda value: whole(value, 0, 2**32 - 1, "a whole number from 0 to 2**32 - 1"))
NAMES = Parsed("names", lambda value: tuple(dict.fromkeys(value.split(","))))
NUMBERS = Parsed("integers", _numbers)
LIMIT = Parsed("limit", _limit)
DTYPE = click.Choice(["auto", "float32", "bfloat16", "float16"])
BATCH_SIZE = Parsed(
    "batch size",
    lambda value: value if value == "auto" else whole(value, 1, None, "a whole number of at least 1, or auto"),
)


def exclusive(*names: str):
    """Checks that at most one of several options of the running command is given.

    Raises:
        click.UsageError: two are given.
    """
    context = click.get_current_context()
    given = [name for name in names if context.params.get(name) is not None]
    if len(given) > 1:
        flags = [f"--{name.replace('_', '-')}" for name in given]
        raise click.UsageError(f"{' and '.join(flags)} exclude each other; leave one out.", context)
