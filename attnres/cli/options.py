"""Option types and the command class that the sub-commands share."""

import math
from itertools import pairwise

import click


class Command(click.Command):
    """A command that takes several values after one option, refuses the name of an option as a value, and registers
    AttnRes models.

    The models are registered, which imports torch, when the command runs but not for `--help`.
    """

    def parse_args(self, ctx, args):
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        several = {name for each in options if each.multiple for name in each.opts}
        words, option = [], None
        for before, word in pairwise([None, *args]):  # `--results A B` becomes `--results A --results B`
            if word.startswith("-"):
                option = word if word in several else None
            elif option is not None and before != option:
                words.append(option)
            words.append(word)
        rest = super().parse_args(ctx, words)
        names = {name for each in options for name in each.opts}
        for each in options:
            value = ctx.params.get(each.name)
            if names.intersection(value if each.multiple else [value]):
                raise click.BadOptionUsage(each.opts[0], f"Option {each.opts[0]!r} requires an argument.", ctx)
        return rest

    def invoke(self, ctx):
        from .. import registration  # noqa: F401

        return super().invoke(ctx)


def names(value: str) -> tuple[str, ...]:
    """Reads names that are joined by commas."""
    return tuple(dict.fromkeys(value.split(",")))


def numbers(value: str) -> tuple[int, ...]:
    """Reads whole numbers that are joined by commas."""
    try:
        found = [int(each) for each in value.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise click.BadParameter(f"must be whole numbers of at least 1, joined by commas, got {value}")
    return tuple(found)


def limit(value: str) -> int | float:
    """Reads a number of items, or a share of them."""
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf or (found > 1 and not found.is_integer()):
        raise click.BadParameter(f"must be a whole number of items, or a share between 0 and 1, got {value}")
    return int(found) if found >= 1 else found


def batch_size(value: str | int) -> str | int:
    """Reads a number of sequences, or `auto`."""
    if value == "auto" or (str(value).isdecimal() and int(value) > 0):
        return value if value == "auto" else int(value)
    raise click.BadParameter(f"must be a whole number of at least 1, or auto, got {value}")


SEED = click.IntRange(0, 2**32 - 1)
AT_LEAST_1 = click.IntRange(1)
dtype = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="dtype of the weights; auto: as in the checkpoint",
)
device = click.option("--device", metavar="NAME", help="device, such as cpu or cuda:1 (default: a GPU if there is one)")
