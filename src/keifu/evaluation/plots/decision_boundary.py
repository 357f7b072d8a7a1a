"""Decision boundaries of classifiers with two inputs, in one image or over training; and comparisons of several runs.

Axes: rows, and the two columns of a table. Colours are those of Okabe and Ito (2008), which colour-blind people can
distinguish. Classes also differ in their markers.
"""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from keifu.data.catalogue.catalogue import fetch
from keifu.data.classification.tables import Table
from keifu.data.images.grid import FAR_EAST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
MARKERS = "os^DvPX*"
# fonts with Japanese, Chinese and Korean characters, which matplotlib's default font draws as boxes
INSTALLED = (
    "Noto Sans CJK JP", "Noto Sans JP", "Source Han Sans JP", "IPAexGothic", "IPAGothic", "Hiragino Sans", "Yu Gothic",
    "Meiryo", "MS Gothic", "TakaoGothic", "VL Gothic",
)  # fmt: skip
Shares = Callable[[Float[Tensor, "rows 2"]], Float[Tensor, "rows classes"]]
Stage = tuple[str, Float[Tensor, "size size classes"]]  # title, and a result of `class_shares_on`


def limits(points: Table) -> tuple[float, float, float, float]:
    """Return left, right, bottom and top of the picture: the range of the points, with a margin."""
    low, high = points.inputs.amin(0), points.inputs.amax(0)
    margin = 0.25 * (high - low).clamp_min(1e-9)
    (left, bottom), (right, top) = (low - margin).tolist(), (high + margin).tolist()
    return left, right, bottom, top


def class_shares_on(points: Table, shares: Shares, size: int = 200) -> Float[Tensor, "size size classes"]:
    """Evaluate `shares`, a function from points to class probabilities, on a grid over the picture. Row 0 is at the
    bottom."""
    left, right, bottom, top = limits(points)
    dtype = points.inputs.dtype
    x, y = torch.linspace(left, right, size, dtype=dtype), torch.linspace(bottom, top, size, dtype=dtype)
    return shares(torch.cartesian_prod(y, x).flip(1)).reshape(size, size, -1).float()


def spread(steps: Sequence[int], most: int = 6) -> list[int]:
    """Return at most `most` of the ascending steps: the first, the last, and some between at growing distances."""
    last = len(steps) - 1
    if last < most:
        return list(steps)
    indices = {0, *(round(last ** (turn / (most - 2))) for turn in range(most - 1))}
    return [steps[index] for index in sorted(indices)]


def paint(axes: "Axes", points: Table, plane: Float[Tensor, "size size classes"], title: str) -> None:
    """Draw the plane in the classes' colours, the decision boundary as a line, and the points."""
    from matplotlib.colors import to_rgb

    left, right, bottom, top = extent = limits(points)
    colours = torch.tensor([to_rgb(COLOURS[index % 8]) for index in range(plane.shape[-1])])
    picture = (1 - 0.5 * (plane @ (1 - colours))).clamp(0, 1)
    axes.imshow(picture.numpy(), extent=extent, origin="lower", aspect="auto", interpolation="bilinear")
    x, y = (torch.linspace(a, b, len(plane)).numpy() for a, b in ((left, right), (bottom, top)))
    for index in range(plane.shape[-1] - (plane.shape[-1] == 2)):
        other_shares = torch.cat([plane[..., :index], plane[..., index + 1 :]], -1).amax(-1)
        lead = plane[..., index] - other_shares
        if bool((lead > 0).any()) and bool((lead < 0).any()):
            axes.contour(x, y, lead.numpy(), levels=[0.0], colors="#222222", linewidths=1.2)
    scatter(axes, points)
    axes.set_title(title, fontsize=9)
    axes.set(xlim=(left, right), ylim=(bottom, top))


def scatter(axes: "Axes", points: Table) -> None:
    """Draw the points, each class with its colour and marker."""
    size = 70 if len(points.inputs) <= 12 else 12
    for index, name in enumerate(points.classes):
        x, y = points.inputs[points.targets == index].T.numpy()
        style = {"marker": MARKERS[index % 8], "edgecolors": "white", "linewidths": 0.5, "zorder": 3}
        axes.scatter(x, y, s=size, c=COLOURS[index % 8], label=name, **style)
    axes.tick_params(labelsize=7)


def strip(points: Table, stages: Sequence[Stage]) -> bytes:
    """Draw one panel for each stage of learning, from left to right, six in a row, as PNG."""
    figure, panels = canvas(len(stages), min(6, len(stages)))
    for axes, (title, plane) in zip(panels, stages, strict=True):
        paint(axes, points, plane, title)
    label(figure, panels, points)
    return png(figure)


def crossing(points: Table, mixture: Float[Tensor, "rows"], title: str) -> bytes:
    """Draw the proof that no line separates two classes as PNG: convex combinations of each class's rows, and their
    common point.

    mixture [rows]: weights of the rows whose combinations meet. The sum is 1, half of it in each class.
    """
    figure, (axes,) = canvas(1, 1, 3.2)
    scatter(axes, points)
    for index in range(2):
        mixed_inputs = points.inputs[(points.targets == index) & (mixture > 0)]
        ring = torch.cat([mixed_inputs, mixed_inputs[:1]])
        axes.plot(*ring.T.numpy(), color=COLOURS[index], linewidth=1.5, zorder=2)
    shared = 2 * ((mixture * (points.targets == 1)) @ points.inputs)
    star = {"marker": "*", "markersize": 14, "linestyle": "none", "zorder": 4}
    axes.plot(*shared[:, None].numpy(), color="#222222", label="shared", **star)
    axes.set_title(title, fontsize=9)
    axes.margins(0.2)
    label(figure, [axes], points)
    return png(figure)


