"""`keifu demo`: runs the recipe `demo` as a command."""

from collections.abc import Callable, Sequence

from keifu.commands.train import parse_recipe


def parse(arguments: Sequence[str]) -> Callable[[], None]:
    """Parse the options of the demonstration. It replaces an earlier run of it."""
    return parse_recipe("demo", arguments, "keifu demo", replaces=True)
