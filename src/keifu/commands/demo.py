"""`keifu demo`: the recipe of that name under a verb of its own; knows nothing of what it does."""

from collections.abc import Callable, Sequence

from keifu.commands.train import parse_recipe


def parse(arguments: Sequence[str]) -> Callable[[], None]:
    """The demonstration, with its options; it takes the place of an earlier one."""
    return parse_recipe("demo", arguments, "keifu demo", replaces=True)
