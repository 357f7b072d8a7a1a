"""A table and pictures that compare networks by their activation and their loss; knows no model and no training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from keifu.evaluation.boundaries import COLOURS, Points, canvas, paint, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = list[tuple[int, float]]  # a figure at each of some steps
DASHES = ("-", "--", ":")


@dataclass(frozen=True, eq=False)
class Result:
    """What became of one network: accuracy on held-out rows at the end, seconds of training, and figures by step.

    `plane` is its decision on a grid (see `boundaries.shares_on`), of data with two columns.
    """

    activation: str
    loss: str
    accuracy: float
    seconds: float
    losses: Curve
    accuracies: Curve
    plane: Float[Tensor, "size size classes"] | None = None


def names(results: Sequence[Result]) -> tuple[list[str], list[str]]:
    """The activations and the losses, in the order in which they come."""
    return list(dict.fromkeys(r.activation for r in results)), list(dict.fromkeys(r.loss for r in results))


def table(results: Sequence[Result]) -> str:
    """Held-out accuracy of every pair, one row an activation, one column a loss."""
    activations, losses = names(results)
    found = {(r.activation, r.loss): f"{r.accuracy:.1%}" for r in results}
    rows = [["held-out accuracy", *losses], *([a, *(found[a, loss] for loss in losses)] for a in activations)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(widths[0]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(row))
                     for row in rows)  # fmt: skip


def curves(results: Sequence[Result]) -> bytes:
    """Accuracy and loss by step as PNG: a column of two panels for each loss, a line for each activation."""
    activations, losses = names(results)
    figure, panels = canvas(2 * len(losses), len(losses), 3.0)
    for place, loss in enumerate(losses):
        chosen = [r for r in results if r.loss == loss]
        top, bottom = panels[place], panels[place + len(losses)]
        _lines(top, chosen, activations, lambda r: r.accuracies)
        _lines(bottom, chosen, activations, lambda r: r.losses)
        top.set_title(loss.replace("_", " "), fontsize=10)
        top.set_ylim(top=1.02)
        bottom.set_yscale("log")
        bottom.set_xlabel("step", fontsize=9)
    panels[0].set_ylabel("held-out accuracy", fontsize=9)
    panels[len(losses)].set_ylabel("training loss", fontsize=9)
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=min(len(labels), 9), fontsize=9, frameon=False)
    return png(figure)


def _lines(
    axes: "Axes", results: Sequence[Result], activations: Sequence[str], curve: Callable[[Result], Curve]
) -> None:
    for result in results:
        number = activations.index(result.activation)
        style = {"color": COLOURS[number % 8], "linestyle": DASHES[number % 3], "linewidth": 1.4}
        steps, values = zip(*curve(result), strict=True)
        axes.plot(steps, values, label=result.activation, **style)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)


def boundaries(results: Sequence[Result], points: Points) -> bytes:
    """The plane as each network parts it, as PNG: one row a loss, one column an activation."""
    activations, losses = names(results)
    figure, panels = canvas(len(results), len(activations), 1.5)
    for axes, result in zip(panels, results, strict=True):
        assert result.plane is not None
        paint(axes, points, result.plane, f"{result.accuracy:.1%}")
        axes.set_xticks([])
        axes.set_yticks([])
    for axes, activation in zip(panels, activations, strict=False):
        axes.set_title(f"{activation}\n{axes.get_title()}", fontsize=9)
    for axes, loss in zip(panels[:: len(activations)], losses, strict=True):
        axes.set_ylabel(loss.replace("_", " ").replace(" cross", "\ncross").replace("mean ", "mean\n"), fontsize=9)
    return png(figure)
