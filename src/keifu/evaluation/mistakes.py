"""A picture of the pictures that a classifier gets wrong; knows no model.

Axes: rows = pictures, height, width.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.evaluation.boundaries import canvas, png

ACROSS, DOWN, GAP = 8, 3, 8  # pictures in a line and in a column, and pixels between them, which hold their names


def picture(
    pictures: Float[Tensor, "rows height width"],
    targets: Int[Tensor, " rows"],
    predicted: Int[Tensor, " rows"],
    classes: Sequence[str],
) -> bytes:
    """The first wrong ones, dark on white, each with its class and what it was taken for, as PNG."""
    wrong = (predicted != targets).nonzero().flatten()
    truth, taken = targets.tolist(), predicted.tolist()
    high, wide = (size + GAP for size in pictures.shape[1:])
    sheet = torch.zeros(DOWN * high, ACROSS * wide)
    figure, (axes,) = canvas(1, 1, 5.4)
    figure.set_size_inches(7.4, 3.3)
    for place, row in enumerate(wrong[: ACROSS * DOWN].tolist()):
        top, left = place // ACROSS * high, place % ACROSS * wide
        sheet[top + GAP : top + high, left + GAP // 2 : left + wide - GAP // 2] = pictures[row]
        name = f"{classes[truth[row]]}, taken for {classes[taken[row]]}"
        axes.text(left + wide / 2, top + GAP - 2, name, fontsize=6.5, ha="center", va="bottom")
    axes.imshow(sheet.numpy(), cmap="gray_r", aspect="equal")
    axes.set_axis_off()
    share = 1 - len(wrong) / len(targets)
    axes.set_title(f"{len(wrong):,} of {len(targets):,} held-out pictures are wrong ({share:.1%} right)", fontsize=9)
    return png(figure)
