"""Lineage of the landmarks: in order of years, with parents, new idea and result; also as one HTML page.

The texts are in docs/lineage/lineage.json, the pictures in docs/pictures, in the checkout or in the wheel. A test
compares the figures with docs/results.
"""

import base64
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

from keifu.errors import require_known
from keifu.folders import packaged
from keifu.untrusted import read_json

LANGUAGES = ("en", "ja")
PICTURES = {".png": "image/png", ".svg": "image/svg+xml"}
WIDTH, HEIGHT, ACROSS, DOWN = 252, 30, 300, 62  # size of a box in the drawing, and distance between boxes
MARGIN = 24  # around the drawing
EXIT = 60  # distance from a box's middle to the line that leaves it sideways
WORDS = {
    "en": {
        "title": "the lineage", "drawing": "Who came from whom", "here": "here", "baseline": "compared with",
        "published": "published", "results": "results", "repeat": "repeat it",
    },
    "ja": {
        "title": "生成モデルの流れ", "drawing": "どのモデルがどのモデルから生まれたか", "here": "keifu での結果",
        "baseline": "比べる基準", "published": "論文の結果", "results": "結果の節", "repeat": "再現するコマンド",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Landmark:
    """Landmark of the lineage. name: of its page and model. parents: names of the landmarks it came from. lane: column
    in the drawing. result: keifu's result, as in docs/results. baseline: the figure to compare with. published: the
    paper's figure."""

    name: str
    year: int
    title: str
    authors: str
    lane: int
    parents: tuple[str, ...]
    new: str
    picture: str
    section: str
    result: str
    baseline: str
    command: str
    published: str


def landmarks(language: str = "en") -> list[Landmark]:
    """Return all landmarks in one language, the oldest first."""
    require_known("language", language, LANGUAGES)
    rows: list[dict[str, Any]] = read_json(packaged("docs") / "lineage/lineage.json")
    ending = f"_{language}"
    rows = [row | {key.removesuffix(ending): row[key] for key in row if key.endswith(ending)} for row in rows]
    return [
        Landmark(parents=tuple(row["from"]), **{key: row[key] for key in Landmark.__dataclass_fields__ if key in row})
        for row in rows
    ]


def page(language: str = "en") -> str:
    """Return an HTML page that needs no network: a drawing of the lineage, then a section with a picture for each
    landmark."""
    entries, words = landmarks(language), WORDS[language]
    parts = "\n".join(_part(entry, words) for entry in entries)
    body = f"<h1>keifu <span lang='ja'>系譜</span>: {words['title']}</h1>\n{drawing(entries, words['drawing'])}{parts}"
    return (
        f'<!doctype html>\n<html lang="{language}"><head><meta charset="utf-8"><title>keifu: {words["title"]}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">\n'
        f"<style>{style()}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


HEAD = (
    '<marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
    '<path d="M0 0 8 4 0 8z"/></marker>'
)
STYLE = """
.drawing { overflow-x: auto; } .drawing svg { min-width: 1000px; }
svg { max-width: 100%; height: auto; } svg rect { fill: var(--page); stroke: currentColor; }
svg text { fill: currentColor; font-size: 13px; } svg path { fill: none; stroke: currentColor; opacity: .55; }
svg marker path { fill: currentColor; stroke: none; } section img { max-width: 100%; background: white; }
"""


def style() -> str:
    """Return the page's style sheet: that of the reports, then the drawing's rules."""
    return (resources.files("keifu.training.run") / "report.css").read_text(encoding="utf-8") + STYLE


def drawing(entries: list[Landmark], label: str) -> str:
    """Return the lineage as SVG: one box in each row, and arrows from parents to children."""
    boxes = "".join(_box(entry, *corner(row, entry.lane)) for row, entry in enumerate(entries))
    paths = ("L".join(f"{x} {y}" for x, y in points) for points in routes(entries))
    arrows = "".join(f'<path d="M{path}" marker-end="url(#head)"/>' for path in paths)
    width = 2 * MARGIN + ACROSS * max(entry.lane for entry in entries) + WIDTH
    height = 2 * MARGIN + DOWN * (len(entries) - 1) + HEIGHT
    return (
        f'<div class="drawing"><svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{label}">'
        f"<defs>{HEAD}</defs>{arrows}{boxes}</svg></div>\n"
    )


def corner(row: int, lane: int) -> tuple[int, int]:
    """Return x and y of a box's top left corner."""
    return MARGIN + lane * ACROSS, MARGIN + row * DOWN


def _box(entry: Landmark, x: int, y: int) -> str:
    text = escape(f"{entry.year} {entry.title}")
    frame = f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>'
    return f'<a href="#{entry.name}">{frame}<text x="{x + 9}" y="{y + 20}">{text}</text></a>'


def routes(entries: list[Landmark]) -> list[list[tuple[int, int]]]:
    """Return the corner points of each arrow, from the bottom of a parent's box to the top of a child's. No arrow
    crosses a box or overlaps another arrow.

    Each row has one box, so an arrow may run sideways between two rows. It runs down in the child's or the parent's
    column if no box is in the way, else between two columns.
    """
    rows = {entry.name: row for row, entry in enumerate(entries)}
    between = dict.fromkeys(range(-1, 1 + max(entry.lane for entry in entries)), 0)  # lines so far right of a column
    arrows = []
    for row, child in enumerate(entries):
        for number, name in enumerate(sorted(child.parents, key=lambda name: entries[rows[name]].lane)):
            parent = entries[rows[name]]
            left, top = corner(row, child.lane)
            x2 = left + WIDTH // 2 + 24 * number - 12 * (len(child.parents) - 1)
            x1, y1 = corner(rows[name], parent.lane)
            passed = {entry.lane for entry in entries[rows[name] + 1 : row]}
            aside = (child.lane > parent.lane) - (child.lane < parent.lane)
            x1 += WIDTH // 2 + EXIT * (aside or 1)
            if child.lane not in passed:
                down = x2
                x1 = x1 if aside else x2
            elif aside and parent.lane not in passed:
                down = x1
            else:
                gap = child.lane - 1 if aside > 0 else child.lane
                between[gap] += 1
                down = corner(0, gap)[0] + WIDTH + 5 * between[gap]
            foot, head = y1 + HEIGHT + 7, top - 10 - 5 * number
            arrows.append([(x1, y1 + HEIGHT), (x1, foot), (down, foot), (down, head), (x2, head), (x2, top - 1)])
    return arrows


def _part(entry: Landmark, words: dict[str, str]) -> str:
    file = packaged("docs") / "pictures" / entry.picture
    picture = f"{PICTURES[file.suffix]};base64,{base64.b64encode(file.read_bytes()).decode()}"
    rows = {"here": entry.result, "baseline": entry.baseline, "published": entry.published, "results": entry.section}
    cells = "".join(f"<tr><th>{words[name]}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
    cells += f"<tr><th>{words['repeat']}</th><td><code>{escape(entry.command)}</code></td></tr>"
    return (
        f'<section id="{entry.name}"><h2>{entry.year} · {escape(entry.title)} ({escape(entry.authors)})</h2>\n'
        f'<p>{escape(entry.new)}</p>\n<p><img alt="{escape(entry.section or entry.title)}" src="data:{picture}"></p>\n'
        f'<table class="pairs">{cells}</table></section>'
    )
