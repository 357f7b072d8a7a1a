"""Scores as arrows over a plane, learned and exact, and points on their way from noise."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.evaluation.plots.decision_boundary import COLOURS, canvas, legend, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Score = Callable[[Tensor, Tensor], Tensor]  # points and each point's sigma → scores
EDGE, ARROWS = 2.2, 15  # half the side of the plane, and arrows along a side


class PointCloud(NamedTuple):
    """A title, points, and their classes."""

    title: str
    points: Float[Tensor, "count 2"]
    labels: Int[Tensor, " count"]


def arrows(axes: "Axes", score: Score, sigma: float, colour: str, name: str) -> None:
    """Draw sigma times the score at each point of a grid, a vector v, as an arrow of the length |v| / (1 + |v|)."""
    line = torch.linspace(-0.9 * EDGE, 0.9 * EDGE, ARROWS)
    places = torch.cartesian_prod(line, line)
    steps = sigma * score(places, torch.full((len(places),), sigma))
    (x, y), (right, up) = places.T, (steps / (1 + steps.norm(dim=1, keepdim=True))).T
    style = {"color": colour, "label": name, "angles": "xy", "scale": 14, "width": 0.006}
    axes.quiver(x.numpy(), y.numpy(), right.numpy(), up.numpy(), **style)


def scatter(axes: "Axes", cloud: PointCloud) -> None:
    """Draw the points, each class in its colour."""
    for index in cloud.labels.unique().tolist():
        x, y = cloud.points[cloud.labels == index].T.numpy()
        axes.scatter(x, y, s=2, c=COLOURS[index % len(COLOURS)], linewidths=0)


def strip(points: PointCloud, scores: dict[str, Score], sigmas: Sequence[float], clouds: Sequence[PointCloud]) -> bytes:
    """Draw the fields of the scores over the points at each sigma in a row, and the clouds in another one, as PNG.

    Both rows have the same number of panels. An earlier score's arrows are below a later one's."""
    figure, panels = canvas(len(sigmas) + len(clouds), len(sigmas))
    for axes, sigma in zip(panels, sigmas, strict=False):
        x, y = points.points.T.numpy()
        axes.scatter(x, y, s=1, c="#cccccc", linewidths=0)
        for index, (name, score) in enumerate(scores.items()):
            arrows(axes, score, sigma, COLOURS[7 - 2 * index], name)
        axes.set_title(f"σ = {sigma:g}", fontsize=9)
    for axes, cloud in zip(panels[len(sigmas) :], clouds, strict=True):
        scatter(axes, cloud)
        axes.set_title(cloud.title, fontsize=9)
    for axes in panels:
        axes.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), xticks=[], yticks=[], aspect="equal")
    legend(figure, panels[0], 2)
    return png(figure)
