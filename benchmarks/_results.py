"""Tables of docs/results/data: a benchmark replaces its own, with the command that made it and the machine."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from keifu.devices import processor_name

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
    """Puts a table into a data file, in place of the first one of that section and command's benchmark, or at its end.

    Cells are as the page has them; the machine is this one. values: the raw values by seed, round or item.
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


def as_text(tables: Sequence[dict]) -> str:
    """JSON with a line for each row."""
    return "[\n" + ",\n".join(map(_one, tables)) + "\n]\n"


def _one(table: dict) -> str:
    head = "".join(f"  {json.dumps(key)}: {json.dumps(table[key], ensure_ascii=False)},\n" for key in KEYS)
    rows = ",\n".join(f"   {json.dumps(list(row), ensure_ascii=False)}" for row in table["rows"])
    return f' {{\n{head}  "rows": [\n{rows}\n  ]\n }}'
