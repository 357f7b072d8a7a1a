"""BERT's two losses: each the mean of its own kind, however a batch is split."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from keifu.models import bert
from keifu.training.objectives.language_modeling import masked_language_modeling
from keifu.training.protocols import Batch
from keifu.training.settings import Settings
from keifu.training.state import Sums
from keifu.training.trainer import Trainer

CPU = torch.device("cpu")
CONFIG = bert.Config(23, 12, 16, 24, 2, 4, dropout=0.0)


def batch(rows: int = 6, pairs: bool = True) -> Batch:
    """Return rows with 0 to 5 hidden words each."""
    mask = torch.arange(12) < torch.randint(6, 13, (rows, 1))
    targets = torch.randint(0, 23, (rows, 5)).masked_fill(torch.arange(5) >= torch.arange(rows)[:, None], -100)
    tokens, words = int(mask.sum()), int((targets != -100).sum())
    made = {
        "tokens": torch.randint(0, 23, (rows, 12)), "mask": mask, "targets": targets,
        "places": torch.randint(0, 6, (rows, 5)), "word_weight": torch.full((rows,), tokens / words),
        "pair_weight": torch.full((rows,), tokens / rows),
    }  # fmt: skip
    extra = {"segments": torch.randint(0, 2, (rows, 12)), "random_next": torch.randint(0, 2, (rows,))}
    return made | (extra if pairs else {})


def written_out(model: bert.Bert, given: Batch) -> dict[str, float]:
    """Return the two means and shares, without a shortcut."""
    hidden = model.encode(given["tokens"], given.get("segments"), given["mask"])
    logits = model.words(hidden).gather(1, given["places"][..., None].expand(-1, -1, 23)).flatten(0, 1)
    targets = given["targets"].flatten()
    right = (logits.argmax(-1) == targets)[targets != -100]
    found = {"word_loss": F.cross_entropy(logits, targets), "word_accuracy": right.float().mean()}
    if "random_next" in given:
        pairs, follows = model.next_sentence(model.pool(hidden)), given["random_next"]
        found["pair_loss"] = F.cross_entropy(pairs, follows)
        found["pair_accuracy"] = (pairs.argmax(-1) == follows).float().mean()
    found["loss"] = found["word_loss"] + found.get("pair_loss", torch.zeros(()))
    return {name: float(value.detach()) for name, value in found.items()}


@pytest.mark.parametrize("pairs", [True, False])
def test_the_loss_is_the_sum_of_two_means(pairs: bool) -> None:
    model, given = bert.build(CONFIG).eval(), batch(pairs=pairs)
    outcome = masked_language_modeling(model, given)
    assert float(outcome.weight) == float(given["mask"].sum())
    assert Sums.of(outcome).means() == pytest.approx(written_out(model, given), rel=1e-4)
    assert (
        "word_accuracy" not in masked_language_modeling(model.train(), given).figures
    )  # it would cost the logits again


@pytest.mark.parametrize("micro", [1, 2, 4, 6])
def test_a_split_changes_neither_loss_nor_gradient(micro: int) -> None:
    given = batch()

    def gradients(rows: int) -> tuple[dict[str, float], dict[str, Any]]:
        torch.manual_seed(3)
        model = bert.build(CONFIG).train()
        changed = Settings(micro_batch=rows, clip=0.0, precision="float32")
        found = Trainer(model, masked_language_modeling, changed).gradient(0, given)
        assert found is not None
        return found.sums.means(), {name: p.grad for name, p in model.named_parameters()}

    (whole, expected), (parts, got) = gradients(6), gradients(micro)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert all(torch.allclose(got[name], expected[name], atol=1e-6) for name in expected)
    torch.manual_seed(3)
    model = bert.build(CONFIG).train()
    model.zero_grad()
    hidden = model.encode(given["tokens"], given["segments"], given["mask"])
    logits = model.words(hidden).gather(1, given["places"][..., None].expand(-1, -1, 23)).flatten(0, 1)
    loss = F.cross_entropy(logits, given["targets"].flatten())
    (loss + F.cross_entropy(model.next_sentence(model.pool(hidden)), given["random_next"])).backward()
    assert all(torch.allclose(got[name], p.grad, atol=1e-6) for name, p in model.named_parameters())
