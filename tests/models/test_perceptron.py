"""The step neuron, its rule within Novikoff's bound, and the decision whether a plane parts two classes."""

from fractions import Fraction
from itertools import islice

import pytest
import torch

from keifu.models.perceptron import Config, build, learn, separate, signed_rows

TABLE = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64)
TARGETS = {"and": [0.0, 0, 0, 1], "or": [0.0, 1, 1, 1], "nand": [1.0, 1, 1, 0], "xor": [0.0, 1, 1, 0]}


def targets_of(name):
    return torch.tensor(TARGETS[name], dtype=torch.float64)


def clouds(seed, rows, dim, gap):
    """Return two clouds on the two sides of a random plane, at least `gap` from it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    normal = torch.nn.functional.normalize(torch.randn(dim, generator=generator, dtype=torch.float64), dim=0)
    side = (x @ normal + 0.1).sign()
    return x + gap * side[:, None] * normal, (side > 0).double()


def test_the_output_is_one_where_the_sum_reaches_the_threshold():
    neuron = build(Config(2))
    neuron.weight.copy_(torch.tensor([1.0, 1.0]))
    neuron.bias.fill_(-2.0)
    assert neuron(TABLE).tolist() == [0, 0, 0, 1]  # a sum equal to the threshold counts


def test_the_rule_moves_weights_by_the_error_and_only_on_a_mistake():
    neuron = build(Config(2))
    neuron.correct(torch.tensor([1.0, 3.0], dtype=torch.float64), 0.0, rate=0.5)
    assert (neuron.weight.tolist(), float(neuron.bias)) == ([-0.5, -1.5], -0.5)
    neuron.correct(torch.tensor([1.0, 3.0], dtype=torch.float64), 0.0, rate=0.5)
    assert (neuron.weight.tolist(), float(neuron.bias)) == ([-0.5, -1.5], -0.5)


@pytest.mark.parametrize("name", ["and", "or", "nand"])
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_logic_is_learned_within_the_bound(name, rate):
    neuron, targets = build(Config(2)), targets_of(name)
    updates = sum(1 for _ in learn(neuron, TABLE, targets, rate))
    assert torch.equal(neuron(TABLE), targets)
    assert updates <= separate(TABLE, targets).bound


def test_the_rule_visits_the_rows_in_turn():
    """The same corrections as the textbook's loop over rows."""
    x, targets = clouds(3, 30, 2, 0.1)
    neuron, order = build(Config(2)), []
    while not torch.equal(neuron(x), targets):
        for row in range(len(x)):
            if neuron(x[row]) != targets[row]:
                neuron.correct(x[row], float(targets[row]))
                order.append(row)
    assert list(learn(build(Config(2)), x, targets)) == order


@pytest.mark.parametrize("seed", range(6))
def test_margin_is_the_support_vector_machines(seed):
    """Against scikit-learn's hard-margin machine on the signed rows, which has no bias of its own."""
    from sklearn.svm import SVC

    x, targets = clouds(seed, 60, 2 + seed, 0.2)
    found, signed = separate(x, targets), signed_rows(x, targets)
    both, sides = torch.cat([signed, -signed]).numpy(), [1] * len(x) + [0] * len(x)
    machine = SVC(kernel="linear", C=1e9, tol=1e-9).fit(both, sides)
    margin = 1 / float(torch.linalg.vector_norm(torch.tensor(machine.coef_)))
    assert found.exact and found.separator is not None
    assert found.margin == pytest.approx(margin, rel=1e-4)
    updates = sum(1 for _ in learn(build(Config(x.shape[1])), x, targets))
    assert 0 < updates <= found.bound


def test_xor_has_no_separator_and_the_proof_says_why():
    found = separate(TABLE, targets_of("xor"))
    assert found.separator is None and found.exact and found.bound == float("inf")
    assert found.mixture.tolist() == [0.25] * 4
    neuron = build(Config(2))
    assert len(list(islice(learn(neuron, TABLE, targets_of("xor")), 500))) == 500


@pytest.mark.parametrize("seed", range(8))
def test_overlapping_clouds_are_proved_inseparable(seed):
    """The mixture is zero in rational arithmetic, up to its own rounding to float64."""
    dim = 1 + seed
    x, targets = clouds(seed, 20 * dim + 20, dim, 0.0)
    targets = targets.index_put((torch.arange(len(x)) % 3 == 0,), torch.tensor(0.0, dtype=torch.float64))
    found = separate(x, targets)
    assert found.separator is None and found.exact
    assert float((found.mixture @ signed_rows(x, targets)).norm()) < 1e-14 * found.radius
    assert float(found.mixture.min()) >= 0 and float(found.mixture.sum()) == pytest.approx(1)


def test_one_row_under_both_labels_is_inseparable_and_a_hair_of_margin_is_not():
    x = torch.tensor([[0.3, 0.1], [0.3, 0.1], [5.0, 2.0]], dtype=torch.float64)
    targets = torch.tensor([1.0, 0, 1], dtype=torch.float64)
    assert separate(x, targets).separator is None
    hair = x.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(0.3 + 1e-6, dtype=torch.float64))
    found = separate(hair, targets)
    assert found.separator is not None and 0 < found.margin < 1e-6
    plane = [Fraction(value) for value in found.separator.tolist()]
    for row in signed_rows(hair, targets).tolist():
        assert sum(a * Fraction(b) for a, b in zip(plane, row, strict=True)) > 0
