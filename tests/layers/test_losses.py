"""Losses against torch's own formulas, term by term and with their gradients."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from keifu.layers.losses import cross_entropy as ce, head
from keifu.layers.losses.cross_entropy import Vocabulary
from keifu.layers.losses.divergence import linear_divergence
from keifu.layers.losses.head import SoftCappedHead
from keifu.layers.losses.log_probabilities import token_log_probabilities


def reference(logits, targets, label_smoothing, z_loss):
    total = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum", label_smoothing=label_smoothing)
    return total + z_loss * (logits.logsumexp(-1) ** 2)[targets != -100].sum()


def linear_cross_entropy(hidden, weight, targets, mask=None, **more):
    return ce.linear_cross_entropy(hidden, weight, None, targets, mask, **more)[0]


@pytest.fixture
def case():
    torch.manual_seed(3)
    hidden, weight = torch.randn(2, 11, 7, requires_grad=True), torch.randn(29, 7, requires_grad=True)
    targets = torch.randint(0, 29, (2, 11))
    targets[0, 3:5] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("at_a_time", [29 * 4, 2**26])
def test_linear_cross_entropy_equals_the_loss_of_the_logits(case, label_smoothing, z_loss, at_a_time, monkeypatch):
    hidden, weight, targets = case
    monkeypatch.setattr(head, "LOGITS_AT_A_TIME", at_a_time)
    ours = linear_cross_entropy(hidden, weight, targets, label_smoothing=label_smoothing, z_loss=z_loss)
    theirs = reference((hidden @ weight.T).flatten(0, 1), targets.flatten(), label_smoothing, z_loss)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
    got = torch.autograd.grad(ours * 0.5, (hidden, weight))
    expected = torch.autograd.grad(theirs * 0.5, (hidden, weight))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_no_rows_have_a_gradient_of_zero():
    hidden, weight, bias = (torch.ones(shape, requires_grad=True) for shape in ((2, 0, 7), (29, 7), (29,)))
    total, _ = ce.linear_cross_entropy(hidden, weight, bias, torch.zeros(2, 0, dtype=torch.long))
    total.backward()
    for tensor in (hidden, weight, bias):
        torch.testing.assert_close(tensor.grad, torch.zeros_like(tensor))


def test_a_mask_is_the_same_as_ignored_targets(case):
    hidden, weight, targets = case
    mask = torch.rand(2, 11) < 0.5
    masked = linear_cross_entropy(hidden, weight, targets, mask)
    ignored = ce.cross_entropy(hidden @ weight.T, targets.masked_fill(~mask, -100))
    by_mask = ce.cross_entropy(hidden @ weight.T, targets, mask)
    torch.testing.assert_close(masked, ignored)
    torch.testing.assert_close(by_mask, ignored)


def test_shares_are_what_each_position_counts(case):
    hidden, weight, targets = case
    shares = torch.rand(2, 11)
    ours = linear_cross_entropy(hidden, weight, targets, z_loss=0.1, shares=shares)
    each = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    z = 0.1 * (hidden @ weight.T).logsumexp(-1).flatten() ** 2 * (targets != -100).flatten()
    theirs = ((each + z) * shares.flatten()).sum()
    torch.testing.assert_close(ours, theirs)
    got = torch.autograd.grad(ours, (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(theirs, (hidden, weight)), rtol=1e-5, atol=1e-6)


def test_a_soft_cap_is_in_the_losses_and_in_their_gradients(case):
    """Next-token losses with z-loss, and log-probabilities, of a head with its cap."""
    hidden, weight, targets = case
    head = SoftCappedHead(weight, 1.5)
    logits = 1.5 * torch.tanh(hidden @ weight.T / 1.5)
    ours, nats = ce.linear_cross_entropy(hidden, head, None, targets, label_smoothing=0.1, z_loss=0.03)
    theirs = reference(logits.flatten(0, 1), targets.flatten(), 0.1, 0.03)
    torch.testing.assert_close((ours, nats), (theirs, reference(logits.flatten(0, 1), targets.flatten(), 0.0, 0.0)))
    got = torch.autograd.grad(ours, (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(theirs, (hidden, weight)), rtol=1e-4, atol=1e-5)
    rows, tokens = hidden.flatten(0, 1), targets.flatten().clamp(min=0)
    logs, _ = token_log_probabilities(rows, head, tokens, 0.7)
    logits = 1.5 * torch.tanh(rows @ weight.T / 1.5) / 0.7
    theirs = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logs, theirs)
    got = torch.autograd.grad(logs.square().sum(), (hidden, weight))
    theirs = torch.autograd.grad(theirs.square().sum(), (hidden, weight))
    torch.testing.assert_close(got, theirs, rtol=1e-4, atol=1e-4)


def classes(first: int, barrier: threading.Barrier, found: dict[int, torch.Tensor]) -> Vocabulary:
    """Return those of two threads."""

    def gather(rows: torch.Tensor) -> torch.Tensor:
        found[first] = rows
        barrier.wait()
        both = torch.stack([found[each] for each in sorted(found)])
        barrier.wait()
        return both

    return Vocabulary(first, 29, gather)


@pytest.mark.parametrize("at_a_time", [13 * 4, 2**26])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_processes_with_some_classes_each_have_the_loss_of_all(case, at_a_time, dtype, monkeypatch):
    """Where the rows of each come in as many parts; with a bias, label smoothing, shares and the z-loss."""
    hidden, weight, targets = (each.detach().to(dtype) if each.is_floating_point() else each for each in case)
    monkeypatch.setattr(head, "LOGITS_AT_A_TIME", at_a_time)
    bias, shares, barrier = torch.randn(29).to(dtype), torch.rand(2, 11), threading.Barrier(2)
    both: dict[int, torch.Tensor] = {}

    def found(first, end, *more):
        own = [hidden.clone().requires_grad_(), *(x[first:end].clone().requires_grad_() for x in (weight, bias))]
        total, plain = ce.linear_cross_entropy(*own, targets, None, 0.1, 0.03, shares, *more)
        return total, plain, *torch.autograd.grad(total, own)

    with ThreadPoolExecutor(2) as threads:
        parts = [threads.submit(found, first, end, classes(first, barrier, both)) for first, end in ((0, 14), (14, 29))]
        one, other = (part.result(timeout=300) for part in parts)
    alone, off = found(0, 29), 1e-5 if dtype == torch.float32 else 0.05
    assert one[:2] == other[:2]
    torch.testing.assert_close(one[:2], alone[:2], rtol=off, atol=off)
    torch.testing.assert_close(one[2] + other[2], alone[2], rtol=off, atol=off)
    for number in (3, 4):
        torch.testing.assert_close(torch.cat([one[number], other[number]]), alone[number], rtol=off, atol=off)


def test_cross_entropy_terms(case):
    hidden, weight, targets = case
    logits = hidden @ weight.T
    ours = ce.cross_entropy(logits, targets, label_smoothing=0.2, z_loss=0.03)
    torch.testing.assert_close(ours, reference(logits.flatten(0, 1), targets.flatten(), 0.2, 0.03))


def test_nothing_counts_gives_zero_and_no_nan(case):
    hidden, weight, targets = case
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), label_smoothing=0.1, z_loss=0.1)
    gradient = torch.autograd.grad(loss, hidden)[0]
    assert loss.item() == 0 and gradient.abs().max().item() == 0


def test_autocast_keeps_the_probabilities_in_float32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32), torch.randn(1000, 32)
    targets = torch.randint(0, 1000, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, targets)
    exact = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    assert ours.dtype == torch.float32
    assert abs(ours - exact) / exact < 2e-3


@pytest.mark.parametrize(
    ("some", "rows"),
    [
        ({"label_smoothing": 0.1, "z_loss": 0.01}, 3),
        *(pytest.param(some, rows, marks=pytest.mark.slow)
          for some in ({"label_smoothing": 0.1}, {"z_loss": 0.01}) for rows in (3, 11)),
    ],
)  # fmt: skip
def test_the_loss_is_one_operator_for_the_compiler_with_the_same_bits(case, some, rows, monkeypatch):
    """Whether the gradient is a sum over several parts of the rows or not."""
    hidden, weight, targets = case
    monkeypatch.setattr(head, "LOGITS_AT_A_TIME", 29 * rows)

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, targets, **some)

    operators = []

    def backend(graph, inputs):
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    found = [f(hidden, weight) for f in (loss, torch.compile(loss, backend=backend))]
    assert "keifu.linear_cross_entropy.default" in operators
    plain, compiled = ((each, *torch.autograd.grad(each * 0.5, (hidden, weight))) for each in found)
    assert all(torch.equal(one, other) for one, other in zip(plain, compiled, strict=True))


def test_the_operator_says_the_shapes_and_types_that_it_gives(case):
    hidden, weight, targets = (each.detach() for each in case)
    for kind, wanted in (torch.float32, (1, 1, 1)), (torch.bfloat16, (1, 1, 1)), (torch.bfloat16, (0, 1, 0)):
        given = hidden.flatten(0, 1), weight, torch.zeros(29), targets.flatten(), targets.flatten() >= 0, 0.1, 0.0
        torch.library.opcheck(ce._operator, (*given, kind, [bool(each) for each in wanted], float("inf")))


def test_only_gradients_that_are_wanted_are_made(case):
    hidden, weight, targets = case
    both = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    for own in (hidden, weight.detach()), (hidden.detach(), weight):
        products = FlopCounterMode(display=False)
        with products:
            loss = linear_cross_entropy(*own, targets)
        (found,) = torch.autograd.grad(loss, [each for each in own if each.requires_grad])
        assert torch.equal(found, both[0] if own[0] is hidden else both[1])
        assert products.get_total_flops() == 2 * (2 * 22 * 7 * 29)  # the logits, and one gradient


def jensen_shannon(student, teacher, beta):
    """Return the generalised divergence of each row by its definition: sums of p ln(p / m)."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    mixture = beta * p + (1 - beta) * q
    if beta in (0, 1):
        one, other = (p, q) if beta == 0 else (q, p)
        return (one * (one / other).log()).sum(-1)
    return (beta * p * (p / mixture).log() + (1 - beta) * q * (q / mixture).log()).sum(-1)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("temperature", "at_a_time"), [(1.0, 2**26), (2.5, 29 * 4)])
