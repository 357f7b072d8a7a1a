"""Vocabulary of the diagrams: boxes, arrows, plus signs, skips, frames and grids, as SVG for light and dark screens.

A drawing is 360 units wide, so that a phone of 390 pixels shows its letters in their size. Data flows downwards.
"""
# ruff: noqa: E501

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360
MIDDLE = WIDTH // 2
MARGIN = 12
TALL, LOW, GAP = 42, 30, 20  # heights of a box with a remark and without one; the length of an arrow between two
LETTER = {"label": 13, "remark": 11, "note": 11}  # sizes of text in pixels
LANGUAGES = ("en", "ja")
STYLE = """
svg{--paper:#fff;--ink:#1b2a33;--soft:#51636d;--line:#51636d;--data:#e8edf0;--layer:#d9f0eb;--attention:#ffe3c2;--norm:#fdf3bf;--goal:#fbd9dd;--frozen:#dfe6fb}
@media(prefers-color-scheme:dark){svg{--paper:#1e2129;--ink:#e9eef0;--soft:#b3c0c7;--line:#9fb0b8;--data:#39424d;--layer:#17534a;--attention:#6b4415;--norm:#5a5013;--goal:#6d2832;--frozen:#2f3f74}}
text{font-family:system-ui,-apple-system,"Segoe UI","Hiragino Sans","Noto Sans CJK JP","Yu Gothic UI",sans-serif;fill:var(--ink);text-anchor:middle}
.label{font-size:13px}.remark,.note{font-size:11px;fill:var(--soft)}.start{text-anchor:start}.end{text-anchor:end}
rect,circle{stroke:var(--line);stroke-width:1.2}.paper{fill:var(--paper);stroke:none}.frame{fill:none;stroke-dasharray:5 4;rx:10}
path{fill:none;stroke:var(--line);stroke-width:1.4}.arrow{marker-end:url(#head)}.dashed{stroke-dasharray:4 3}.head{fill:var(--line);stroke:none}
.data{fill:var(--data)}.layer{fill:var(--layer)}.attention{fill:var(--attention)}.norm{fill:var(--norm)}.goal{fill:var(--goal)}.frozen{fill:var(--frozen)}.empty{fill:var(--paper)}
""".replace("\n", "")
HEAD = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path class="head" d="M0 0L8 4L0 8z"/></marker></defs>'
)

Label = str | tuple[str, str]  # the same in both languages, or English and Japanese
Point = tuple[float, float]


def text_width(text: str, size: int) -> float:
    """Return the estimated width of text: a Japanese character is square, a Latin one about half as wide."""
    return sum(1.0 if character >= "\u2e80" else 0.56 for character in text) * size


@dataclass(frozen=True)
class Area:
    """Rectangle that was drawn: its middle, width and height."""

    x: float
    y: float
    width: float
    height: float

    @property
    def top(self) -> Point:
        return self.x, self.y - self.height / 2

    @property
    def bottom(self) -> Point:
        return self.x, self.y + self.height / 2

    @property
    def left(self) -> Point:
        return self.x - self.width / 2, self.y

    @property
    def right(self) -> Point:
        return self.x + self.width / 2, self.y


