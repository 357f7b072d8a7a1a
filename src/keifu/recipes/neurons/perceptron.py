"""Perceptron (Rosenblatt, 1958): a linear classifier of two classes, trained on AND, OR or a CSV file.

Paper: F. Rosenblatt, "The perceptron: a probabilistic model for information storage and organization in the brain",
Psychological Review 65 (1958); the bound: A. Novikoff, "On convergence proofs on perceptrons" (1962).
Command: keifu train perceptron --data and
Cost: under a second on one core; a CSV file of thousands of rows and hundreds of columns, up to a minute.
Expected: AND and OR are learned without errors, in fewer corrections than the printed bound; XOR is refused, with a
proof that no line separates its classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from keifu import checkpoints
from keifu.data.classification import tables
from keifu.errors import UserError, shell
from keifu.evaluation.plots import decision_boundary
from keifu.files import write_atomic
from keifu.models import perceptron
from keifu.ranges import Count, Positive, check
from keifu.training.job import RUN_FOLDER, Jobs
from keifu.training.run.report import write_page

Plane = Float[Tensor, "dim1"]  # weights, then bias


@dataclass(frozen=True)
class Recipe:
    """Options of the run."""

    data: str = "and"
    """and, or, xor, moons, spirals, or a CSV file: columns of numbers, and one of labels with two values."""
    label: str | None = None
    """The CSV file's column of labels; unset: the last one."""
    rate: Positive = 1.0
    """Learning rate η. It scales the weights, which start at zero, and changes no decision."""
    max_updates: Count = 100_000
    """Most corrections; more are an error."""


@dataclass(frozen=True, eq=False)
class Lesson:
    """Table for the perceptron. inputs: the columns of the table, with mean 0 and deviation 1.

    This does not change which side of a plane a row is on, and columns with small numbers count as much as others. The
    toy sets are not scaled.
    """

    table: tables.Table
    mean: Float[Tensor, "dim"]
    scale: Float[Tensor, "dim"]

    @property
    def inputs(self) -> Float[Tensor, "rows dim"]:
        return (self.table.inputs - self.mean) / self.scale

    def unscaled(self, plane: Plane) -> Plane:
        """Convert the plane to the units of the table."""
        weights = plane[:-1] / self.scale
        return torch.cat([weights, (plane[-1] - weights @ self.mean)[None]])


def jobs(recipe: Recipe) -> Jobs:
    """Train, print the corrections and the bound, and save the perceptron and, for two columns, boundary.png.

    The rule needs no training loop, and nothing is resumed: it uses no random numbers, so a repetition gives the same
    result. Raises `UserError`, with the proof, if no plane separates the classes.
    """
    out = yield RUN_FOLDER
    lesson = prepare(recipe)
    table, targets = lesson.table, lesson.table.targets.double()
    proof = perceptron.separate(lesson.inputs, targets)
    if proof.separator is None:
        refuse(recipe, table, proof, out)
    print(
        f"{recipe.data}: {len(targets)} rows; widest margin γ = {proof.margin:.4g}, longest row R = {proof.radius:.4g}."
    )
    stages = list(learn(lesson, recipe))
    updates, plane = stages[-1]
    neuron = build_neuron(plane)
    if wrong := int((neuron(table.inputs) != targets).sum()):
        raise UserError(
            f"After {updates} corrections {wrong} of {len(targets)} rows are still wrong, and the bound is (R/γ)² = "
            f"{proof.bound:,.0f}: allow more with --max-updates."
        )
    checkpoints.save(neuron, None, out)
    text = (
        f"Learned after {updates} corrections; Novikoff's bound is (R/γ)² = {proof.bound:,.1f}.\n"
        f"The output is {table.classes[1]} where {formula(plane, table.columns)}, else {table.classes[0]}."
    )
    facts = {"corrections": updates, "bound": proof.bound, "margin γ": proof.margin, "longest row R": proof.radius}
    pictures = {"boundary": draw(lesson, stages)} if len(table.columns) == 2 else {}
    write_page(out, f"A perceptron learns “{Path(recipe.data).stem}”", text, facts | vars(recipe), pictures)
    print(f"{text}\nThe neuron is in {out}; report.html there shows how it learned.")


def refuse(recipe: Recipe, table: tables.Table, proof: perceptron.Separation, out: Path) -> NoReturn:
    """Raise an error with the reason why no plane separates the classes; for two columns, draw the reason."""
    text = refusal(recipe, table, proof)
    if proof.exact and len(table.columns) == 2:
        title = f"{Path(recipe.data).stem}: no line parts the classes"
        write_atomic(out / "proof.png", decision_boundary.crossing(table, proof.mixture, title))
        text += f" {out / 'proof.png'} shows it."
    raise UserError(text)


