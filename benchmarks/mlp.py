"""keifu's multi-layer network compared with scikit-learn's MLPClassifier: same digits, split and sizes, several seeds.

    python benchmarks/mlp.py --hidden 64 32
    python benchmarks/mlp.py --tuned --json docs/results/data/neurons.json

Both are trained on 4,000 MNIST digits and tested on the other 1,000. keifu runs like `keifu train mlp --data mnist
--hidden ...`, through the training loop with its log, validation and state; scikit-learn has its default settings. Runs
alternate, so that a busy machine slows both. Needs scikit-learn (development dependencies).

--tuned gives scikit-learn the L2 penalty and learning rate that read most of 800 of the 4,000 digits, after it learned
the others with seed 0. It then learns all 4,000 with each seed. keifu does not run.
"""

import argparse
import itertools
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from _results import write_table
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from keifu import checkpoints
from keifu.data.classification.tables import ToyDataset
from keifu.models.mlp import MLP
from keifu.recipes.neurons import mlp
from keifu.recipes.running import run_jobs

SECTION, COLUMNS = (
    "The neuron and the network",
    ["", "right, of 1,000 held-out digits", "seconds", "time, to scikit-learn's"],
)

TUNED = "scikit-learn with tuned settings"
ALPHAS, RATES = (0.0001, 0.1, 1.0), (0.001, 0.0003)


def ours(learned: ToyDataset, hidden: tuple[int, ...], seed: int) -> tuple[float, float]:
    """Return held-out accuracy and seconds of one run."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        run_jobs(mlp.jobs(mlp.Recipe("mnist", hidden=hidden, seed=seed)), out)
        seconds = time.perf_counter() - start
        model = checkpoints.load_model(out)
    assert isinstance(model, MLP)
    return mlp.accuracy(model, learned.held_out), seconds


def fitted(inputs: Tensor, targets: Tensor, hidden: tuple[int, ...], seed: int, **settings: float) -> MLPClassifier:
    """Return scikit-learn's network after training."""
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        return MLPClassifier(hidden, random_state=seed, **settings).fit(inputs.numpy(), targets.numpy())


def tuned(learned: ToyDataset, hidden: tuple[int, ...], seeds: int) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Return the best settings of scikit-learn's network, and its right answers of 800 digits, and of 1,000 by seed."""
    inputs, targets = learned.training.inputs, learned.training.targets
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    kept, asked = order[800:], order[:800]
    right = dict[tuple[float, float], int]()
    for alpha, rate in itertools.product(ALPHAS, RATES):
        model = fitted(inputs[kept], targets[kept], hidden, 0, alpha=alpha, learning_rate_init=rate)
        right[alpha, rate] = int((model.predict(inputs[asked].numpy()) == targets[asked].numpy()).sum())
        print(f"alpha {alpha}, learning rate {rate}: {right[alpha, rate]} of 800", flush=True)
    alpha, rate = max(right, key=lambda pair: right[pair])
    settings = {"alpha": alpha, "learning_rate_init": rate}
    found = []
    for seed in range(seeds):
        model = fitted(inputs, targets, hidden, seed, **settings)
        found.append(int((model.predict(learned.held_out.inputs.numpy()) == learned.held_out.targets.numpy()).sum()))
        print(f"seed {seed}: {found[-1]} of {len(learned.held_out)}", flush=True)
    return settings, {"of 800, by setting": list(right.values()), "of 1,000, by seed": found}


def theirs(learned: ToyDataset, hidden: tuple[int, ...], seed: int) -> tuple[float, float]:
    """Return the accuracy and the training seconds of scikit-learn's network."""
    start = time.perf_counter()
    model = fitted(learned.training.inputs, learned.training.targets, hidden, seed)
    seconds = time.perf_counter() - start
    return float(model.score(learned.held_out.inputs.numpy(), learned.held_out.targets.numpy())), seconds


def ratio(run: list[tuple[float, float]], beside: list[tuple[float, float]]) -> str:
    """Return the ratio of the median times, with the smallest and the largest ratio of a pair of runs in brackets."""
    medians = [statistics.median(seconds for _, seconds in each) for each in (run, beside)]
    pairs = sorted(one / other for (_, one), (_, other) in zip(run, beside, strict=True))
    return f"{medians[0] / medians[1]:.2f} ({pairs[0]:.2f} to {pairs[-1]:.2f})"


def rows(runs: dict[str, list[tuple[float, float]]]) -> list[list[str]]:
    """Return the rows of the table in docs/results/neurons.md."""
    found = []
    for name, run in runs.items():
        right = ", ".join(f"{accuracy:.1%}" for accuracy, _ in run)
        seconds = f"{statistics.median(seconds for _, seconds in run):.1f}"
        found.append([name, right, seconds, "1.00" if name == "scikit-learn" else ratio(run, runs["scikit-learn"])])
    return found


def write_tuned(learned: ToyDataset, hidden: tuple[int, ...], seeds: int, path: Path | None) -> None:
    """Tune scikit-learn, print its accuracy and write the table."""
    settings, values = tuned(learned, hidden, seeds)
    shares = [right / 1000 for right in values["of 1,000, by seed"]]
    cells = ", ".join(f"{share:.1%}" for share in shares)
    print(f"{settings}: {cells}, mean {statistics.mean(shares):.2%}")
    if path:
        row = [f"{settings['alpha']:g}", f"{settings['learning_rate_init']:g}", cells, f"{statistics.mean(shares):.1%}"]
        columns = ["L2 penalty (alpha)", "learning rate", "right, of 1,000 held-out digits", "mean"]
        write_table(path, TUNED, f"python benchmarks/mlp.py --tuned --json {path}", columns, [row], values)


def main() -> None:
    """Print each pair of runs, then the mean accuracies and the ratio of median times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 256])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="Where the table is written, with the command and the machine.")
    parser.add_argument("--tuned", action="store_true", help="only scikit-learn, with tuned settings")
    options = parser.parse_args()
    hidden = tuple(options.hidden)
    learned = mlp.check_learnable(mlp.Recipe("mnist"))
    if options.tuned:
        return write_tuned(learned, hidden, options.seeds, options.json)
    runs = {"keifu": [], "scikit-learn": []}
    for seed in range(options.seeds):
        runs["keifu"].append(ours(learned, hidden, seed))
        runs["scikit-learn"].append(theirs(learned, hidden, seed))
        print(
            f"seed {seed}:", "  ".join(f"{name} {run[-1][0]:.1%} in {run[-1][1]:.1f} s" for name, run in runs.items())
        )
    print(f"hidden {hidden}, {options.seeds} seeds, {torch.get_num_threads()} threads")
    for name, run in runs.items():
        accuracies, seconds = zip(*run, strict=True)
        mean = statistics.mean(accuracies)
        print(f"{name:14}{mean:.2%} held-out accuracy ({min(accuracies):.1%} to {max(accuracies):.1%}), "
              f"median {statistics.median(seconds):.1f} s")  # fmt: skip
    print(f"time keifu / scikit-learn: {ratio(runs['keifu'], runs['scikit-learn'])}")
    if options.json:
        right = {f"{name}, right of 1,000": [round(1000 * each) for each, _ in run] for name, run in runs.items()}
        seconds = {f"{name}, seconds": [each for _, each in run] for name, run in runs.items()}
        values = {"seeds": [*range(options.seeds)], **right, **seconds}
        command = f"python benchmarks/mlp.py --json {options.json}"
        write_table(options.json, SECTION, command, COLUMNS, rows(runs), values)


if __name__ == "__main__":
    main()
