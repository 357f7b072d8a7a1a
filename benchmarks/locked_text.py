"""Names of emoji from new families, with two text sides: word counts, and a frozen sentence encoder.

python benchmarks/locked_text.py [--part test] [--out docs/results/data/text_and_pictures.json]

Both have the same picture side without a network: histograms of 64 colours, histograms of oriented gradients (Dalal and
Triggs, 2005) in cells of 12 and of 24 pixels, and the picture in 8 x 8 pixels. Kernel ridge regression from these
features predicts a picture's words (TF-IDF), or the embedding of its English name by all-MiniLM-L6-v2. The encoder is
not trained, as in LiT (Zhai et al., 2021). Features and ridge were chosen on the validation families. Each picture of
the part is once in the gallery; intervals are 95%, by resampling families.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _results import write_table
from _rounds import machine
from torch import Tensor

from keifu import checkpoints
from keifu.data.images.dataset import ImageDataset, read_images
from keifu.data.images.splits import split
from keifu.evaluation.images.counting import WordCounter, color_histograms, counted_points
from keifu.evaluation.images.retrieval import both_ranks, equal
from keifu.evaluation.intervals import bootstrap
from keifu.inference.embeddings.encoders import embed

SIZE, ANGLES, RIDGE = 72, 9, 0.03
WAYS = {
    "counting": "colours and words, nearest neighbours",
    "words": "ridge to words",
    "locked": "ridge to MiniLM, locked",
}


def gradients(pictures: Tensor, cell: int) -> Tensor:
    """Return histograms of gradient directions, weighted by magnitude, in cells of `cell` pixels."""
    grey = F.pad(pictures.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]
    down = grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
    angle = (torch.atan2(down, across) % np.pi / np.pi * ANGLES).long().clamp(max=ANGLES - 1)
    sizes = torch.zeros(len(pictures), ANGLES, SIZE, SIZE).scatter_(1, angle, torch.hypot(across, down))
    return F.normalize(F.avg_pool2d(sizes, cell).flatten(1), dim=-1)


def features(pictures: ImageDataset) -> Tensor:
    pixels = torch.cat(list(pictures.batches(256))).float() / 255
    small = F.normalize(F.avg_pool2d(pixels, 9).flatten(1) - 0.7, dim=-1)
    return torch.cat([color_histograms(pictures), gradients(pixels, 12), gradients(pixels, 24), small], 1)


def regress(known: Tensor, searched: Tensor, values: Tensor) -> Tensor:
    """Fit kernel ridge regression with a Gaussian whose width is the median distance. Return the predictions for
    `searched`."""
    distances = torch.cdist(known, known).square()
    width = distances.median()
    weights = torch.linalg.solve((-distances / width).exp() + RIDGE * torch.eye(len(known)), values)
    return F.normalize((-torch.cdist(searched, known).square() / width).exp() @ weights, dim=-1)


def right(train: ImageDataset, searched: ImageDataset) -> dict[str, dict[str, list[int]]]:
    """Return by way whether each picture finds its name first, and each name its picture."""
    names, asked = (list(part.texts("en")) for part in (train, searched))
    counter, (encoder, tokenizer) = WordCounter(names, "en"), checkpoints.load("minilm", torch.float32)
    embedded = embed(encoder, tokenizer, [*names, *asked])
    centred = F.normalize(embedded - embedded[: len(names)].mean(0), dim=-1)
    sides = {"words": (counter(names), counter(asked)), "locked": centred.split([len(names), len(asked)])}
    known, new = features(train), features(searched)
    points: dict[str, Any] = {"counting": counted_points(train, searched, "en")}
    for way, (taught, wanted) in sides.items():
        both = regress(known, new, taught), wanted
        points[way] = both, both
    ranks = {way: both_ranks(*both, equal(asked)) for way, both in points.items()}
    return {way: {what: [int(r == 1) for r in rank] for what, rank in each.items()} for way, each in ranks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("validation", "test"), default="test")
    parser.add_argument("--out", type=Path, help="a data file of docs/results/data")
    options = parser.parse_args()
    parts = split(read_images("emoji", SIZE, 3))
    searched = getattr(parts, options.part).distinct()
    families = searched.families.tolist()
    found = right(parts.train.distinct(), searched)
    about = f"{len(searched)} emoji of {len({*families})} new families, en, R@1"
    columns = [about, "name by picture", "picture by name"]
    rows = []
    for way, each in found.items():
        ends = {what: bootstrap(np.array(hits), clusters=families) for what, hits in each.items()}
        cells = [f"{np.mean(hits):.1%} ({ends[what][0]:.1%} to {ends[what][1]:.1%})" for what, hits in each.items()]
        rows.append([WAYS[way], *cells])
    print(f"{machine()}\n\n| {' | '.join(columns)} |\n|---|---:|---:|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    if options.out:
        command, section = "python benchmarks/locked_text.py", "A locked text side"
        values: dict[str, Any] = {
            way: {what: "".join(map(str, hits)) for what, hits in each.items()} for way, each in found.items()
        }
        write_table(options.out, section, command, columns, rows, values | {"families": families})


if __name__ == "__main__":
    main()