def prepare(recipe: Recipe) -> Lesson:
    """Read the recipe's table, which must have two classes."""
    check(recipe)
    table = tables.toy_table(recipe.data, recipe.label)
    if len(table.classes) != 2:
        raise UserError(
            f"One neuron parts two classes, and {recipe.data} has {len(table.classes)} ({', '.join(table.classes[:5])}"
            f"{', ...' if len(table.classes) > 5 else ''}): use keifu train mlp --data {shell(recipe.data)}"
        )
    if recipe.data in tables.TOYS:
        zeros = table.inputs.new_zeros(len(table.columns))
        return Lesson(table, zeros, zeros + 1)
    return Lesson(table, *tables.standardisation(table.inputs))


def learn(lesson: Lesson, recipe: Recipe) -> Iterator[tuple[int, Plane]]:
    """Yield (number of corrections, plane in the table's units). For two columns, first and after each correction;
    otherwise only at the end, because nothing is drawn."""
    neuron = perceptron.build(perceptron.Config(len(lesson.table.columns)))
    is_plane, updates = len(lesson.table.columns) == 2, 0
    corrections = perceptron.learn(neuron, lesson.inputs, lesson.table.targets.double(), recipe.rate)
    if is_plane:
        yield 0, plane_of(neuron)
    for updates, _ in enumerate(islice(corrections, recipe.max_updates), 1):
        if is_plane:
            yield updates, lesson.unscaled(plane_of(neuron))
    if not is_plane:
        yield updates, lesson.unscaled(plane_of(neuron))


def plane_of(neuron: perceptron.Perceptron) -> Plane:
    """Return the weights, then the bias."""
    return torch.cat([neuron.weight, neuron.bias[None]])


def build_neuron(plane: Plane) -> perceptron.Perceptron:
    """Return a perceptron with that plane."""
    neuron = perceptron.build(perceptron.Config(len(plane) - 1))
    neuron.weight.copy_(plane[:-1])
    neuron.bias.copy_(plane[-1])
    return neuron


def formula(plane: Plane, columns: tuple[str, ...]) -> str:
    """Format the perceptron as a formula: weighted sum and threshold -b."""
    *weights, bias = plane.tolist()
    terms = " + ".join(f"{weight:.4g}·{name}" for weight, name in zip(weights, columns, strict=True))
    return f"{terms if len(weights) <= 6 else 'Σ w x'} ≥ {-bias + 0.0:.4g}".replace("+ -", "- ")


def refusal(recipe: Recipe, table: tables.Table, proof: perceptron.Separation) -> str:
    """Describe that the data cannot be separated, the proof, and what to use instead."""
    advice = f"Use keifu train mlp --data {shell(recipe.data)}: a hidden layer can part them."
    if not proof.exact:
        return (
            f"{recipe.data} is not linearly separable as far as float64 can tell: no plane leaves a margin above "
            f"{proof.margin:.1e} (the longest row is {proof.radius:.3g}). {advice}"
        )
    sides = [describe(table, proof.mixture, label) for label in (1, 0)]
    shared = 2 * ((proof.mixture * (table.targets == 1)) @ table.inputs)
    where = f" {numbers(shared.tolist())}" if len(shared) <= 6 else ""
    return (
        f"{recipe.data} is not linearly separable, so no single neuron can learn it: the point{where} is a mixture "
        f"of {sides[0]}, and also one of {sides[1]}. {advice}"
    )


def describe(table: tables.Table, mixture: Float[Tensor, "rows"], label: int) -> str:
    """Describe the rows of a class whose combination is the common point."""
    rows = table.inputs[(table.targets == label) & (mixture > 0)].tolist()
    if len(rows) > 4 or len(table.columns) > 6:
        return f"{len(rows)} rows of class {table.classes[label]}"
    return f"{', '.join(map(numbers, rows))} of class {table.classes[label]}"


def numbers(row: list[float]) -> str:
    """Format a row of numbers for people."""
    return f"({', '.join(f'{value:.4g}' for value in row)})"


def draw(lesson: Lesson, stages: list[tuple[int, Plane]]) -> bytes:
    """Draw the boundary at stages of learning, as PNG."""
    table = lesson.table
    panels = []
    for index in decision_boundary.spread(range(len(stages))):
        updates, plane = stages[index]
        neuron = build_neuron(plane)
        wrong = int((neuron(table.inputs) != table.targets).sum())
        shares = decision_boundary.class_shares_on(
            table, lambda x, neuron=neuron: torch.stack([1 - neuron(x), neuron(x)], 1), 400
        )
        title = f"{updates} correction{'' if updates == 1 else 's'}\n{wrong} of {len(table.inputs)} wrong"
        panels.append((title, shares))
    return decision_boundary.strip(table, panels)
