"""The reference of commands, recipes, models and the catalogue: what the program itself says, at a mark in a page."""

import io
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from importlib import import_module

from keifu.checkpoints.registry import INDEX
from keifu.cli import parse
from keifu.commands.shared.command_names import COMMANDS
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models.registration import row
from keifu.recipes.files import recipes

WIDTH = 100  # columns


def help_of(*words: str) -> str:
    """Return the help text of a command or recipe, 100 columns wide."""
    os.environ["COLUMNS"] = str(WIDTH)
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            parse([*words, "--help"])()
    except SystemExit:
        pass
    return aligned(text.getvalue().strip())


def aligned(text: str) -> str:
    """Return a text whose lines of two cells (a name, a tab, its description) are columns within the width."""
    lines = [line.partition("\t") for line in text.splitlines()]
    indent = " " * (2 + max((len(name) for name, tab, _ in lines if tab), default=0))
    return "\n".join(
        textwrap.fill(rest, WIDTH, initial_indent=name.ljust(len(indent)), subsequent_indent=indent) if tab else name
        for name, tab, rest in lines
    )


def catalogue() -> str:
    """Return the entries of `keifu data list` as a table, without the column about this computer."""
    text = io.StringIO()
    with redirect_stdout(text):
        parse(["data", "list"])()
    rows = [line.split("\t") for line in text.getvalue().strip().splitlines()]
    cells = [[name, *rest[:2], *rest[3:]] for name, *rest in rows if len(rest) > 3]
    lines = [f"| {' | '.join(row)} |" for row in [cells[0], ["---"] * len(cells[0]), *cells[1:]]]
    return "\n".join(lines)


def sections(commands: Iterable[list[str]]) -> str:
    """Return a heading for each command, and its help text below it."""
    return "\n\n".join(f"## {words[-1]}\n\n```{{.text .help}}\n{help_of(*words)}\n```" for words in commands)


def is_language_model(name: str) -> bool:
    """Return whether a model's file builds a decoder of tokens."""
    return import_module(f"keifu.models.{name}").build.__annotations__.get("return") is DecoderLM


def language_models(heads: Iterable[str]) -> str:
    """Return a table of the language models from their rows: names in config.json and GGUF, and what computes them.

    heads: of the columns. A layer's name in a cell says what is refused.
    """
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|---|---|"]
    for name in filter(is_language_model, INDEX):
        model = row(name)
        title = re.split(r" \(|:", import_module(f"keifu.models.{name}").__doc__ or name)[0]
        cells = [f"[{title.removeprefix('The text model of ')}](../../src/keifu/models/{name.replace('.', '/')}.py)"]
        cells += [code(INDEX[name].model_types[:-1]), code(model.gguf)]
        cells += [f"- (`{model.refused[part]}`)" if part in model.refused else "✓" for part in ("native", "tensor")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def code(names: Iterable[str]) -> str:
    """Return names as code, with commas between them, or a dash if there are none."""
    return ", ".join(f"`{name}`" for name in names) or "-"


def other_models() -> str:
    """Return the model_types of published models that are no language models."""
    types = [kind for name in INDEX if not is_language_model(name) for kind in INDEX[name].model_types[:-1]]
    return code(kind for kind in types if kind[0].islower() and kind != "open_clip")


MARKS: Mapping[str, Callable[[], str]] = {
    "catalogue": catalogue,
    "verbs": lambda: sections([verb] for verb in COMMANDS),
    "recipes": lambda: sections(["train", name] for name in recipes()),
    "language models": lambda: language_models(
        ("model", "`model_type`", "GGUF", "[native step](../native.md)", "[`--mesh.tensor`](../cluster.md)")
    ),
    "言語モデル": lambda: language_models(
        (
            "モデル", "`model_type`", "GGUF", "[ネイティブの計算](../native.ja.md)",
            "[`--mesh.tensor`](../cluster.ja.md)",
        )
    ),
    "other models": other_models,
}  # fmt: skip


def fill(page: str) -> str:
    """Return the page with each mark, such as `<!-- verbs -->`, replaced by what the program says."""
    for mark, text in MARKS.items():
        if f"<!-- {mark} -->" in page:
            page = page.replace(f"<!-- {mark} -->", text())
    return page
