"""Two objectives of the same diffusion network: the paper's, and the one that keifu takes by default.

python benchmarks/objectives.py FOLDER [--steps 1500] [--seeds 0 1 2] [--pictures 200] [--write] [--picture PNG]

A U-Net of 0.7 M parameters learns the classes of the digits, once with the objective of Ho et al. (2020), noise under
a linear schedule and a plain squared error, and once with keifu's, velocity under a cosine schedule weighted by
min-SNR. Steps, pictures, optimizer and sampler are the same. The paper's objective is also trained at the paper's
rate. Each network draws all classes equally often with guidance 2, once by the paper's sampler and once by keifu's
default one, and the packaged `network` reads the pictures. A network whose folder is complete is not trained again.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _results import print_rows, share_of, write_table
from torch import Tensor

import keifu
from keifu.data.images.grid import grid
from keifu.inference.images.pixel_diffusion import ImageRequest, PixelPipeline
from keifu.recipes.images import ddpm
from keifu.recipes.running import train_job

SECTION = "Two objectives"
DATA = Path(__file__).parents[1] / "docs/results/data/drawing.json"
PAPER: dict[str, Any] = {"schedule": "linear", "target": "noise", "weighting": "simple", "variance": "fixed_large"}
WAYS: dict[str, dict[str, Any]] = {
    "keifu's objective": {"learning_rate": 1e-3},
    "the paper's objective": PAPER | {"learning_rate": 1e-3},
    "the paper's objective and rate": PAPER | {"learning_rate": 2e-4},
}
SAMPLERS = {"100 steps of DDPM's sampler": ("ddpm", 100), "50 steps of DDIM": ("ddim", 50)}
GUIDANCE, SHOWN = 2.0, 4  # pictures of a class on the sheet


def train(way: str, seed: int, steps: int, folder: Path) -> Any:
    """Train a network, unless its folder has the facts of a complete run. Return the network."""
    facts = folder / "facts.json"
    if not facts.is_file():
        start = time.process_time()
        options = ddpm.Recipe("mnist", classes=True, dim=16, steps=steps, seed=seed, **WAYS[way]).resolved()
        settings = partial(ddpm.settings, options)
        train_job(ddpm.job_of(options, ddpm.prepare(options), settings, ("weighting", "gamma"), "DDPM", ""), folder)
        facts.write_text(json.dumps({"core minutes": round((time.process_time() - start) / 60, 2)}), encoding="utf-8")
    return keifu.load(folder)[0]


def drawn(model: Any, sampler: str, steps: int, count: int) -> list[Tensor]:
    """Draw each class with the seeds from 0 on."""
    request = ImageRequest(sampler, steps, guidance=GUIDANCE)
    each = range(count // model.config.n_classes)
    return [PixelPipeline(model).draw(replace(request, label=label), each) for label in range(model.config.n_classes)]


def readings(pictures: Sequence[Tensor], reader: Any) -> list[str]:
    """Return the class that the classifier reads in each picture, as a row of names for each requested class."""
    rows = []
    for each in pictures:
        pixels = each[:, 0].flatten(1) / 255
        rows.append("".join(reader.classes[index] for index in reader.predict_proba(pixels).argmax(-1).tolist()))
    return rows


def main() -> None:
    """Train, draw and read; print the shares and write the readings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=200, help="by each network; the classes get equally many")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    reader, _ = keifu.load("network")
    found: dict[str, dict[str, list[list[str]]]] = {way: {name: [] for name in SAMPLERS} for way in WAYS}
    shown = []
    for seed in options.seeds:
        for way in WAYS:
            model = train(way, seed, options.steps, options.folder / f"{list(WAYS).index(way)}-{seed}")
            for name, (sampler, steps) in SAMPLERS.items():
                pictures = drawn(model, sampler, steps, options.pictures)
                found[way][name].append(readings(pictures, reader))
                print(seed, way, name, share(found[way][name][-1:], reader), flush=True)
                if seed == options.seeds[0] and name in list(SAMPLERS)[:1]:
                    shown += [each[0] for each in pictures] + [each[1] for each in pictures]
    rows = [[way, *(share(seeds, reader) for seeds in by_sampler.values())] for way, by_sampler in found.items()]
    print_rows(rows)
    if options.picture:
        options.picture.write_bytes(grid(torch.stack(shown), columns=len(reader.classes)))
    if options.write:
        command = "python benchmarks/objectives.py FOLDER --write"
        columns = ["", *SAMPLERS]
        values = {"classes": list(reader.classes), "readings by seed and class": found, "reader": "network"}
        write_table(DATA, SECTION, command, columns, rows, values)


def share(seeds: Sequence[Sequence[str]], reader: Any) -> str:
    """Return the share of pictures that are read as asked, with its interval, of all seeds together, and then the
    lowest and the highest seed."""
    right = [sum(row.count(name) for name, row in zip(reader.classes, rows, strict=True)) for rows in seeds]
    total = sum(map(len, seeds[0]))
    shares = [each / total for each in right]
    return f"{share_of(sum(right), total * len(seeds))}; {min(shares):.1%} to {max(shares):.1%}"


if __name__ == "__main__":
    main()
