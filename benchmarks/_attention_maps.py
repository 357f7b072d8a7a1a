"""Attention maps as pictures: one square for each head of any model with softmax attention."""

from collections.abc import Sequence
from io import BytesIO

from torch import Tensor

from keifu.errors import UserError


def draw_maps(
    maps: dict[str, Tensor], rows: Sequence[str], columns: Sequence[str], title: str = "", width: int = 4
) -> bytes:
    """A PNG with a square for each head: `maps` gives [heads, rows, columns] weights for each name.

    rows are the query tokens, columns the key tokens.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heads = [(f"{name}, head {n + 1}", head) for name, each in maps.items() for n, head in enumerate(each)]
    if not heads:
        raise UserError("There is no attention to draw: the model computed none.")
    lines = -(-len(heads) // width)
    size = (min(width, len(heads)) * (1.1 + 0.24 * len(columns)), lines * (1.1 + 0.24 * len(rows)))
    with plt.rc_context({"font.family": _fonts(), "font.size": 7}):
        figure, grid = plt.subplots(lines, min(width, len(heads)), figsize=size, squeeze=False, layout="constrained")
        for axes in grid.flat[len(heads) :]:
            axes.set_axis_off()
        for axes, (name, head) in zip(grid.flat, heads, strict=False):
            axes.imshow(head.cpu().numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto")
            axes.set_title(name, fontsize=7)
            axes.set_xticks(range(len(columns)), columns, rotation=90)
            axes.set_yticks(range(len(rows)), rows)
        figure.suptitle(title, fontsize=9)
        file = BytesIO()
        figure.savefig(file, format="png", dpi=110)
        plt.close(figure)
    return file.getvalue()


def _fonts() -> list[str]:
    """A letter is drawn by the first of these fonts that has it; the second one has Japanese."""
    from matplotlib import font_manager

    from keifu.data.catalogue.catalogue import fetch

    path = fetch("japanese-font")
    font_manager.fontManager.addfont(path)
    return ["DejaVu Sans", font_manager.FontProperties(fname=path).get_name()]
