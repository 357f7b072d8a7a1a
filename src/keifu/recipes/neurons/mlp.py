"""Multi-layer network (Rumelhart, Hinton, Williams, 1986): learns XOR, 5,000 MNIST digits or a CSV file of classes.

Paper: D. Rumelhart, G. Hinton, R. Williams, "Learning representations by back-propagating errors", Nature 323 (1986).
Command: keifu train mlp --data mnist
Cost: on one core, XOR 2 seconds, the digits 6, and 30 with --augment, without the start of the program.
Expected: XOR without a mistake; 95 to 97% of 1,000 held-out digits, by the seed, and 98% with --augment.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from keifu.data.classification import batches, tables
from keifu.data.images.augmentation import Distortion
from keifu.devices import choose
from keifu.errors import UserError, require_known
from keifu.evaluation.classification import metrics
from keifu.evaluation.plots import decision_boundary
from keifu.files import write_atomic
from keifu.inference.text.model import evaluation_mode
from keifu.layers.activations import ACTIVATIONS, STEP_HAS_NO_GRADIENT
from keifu.models import mlp
from keifu.ranges import BelowOne, Count, NotNegative, Seed
from keifu.recipes.options import Logging
from keifu.threads import on_threads
from keifu.training.job import RUN_FOLDER, Job, Jobs, RunFacts
from keifu.training.protocols import Batch, LossOutput, Objective, Sample
from keifu.training.settings import Settings

SMALL: dict[str, Any] = {
    "hidden": (16, 16), "steps": 600, "batch_size": 32, "learning_rate": 1e-2, "dropout": 0.0, "weight_decay": 0.01,
}  # fmt: skip
DIGITS: dict[str, Any] = {
    "hidden": (512, 256), "steps": 800, "batch_size": 128, "learning_rate": 2e-3, "dropout": 0.3, "weight_decay": 0.1,
}  # fmt: skip
AUGMENTED = DIGITS | {"steps": 2400, "dropout": 0.1}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # sums over rows; except for the first, of means over outputs
    "cross_entropy": lambda logits, targets: F.cross_entropy(logits, targets, reduction="sum"),
    "binary_cross_entropy": lambda logits, targets: (
        F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1).sum()
    ),
    "mean_squared_error": lambda outputs, targets: (outputs - targets).square().mean(-1).sum(),
    "mean_absolute_error": lambda outputs, targets: (outputs - targets).abs().mean(-1).sum(),
}


@dataclass(frozen=True)
class Recipe(Logging):
    """Options of the run. Unset ones depend on the data: `SMALL`, or `DIGITS` or `AUGMENTED` for mnist."""

    data: str = "xor"
    """mnist, and, or, xor, moons, spirals, or a CSV file: columns of numbers, and one of labels."""
    label: str | None = None
    """The CSV file's column of labels; unset: the last one."""
    hidden: tuple[Count, ...] | None = None
    """The width of each hidden layer."""
    activation: str = "relu"
    """Activation of the hidden layers: sigmoid, tanh, relu, gelu and others."""
    loss: str = "cross_entropy"
    """cross_entropy, binary_cross_entropy, mean_squared_error or mean_absolute_error."""
    augment: bool = False
    """Augment the pictures of mnist at every step: shifts, rotations, scales and elastic distortions."""
    dropout: BelowOne | None = None
    """Dropout probability of the hidden layers."""
    steps: Count | None = None
    """Updates of the weights."""
    batch_size: Count | None = None
    """Rows in a step."""
    learning_rate: NotNegative | None = None
    """The highest rate of AdamW."""
    weight_decay: NotNegative | None = None
    """AdamW's weight decay."""
    seed: Seed = 0
    """Random seed of the weights, the order of the rows, dropout and augmentation."""

    def resolved(self) -> "Recipe":
        """Return the recipe with defaults for unset options."""
        fitting = SMALL if self.data != "mnist" else AUGMENTED if self.augment else DIGITS
        return replace(self, **{name: value for name, value in fitting.items() if vars(self)[name] is None})

    def command(self) -> str:
        """Return the command for this run."""
        words = ["keifu", "train", "mlp"]
        for option in fields(self):
            value = vars(self)[option.name]
            if value != option.default:
                words.append(f"--{option.name.replace('_', '-')}")
                words += [] if value is True else map(str, value if isinstance(value, tuple) else (value,))
        return shlex.join(words)


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training of the network, and print its accuracy on the held-out rows.

    For two columns, boundary.png shows the decision at the start and at stages of learning (of a resumed run, those
    since then). For digits, the samples are misclassified digits.
    """
    out = yield RUN_FOLDER
    learned, training = check_learnable(recipe), settings(recipe)
    model = network(recipe, learned)
    sample: Sample | None = wrong_digits(learned, model) if recipe.data == "mnist" else None
    if len(learned.columns) == 2:
        sample = boundary(learned, model, training.steps, out)
        sample(0)
    full, augment = recipe.resolved(), distort if recipe.augment else None
    validating = 0 if learned.held_out is learned.training else len(learned.held_out)
    counts = {"rows": len(learned.training), "held out": validating, "classes": ", ".join(learned.classes)}
    data = batches.TensorBatches(learned.training, learned.held_out, training.batch_size, training.seed, augment)
    paper = "Rumelhart, Hinton and Williams, Learning representations by back-propagating errors (1986)"
    facts = RunFacts(
        title=f"A multi-layer network learns “{Path(recipe.data).stem}”",
        about={"paper": paper, "command": recipe.command()},
        data={"source": recipe.data, **counts},
        options={name: vars(full)[name] for name in ("hidden", "activation", "loss", "dropout", "augment")},
        unit="rows",
    )
    with on_threads(1):  # small matrices gain little from a second thread, and wait for it on a busy machine
        yield Job(
            model=model, objective=objective(recipe.loss), data=data, settings=training, facts=facts, sample=sample
        )
    print(f"{verdict(learned, model)} The network is in {out}.")


def settings(recipe: Recipe) -> Settings:
    """Return the training settings: AdamW with warm-up and a cosine to zero, in float32."""
    full: Any = recipe.resolved()  # so that no option is None
    often = max(1, full.steps // 12)
    return Settings(
        steps=full.steps, batch_size=full.batch_size, learning_rate=full.learning_rate, final_ratio=0.0,
        warmup=full.steps // 20, weight_decay=full.weight_decay, betas=(0.9, 0.99), precision="float32", seed=full.seed,
        evaluate_every=often, sample_every=full.steps if recipe.data == "mnist" else often, **recipe.logging(),
    )  # fmt: skip


def check_learnable(recipe: Recipe) -> tables.ToyDataset:
    """Check all options, and return the recipe's data."""
    for option, name, known_names in (("activation", recipe.activation, ACTIVATIONS), ("loss", recipe.loss, LOSSES)):
        require_known(option, name, known_names)
    if recipe.activation == "step" and recipe.resolved().hidden:
        raise UserError(STEP_HAS_NO_GRADIENT)
    if recipe.augment and recipe.data != "mnist":
        raise UserError(f"--augment distorts pictures, and {recipe.data!r} has none: leave it out, or --data mnist.")
    return tables.toy_dataset(recipe.data, recipe.label)


