"""The tables of docs/results/speedrun.md from the results in this folder: python benchmarks/speedrun/table.py

It writes docs/results/data/speedrun.json, and the part of both pages after each mark `<!-- speedrun: TRACK -->`. Runs
of one entry with one seed on one kind of machine are one line.
"""

import json
import re
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from _results import as_text  # noqa: E402 (a file of the folder above)

RESULTS = Path(__file__).parent / "results"
DATA = ROOT / "docs/results/data/speedrun.json"
SECTIONS = {
    "characters": "Characters to nanoGPT's loss", "english": "English to a number of bits per byte",
    "digits": "Digits to a kernel distance",
}  # fmt: skip
COLUMNS = {
    "": ["entry", "seconds to the target", "steps", "held-out value", "machine", "versions"],
    ".ja": ["参加", "目標までの秒", "ステップ", "検証の値", "マシン", "バージョン"],
}
EMPTY = {"": "There is no result yet.", ".ja": "結果はまだありません。"}
MARK = re.compile(r"(?ms)^<!-- speedrun: (\w+) -->\n\n.*?(?=\n## |\Z)")


def read(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the results that reached their target, ordered by what makes a line."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return sorted((each for each in found if each["reached"]), key=line_of)


def line_of(result: dict[str, Any]) -> tuple[str, ...]:
    """Return what the runs of one line have in common."""
    hardware, versions = result["hardware"], result["versions"]
    machine = f"{hardware['cores']} cores of {hardware['processor']}"
    software = f"torch {versions['torch']}, keifu {versions['keifu']}, commit {result['commit']}"
    return result["track"], result["entry"], str(result["seed"]), machine, software, result["command"]


def row(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the cells of one line: the median of its runs, and each of them if there are several."""
    seconds = [each["seconds"] for each in runs]
    among = f" ({', '.join(f'{value:.1f}' for value in seconds)})" if len(runs) > 1 else ""
    _, entry, seed, machine, software, _ = line_of(runs[0])
    values = sorted({f"{each['value']:.3f}" for each in runs})
    steps = sorted({f"{each['steps']:,}" for each in runs})
    cells = [f"{entry}, seed {seed}", f"{median(seconds):.1f}{among}", ", ".join(steps), ", ".join(values)]
    return [*cells, machine, software]


def tables(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a table for each track with results, the fastest line first."""
    made = []
    for track, section in SECTIONS.items():
        lines = [list(runs) for _, runs in groupby((r for r in results if r["track"] == track), line_of)]
        lines.sort(key=lambda runs: median(each["seconds"] for each in runs))
        if lines:
            values = {f"{r['entry']}, {r['date']}": r["seconds"] for runs in lines for r in runs}
            commands = "; ".join(dict.fromkeys(runs[0]["command"] for runs in lines))
            about = {"section": section, "command": commands, "machine": "in each line", "values": values}
            made.append({**about, "columns": COLUMNS[""], "rows": [row(runs) for runs in lines]})
    return made


def fill(page: str, made: Sequence[dict[str, Any]], ending: str = "") -> str:
    """Return a page (ending: "" or ".ja") with its tables."""

    def part(found: re.Match[str]) -> str:
        rows = [each["rows"] for each in made if each["section"] == SECTIONS[found[1]]]
        lines = [COLUMNS[ending], ["---", "---:", "---:", "---:", "---", "---"], *rows[0]] if rows else []
        text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines) or EMPTY[ending]
        return f"<!-- speedrun: {found[1]} -->\n\n{text}\n"

    return MARK.sub(part, page)


def main() -> None:
    """Write the data file and both pages."""
    made = tables(read())
    if made:
        DATA.write_text(as_text(made), encoding="utf-8")
    else:
        DATA.unlink(missing_ok=True)
    for ending in EMPTY:
        path = ROOT / f"docs/results/speedrun{ending}.md"
        path.write_text(fill(path.read_text(encoding="utf-8"), made, ending), encoding="utf-8")


if __name__ == "__main__":
    main()
