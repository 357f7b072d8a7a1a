"""Quality of a network's pictures during training: kernel distance of each saved state, and pictures.

python benchmarks/drawing.py RUN --data emoji [--distinct] [--pictures 256] [--steps 20] [--picture PNG] [--sheet PNG]

RUN must have saved states (`keifu train ddpm ... --keep 50`). Each state draws the same seeds with its moving average
by DPM-Solver++ (2M). Below the table is the distance of the held-out pictures. Figures with different features cannot
be compared, so the features are named. `--sheet` shows eight of the seeds, with a row for each state.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from _charts import chart
from _drawn import beside
from _rounds import machine
from torch import Tensor, nn

from keifu.data.images.grid import grid
from keifu.evaluation.images.distances import kernel_distance
from keifu.inference.images.pixel_diffusion import ImageRequest, PixelPipeline
from keifu.training.optim.weight_averaging import MovingAverage
from keifu.training.run import checkpoint

SHOWN = 8  # pictures of a row


@torch.no_grad()
def states(run: Path, model: nn.Module, at_most: int | None = None) -> Iterator[tuple[int, float]]:
    """Yield the step and the minutes of training of each saved state, after loading the state into the model. With
    `at_most`, yield only that many states, evenly spaced, the last one included."""
    kept = checkpoint.steps(run)
    spread = min(at_most or len(kept), len(kept))
    for step in (kept[(number + 1) * len(kept) // spread - 1] for number in range(spread)):
        saved = checkpoint.read(run, step)
        own = {name: tensor for name, tensor in saved.tensors.items() if name.startswith("model.")}
        start = f"optimisers.{MovingAverage.PREFIX}"
        averages = {f"model.{n.removeprefix(start)}": t for n, t in saved.tensors.items() if n.startswith(start)}
        checkpoint.load_into_model(model, own | {name: averages[name] for name in own if name in averages})
        yield step, saved.facts["seconds"] / 60


def measure(options: argparse.Namespace) -> tuple[list[tuple[int, float, float]], float, list[Tensor], str]:
    """Return step, minutes and kernel distance of each state, that of the held-out pictures, some drawn pictures, and
    the name of the features."""
    model, extract, real, floor = beside(options.run, options.data, options.distinct)
    config = model.config
    labels = range(config.n_classes) if config.n_classes else [None]
    found, rows = [], []
    for step, minutes in states(options.run, model):
        drawn = torch.cat([
            PixelPipeline(model).draw(
                ImageRequest("dpm++-2m", options.steps, label=label), range(first, min(first + 64, each))
            )
            for label in labels
            for each in [-(-options.pictures // len(labels))]
            for first in range(0, each, 64)
        ])  # fmt: skip
        distance = kernel_distance(real, extract(drawn)).mean
        found.append((step, minutes, distance))
        rows.append(drawn[:: max(1, len(drawn) // SHOWN)][:SHOWN])
        print(f"step {step:,}, {minutes:.1f} min: {1e3 * distance:.2f}", flush=True)
    return found, floor, rows, extract.name


def show(found: list[tuple[int, float, float]], floor: float, features: str, options: argparse.Namespace) -> None:
    """Print the table in Markdown, and save the plot if a path is given."""
    print(f"\n{machine()}\n\n| step | minutes | 1000 · kernel distance ({features}) |\n|---:|---:|---:|")
    for step, minutes, distance in found:
        print(f"| {step:,} | {minutes:.1f} | {1e3 * distance:.2f} |")
    print(f"\nHeld-out pictures: {1e3 * floor:.2f}")
    if options.picture:
        with chart(options.picture, (6, 3.8)) as axes:
            axes.plot([minutes for _, minutes, _ in found], [1e3 * distance for *_, distance in found], marker="o")
            axes.set(xlabel="minutes of training", ylabel="1000 · kernel distance", yscale="log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.set_title(f"{options.run.name}: {features}; held-out pictures {1e3 * floor:.2f}", fontsize=9)


def main() -> None:
    """Draw, measure, print and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--distinct", action="store_true", help="as the run's --distinct")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20, help="of the sampler")
    parser.add_argument("--picture", type=Path, help="write a plot")
    parser.add_argument("--sheet", type=Path, help="write what was drawn")
    options = parser.parse_args()
    found, floor, rows, features = measure(options)
    show(found, floor, features, options)
    if options.sheet:
        options.sheet.write_bytes(grid(torch.cat(rows), columns=SHOWN))


if __name__ == "__main__":
    main()
