"""A picture of the pictures that a classifier gets wrong; knows no model.

Axes: rows = pictures, height, width.
"""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from keifu.evaluation.boundaries import canvas, png


def picture(
    pictures: Float[Tensor, "rows height width"],
    targets: Int[Tensor, "rows"],
    predicted: Int[Tensor, "rows"],
    classes: Sequence[str],
    most: int = 24,
) -> bytes:
    """The first wrong ones, dark on white, each with its class and what it was taken for, as PNG."""
    wrong = (predicted != targets).nonzero().flatten()
    shown = wrong[:most].tolist()
    truth, taken = targets.tolist(), predicted.tolist()
    figure, panels = canvas(max(1, len(shown)), 8 if len(shown) > 8 else max(1, len(shown)), 0.95)
    for axes in panels:
        axes.set_axis_off()
    for axes, row in zip(panels, shown, strict=False):
        axes.imshow(pictures[row].numpy(), cmap="gray_r")
        axes.set_title(f"{classes[truth[row]]}, taken for {classes[taken[row]]}", fontsize=6)
    share = 1 - len(wrong) / len(targets)
    figure.suptitle(f"{len(wrong):,} of {len(targets):,} held-out pictures are wrong ({share:.1%} right)", fontsize=9)
    return png(figure)
