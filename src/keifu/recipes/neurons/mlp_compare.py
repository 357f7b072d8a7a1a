"""Activations and losses compared: one multi-layer network for each pair, on the same data and from the same seed.

Paper: Rumelhart, Hinton and Williams (1986) use sigmoids and the squared error; each later activation is cited with its
function in keifu/layers/activations.py.
Command: keifu train mlp-compare --data spirals
Cost: a minute on 2 cores for the 36 pairs.
Expected: on the spirals, relu, its smooth variants and tanh reach 97% or more of the held-out rows with cross-entropy
or squared error, the absolute error is the slowest, and sigmoids need more steps than the 600.
"""

import io
import json
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keifu.data.classification.batches import TensorBatches
from keifu.data.classification.tables import ToyDataset
from keifu.data.progress import counted
from keifu.errors import UserError
from keifu.evaluation.plots import decision_boundary
from keifu.files import write_atomic
from keifu.ranges import Count, NotNegative, Seed
from keifu.recipes.neurons import mlp
from keifu.threads import on_threads
from keifu.training.job import RUN_FOLDER, Job, Jobs, JobStage, RunFacts
from keifu.training.loop import Summary
from keifu.training.run import checkpoint, metrics, report
from keifu.training.run.run_directory import read_recipe


@dataclass(frozen=True)
class Recipe:
    """Options of the run; unset ones are those of keifu train mlp for the same data."""

    data: str = "spirals"
    """moons, spirals, xor, mnist, or a CSV file: columns of numbers, and one of labels."""
    label: str | None = None
    """The CSV file's column of labels; unset: the last one."""
    activations: tuple[str, ...] = ("sigmoid", "tanh", "relu", "leaky_relu", "elu", "softplus", "gelu", "silu", "mish")
    """Activations of the hidden layers."""
    losses: tuple[str, ...] = ("cross_entropy", "binary_cross_entropy", "mean_squared_error", "mean_absolute_error")
    """Losses."""
    hidden: tuple[Count, ...] | None = None
    """The width of each hidden layer."""
    steps: Count | None = None
    """Updates of the weights of each network."""
    learning_rate: NotNegative | None = None
    """The highest rate of AdamW, the same for all."""
    seed: Seed = 0
    """Random seed of the weights and the order of the rows, the same for all."""

    def pairs(self) -> list[mlp.Recipe]:
        """Return the recipe of each network, loss by loss."""
        shared = ("data", "label", "hidden", "steps", "learning_rate", "seed")
        start = mlp.Recipe(**{name: vars(self)[name] for name in shared})
        return [replace(start, activation=name, loss=loss) for loss in self.losses for name in self.activations]


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training of each network. Print the table; write comparison.json, curves.png and, for two columns,
    boundaries.png.

    Each network has a run folder named after its pair. Stopped runs are resumed network by network.
    """
    out = yield RUN_FOLDER
    pairs = recipe.pairs()
    if not pairs:
        raise UserError("There is nothing to compare: give at least one of --activations and one of --losses.")
    subject = [mlp.check_learnable(pair) for pair in pairs][0]  # check every name before any training
    results = []
    for pair in counted("networks", pairs, "networks"):
        with redirect_stderr(io.StringIO()), on_threads(1):
            stage = JobStage(f"{pair.activation}-{pair.loss}")
            job = job_of(pair, subject, out / stage.folder)
            results.append(result_of(pair, subject, job, (yield replace(job, stage=stage))))
    table = decision_boundary.table(results)
    print(table)
    figure_names = ("activation", "loss", "accuracy", "seconds")
    facts = [{name: result._asdict()[name] for name in figure_names} for result in results]
    write_atomic(out / "comparison.json", json.dumps(facts, indent=1) + "\n")
    pictures = {"curves": decision_boundary.curves(results)}
    if len(subject.columns) == 2:
        pictures["boundaries"] = decision_boundary.boundaries(results, mlp.points(subject))
    text = "The same network learns the same rows from the same start, with each activation and each loss."
    report.write_page(out, f"Activations and losses on “{Path(recipe.data).stem}”", text, vars(recipe), pictures, table)
    print(f"The pictures are in {out / 'report.html'}.")


def job_of(pair: mlp.Recipe, subject: ToyDataset, directory: Path) -> Job:
    """Return the training of one network of the comparison, of which only the figures stay."""
    steps = mlp.settings(pair).steps
    then = read_recipe(directory)["options"] if checkpoint.steps(directory) else {}
    begun = replace(pair, steps=then.get("steps", pair.steps))  # a resumed run may have another number of steps
    different = {"steps": steps, "sample_every": 0, "save_every": 0, "evaluate_every": max(1, steps // 30)}
    settings = replace(mlp.settings(begun), **different)
    title = f"{pair.activation} and {pair.loss} on {pair.data}"
    return Job(
        model=mlp.network(pair, subject), objective=mlp.objective(pair.loss), settings=settings,
        data=TensorBatches(subject.training, subject.held_out, settings.batch_size, settings.seed),
        facts=RunFacts(title=title, options=vars(begun.resolved()), unit="rows"), save=lambda folder: None,
    )  # fmt: skip


def result_of(pair: mlp.Recipe, subject: ToyDataset, job: Job, summary: Summary) -> decision_boundary.Result:
    """Return the figures of a trained network."""
    model: Any = job.model
    lines = metrics.read(summary.directory)
    plane = None
    if len(subject.columns) == 2:
        plane = decision_boundary.class_shares_on(mlp.points(subject), model.predict_proba, 100)
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    accuracies = [(line["step"], line["validation_accuracy"]) for line in lines if "validation_accuracy" in line]
    accuracy = mlp.accuracy(model, subject.held_out)
    return decision_boundary.Result(pair.activation, pair.loss, accuracy, summary.seconds, losses, accuracies, plane)