def label(figure: "Figure", panels: Sequence["Axes"], points: Table) -> None:
    """Label the axes with the columns, and add a legend of classes below."""
    panels[0].set_ylabel(points.columns[1], fontsize=9)
    for axes in panels:
        axes.set_xlabel(points.columns[0], fontsize=9)
    legend(figure, panels[0], 6)


def legend(figure: "Figure", axes: "Axes", most: int) -> None:
    """Add a legend of these axes below the figure, with at most `most` names in a line."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), most), fontsize=8, frameon=False)


def canvas(panels: int, across: int, width: float = 2.1, height: float | None = None) -> tuple["Figure", list["Axes"]]:
    """Return a figure with that many panels, in rows. height: of a panel; None: as its width."""
    from matplotlib.figure import Figure

    down = -(-panels // across)
    figure = Figure(figsize=(max(width * across, 3.2), (height or width) * down + 0.6), dpi=110, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False).flatten().tolist()
    for axes in grid[panels:]:
        axes.remove()
    return figure, grid[:panels]


def png(figure: "Figure") -> bytes:
    """Return a figure as a PNG file of 256 colours, which is a third of the size of a full-colour file."""
    from PIL import Image

    from keifu.data.images.io import open_image

    use_far_east(figure)
    stream, reduced = io.BytesIO(), io.BytesIO()
    figure.savefig(stream, format="png")
    colours = open_image(stream).convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    colours.save(reduced, format="png", optimize=True)
    return reduced.getvalue()


def far_east_families() -> list[str]:
    """Return font families for such characters. Each character is drawn by the first family that has it."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    for name in INSTALLED:
        if name in installed:
            return ["DejaVu Sans", name]
    path = fetch("japanese-font")
    font_manager.fontManager.addfont(path)
    return ["DejaVu Sans", font_manager.FontProperties(fname=path).get_name()]


def use_far_east(figure: "Figure") -> None:
    """Set such a font for those texts of a figure that need it."""
    from matplotlib.text import Text

    texts: list[Text] = figure.findobj(Text)  # pyright: ignore[reportAssignmentType]
    wanting = [text for text in texts if any(ord(letter) in FAR_EAST for letter in text.get_text())]
    families = far_east_families() if wanting else []
    for text in wanting:
        text.set_fontfamily(families)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as lines of text in columns. The first column is left-aligned, the others are
    right-aligned."""
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([name.ljust(first), *map(str.rjust, cells, widths)] for name, *cells in rows)
    return "\n".join(map("  ".join, lines))


Curve = list[tuple[int, float]]  # pairs of a step and a figure
DASHES = ("-", "--", ":")


class Result(NamedTuple):
    """Result of training one network: final held-out accuracy, seconds of training, and figures by step.

    plane: its decision on a grid (see `class_shares_on`), for data with two columns.
    """

    activation: str
    loss: str
    accuracy: float
    seconds: float
    losses: Curve
    accuracies: Curve
    plane: Float[Tensor, "size size classes"] | None = None


def names(results: Sequence[Result]) -> tuple[list[str], list[str]]:
    """Return the activations and the losses, in order of appearance."""
    return list(dict.fromkeys(r.activation for r in results)), list(dict.fromkeys(r.loss for r in results))


def table(results: Sequence[Result]) -> str:
    """Return a text table of held-out accuracy, with a row for each activation and a column for each loss."""
    activations, losses = names(results)
    share = {(r.activation, r.loss): f"{r.accuracy:.1%}" for r in results}
    return aligned([["held-out accuracy", *losses], *([a, *(share[a, loss] for loss in losses)] for a in activations)])


def curves(results: Sequence[Result]) -> bytes:
    """Draw accuracy and loss by step as PNG: a column of two panels for each loss, a line for each activation."""
    activations, losses = names(results)
    figure, panels = canvas(2 * len(losses), len(losses), 3.0)
    for index, loss in enumerate(losses):
        of_loss = [r for r in results if r.loss == loss]
        top, bottom = panels[index], panels[index + len(losses)]
        _lines(top, of_loss, activations, lambda r: r.accuracies)
        _lines(bottom, of_loss, activations, lambda r: r.losses)
        top.set_title(loss.replace("_", " "), fontsize=10)
        top.set_ylim(top=1.02)
        bottom.set_yscale("log")
        bottom.set_xlabel("step", fontsize=9)
    panels[0].set_ylabel("held-out accuracy", fontsize=9)
    panels[len(losses)].set_ylabel("training loss", fontsize=9)
    legend(figure, panels[0], 9)
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


def boundaries(results: Sequence[Result], points: Table) -> bytes:
    """Draw the decision boundary of each network as PNG: a row for each loss, a column for each activation."""
    activations, losses = names(results)
    figure, panels = canvas(len(results), len(activations), 1.5)
    for axes, result in zip(panels, results, strict=True):
        assert result.plane is not None
        paint(axes, points, result.plane, f"{result.accuracy:.1%}")
        axes.set(xticks=[], yticks=[])
    for axes, activation in zip(panels, activations, strict=False):
        axes.set_title(f"{activation}\n{axes.get_title()}", fontsize=9)
    for axes, loss in zip(panels[:: len(activations)], losses, strict=True):
        axes.set_ylabel(loss.replace("_", " ").replace(" cross", "\ncross").replace("mean ", "mean\n"), fontsize=9)
    return png(figure)