@pytest.mark.parametrize("by_logits", [False, True])
def test_divergence_and_its_gradient_are_those_of_the_definition(beta, temperature, at_a_time, by_logits, monkeypatch):
    monkeypatch.setattr(head, "LOGITS_AT_A_TIME", at_a_time)
    monkeypatch.setattr(head, "LOGITS_IN_CACHE", 29 * 3)
    torch.manual_seed(4)
    hidden, weight = torch.randn(11, 7, requires_grad=True), torch.randn(29, 7, requires_grad=True)
    theirs, matrix = torch.randn(11, 5), torch.randn(29, 5)
    given = (theirs @ matrix.T, None) if by_logits else (theirs, matrix)
    ours = linear_divergence(hidden, weight, *given, beta, temperature)
    scaled = (hidden @ weight.T / temperature).double(), (theirs @ matrix.T / temperature).double()
    expected = jensen_shannon(*scaled, beta).sum()
    torch.testing.assert_close(ours.double() / 11, expected / 11, rtol=0, atol=1e-6)
    got = torch.autograd.grad(ours * 0.5, (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(expected * 0.5, (hidden, weight)), rtol=1e-5, atol=2e-6)


def test_divergence_of_equal_models_is_zero():
    hidden, weight = torch.randn(3, 7, requires_grad=True), torch.randn(29, 7)
    for beta in (0.0, 0.5, 1.0):
        total = linear_divergence(hidden, weight, hidden, weight, beta)
        assert total.item() == pytest.approx(0, abs=1e-6)
        assert torch.autograd.grad(total, hidden)[0].abs().max() < 1e-6
