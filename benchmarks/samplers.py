"""Quality of each sampler with few steps: the kernel distance of drawn pictures to a run's training pictures.

python benchmarks/samplers.py RUN --data emoji [--samplers ddim dpm++-2m ...] [--evaluations 5 10 20 50 100 1000]
    [--pictures 512] [--seeds 0] [--distinct] [--batch-size 64] [--write FILE] [--picture PNG]

All samplers begin with the same noise, and RUN's model draws as many pictures with each. The cost is the number of
network evaluations: heun has two per step, and plms one more than steps. Each seed draws other pictures. Below the
table is the distance of the held-out pictures, which a sampler cannot be expected to surpass. A model with classes
draws each of them equally often. Figures with different features cannot be compared, so the features are named.
"""

import argparse
from pathlib import Path
from statistics import mean

import torch
from _charts import chart
from _drawn import beside
from _results import of_seeds, publish, typed
from _rounds import machine
from torch import Tensor

from keifu.data.progress import counting
from keifu.evaluation.images.distances import kernel_distance
from keifu.evaluation.images.features import Extractor
from keifu.inference.images.pixel_diffusion import ImageRequest, PixelPipeline
from keifu.inference.images.samplers import SAMPLERS

Found = dict[str, dict[int, list[float]]]
ETAS = {"ddim, η = 1": ("ddim", 1.0)}  # additional rows


def steps_for(sampler: str, evaluations: int) -> int:
    """Return the steps of a sampler for this many evaluations."""
    return {"heun": (evaluations + 1) // 2, "plms": max(1, evaluations - 1)}.get(sampler, evaluations)


def drawn(model, sampler: str, eta: float, steps: int, all_seeds: range, batch_size: int) -> Tensor:
    """Draw a picture with each seed. Classes alternate."""
    classes, count = model.config.n_classes, len(all_seeds)
    parts = []
    with counting(f"{sampler}, {steps} steps", count, "pictures") as advance:
        for label in range(max(1, classes)):
            seeds = all_seeds[label :: max(1, classes)]
            for first in range(0, len(seeds), batch_size):
                wanted = ImageRequest(sampler, steps, eta=eta, label=label if classes else None)
                parts.append(PixelPipeline(model).draw(wanted, seeds[first : first + batch_size]))
                advance(sum(map(len, parts)))
    return torch.cat(parts)


def measure(options: argparse.Namespace, model, extract: Extractor, real: Tensor) -> Found:
    """Return 1000 times the kernel distances of the seeds, by row and number of evaluations."""
    rows = {name: (name, 0.0) for name in options.samplers} | (ETAS if "ddim" in options.samplers else {})
    found: Found = {name: {} for name in rows}
    for evaluations in options.evaluations:
        for name, (sampler, eta) in rows.items():
            steps = steps_for(sampler, evaluations)
            most = model.noise.steps - (sampler in ("dpm++-2m", "dpm++-2m-sde", "unipc"))
            if steps > most:
                continue
            parts = [range(options.pictures * seed, options.pictures * (seed + 1)) for seed in options.seeds]
            sets = [extract(drawn(model, sampler, eta, steps, part, options.batch_size)) for part in parts]
            found[name][evaluations] = [1e3 * kernel_distance(real, each).mean for each in sets]
            print(f"{name}, {evaluations} evaluations: {found[name][evaluations]}", flush=True)
    return found


def show(found: Found, floor: float, features: str, options: argparse.Namespace) -> None:
    """Print the table, and write it if a file is given."""
    print(f"{machine()}\n\n1000 · kernel distance ({features}) by evaluations of the network\n")
    rows, values = of_seeds({name: [*row.values()] for name, row in found.items()}, ".2f")
    columns = ["evaluations", *map(str, options.evaluations)]
    usual = {"samplers": [], "evaluations": [], "pictures": 0, "seeds": [0], "distinct": False}
    command = typed(f"samplers.py {options.run} --data {options.data}", vars(options), usual)
    publish(options.write, "Samplers", command, columns, rows, values)
    print(f"\nHeld-out pictures: {1e3 * floor:.2f}")


def plot(found: Found, floor: float, features: str, path: Path) -> None:
    """Draw quality over evaluations on logarithmic axes. If the distance of the held-out pictures is not positive, it
    is only printed."""
    with chart(path, (7, 4.5), legend=7, dpi=150) as axes:
        for name, row in found.items():
            axes.plot(list(row), [mean(seeds) for seeds in row.values()], marker="o", markersize=3, label=name)
        axes.set(xscale="log", yscale="log", xlabel="evaluations of the network", ylabel="1000 · kernel distance")
        if floor > 0:
            axes.axhline(1e3 * floor, color="grey", linestyle=":", label="held-out pictures")
        ticks = sorted({evaluations for row in found.values() for evaluations in row})
        axes.set_xticks(ticks, [f"{each:,}" for each in ticks])
        axes.minorticks_off()
        axes.set_title(f"{features}; held-out pictures {1e3 * floor:.2f}", fontsize=8)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=[*SAMPLERS])
    parser.add_argument("--evaluations", nargs="+", type=int, default=[5, 10, 20, 50, 100])
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--distinct", action="store_true", help="as the run's --distinct")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--write", type=Path, help="a data file of docs/results/data")
    parser.add_argument("--picture", type=Path, help="write a plot")
    return parser.parse_args()


def main() -> None:
    """Draw, measure, print and plot."""
    options = arguments()
    model, extract, real, floor = beside(options.run, options.data, options.distinct)
    found = measure(options, model, extract, real)
    show(found, floor, extract.name, options)
    if options.picture:
        plot(found, floor, extract.name, options.picture)


if __name__ == "__main__":
    main()
