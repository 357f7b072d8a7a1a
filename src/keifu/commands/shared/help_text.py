"""Text of `--help`: usage, a description of the command, and a line for each argument and option."""

import re
import shutil
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tyro

WIDEST = 100  # maximal number of columns, for readability
LEFT = 30  # columns for an option and its value; a longer one gets a separate line
PARTS = "optional subcommands"  # tyro's name for the group of nested options whose default is None
VALUES = {"STR": "TEXT", "FLOAT|INT": "FLOAT", "INT|FLOAT": "FLOAT"}
SAYS_NOTHING = ("None", "''", "", "False", "()", "True")  # defaults that need no display


@dataclass(frozen=True)
class Argument:
    """Argument or option: its names (none if it is positional), its value, and its help text."""

    names: tuple[str, ...]
    value: str
    help: str
    group: str

    @property
    def spelled(self) -> str:
        """Left column of the help: `-o, --out PATH`. A switch whose default is on is `--[no-]flip`."""
        return f"{', '.join(self.names)} {self.value}".strip() if self.names else self.value


def arguments_of(cls: type) -> list[Argument]:
    """Return the arguments of the dataclass `cls`, positional ones first, in the order of their groups.

    Nested options whose default is None are grouped under tyro's word for them, such as
    model.rope-scaling:rope-scaling.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tyro 1 deprecates the only way
        parser: Any = tyro.extras.get_parser(cls, prog="keifu", console_outputs=False)
    grouped = [(str(group.title), action) for group in parser._action_groups for action in group._group_actions]
    parts = [part for title, action in grouped if title == PARTS for part in action.choices.items()]
    grouped = [pair for pair in grouped if pair[0] != PARTS]
    grouped += [
        (word, action) for word, part in parts for action in part._actions if "--help" not in action.option_strings
    ]
    return [_argument(title, action) for title, action in grouped]


def _argument(title: str, action: Any) -> Argument:
    if "--help" in action.option_strings:
        return Argument(("-h", "--help"), "", "Show this help.", title)
    text = re.sub(r"\s+", " ", str(action.help or "")).strip()
    match = re.search(r"\s*\((default|repeatable|required)(?:: (.*))?\)$", text)
    text = text[: match.start()] if match else text
    text = _sentence(text)
    metavar = str(action.metavar or "")
    choices = tuple(one for one in re.findall(r"[^][,{}| ]+", metavar) if one != "None") if action.choices else ()
    if not action.option_strings and metavar in ("STR", "INT", "FLOAT", "PATH"):
        metavar = action.dest.rpartition(".")[2].upper()
    value, listed = _value(metavar, choices)
    if not action.option_strings and listed:
        word = action.dest.rpartition(".")[2].upper()
        value = f"[{word}]" if metavar.startswith("[") else word
    text = f"{text} One of {listed}." if listed else text
    names = tuple(action.option_strings)
    default = (match[2] or "") if match and match[1] == "default" else ""
    if action.metavar is None and len(names) > 1:  # a switch and its negation
        positive = [name for name in names if not name.rpartition(".")[2].removeprefix("--").startswith("no-")]
        names = tuple(positive) if default != "True" else (re.sub(r"(--|\.)(?=[^.]*$)", r"\1[no-]", positive[-1]),)
    if default not in SAYS_NOTHING:
        text = f"{text} (default: {default})"
    elif default == "True":
        text = f"{text} (default: yes)"
    elif match and match[1] == "repeatable":
        text = f"{text} May be given several times."
    return Argument(names, value, text.strip(), title)


def _sentence(text: str) -> str:
    """End the text with a full stop. Capitalise its first letter unless it begins with a name, as in `bpe, unigram or
    ...`."""
    text = f"{text}." if re.search(r"[^.?!]$", text) else text
    return text if re.match(r"\S*[:,'._-]", text) else f"{text[:1].upper()}{text[1:]}"


def _value(metavar: str, choices: Sequence[str]) -> tuple[str, str]:
    """Return the value for the left column, and the list of choices if it is too long for that column."""
    if choices:
        value_text = "|".join(choices)
        value_text = f"[{value_text}]" if metavar.startswith("[") else value_text
        return (value_text, "") if len(value_text) <= 22 else ("NAME", ", ".join(choices))
    value_text = re.sub(r"\{None\}\|?|\|?\{None\}", "", metavar)
    value_text = VALUES.get(value_text, value_text)
    value_text = re.sub(r"\bSTR\b", "TEXT", value_text).strip("{}")
    return re.sub(r"\[(\w+(?: \w+)*) \[\1 \.\.\.\]\]", r"\1 ...", value_text), ""


def help_text(arguments: Sequence[Argument], program: str, about: str, width: int | None = None) -> str:
    """Return the whole help text in lines of at most `width` columns. None: the terminal's width, at most `WIDEST`."""
    width = width or min(WIDEST, shutil.get_terminal_size().columns)
    positional = [argument.value for argument in arguments if not argument.names]
    usage = f"Usage: {' '.join([program, '[OPTIONS]', *positional])}"
    column = min(LEFT, max(len(argument.spelled) for argument in arguments) + 2)
    lines = [usage, "", *_paragraphs(about, width)]
    for group in dict.fromkeys(argument.group for argument in arguments):
        title = {"positional arguments": "Arguments"}.get(group, re.sub(":.*", " options", group))
        lines += ["", f"{title[:1].upper()}{title[1:]}:"]
        for argument in arguments:
            if argument.group == group:
                lines += _entry(argument, column, width)
    return "\n".join(lines)


def _paragraphs(text: str, width: int) -> Iterator[str]:
    for number, paragraph in enumerate(re.split(r"\n\s*\n", text.strip())):
        yield from [""] if number else []
        yield from textwrap.wrap(re.sub(r"\s+", " ", paragraph), width, break_on_hyphens=False)


def _entry(argument: Argument, column: int, width: int) -> list[str]:
    spelled = argument.spelled
    text = textwrap.wrap(argument.help, max(20, width - column - 2), break_on_hyphens=False) or [""]
    if len(spelled) + 2 > column:
        return [f"  {spelled}", *(f"  {'':{column}}{line}" for line in text)]
    first, *further_lines = text
    return [f"  {spelled:{column}}{first}".rstrip(), *(f"  {'':{column}}{line}" for line in further_lines)]
