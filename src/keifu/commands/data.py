"""`keifu data`: lists, fetches and checks training data; knows no data set by name."""

import json
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from keifu.commands import flags, tables
from keifu.errors import UserError


@dataclass(frozen=True)
class Options:
    """List the catalogue; get an entry of it into the cache; check a text before training on it."""

    action: Annotated[
        tyro.conf.Positional[Literal["list", "get", "check"]],
        tyro.conf.arg(help="What to do; check reports encoding errors, duplicates and lengths."),
    ] = "list"
    name: Annotated[
        tyro.conf.Positional[str | None],
        tyro.conf.arg(metavar="[NAME]", help="A catalogue name; check also takes a file or a folder of text."),
    ] = None
    tokenizer: str = "gpt2-bpe"
    """What check counts tokens with: a catalogue name, or a tokenizer's file or folder."""
    field: str = "text"
    """Where a record of .jsonl or .parquet has its text."""
    json: bool = False
    """Print the report of check as JSON."""


def run(options: Options) -> None:
    """Does one of the three."""
    if options.action == "list":
        _list()
    elif options.name is None:
        raise UserError(f"keifu data {options.action} needs a name: keifu data list shows those of the catalogue.")
    elif options.action == "get":
        from keifu.data.catalogue import fetch

        print(fetch(options.name))
    else:
        _check(options.name, options)


def _list() -> None:
    from keifu.data.catalogue import rows

    plain = ("name", "kind", "download", "fetched", "about")
    cells = [[*(row[column] for column in plain), f"{row['licence']}; {row['attribution']}"] for row in rows()]
    tables.show((*plain, "licence; whom to name"), cells)


def _check(source: str, options: Options) -> None:
    from keifu.data.catalogue import CATALOGUE, fetch
    from keifu.data.preflight import check
    from keifu.data.tokenizers import load_tokenizer

    place = fetch(options.tokenizer) if options.tokenizer in CATALOGUE else options.tokenizer
    report = check(source, load_tokenizer(place), options.field)
    print(json.dumps(report.to_json(), ensure_ascii=False, indent=2) if options.json else report)


parse = flags.parser(Options, run, "keifu data")