class Drawing:
    """Diagram under construction in one language; its height follows from its parts."""

    def __init__(self, language: str) -> None:
        self.language = LANGUAGES.index(language)
        self.behind: list[str] = []  # frames and lines
        self.front: list[str] = []  # boxes and text
        self.height = 0.0
        self.tight: list[str] = []  # text that is wider than the room for it

    def words(self, label: Label) -> str:
        """Return the label in the language of the drawing."""
        return label if isinstance(label, str) else label[self.language]

    def reach(self, y: float) -> None:
        """Make the drawing at least so tall."""
        self.height = max(self.height, y + MARGIN)

    def write(self, x: float, y: float, label: Label, style: str, room: float = WIDTH, anchor: str = "") -> None:
        """Write one line of text whose baseline is at y."""
        text = self.words(label)
        if text_width(text, LETTER[style]) > room:
            self.tight.append(text)
        self.front.append(f'<text class="{f"{style} {anchor}".strip()}" x="{x:g}" y="{y:g}">{escape(text)}</text>')
        self.reach(y)

    def note(self, x: float, y: float, label: Label, anchor: str = "") -> None:
        """Write a small remark; `anchor` is start, end or, for the middle, empty."""
        room = {"": 2 * min(x, WIDTH - x), "start": WIDTH - x, "end": x}[anchor]
        self.write(x, y, label, "note", room, anchor)

    def box(
        self, x: float, y: float, label: Label, remark: Label = "", tone: str = "layer", width: float = 150
    ) -> Area:
        """Draw a box whose middle is x and whose upper edge is y."""
        height = TALL if remark else LOW
        corner = f'x="{x - width / 2:g}" y="{y:g}" width="{width:g}" height="{height}" rx="6"'
        self.front.append(f'<rect class="{tone}" {corner}/>')
        if label:
            self.write(x, y + (18 if remark else 20), label, "label", width - 6)
        if remark:
            self.write(x, y + 34, remark, "remark", width - 6)
        self.reach(y + height)
        return Area(x, y + height / 2, width, height)

    def circle(self, x: float, y: float, label: Label = "", tone: str = "empty", radius: float = 9) -> Area:
        """Draw a circle with a short text around its middle."""
        self.front.append(f'<circle class="{tone}" cx="{x:g}" cy="{y:g}" r="{radius:g}"/>')
        if label:
            self.write(x, y + 4.5, label, "label", 2 * radius)
        self.reach(y + radius)
        return Area(x, y, 2 * radius, 2 * radius)

    def plus(self, x: float, y: float) -> Area:
        """Draw the sum of what flows in."""
        return self.circle(x, y, "+")

    def line(self, *points: Point, arrow: bool = True, dashed: bool = False) -> None:
        """Draw straight pieces from point to point, with a head at the end."""
        path = "L".join(f"{x:g} {y:g}" for x, y in points)
        style = f"{'arrow ' if arrow else ''}{'dashed' if dashed else ''}".strip()
        self.behind.append(f'<path class="{style}" d="M{path}"/>')
        self.reach(max(y for _, y in points))

    def frame(self, x0: float, y0: float, x1: float, y1: float, label: Label, anchor: str = "start") -> None:
        """Draw a dashed frame around a part that repeats or has a name."""
        self.behind.append(
            f'<rect class="frame" x="{x0:g}" y="{y0:g}" width="{x1 - x0:g}" height="{y1 - y0:g}" rx="10"/>'
        )
        x = {"start": x0 + 8, "end": x1 - 8, "": (x0 + x1) / 2}[anchor]
        self.write(x, y0 + 14, label, "note", x1 - x0 - 16, anchor)
        self.reach(y1)

    def grid(self, x: float, y: float, cells: Sequence[str], size: float = 12) -> Area:
        """Draw squares row by row; each character chooses a tone: # attention, + layer, o goal, anything else empty."""
        tones = {"#": "attention", "+": "layer", "o": "goal"}
        for row, line in enumerate(cells):
            for column, cell in enumerate(line):
                corner = f'x="{x + column * size:g}" y="{y + row * size:g}" width="{size:g}" height="{size:g}"'
                self.front.append(f'<rect class="{tones.get(cell, "empty")}" {corner}/>')
        width, height = len(cells[0]) * size, len(cells) * size
        self.reach(y + height)
        return Area(x + width / 2, y + height / 2, width, height)

    def svg(self) -> str:
        """Return the whole file."""
        size = f'width="{WIDTH}" height="{self.height:g}"'
        paper = f'<rect class="paper" {size}/>'
        view = f'xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {WIDTH} {self.height:g}"'
        return f"<svg {view}><style>{STYLE}</style>{HEAD}{paper}{''.join(self.behind)}{''.join(self.front)}</svg>\n"


@dataclass(frozen=True)
class Part:
    """Box of a column."""

    label: Label
    remark: Label = ""
    tone: str = "layer"


@dataclass(frozen=True)
class Fork:
    """Point of a column at which a skip begins."""


@dataclass(frozen=True)
class Join:
    """Sum of a column with the skip that began last."""


@dataclass(frozen=True)
class Begin:
    """Upper edge of a frame."""

    label: Label


@dataclass(frozen=True)
class End:
    """Lower edge of the frame that began last."""


def column(
    drawing: Drawing, x: float, y: float, parts: Sequence[object], width: float = 150, side: int = 1
) -> list[Area]:
    """Draw parts below each other, joined by arrows, with skips on one side (1 right, -1 left); return their areas."""
    drawn: list[Area] = []
    out, frames, last = x + side * (width / 2 + 14), [], None
    fork = 0.0
    for part in parts:
        if isinstance(part, Begin):
            frames.append((y - 4, part.label))
            y += 16
        elif isinstance(part, End):
            top, label = frames.pop()
            left, right = sorted((x - side * (width / 2 + 8), out + side * 10))
            drawing.frame(left, top, right, y - GAP + 10, label, "start" if side > 0 else "end")
            y += 6
        elif isinstance(part, Fork):
            fork = y - GAP / 2 - 1
        else:
            area = place(drawing, x, y, part, width)
            if last is not None:
                drawing.line(last.bottom, area.top)
            if isinstance(part, Join):
                edge = area.right if side > 0 else area.left
                drawing.line((x, fork), (out, fork), (out, area.y), edge)
            drawn.append(area)
            last, y = area, area.bottom[1] + GAP
    return drawn


def place(drawing: Drawing, x: float, y: float, part: object, width: float) -> Area:
    """Draw one box or sum of a column with its upper edge at y."""
    if isinstance(part, Part):
        return drawing.box(x, y, part.label, part.remark, part.tone, width)
    return drawing.plus(x, y + 9)
