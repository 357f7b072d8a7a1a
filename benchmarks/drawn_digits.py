"""Distances of drawn digits to real ones, for several sets of drawings.

python benchmarks/drawn_digits.py [--pictures 300] [--sets 3] [--write]

Each set is drawn and measured by the evaluation of the packaged `digits`, with other seeds. Held-out digits, measured
in the same way, show the best values that are possible.
"""

import argparse
import json
import tempfile
from pathlib import Path

from _results import print_rows, write_table
from _rounds import spread

from keifu import cli

DATA = Path(__file__).parents[1] / "docs/results/data/packaged.json"
COMMAND = "keifu evaluate digits --on mnist --metric classes --judge network --guidance 2 --sampler dpm++-2m"
SECTION = "Distance of drawn digits"
COLUMNS = ("features", "drawn: mean of three sets (lowest to highest)", "held-out digits")
FEATURES = "kernel distance x 1000", "precision", "recall"
HELD_OUT = " of held-out pictures"


def measured(seed: int, pictures: int, file: Path) -> dict[str, float]:
    """Return the figures of a set of drawings and of the held-out digits. seed: that of the first drawing."""
    words = [*COMMAND.split()[1:], "--limit", str(pictures), "--seed", str(seed), "--output", str(file)]
    cli.main(words)
    figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
    return {name: figures[name] for feature in FEATURES for name in (feature, feature + HELD_OUT)}


def rows(sets: list[dict[str, float]]) -> list[list[str]]:
    """Return a row for each feature."""
    (held_out,) = {tuple(figures[name + HELD_OUT] for name in FEATURES) for figures in sets}
    drawn = [spread([figures[name] for figures in sets], ".3f") for name in FEATURES]
    return [[*cells, f"{best:.3f}"] for *cells, best in zip(FEATURES, drawn, held_out, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--sets", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    seeds = [number * options.pictures for number in range(options.sets)]
    with tempfile.TemporaryDirectory() as folder:
        sets = {str(seed): measured(seed, options.pictures, Path(folder) / f"{seed}.json") for seed in seeds}
    print_rows(table := rows([*sets.values()]))
    if options.write:
        command = "python benchmarks/drawn_digits.py --write"
        write_table(DATA, SECTION, command, COLUMNS, table, {"by first seed": sets})


if __name__ == "__main__":
    main()
