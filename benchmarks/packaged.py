"""Tables of docs/results/packaged.md: figures of the packaged models with their 95% intervals.

python benchmarks/packaged.py

The tables come from docs/results/data/NAME.json, which `python pretrained/make.py NAME --card` writes with the values
of each item. The pages keep their first columns.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _results import write_table

ROOT = Path(__file__).parent.parent
DATA = ROOT / "docs" / "results" / "data"
COMMAND = "python pretrained/make.py NAME --card"
COLUMNS = ("model and test; compared with", "figure", "95% interval", "compared with", "95% interval")
HELD_OUT = " of held-out captions"
FIRST = "own caption first of 24"
MODELS = {  # for each model its test, and the names of its figure and of the compared one in the files
    "neuron": ("its 4 inputs", "accuracy", ""),
    "network": ("held-out digits read", "accuracy", ""),
    "ja-en": ("BLEU of held-out pairs; pairs without a near copy in training", "BLEU", "without"),
    "en-ja": ("BLEU of held-out pairs; pairs without a near copy in training", "BLEU", "without"),
    "digits": ("drawings read as the digit asked for; real digits", "asked class seen", "network: accuracy"),
    "emoji": (
        "names of new families, recognised by `emoji-clip`; their real pictures",
        f"{FIRST}{HELD_OUT}", f"{FIRST} of real pictures{HELD_OUT}",
    ),
    "emoji-clip": (
        "English names found for emoji of new families; counting colours and words",
        "en captions R@1", "en captions R@1 by counting",
    ),
    "bert-en": ("hidden tokens filled in; neighbours looked up", "masked words right", "masked words looked up"),
    "see": (
        "questions of easy-VQA's test part; the commonest answer to each question",
        "accuracy", "commonest answer to each question",
    ),
    "gpt-en": ("bits per byte of held-out English", "bits per byte", ""),
    "chat-en": ("bits per byte of SmolLM2's held-out answers; `gpt-en`", "chat-en", "gpt-en"),
}  # fmt: skip


def stored(name: str) -> Any:
    """Return the figures and tables of a model: as its evaluation wrote them, or else as its card has them."""
    path = DATA / f"{name}.json"
    if not path.exists():
        path = ROOT / "pretrained" / "src" / "keifu_pretrained" / name / "card.json"
    return json.loads(path.read_text(encoding="utf-8"))


def conversations() -> dict[str, list[str]]:
    """Return the cells of the table of held-out conversations by model."""
    (table,) = [each for each in stored("packaged") if each["section"] == "Held-out conversations"]
    return {name: cells for name, *cells in table["rows"]}


def percent(interval: str, items: int = 0) -> str:
    """Return an interval of shares in percent. items: as in `exact`."""
    low, high = (100 * exact(float(end), items) for end in interval.split(" to "))
    return f"{low:.1f} to {high:.1f}%"


def exact(share: float, items: int) -> float:
    """Return the share of a number of items that the file rounds to four digits: 5 of 73 are 6.849%, not 6.85%."""
    return round(share * items) / items if items else share


def cells(figures: Mapping[str, Any], name: str) -> list[str]:
    """Return a figure and its interval: bits and BLEU as they are, shares in percent."""
    interval = figures.get(f"{name}, 95% interval", "")
    if name == "BLEU" or "bits" in name:
        return [f"{figures[name]:.{2 if name == 'BLEU' else 4}f}", interval]
    items = figures["pictures"] if "R@1" in name else 0
    return [f"{exact(figures[name], items):.1%}", percent(interval, items) if interval else ""]


def near_copies(name: str) -> dict[str, list[str]]:
    """Return count, BLEU and chrF with intervals of all pairs of a translator, with a near copy, and without one."""
    found = stored(name)
    figures = found["figures"]
    every = [figures[key] for key in ("pairs", "BLEU", "BLEU, 95% interval", "chrF", "chrF, 95% interval")]
    parts = {row["near copy"]: [*row.values()][1:] for row in found["tables"]["near copies in the training part"]}
    return {
        key: [f"{count:,}", f"{bleu:.2f}", bleu_interval, f"{chrf:.2f}", chrf_interval]
        for key, (count, bleu, bleu_interval, chrf, chrf_interval) in ({"all": every} | parts).items()
    }


def compared(name: str, other: str) -> list[str]:
    """Return the cells that a model's figure is compared with."""
    if not other:
        return ["", ""]
    if other == "without":
        return near_copies(name)[other][1:3]
    if ": " in other:
        name, other = other.split(": ")
    return cells(stored(name)["figures"], other)


def models() -> list[list[str]]:
    """Return a row for each model."""
    rows = []
    for name, (test, figure, other) in MODELS.items():
        if name == "chat-en":
            both = [*conversations()[figure], *conversations()[other]]
        else:
            both = [*cells(stored(name)["figures"], figure), *compared(name, other)]
        rows.append([f"`{name}`, {test}", *both])
    return rows


def translators() -> list[list[str]]:
    """Return three rows for each translator."""
    parts = {"all": "all", "without": "without a near copy", "with": "with a near copy"}
    found = {name: near_copies(name) for name in ("ja-en", "en-ja")}
    return [[f"{name}, {label}", *found[name][part]] for name in found for part, label in parts.items()]


def masked_words() -> list[list[str]]:
    """Return a row for all hidden tokens and one for each class of them."""
    found = stored("bert-en")
    figures = found["figures"]
    right, looked_up = cells(figures, "masked words right"), cells(figures, "masked words looked up")
    rows = [["all hidden by [MASK]", f"{figures['masked words']:,}", *right, looked_up[0]]]
    for row in found["tables"]["by class"]:
        shares = f"{row['right']:.1%}", percent(row["95% interval"]), f"{row['looked up']:.1%}"
        rows.append([row["tokens"], f"{row['count']:,}", *shares])
    return rows


def emoji_clip() -> list[list[str]]:
    """Return a row for each language and direction."""
    figures, rows = stored("emoji-clip")["figures"], []
    for language in ("en", "ja", "zh"):
        for asked, label in (("captions", "name by picture"), ("pictures", "picture by name")):
            key = f"{language} {asked} R@1"
            above = percent(figures[f"{key} above counting, 95% interval"], figures["pictures"]).removesuffix("%")
            rows.append([f"{language}, {label}", *cells(figures, key), *cells(figures, f"{key} by counting"), above])
    return rows


TABLES = (
    ("Models and their figures", COLUMNS, models),
    (
        "Translators",
        ("pairs of the test", "count", "BLEU", "95% interval", "chrF", "95% interval"), translators,
    ),
    (
        "Masked words",
        ("tokens", "count", "right", "95% interval", "neighbours looked up"), masked_words,
    ),
    (
        "Emoji and their names",
        (
            "73 emoji of new families, R@1", "emoji-clip", "95% interval", "counting", "95% interval",
            "points above counting, 95% interval",
        ), emoji_clip,
    ),
)  # fmt: skip


def main() -> None:
    files = [f"{name}.json" for name in MODELS if (DATA / f"{name}.json").exists()]
    for section, columns, rows in TABLES:
        write_table(DATA / "packaged.json", section, COMMAND, columns, rows(), {"files": files})


if __name__ == "__main__":
    main()
