"""Fonts of charts: an installed font for Japanese, Chinese and Korean characters, else the catalogue's font.

Matplotlib's default font, DejaVu Sans, lacks these characters and would draw boxes.
"""

from typing import TYPE_CHECKING

from keifu.data.catalogue.catalogue import fetch
from keifu.data.images.grid import FAR_EAST

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INSTALLED = (
    "Noto Sans CJK JP", "Noto Sans JP", "Source Han Sans JP", "IPAexGothic", "IPAGothic", "Hiragino Sans", "Yu Gothic",
    "Meiryo", "MS Gothic", "TakaoGothic", "VL Gothic",
)  # fmt: skip


def has_far_east(text: str) -> bool:
    """Return whether a text has Japanese, Chinese or Korean characters."""
    return any(ord(character) in FAR_EAST for character in text)


def far_east_families() -> list[str]:
    """Return font families for such characters. Each character is drawn by the first family that has it."""
    from matplotlib import font_manager

    known = {font.name for font in font_manager.fontManager.ttflist}
    for name in INSTALLED:
        if name in known:
            return ["DejaVu Sans", name]
    path = fetch("japanese-font")
    font_manager.fontManager.addfont(path)
    return ["DejaVu Sans", font_manager.FontProperties(fname=path).get_name()]


def use_far_east(figure: "Figure") -> None:
    """Set such a font for those texts of a figure that need it."""
    from matplotlib.text import Text

    written: list[Text] = figure.findobj(Text)  # pyright: ignore[reportAssignmentType]
    wanting = [text for text in written if has_far_east(text.get_text())]
    families = far_east_families() if wanting else []
    for text in wanting:
        text.set_fontfamily(families)
