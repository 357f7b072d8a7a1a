"""`keifu demo`: the recipe of that name as a command."""

from collections.abc import Callable, Sequence

from keifu.commands.train import parse_recipe


def parse(arguments: Sequence[str]) -> Callable[[], None]:
    """Return the demonstration, with its options; it takes the place of an earlier one."""
    return parse_recipe("demo", arguments, "keifu demo", replaces=True)
