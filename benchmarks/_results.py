"""Tables of docs/results/data. A benchmark replaces its table, with the command and the machine that made it."""

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from keifu.devices import processor_name
from keifu.evaluation.intervals import wilson

KEYS = ("section", "command", "machine", "values", "columns")
SUMMARY = "summary only: the values of single seeds, rounds and items were not kept"


def write_table(
    path: Path,
    section: str,
    command: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    values: dict | str = SUMMARY,
) -> None:
    """Write a table to a data file. It replaces the first table of the same section and benchmark, or is appended.

    Cells are those of the page; the machine is this one. values: the raw values by seed, round or item.
    """
    tables = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    machine = f"{os.cpu_count()} cores of {processor_name()}"
    new = {
        "section": section, "command": command, "machine": machine, "values": values,
        "columns": list(columns), "rows": list(rows),
    }  # fmt: skip
    made_so = [(each["section"], each["command"].split()[:2]) for each in tables]
    same = [number for number, made in enumerate(made_so) if made == (section, command.split()[:2])]
    if same:
        tables[same[0]] = new
    else:
        tables.append(new)
    path.write_text(as_text(tables), encoding="utf-8")
    for page in (path.parent.parent / f"{path.stem}{ending}.md" for ending in ("", ".ja")):
        if page.exists():
            page.write_text(renewed(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


def typed(script: str, options: Mapping[str, Any], defaults: Mapping[str, Any], always: Collection[str] = ()) -> str:
    """Return the command with those options that differ from `defaults` or are in `always`."""
    words = [f"python benchmarks/{script}"]
    for name, usual in defaults.items():
        if (value := options[name]) != usual or name in always:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {text}"))
    return " ".join(words)


def renewed(page: str, tables: Sequence[dict]) -> str:
    """Return a page whose marked tables, `<!-- table: SECTION -->`, have the cells of the data file.

    The header and the first cell of each row are not changed, since they are in the page's language.
    """

    def replace(found: re.Match[str]) -> str:
        mark, section, lines = found[1], found[2], found[3].splitlines()
        (rows,) = [each["rows"] for each in tables if each["section"] == section]
        if len(rows) != len(lines) - 2:
            raise SystemExit(f"The page's table {section!r} has {len(lines) - 2} rows, and the data have {len(rows)}.")
        japanese = re.search("[ぁ-んァ-ン一-龥]", page)
        cells = [[cell.replace(" to ", "～").replace(", ", "、") if japanese else cell for cell in row] for row in rows]
        labels = [line[1:].partition("|")[0].strip() for line in lines[2:]]
        new = [f"| {' | '.join([label, *row[1:]])} |" for label, row in zip(labels, cells, strict=True)]
        return mark + "\n".join([*lines[:2], *new]) + "\n"

    return re.sub(r"(?m)(^<!-- table: (.*) -->\n\n)((?:\|.*\n)+)", replace, page)


def share_of(right: int, total: int) -> str:
    """Return a share in percent, with Wilson's 95% interval."""
    low, high = wilson(right, total)
    return f"{right / total:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def print_rows(rows: Iterable[Sequence[str]]) -> None:
    """Print the rows of a table as Markdown, without the line below its head."""
    for row in rows:
        print("| " + " | ".join(row) + " |")


def write_items(path: Path, about: Mapping[str, Any], items: Iterable[Mapping[str, Any]]) -> None:
    """Write facts and items as one JSON object, with a line for each item."""
    head = json.dumps(dict(about), ensure_ascii=False)
    lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in items)
    path.write_text(f'{head[:-1]}, "items": [\n{lines}\n]}}\n', encoding="utf-8")


def as_text(tables: Sequence[dict]) -> str:
    """Return the tables as JSON with a line for each row."""
    return "[\n" + ",\n".join(map(_one, tables)) + "\n]\n"


def _one(table: dict) -> str:
    head = "".join(f"  {json.dumps(key)}: {json.dumps(table[key], ensure_ascii=False)},\n" for key in KEYS)
    rows = ",\n".join(f"   {json.dumps(list(row), ensure_ascii=False)}" for row in table["rows"])
    return f' {{\n{head}  "rows": [\n{rows}\n  ]\n }}'
