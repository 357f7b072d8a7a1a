"""Tables of docs/results/data. A benchmark replaces its table, with the command and the machine that made it."""

import argparse
import json
import re
import shlex
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _rounds import spread

from keifu.devices import processor_name
from keifu.evaluation.intervals import wilson

KEYS = ("section", "command", "machine", "values", "columns")


def write_table(
    path: Path,
    section: str,
    command: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    values: dict[str, Any],
) -> None:
    """Write a table to a data file. It replaces the first table of the same section and benchmark, or is appended.

    Cells are those of the page; the machine is this one. values: the raw values by seed, round or item.
    """
    tables = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    threads = torch.get_num_threads()
    machine = f"{threads} thread{'s' * (threads > 1)} of {processor_name()}"
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


def publish(
    path: Path | None, section: str, command: str, columns: Sequence[str], rows: Sequence[Sequence[str]], values: Any
) -> None:
    """Print a table as Markdown, and write it to a data file if there is a path (see `write_table`)."""
    print_rows([columns, *rows])
    if path:
        write_table(path, section, command, columns, rows, values)


def saved(folder: Path | None, name: str, compute: Callable[[], Any]) -> Any:
    """Return a result that an earlier run has saved in the folder, or compute and save it. None: only compute."""
    path = folder / f"{name}.json" if folder else None
    if path is not None and path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    result = compute()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result), encoding="utf-8")
    return result


def typed(script: str, options: Mapping[str, Any], defaults: Mapping[str, Any], always: Collection[str] = ()) -> str:
    """Return the command with those options that differ from `defaults` or are in `always`."""
    words = [f"python benchmarks/{script}"]
    for name, usual in defaults.items():
        if (value := options[name]) != usual or name in always:
            text = shlex.join(map(str, value if isinstance(value, list) else [value]))
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {text}"))
    return " ".join(words)


def usual(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return the defaults of all options that change figures."""
    return {
        name: value
        for name, value in vars(parser.parse_args([])).items()
        if name not in ("write", "json", "picture", "out")
    }


def renewed(page: str, tables: Sequence[dict]) -> str:
    """Return a page whose marked tables, `<!-- table: SECTION -->`, have the cells of the data file.

    If a section has tables of several benchmarks, the mark is `<!-- table: SECTION: SCRIPT.py -->`.
    The header and the first cell of each row are not changed, since they are in the page's language.
    """

    def replace(found: re.Match[str]) -> str:
        mark, section, lines = found[1], found[2], found[3].splitlines()
        (rows,) = [each["rows"] for each in tables if section in _marks(each)]
        if len(rows) != len(lines) - 2:
            raise SystemExit(f"The page's table {section!r} has {len(lines) - 2} rows, and the data have {len(rows)}.")
        japanese = re.search("[ぁ-んァ-ン一-龥]", page)
        cells = [[cell.replace(" to ", "～").replace(", ", "、") if japanese else cell for cell in row] for row in rows]
        labels = [line[1:].partition("|")[0].strip() for line in lines[2:]]
        new = [f"| {' | '.join([label, *row[1:]])} |" for label, row in zip(labels, cells, strict=True)]
        return mark + "\n".join([*lines[:2], *new]) + "\n"

    return re.sub(r"(?m)(^<!-- table: (.*) -->\n\n)((?:\|.*\n)+)", replace, page)


def _marks(table: Mapping[str, Any]) -> tuple[str, str]:
    section, command = table["section"], table["command"]
    return section, f"{section}: {Path(command.split()[1]).name}"


def write_timing(path: Path | None, section: str, command: str, columns: Sequence[str], values: dict) -> None:
    """Print the table of timed rounds as Markdown, and write it to a data file if there is a path."""
    rows = timing_rows(values)
    print_rows([columns, ["---", *["---:"] * (len(columns) - 1)], *rows])
    if path:
        write_table(path, section, command, columns, rows, values)


def timing_rows(values: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of a table of timed rounds: one for each contender, or for each task if "a row" is "task".

    values["tasks"] has by name the "seconds" of each contender in each round (of `_rounds.interleaved`) and the
    "amount" of units in one run. values["against"] has by contender those that it is compared with, perhaps itself.
    A cell has the median of the units a second, or of the milliseconds a unit if "in" is "ms". Behind it are the
    ratios to the others in the same round (median, lowest and highest), then the share of a "peak" a second that the
    "work" of a run reaches, then the contender's other cells ("more"). The parts stand in columns of their own if the
    row has no others. "shown" names the contenders that have cells.
    """
    tasks = values["tasks"]
    names = values.get("shown") or list(dict.fromkeys(name for task in tasks.values() for name in task["seconds"]))
    if values.get("a row") == "task":
        found = {name: [_parts(values, task, each) for each in names] for name, task in tasks.items()}
    else:
        found = {each: [_parts(values, task, each) for task in tasks.values()] for each in names}
    return [[name, *(cells[0] if len(cells) == 1 else map("; ".join, cells))] for name, cells in found.items()]


def _parts(values: Mapping[str, Any], task: Mapping[str, Any], name: str) -> list[str]:
    """Return the median of a contender, its ratios, its share of the peak and its other cells."""
    if name not in task["seconds"]:
        return []
    figures = {each: _figures(values, task["amount"], seconds) for each, seconds in task["seconds"].items()}
    middle = statistics.median(figures[name])
    found = [f"{middle:,.{3 if middle < 0.1 else 2 if middle < 10 else 1 if middle < 100 else 0}f}"]
    for other in (each for each in values["against"].get(name, ()) if each in figures):
        ratios = [a / b for a, b in zip(figures[name], figures[other], strict=True)]
        found.append("1.00" if other == name else spanned(ratios))
    if "peak" in task:
        found.append(f"{task['work'] / statistics.median(task['seconds'][name]) / task['peak']:.0%}")
    return [*found, *task.get("more", {}).get(name, ())]


def _figures(values: Mapping[str, Any], amount: float, seconds: Sequence[float]) -> list[float]:
    return [1000 * each / amount if values.get("in") == "ms" else amount / each for each in seconds]


def spanned(values: Sequence[float], form: str = ".2f") -> str:
    """Return the median, with the lowest and the highest in brackets."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def of_seeds(
    found: Mapping[str, Sequence[Sequence[float]]], form: str = ".3f", before: Mapping[str, Sequence[str]] | None = None
) -> tuple[list[list[str]], dict]:
    """Return rows of means with the lowest and the highest seed, and the values to keep with the table.

    found: for each row the values of the seeds, for each column. before: cells between the first one and these.
    """
    kept = {name: [[round(value, 5) for value in seeds] for seeds in cells] for name, cells in found.items()}
    rows = [
        [name, *(before or {}).get(name, ()), *(spread(seeds, form) for seeds in cells)] for name, cells in kept.items()
    ]
    return rows, {"seeds": kept, "form": form}


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
