"""The perceptron (Rosenblatt, 1958): one neuron with a step function, trained by correcting its mistakes.

New: the weights of McCulloch and Pitts' threshold neuron (1943) were set by hand. Rosenblatt's rule finds them: w ← w +
η (t - y) x, b ← b + η (t - y), applied only if the output y is not the target t. A step has no gradient; the rule needs
none. If a plane separates the two classes, the rule finds one after at most (R/γ)² corrections (Novikoff, 1962). If no
plane does (XOR), the rule never ends. So linear separability is decided beforehand, with a proof.

Axes: rows = examples, dim = inputs. A signed row is ±(x, 1): the bias is the weight of a constant 1, and the sign is
the class's. So a separator is a vector whose product with every signed row is positive.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.layers.activations import step

LARGEST_PROOF = 40  # rows; with more, the exact arithmetic of `exact_mixture` would take minutes


@dataclass(frozen=True)
class Config:
    """The number of inputs, `dim`. The paper gives a rule, not a size."""

    dim: int = 2


class Perceptron(nn.Module):
    """Neuron with output 1 if Σ w x reaches the threshold -b (a tie is a 1), else 0, in float64. Weights and bias start
    at zero."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.dim, dtype=torch.float64), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        return step(x @ self.weight + self.bias)

    @property
    def classes(self) -> tuple[str, str]:
        """The names of both classes."""
        return "0", "1"

    def predict_proba(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        """Return 1 for the class of each row and 0 for the other: a step has no uncertainty."""
        fires = self(x.to(self.weight)).to(x)
        return torch.stack([1 - fires, fires], -1)

    def correct(self, x: Float[Tensor, "dim"], target: float, rate: float = 1.0) -> None:
        """Apply the perceptron rule to one row. Nothing changes if the output is already right."""
        error = rate * (target - self(x))
        self.weight += error * x
        self.bias += error


def build(config: Config) -> Perceptron:
    """Build a neuron with all weights zero, as Novikoff's bound requires."""
    return Perceptron(config)


def learn(
    neuron: Perceptron, x: Float[Tensor, "rows dim"], targets: Float[Tensor, "rows"], rate: float = 1.0
) -> Iterator[int]:
    """Go through the rows repeatedly and correct each mistake. Yield the index of each corrected row.

    It ends when every row is right: never, if no plane separates the classes.
    """
    position = 0
    while len(wrong := (neuron(x) != targets).nonzero().flatten()):
        later = wrong[wrong >= position]
        row = int(later[0] if len(later) else wrong[0])
        neuron.correct(x[row], float(targets[row]), rate)
        position = row + 1
        yield row


@dataclass(frozen=True)
class Separation:
    """Whether a plane separates two classes, and the proof.

    mixture (rows): weights ≥ 0 with sum 1 of the mixture of signed rows nearest to zero. separator (dim + 1): weights,
    then bias, of the plane with the widest margin; None if there is none. margin: γ, the smallest distance of the plane
    to a signed row; without a separator, an upper bound of any margin. radius: R, the length of the longest signed row.
    exact: whether the answer is proved, independently of rounding. A separator is proved if its products are further
    from zero than their rounding error. That there is none is proved by a mixture that is zero in rational arithmetic
    (Gordan, 1873).
    """

    mixture: Float[Tensor, "rows"]
    separator: Float[Tensor, "dim1"] | None
    margin: float
    radius: float
    exact: bool

    @property
    def bound(self) -> float:
        """Novikoff's bound of the number of corrections from zero weights, (R/γ)²."""
        return (self.radius / self.margin) ** 2 if self.margin else float("inf")


def separate(x: Float[Tensor, "rows dim"], targets: Float[Tensor, "rows"]) -> Separation:
    """Decide whether a plane separates the rows with target 1 from those with target 0, and find the widest margin.

    The separator with the widest margin is the point nearest to zero in the convex hull of the signed rows. There is
    none exactly if the hull contains zero. (Separation with ≥ on one side equals separation with > on both: there are
    finitely many rows, so the plane can be shifted a little.)
    """
    signed = signed_rows(x, targets)
    radius = float(signed.norm(dim=1).max())
    mixture = nearest_mixture(signed)
    nearest = mixture @ signed
    length = float(nearest.norm())
    products = signed @ nearest
    rounding = 2 * signed.shape[1] * torch.finfo(torch.float64).eps * radius * length
    if float(products.min()) > rounding:
        return Separation(mixture, nearest, (float(products.min()) - rounding) / length, radius, True)
    support = mixture.nonzero().flatten()
    proof = exact_mixture(signed[support].tolist()) if len(support) <= LARGEST_PROOF else None
    if proof is None:
        return Separation(mixture, None, length + rounding / radius, radius, False)
    mixture[support] = torch.tensor([float(share) for share in proof], dtype=torch.float64)
    return Separation(mixture, None, 0.0, radius, True)


def signed_rows(x: Float[Tensor, "rows dim"], targets: Float[Tensor, "rows"]) -> Float[Tensor, "rows dim1"]:
    """Return (x, 1) if the target is 1, and -(x, 1) if it is 0, in float64."""
    lifted = torch.cat([x.double(), x.new_ones(len(x), 1, dtype=torch.float64)], 1)
    return lifted * (2 * targets.double() - 1)[:, None]


def nearest_mixture(points: Float[Tensor, "rows dim1"]) -> Float[Tensor, "rows"]:
    """Return the weights of the convex mixture of points nearest to zero (Wolfe, 1976: finite, with no step size).

    The support is a few affinely independent points. Each iteration adds the point furthest in the direction from the
    current mixture to zero, until rounding hides any improvement.
    """
    radius, eps = float(points.norm(dim=1).max()), torch.finfo(torch.float64).eps
    support = points.norm(dim=1).argmin()[None]
    weights, length = points.new_ones(1), float("inf")
    while True:
        nearest = weights @ points[support]
        products, previous, length = points @ nearest, length, float(nearest.norm())
        entering = products.argmin()
        gain = length**2 - float(products[entering])
        if length <= eps * radius or length >= previous or gain <= 8 * eps * radius * length or entering in support:
            break
        best = support, weights
        support, weights = absorb(
            points, torch.cat([support, entering[None]]), torch.cat([weights, weights.new_zeros(1)])
        )
    if length >= previous:  # rounding made the last iteration worse
        support, weights = best
    return points.new_zeros(len(points)).index_put_((support,), weights)


def absorb(
    points: Float[Tensor, "rows dim1"], support: Int[Tensor, "few"], weights: Float[Tensor, "few"]
) -> tuple[Int[Tensor, "fewer"], Float[Tensor, "fewer"]]:
    """Return the mixture of the support nearest to zero, and its support, which may lose points: Wolfe's inner loop."""
    while True:
        target = affine_weights(points[support])
        falling = target <= 0
        if not falling.any():
            return support, target
        reach = torch.where(falling, weights / (weights - target).clamp_min(1e-300), torch.inf)
        leaving = reach.argmin()
        weights = weights + reach[leaving].clamp_max(1.0) * (target - weights)
        staying = (weights > 0) & (torch.arange(len(weights)) != leaving)
        support, weights = support[staying], weights[staying] / weights[staying].sum()


def affine_weights(points: Float[Tensor, "few dim1"]) -> Float[Tensor, "few"]:
    """Return the weights (sum 1, any sign) of the point nearest to zero in the affine hull of the points."""
    first, further_points = points[0], points[1:]
    other_weights = torch.linalg.lstsq((further_points - first).T, -first[:, None], driver="gelsd").solution.flatten()
    return torch.cat([1 - other_weights.sum(dim=0, keepdim=True), other_weights])


def exact_mixture(points: list[list[float]]) -> list[Fraction] | None:
    """Return the weights ≥ 0 with sum 1 whose mixture of the points is zero in rational arithmetic, or None.

    The points must be affinely independent, so that there is at most one answer: Gaussian elimination finds it.
    """
    size = len(points)
    rows = [[Fraction(point[axis]) for point in points] + [Fraction(0)] for axis in range(len(points[0]))]
    rows.append([Fraction(1)] * (size + 1))
    for column in range(size):
        pivot = next((i for i in range(column, len(rows)) if rows[i][column]), None)
        if pivot is None:
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [value / rows[column][column] for value in rows[column]]
        for i, row in enumerate(rows):
            if i != column and (factor := row[column]):
                rows[i] = [value - factor * unit for value, unit in zip(row, rows[column], strict=True)]
    shares = [row[size] for row in rows[:size]]
    return shares if all(row[size] == 0 for row in rows[size:]) and min(shares) >= 0 else None


WRITES_TEXT = False
