"""CLIP's loss: transformers' number, a gradient that no split changes, a temperature that is learned and bounded."""

import math

import pytest
import torch
import transformers

from keifu.models.clip import clip, image as clip_image, text as clip_text
from keifu.training.objectives.contrastive import contrastive_loss, taught_loss
from keifu.training.settings import Settings
from keifu.training.trainer import Trainer

TEXT = clip_text.Config(31, 9, 16, 24, 1, 2, end_id=30, embedding_dim=8)
IMAGE = clip_image.Config(12, 4, 3, 16, 24, 1, 2, embedding_dim=8)
LOSS = contrastive_loss(lambda pixels: pixels.float() / 255)


def made(dropout: float = 0.0) -> clip.Clip:
    torch.manual_seed(0)
    text = clip_text.Config(**vars(TEXT) | {"attention_dropout": dropout})
    return clip.build(clip.Config(text, IMAGE)).train()


def batch(rows: int = 7) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 30, (rows, 6), generator=random)
    tokens[:, -1] = 30
    return {"pictures": torch.randint(0, 256, (rows, 3, 12, 12), generator=random).byte(), "tokens": tokens}


def trainer(model: clip.Clip, rows: int, **changed) -> Trainer:
    settings = Settings(clip=0.0, weight_decay=0.0, micro_batch=rows, seed=1, precision="float32", **changed)
    return Trainer(model, LOSS, settings)


def test_the_loss_is_transformers_loss() -> None:
    model, given = made(), batch()
    outcome = LOSS(model, given)
    logits = model(given["pictures"].float() / 255, given["tokens"])

    theirs = transformers.models.clip.modeling_clip.image_text_contrastive_loss(logits.T)
    assert outcome.total.item() / 7 == pytest.approx(theirs.item(), abs=1e-6)
    assert int(outcome.figures["captions_found"]) == int((logits.argmax(1) == torch.arange(7)).sum())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_the_gradient_does_not_depend_on_the_split(rows: int, dropout: float) -> None:
    whole, parts = made(dropout), made(dropout)
    expected = trainer(whole, 7).gradient(0, batch())
    got = trainer(parts, rows).gradient(0, batch())
    assert expected and got
    assert got.sums.means() == pytest.approx(expected.sums.means(), abs=1e-6)
    for name, parameter in parts.named_parameters():
        wanted = whole.get_parameter(name).grad
        assert parameter.grad is not None and wanted is not None
        assert (parameter.grad - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))


def test_the_gradient_of_a_taught_batch_does_not_depend_on_the_split() -> None:
    given, random = batch(), torch.Generator().manual_seed(4)
    points = torch.nn.functional.normalize(torch.randn(7, 3, 8, generator=random), dim=-1)
    given |= {"points": points[:, 0], "words": given["tokens"][:, None].repeat(1, 2, 1), "word_points": points[:, 1:]}
    gradients = []
    for rows in (7, 2):
        model = made()
        settings = Settings(clip=0.0, weight_decay=0.0, micro_batch=rows, seed=1, precision="float32")
        Trainer(model, taught_loss(lambda pixels: pixels.float() / 255), settings).gradient(0, given)
        gradients.append(torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_validation_is_of_the_whole_batch_too() -> None:
    model = made()
    alone, split = (trainer(model, rows).validation([batch(), batch(5)]) for rows in (7, 2))
    assert alone == pytest.approx(split, abs=1e-6)
    assert alone["captions_found"] <= 1


def test_the_temperature_stops_at_a_hundred() -> None:
    model = made()
    with torch.no_grad():
        model.logit_scale.fill_(7.0)
    outcome = LOSS(model, batch())
    assert model.logit_scale.item() == pytest.approx(math.log(100))
    outcome.total.backward()
    assert model.logit_scale.grad is not None and float(model.logit_scale.grad) != 0  # it can come back


def test_pairs_are_learned_by_heart() -> None:
    model, given = made(), batch(12)
    step = trainer(model, 5, steps=60, warmup=5, learning_rate=3e-3)
    losses = []
    for number in range(60):
        found = step.gradient(number, given)
        assert found is not None
        losses.append(found.sums.means()["loss"])
        step.update(found)
    assert losses[0] > 2.0 and losses[-1] < 0.1  # log 12 is 2.48
    assert step.validation([given])["pictures_found"] == 1.0
