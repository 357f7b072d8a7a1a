"""Few steps from noise to picture: a U-Net with noise prediction, a U-Net with a flow and a DiT with a flow.

python benchmarks/flow.py [--data mnist] [--minutes 2] [--seeds 0 1 2] [--pictures 500] [--steps 1 2 4 8 16 50]
    [--write JSON] [--picture PNG]

Each network is trained for the same time of one core (`time.process_time`), on the same pictures, with the same
optimizer. Then it draws the same seeds by DDIM with each number of steps; in a flow this is Euler's method. The table
has 1000 · kernel distance to the training pictures: the mean of the seeds, and in brackets the lowest and the highest.
Training times are uniform, except for the ways named logit-normal. The picture has a row for each way and number of
steps.
"""

import argparse
import io
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from _results import publish
from _rounds import machine
from PIL import Image
from torch import Tensor, nn

from keifu.data.images.grid import grid
from keifu.evaluation.images.distances import kernel_distance
from keifu.evaluation.images.features import extractor
from keifu.inference.images.pixel_diffusion import ImageRequest, PixelPipeline
from keifu.recipes.images import ddpm, dit

RATE, WARMUP, DECAY = 1e-3, 0.05, 0.995  # maximal rate, share of the time for warm-up, decay of the moving average
SHOWN = 4  # pictures in a cell
UNET: dict[str, Any] = {"dim": 16, "multipliers": (1, 2, 4), "weighting": "simple"}
NOISE = {"schedule": "linear", "target": "noise"}
DIT = {"n_layers": 4, "n_heads": 4, "head_dim": 24}
WAYS: dict[str, Callable[..., ddpm.ImageTask]] = {
    "U-Net, noise": lambda **more: ddpm.prepare(ddpm.Recipe(**UNET, **NOISE, **more).resolved()),
    "U-Net, flow": lambda **more: ddpm.prepare(ddpm.Recipe(**UNET, schedule="flow", **more).resolved()),
    "DiT, flow": lambda **more: dit.prepare(dit.Recipe(**DIT, **more).resolved()),
    "U-Net, flow, logit-normal": lambda **more: ddpm.prepare(
        ddpm.Recipe(**UNET, schedule="flow", times="logit_normal", **more).resolved()
    ),
    "DiT, flow, logit-normal": lambda **more: dit.prepare(dit.Recipe(**DIT, times="logit_normal", **more).resolved()),
}


def learn(task: ddpm.ImageTask, seconds: float) -> tuple[nn.Module, int]:
    """Train for `seconds` of one core. Return the moving average of the weights, and the number of updates."""
    model: Any = task.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.99), weight_decay=0.01)
    averages, start, step = [p.detach().clone() for p in model.parameters()], time.process_time(), 0
    while (share := (time.process_time() - start) / seconds) < 1 or not step:
        optimizer.param_groups[0]["lr"] = RATE * min(1, share / WARMUP) * (1 + math.cos(math.pi * share)) / 2
        found = task.objective(model, task.data.batch(step))
        optimizer.zero_grad()
        (found.total / found.weight).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        for average, parameter in zip(averages, model.parameters(), strict=True):
            average.lerp_(parameter.detach(), 1 - min(DECAY, step / (step + 10)))
    for average, parameter in zip(averages, model.parameters(), strict=True):
        parameter.data.copy_(average)
    return model.eval(), step


def drawn(model: nn.Module, steps: int, count: int) -> Tensor:
    """Draw pictures of the first seeds, in batches."""
    painter, request = PixelPipeline(model), ImageRequest("ddim", steps)
    parts = [range(first, min(first + 100, count)) for first in range(0, count, 100)]
    return torch.cat([painter.draw(request, part) for part in parts])


def measure(options: argparse.Namespace) -> tuple[dict[str, dict[str, list[float]]], dict[str, int], list[Tensor]]:
    """Return distances by way and steps, a number for each seed; numbers of parameters; pictures of the first seed."""
    distances: dict[str, dict[str, list[float]]] = {}
    sizes, rows, extract = dict[str, int](), list[Tensor](), extractor()
    real: Tensor | None = None
    for seed in options.seeds:
        for way, prepare in WAYS.items():
            task = prepare(data=options.data, size=options.size, batch_size=32, steps=1, seed=seed)
            pictures = task.parts.train
            real = extract(pictures.take(slice(None))) if real is None else real
            model, updates = learn(task, 60 * options.minutes)
            sizes[way] = sum(parameter.numel() for parameter in model.parameters())
            for steps in options.steps:
                found = drawn(model, steps, options.pictures)
                distance = 1e3 * kernel_distance(real, extract(found)).mean
                distances.setdefault(way, {}).setdefault(str(steps), []).append(round(distance, 2))
                if seed == options.seeds[0]:
                    rows.append(found[:SHOWN])
            last = {steps: values[-1] for steps, values in distances[way].items()}
            print(f"seed {seed}, {way}: {updates} updates, {last}", flush=True)
    return distances, sizes, rows


def sheet(rows: list[Tensor], ways: Sequence[str], steps: Sequence[int], path: Path) -> None:
    """Draw a row for each way and a column for each number of steps, with pictures of the same noise."""
    figure, axes = plt.subplots(len(ways), len(steps), figsize=(9.6, 0.5 * len(ways) + 0.3), squeeze=False)
    for cell, pictures in zip(axes.flat, rows, strict=True):
        cell.imshow(Image.open(io.BytesIO(grid(pictures, columns=SHOWN))), cmap="gray")
        cell.set(xticks=[], yticks=[])
    for cell, count in zip(axes[0], steps, strict=True):
        cell.set_title(f"{count} step{'s' * (count > 1)}", fontsize=9)
    for cell, way in zip(axes[:, 0], ways, strict=True):
        cell.set_ylabel(way.replace(", ", "\n"), rotation=0, ha="right", va="center", fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Train, draw, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--size", type=int, help="side of the pictures; unset: as the recipe")
    parser.add_argument("--minutes", type=float, default=2.0, help="of a core, for each network and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 50])
    parser.add_argument("--write", type=Path, help="a data file of docs/results/data")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    distances, sizes, rows = measure(options)
    columns = ["network", "parameters", *(f"{steps} step{'s' * (steps > 1)}" for steps in options.steps)]
    table = [
        [way, f"{sizes[way]:,}"]
        + [f"{sum(v) / len(v):.1f} ({min(v):.1f} to {max(v):.1f})" for v in distances[way].values()]
        for way in distances
    ]
    print(f"\n{machine()}\n")
    command = f"python benchmarks/flow.py --minutes {options.minutes:g} --seeds {' '.join(map(str, options.seeds))}"
    publish(options.write, "Few steps by a flow", command, columns, table, distances)
    if options.picture:
        sheet(rows, [*distances], options.steps, options.picture)


if __name__ == "__main__":
    main()
