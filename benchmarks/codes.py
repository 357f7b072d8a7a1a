"""Codes in use: a VQ-VAE of digits whose codes learn by gradient, as moving averages, and with unused codes moved.

python benchmarks/codes.py [--steps 200] [--seeds 0 1 2] [--write JSON] [--picture PNG]

The networks, the digits and their order are the same; each step has 16 digits of 7 x 7 codes. After the training the
held-out digits are encoded. "in use" is the share of the 256 codes that occur in them. "perplexity" is the exponential
of the entropy of the codes' frequencies: 256 if all are equally frequent. "squared error" is that of their
reconstruction, of numbers from -1 to 1. Each of the nine trainings takes some 15 seconds of one core.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from _results import of_seeds, print_rows, typed, usual, write_table
from _rounds import machine
from torch import Tensor

from keifu.data.images.grid import grid
from keifu.data.images.io import to_bytes, to_signed
from keifu.models.diffusion import vq_vae
from keifu.recipes.images import vq
from keifu.training.settings import Settings
from keifu.training.trainer import Trainer

SIZES = vq_vae.Config(
    size=28, channels=1, latent_channels=16, widths=(8, 16, 32), n_residual_blocks=1, codebook_size=256, norm_groups=8
)
DECAY = 0.97  # of the moving averages; the recipe's 0.99 is for more steps
WAYS: dict[str, dict[str, Any]] = {
    "gradient": {"codebook": "gradient"},
    "moving average": {"decay": DECAY, "least_usage": 0.0},
    "moving average, unused codes moved": {"decay": DECAY},
}
COLUMNS = ("codes learn by", "in use, %", "perplexity", "1000 · squared error")
SHOWN = 16  # digits of a row of the picture


def spread_over(pictures: Tensor) -> Tensor:
    """Return some pictures from the beginning to the end, so that all digits are among them."""
    return pictures[:: len(pictures) // SHOWN][:SHOWN]


@torch.no_grad()
def figures(model: Any, pictures: Tensor) -> tuple[list[float], Tensor]:
    """Return the figures of held-out pictures, and the first ones again from their codes."""
    signed = to_signed(pictures)
    codes = model.encode(signed)
    shares = torch.bincount(codes.flatten(), minlength=SIZES.codebook_size) / codes.numel()
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum()
    again = model.decode(codes)
    error = (again - signed).square().mean()
    values = [100 * float((shares > 0).float().mean()), float(entropy.exp()), 1000 * float(error)]
    return values, to_bytes(spread_over(again))


def measure(options: argparse.Namespace) -> tuple[dict[str, list[list[float]]], list[Tensor]]:
    """Return by way the values of the seeds for each figure, and pictures of the first seed."""
    found: dict[str, list[list[float]]] = {}
    pictures = list[Tensor]()
    for seed in options.seeds:
        for name, different in WAYS.items():
            settings = Settings(
                steps=options.steps, batch_size=16, micro_batch=16, learning_rate=1e-3, warmup=min(20, options.steps),
                final_ratio=0.0, weight_decay=0.0, betas=(0.9, 0.99), precision="float32", seed=seed,
            )  # fmt: skip
            task = vq.prepare(vq.Recipe("mnist", SIZES, training=settings, **different))
            trainer, start = Trainer(task.model.train(), task.objective, settings), time.process_time()
            for step in range(options.steps):
                gradient = trainer.gradient(step, task.data.batch(step))
                assert gradient is not None
                trainer.update(gradient)
            seconds = time.process_time() - start
            held = torch.cat([part.take(slice(None)) for part in (task.parts.validation, task.parts.test)])
            values, again = figures(task.model.eval(), held)
            for column, value in zip(found.setdefault(name, [[] for _ in values]), values, strict=True):
                column.append(value)
            if seed == options.seeds[0]:
                pictures += [again] if pictures else [spread_over(held), again]
            print(f"seed {seed}, {name}: {[round(value, 4) for value in values]}, {seconds:.0f} s", flush=True)
    return found, pictures


def main() -> None:
    """Train, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--write", type=Path, help="a data file of docs/results/data")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found, pictures = measure(options)
    rows, values = of_seeds(found, ".1f")
    print(f"{machine()}\n")
    print_rows([COLUMNS, *rows])
    if options.write:
        write_table(
            options.write, "Codes in use", typed("codes.py", vars(options), usual(parser)), COLUMNS, rows, values
        )
    if options.picture:
        options.picture.write_bytes(grid(torch.cat(pictures), columns=SHOWN))


if __name__ == "__main__":
    main()
