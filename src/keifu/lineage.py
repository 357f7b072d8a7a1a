"""The lineage: the landmarks in order of years, where each came from, what was new and what it bought; as one page.

What is said of them stands in docs/lineage/lineage.json, their pictures in docs/pictures: of a checkout, or as packed
into a wheel. A test holds the figures equal to those of docs/results.
"""

import base64
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from keifu.errors import UserError
from keifu.files import read_json

DOCS = Path(__file__).parent / "docs", Path(__file__).parents[2] / "docs"  # of a wheel, of a checkout
WIDTH, HEIGHT, ACROSS, DOWN = 212, 30, 226, 46  # of a box in the drawing, and from one box to the next


@dataclass(frozen=True)
class Landmark:
    """A landmark. name: of its page and model. parents: names of those it came from. lane: its column in the drawing.
    bought: what it bought here, from the section of docs/results. published: the paper's figure."""

    name: str
    year: int
    title: str
    authors: str
    lane: int
    parents: tuple[str, ...]
    new: str
    picture: str
    section: str
    bought: str
    command: str
    published: str


def docs() -> Path:
    """Return the folder of the pages and their pictures; a `UserError` where there is none."""
    found = next((folder for folder in DOCS if (folder / "lineage/lineage.json").is_file()), None)
    if found is None:
        raise UserError("The pages of the lineage are not installed: install keifu from a wheel, or run a checkout.")
    return found


def landmarks() -> list[Landmark]:
    """All of them, the oldest first."""
    rows: list[dict[str, Any]] = read_json(docs() / "lineage/lineage.json")
    return [
        Landmark(parents=tuple(row["from"]), **{key: row[key] for key in Landmark.__dataclass_fields__ if key in row})
        for row in rows
    ]


def page() -> str:
    """Return the offline page: a drawing of who came from whom, then a part for each landmark with its picture."""
    found = landmarks()
    body = "<h1>keifu <span lang='ja'>系譜</span>: the lineage</h1>\n" + drawing(found) + "\n".join(map(_part, found))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>The lineage</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{style()}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


HEAD = (
    '<marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
    '<path d="M0 0 8 4 0 8z"/></marker>'
)
STYLE = """
svg { max-width: 100%; height: auto; } svg rect { fill: var(--page); stroke: currentColor; }
svg text { fill: currentColor; font-size: 13px; } svg path { fill: none; stroke: currentColor; opacity: .55; }
svg marker path { fill: currentColor; stroke: none; } section img { max-width: 100%; background: white; }
"""


def style() -> str:
    """Return the style sheet of the page: that of reports, and of the drawing."""
    return (resources.files("keifu.training.run") / "report.css").read_text(encoding="utf-8") + STYLE


def drawing(found: list[Landmark]) -> str:
    """Return an SVG: a box for each landmark, a line down for each, and arrows from those it came from."""
    corner = {each.name: (8 + each.lane * ACROSS, 8 + row * DOWN) for row, each in enumerate(found)}
    boxes = "".join(_box(each, *corner[each.name]) for each in found)
    arrows = "".join(_arrow(corner[parent], corner[each.name]) for each in found for parent in each.parents)
    width, height = 8 + ACROSS * (1 + max(each.lane for each in found)), DOWN * len(found)
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="Who came from whom">'
        f"<defs>{HEAD}</defs>{arrows}{boxes}</svg>\n"
    )


def _box(each: Landmark, x: int, y: int) -> str:
    text = escape(f"{each.year} {each.title}")
    frame = f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>'
    return f'<a href="#{each.name}">{frame}<text x="{x + 9}" y="{y + 20}">{text}</text></a>'


def _arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    """From the foot of one box to the head of another, bent to the side where both stand in one column far apart."""
    x1, y1, x2, y2 = start[0] + WIDTH // 2, start[1] + HEIGHT, end[0] + WIDTH // 2, end[1]
    if x1 == x2 and y2 - y1 > DOWN:
        x1, x2 = x1 + WIDTH // 2 - 14, x2 + WIDTH // 2 - 14
        bend = f"C{x1 + 40} {y1 + 20} {x2 + 40} {y2 - 20}"
    else:
        bend = f"C{x1} {(y1 + y2) // 2} {x2} {(y1 + y2) // 2}"
    return f'<path d="M{x1} {y1}{bend} {x2} {y2}" marker-end="url(#head)"/>'


def _part(each: Landmark) -> str:
    picture = base64.b64encode((docs() / "pictures" / each.picture).read_bytes()).decode()
    rows = {"here": each.bought, "published": each.published, "results": each.section}
    cells = "".join(f"<tr><th>{name}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
    cells += f"<tr><th>repeat it</th><td><code>{escape(each.command)}</code></td></tr>"
    return (
        f'<section id="{each.name}"><h2>{each.year} · {escape(each.title)} ({escape(each.authors)})</h2>\n'
        f'<p>{escape(each.new)}</p>\n<p><img alt="{escape(each.section)}" src="data:image/png;base64,{picture}"></p>\n'
        f'<table class="pairs">{cells}</table></section>'
    )
