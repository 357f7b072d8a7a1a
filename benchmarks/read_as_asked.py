"""Share of drawn digits that a classifier assigns to the requested class, picture by picture.

python benchmarks/read_as_asked.py [--pictures 200] [--out docs/results/data/read_as_asked.json]

Each class is drawn by the command of the README, `keifu draw digits --label CLASS --guidance 2`, with the seeds from 0
on. The packaged `network` classifies the pictures. The file has the class of each picture.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from _rounds import machine

import keifu
from keifu import cli
from keifu.data.images.io import read_image

COMMAND = "keifu draw digits --label {label} --guidance 2"
PACKAGES = ("keifu", "torch")


def draw(label: str, count: int, folder: Path) -> Iterator[torch.Tensor]:
    """Run the README's command for the seeds 0 to `count` - 1. Yield each picture as numbers from 0 to 1."""
    out = folder / f"{label}.png"
    words = COMMAND.format(label=label).split()[1:]
    cli.main([*words, "--seed", "0", "--count", str(count), "--out", str(out)])
    for number in range(1, count + 1):
        image = read_image(folder / f"{label}-{number}.png").image.convert("L")
        yield torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) / 255


def main() -> None:
    """Draw and classify; print the share and write the classes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200, help="in all; the classes get equally many")
    parser.add_argument("--out", type=Path, help="JSON file with the readings")
    options = parser.parse_args()
    reader, _ = keifu.load("network")
    each_class = options.pictures // len(reader.classes)
    readings = {}
    with tempfile.TemporaryDirectory() as folder:
        for label in reader.classes:
            pixels = torch.stack(list(draw(label, each_class, Path(folder))))
            readings[label] = [reader.classes[index] for index in reader.predict_proba(pixels).argmax(-1).tolist()]
    right = sum(readings[label].count(label) for label in readings)
    count = each_class * len(readings)
    print(f"{machine()}\n{right} of {count} pictures are read as asked ({right / count:.1%}).")
    if options.out:
        record = {
            "command": f"python benchmarks/read_as_asked.py --pictures {count}",
            "draws": COMMAND.format(label="CLASS"),
            "reads": "network",
            "seeds": [0, each_class - 1],
            "machine": machine(),
            "versions": {name: version(name) for name in PACKAGES},
            "right": right,
            "pictures": count,
            "read_as": readings,
        }
        options.out.write_text(json.dumps(record, indent=1) + os.linesep, encoding="utf-8")


if __name__ == "__main__":
    main()
