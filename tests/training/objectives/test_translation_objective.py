"""The loss of translation: each next token, with smoothing, a bias of the head, and padding that counts nothing."""

import pytest
import torch
from torch import nn

from keifu.layers.losses.cross_entropy import linear_cross_entropy
from keifu.models import transformer
from keifu.training.objectives.language_modeling import translation
from keifu.training.protocols import Batch

SMALL = transformer.Config(
    vocab_size=13, context_length=16, dim=16, hidden_dim=24, n_layers=1, n_heads=2, dropout=0.0, start_id=1
)


def batch() -> Batch:
    """Return three pairs of unequal lengths."""
    source, target = torch.randint(4, 13, (3, 5)), torch.randint(4, 13, (3, 6))
    masks = [torch.arange(n) < torch.tensor(lengths)[:, None] for n, lengths in ((5, [5, 3, 2]), (6, [4, 6, 3]))]
    target[:, 0] = 1
    return {"source": source, "source_mask": masks[0], "target": target, "target_mask": masks[1]}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("biased", [False, True])
def test_the_loss_is_that_of_each_next_token_and_padding_counts_nothing(smoothing: float, biased: bool) -> None:
    model, given = transformer.build(SMALL), batch()
    if biased:
        model.logits_bias.copy_(torch.randn(1, 13))
    logits = model(given["source"], given["target"][:, :-1], given["source_mask"])
    counted = given["target_mask"][:, 1:]
    plain = (-logits.log_softmax(-1).gather(-1, given["target"][:, 1:, None]).squeeze(-1) * counted).sum()
    smooth = (-logits.log_softmax(-1).mean(-1) * counted).sum()
    outcome = translation(model.train(), given, smoothing)
    torch.testing.assert_close(outcome.total, (1 - smoothing) * plain + smoothing * smooth)
    torch.testing.assert_close(outcome.figures["nats"], plain)
    assert int(outcome.weight) == 3 + 5 + 2 and not outcome.figures["nats"].requires_grad
    judged = translation(model.eval(), given, smoothing)  # smoothing is for training
    torch.testing.assert_close(judged.total, plain)
    assert judged.figures == {}


def test_what_padding_holds_changes_nothing() -> None:
    model, given = transformer.build(SMALL).eval(), batch()
    other = {name: tensor.clone() for name, tensor in given.items()}
    for side in ("source", "target"):
        other[side][~given[f"{side}_mask"]] = 7
    torch.testing.assert_close(translation(model, given).total, translation(model, other).total)


def test_a_head_with_a_bias_has_its_gradient() -> None:
    hidden, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((9, 4), (11, 4), (11,)))
    targets = torch.randint(11, (9,))
    ours, plain = linear_cross_entropy(hidden, weight, bias, targets, label_smoothing=0.2)
    theirs = nn.functional.cross_entropy(hidden @ weight.T + bias, targets, reduction="sum", label_smoothing=0.2)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(plain, nn.functional.cross_entropy(hidden @ weight.T + bias, targets, reduction="sum"))
    everything = (hidden, weight, bias)
    torch.testing.assert_close(torch.autograd.grad(ours, everything), torch.autograd.grad(theirs, everything))
