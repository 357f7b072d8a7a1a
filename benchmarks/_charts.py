"""Charts of the benchmarks: one figure with its grid, legend and file; lines with the range of the seeds."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.container import BarContainer
from torch import Tensor


@contextmanager
def chart(
    path: Path, size: tuple[float, float] = (8, 4.5), panels: int = 1, *, legend: float | None = 8, dpi: int = 110,
    **options: Any,
) -> Iterator[Any]:  # fmt: skip
    """Yield the axes of a figure, or the axes of its panels; then add the grid and the legend, and save it.

    legend: size of its letters; panels without labels have none. None: no legend. options: of `plt.subplots`.
    """
    figure, axes = plt.subplots(1, panels, figsize=size, layout="constrained", **options)
    all_axes: list[Any] = [axes] if panels == 1 else [*axes]
    yield axes
    for panel in all_axes:
        has_bars = any(isinstance(each, BarContainer) for each in panel.containers)
        panel.grid(axis="y" if has_bars else "both", alpha=0.3)
        if legend and panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=legend)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def plot_seeds(axes: Any, places: Sequence[float] | Tensor, seeds: Tensor, label: str, marker: str = "-") -> None:
    """Draw the mean of the seeds [seeds, places]. The shade is their range."""
    axes.plot(places, seeds.mean(0), marker, label=label)
    axes.fill_between(places, seeds.amin(0), seeds.amax(0), alpha=0.2)


def bar_seeds(axes: Any, shift: float, seeds: Tensor, label: str) -> None:
    """Draw bars of the mean of the seeds [seeds, bars], moved by `shift`. The error bars are their range."""
    mean = seeds.mean(0)
    around = torch.stack([mean - seeds.amin(0), seeds.amax(0) - mean])
    axes.bar(torch.arange(seeds.shape[1]) + shift, mean, 0.38, yerr=around, capsize=2, label=label)
