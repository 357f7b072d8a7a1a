"""Multinomial logistic regression with an L2 penalty, by L-BFGS (Liu and Nocedal, 1989), in float64.

The objective is scikit-learn's: C times the sum of the cross-entropies, plus half of the squared weights. The bias has
no penalty. Cross-validation chooses the strength C with the lowest cross-entropy, so that probabilities are calibrated.

Axes: rows, dim, labels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
FOLDS = 5
ITERATIONS = 300


@dataclass(frozen=True, eq=False)
class Regression:
    """Fitted regression, and its accuracy in cross-validation."""

    weight: Float[Tensor, "labels dim"]
    bias: Float[Tensor, "labels"]
    strength: float
    accuracy: float

    def predict(self, inputs: Float[Tensor, "rows dim"]) -> Int[Tensor, "rows"]:
        """Return the index of the likeliest label of each row."""
        return F.linear(inputs.double(), self.weight, self.bias).argmax(-1)


def fit(
    inputs: Float[Tensor, "rows dim"], targets: Int[Tensor, "rows"], labels: int, strength: float,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Float[Tensor, "labels dim"], Float[Tensor, "labels"]]:  # fmt: skip
    """Return weights and biases at the minimum. start: initial weights and biases; None: zeros."""
    inputs = inputs.double()
    weight, bias = start or (inputs.new_zeros(labels, inputs.shape[1]), inputs.new_zeros(labels))
    weight = weight.clone().requires_grad_(True)
    bias = bias.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        fitting = F.cross_entropy(F.linear(inputs, weight, bias), targets)
        value = fitting + weight.square().sum() / (2 * strength * len(targets))
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return weight.detach(), bias.detach()


def folds(targets: Int[Tensor, "rows"], count: int) -> Int[Tensor, "rows"]:
    """Return the fold of each row. The rows of each label are distributed evenly over the folds."""
    order = targets.argsort(stable=True)
    folds_of_rows = torch.empty_like(targets)
    folds_of_rows[order] = torch.arange(len(targets)) % count
    return folds_of_rows


def cross_validate(
    inputs: Float[Tensor, "rows dim"], targets: Int[Tensor, "rows"], labels: int, count: int = FOLDS
) -> dict[float, tuple[float, float]]:
    """Return (cross-entropy, accuracy) in cross-validation for each strength."""
    fold = folds(targets, min(count, len(targets)))
    sums = {strength: [0.0, 0.0] for strength in STRENGTHS}
    for part in fold.unique().tolist():
        seen, tested = fold != part, fold == part
        start = None
        for strength in STRENGTHS:
            start = fit(inputs[seen], targets[seen], labels, strength, start)
            logits = F.linear(inputs[tested].double(), *start)
            sums[strength][0] += float(F.cross_entropy(logits, targets[tested], reduction="sum"))
            sums[strength][1] += int((logits.argmax(-1) == targets[tested]).sum())
    return {strength: (loss / len(targets), right / len(targets)) for strength, (loss, right) in sums.items()}


def fit_best(inputs: Float[Tensor, "rows dim"], targets: Int[Tensor, "rows"], labels: int) -> Regression:
    """Return the regression on all rows, at the strength with the lowest cross-entropy in cross-validation."""
    figures = cross_validate(inputs, targets, labels)
    strength = min(STRENGTHS, key=lambda value: figures[value])
    return Regression(*fit(inputs, targets, labels, strength), strength, figures[strength][1])