def points(learned: tables.ToyDataset) -> tables.Table:
    """Return the training rows for a picture. They must have two columns."""
    return tables.Table(learned.training.inputs, learned.training.targets, learned.columns, learned.classes)


def network(recipe: Recipe, learned: tables.ToyDataset) -> mlp.MLP:
    """Build the network. Squared and absolute error compare sigmoids, as in the paper; the others compare logits."""
    full = recipe.resolved()
    assert full.hidden is not None and full.dropout is not None
    torch.manual_seed(recipe.seed)
    widths = len(learned.mean), full.hidden, len(learned.classes)
    output = "identity" if "entropy" in recipe.loss else "sigmoid"
    model = mlp.build(mlp.Config(*widths, recipe.activation, output, full.dropout, learned.classes))
    model.mean.copy_(learned.mean)
    model.scale.copy_(learned.scale)
    return model.to(choose())


def objective(loss: str) -> Objective:
    """Return the objective for that loss between outputs and one-hot classes. It also counts the rows that are
    right."""

    def outcome(model: nn.Module, batch: Batch) -> LossOutput:
        outputs, targets = model(batch["inputs"]), batch["targets"]
        total = LOSSES[loss](outputs.float(), F.one_hot(targets, outputs.shape[-1]).float())
        return LossOutput(total, len(targets), {"accuracy": (outputs.argmax(-1) == targets).sum()})

    return outcome


def distort(inputs: Float[Tensor, "rows dim"], generator: Generator) -> Float[Tensor, "rows dim"]:
    """Distort digits by small shifts, rotations, zooms and elastic bends."""
    return Distortion()(inputs.view(-1, 28, 28), generator).flatten(1)


def boundary(learned: tables.ToyDataset, model: mlp.MLP, steps: int, out: Path) -> Callable[[int], bytes]:
    """Return a function that draws the decision over two columns after a step. At the end it writes the stages to
    `out`."""
    training_points, stages = points(learned), []

    def sample(step: int) -> bytes:
        correct = accuracy(model, learned.training)
        shares = decision_boundary.class_shares_on(training_points, model.predict_proba)
        stages.append((f"step {step:,}\n{correct:.0%} right", shares))
        if step >= steps:  # an extended run ends later
            shown_stages = [stages[index] for index in decision_boundary.spread(range(len(stages)))]
            write_atomic(out / "boundary.png", decision_boundary.strip(training_points, shown_stages))
        return decision_boundary.strip(training_points, stages[-1:])

    return sample


def wrong_digits(learned: tables.ToyDataset, model: mlp.MLP) -> Callable[[int], bytes]:
    """Return a function that draws misclassified held-out digits."""
    inputs, targets = learned.held_out.inputs, learned.held_out.targets
    return lambda step: metrics.picture(inputs.view(-1, 28, 28), targets, model.predict(inputs), learned.classes)


def accuracy(model: mlp.MLP, split: batches.LabelledTensors) -> float:
    """Return the share of rows that the network classifies correctly."""
    with evaluation_mode(model):
        return float((model.predict(split.inputs) == split.targets).float().mean())


def verdict(learned: tables.ToyDataset, model: mlp.MLP) -> str:
    """Describe the network's result in a sentence."""
    training_accuracy, rows = accuracy(model, learned.training), f"{len(learned.training):,}"
    if learned.held_out is learned.training:
        return f"Right: {training_accuracy:.1%} of the {rows} rows."
    result = f"{accuracy(model, learned.held_out):.1%} of {len(learned.held_out):,} held-out rows"
    return f"Right: {result}, {training_accuracy:.1%} of the {rows} learned from."
