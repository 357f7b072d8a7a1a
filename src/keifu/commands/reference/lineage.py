"""`keifu lineage`: the landmarks in order of years, with their new idea and the result here; optionally as an HTML
page."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from keifu import lineage
from keifu.commands.shared import tables
from keifu.errors import unknown
from keifu.files import write_atomic
from keifu.recipes import files

HEADINGS = {
    "en": ("year", "landmark", "came from", "what was new", "result here", "baseline", "published", "repeat it",
           "time of it", "results"),
    "ja": ("年", "ランドマーク", "元のモデル", "新しい点", "keifu での結果", "比べる基準", "論文の結果",
           "再現するコマンド", "かかる時間", "結果の節"),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """The landmarks in order of years: where each came from, what was new, the result here, how to repeat it."""

    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[NAME]")] = None
    """Only this landmark, such as gpt2, with all that is said of it."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """Write one offline page with the arrows and pictures of all."""
    language: Literal["en", "ja"] = "en"
    """Language of the table and the page, English or Japanese."""


def run(options: Options) -> None:
    """Print the table or one landmark's entry. Write the page if it is requested."""
    landmark_of = {landmark.name: landmark for landmark in lineage.landmarks(options.language)}
    year, title, parents, new, result, baseline, published, command, time, section = HEADINGS[options.language]
    if options.output is not None:
        write_atomic(options.output, lineage.page(options.language))
        print(f"The lineage is in {options.output}: open it in a browser.")
    elif options.name is None:
        rows = [
            (str(e.year), e.name, ", ".join(e.parents) or "-", e.new, e.result, e.baseline)
            for e in landmark_of.values()
        ]
        tables.show((year, title, parents, new, result, baseline), rows)
    elif options.name not in landmark_of:
        raise unknown("landmark", options.name, landmark_of)
    else:
        one = landmark_of[options.name]
        facts = (
            (title, f"{one.title} ({one.authors}, {one.year})"), (parents, ", ".join(one.parents) or "-"),
            (new, one.new), (result, one.result), (baseline, one.baseline),
            (published, one.published), (command, one.command), (time, cost_of(one.command)),
            (section, f"{one.section} (docs/results.md)"),
        )  # fmt: skip
        tables.show(("", ""), facts)


def cost_of(command: str) -> str:
    """Return what the recipe of a command says about its time; "-" for a command that trains nothing."""
    words = command.split()
    if words[1] != "train":
        return "-"
    found = re.search(
        r"^Cost: (.*?)(?=^[A-Z]\w+: |\Z)", files.docstring(files.path_of(words[2])), re.DOTALL | re.MULTILINE
    )
    return " ".join(found[1].split()) if found else "-"
