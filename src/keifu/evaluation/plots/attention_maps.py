"""Picture of attention maps: a square for each head.

Axes: heads, rows = queries, columns = keys.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from keifu.errors import UserError
from keifu.evaluation.plots.decision_boundary import canvas, png


def draw_maps(
    maps: Mapping[str, Tensor], rows: Sequence[str], columns: Sequence[str], title: str = "", width: int = 4
) -> bytes:
    """Draw a PNG with a square for each head. maps: weights [heads, rows, columns] or [rows, columns] by name.

    rows: query tokens. columns: key tokens. width: squares side by side.
    """
    heads = [
        (f"{name}, head {n}" if weights.dim() == 3 else name, head)
        for name, weights in maps.items()
        for n, head in enumerate(weights if weights.dim() == 3 else weights[None], 1)
    ]
    if not heads:
        raise UserError("There is no attention to draw: the model computed none.")
    figure, panels = canvas(len(heads), min(width, len(heads)), 1.1 + 0.24 * len(columns), 1.1 + 0.24 * len(rows))
    for axes, (name, head) in zip(panels, heads, strict=True):
        axes.imshow(head.cpu().numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto")
        axes.set_title(name, fontsize=7)
        axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
        axes.set_yticks(range(len(rows)), rows, fontsize=7)
    figure.suptitle(title, fontsize=9)
    return png(figure)
