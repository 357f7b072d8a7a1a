"""What the objectives of drawing from texts give to their networks: which captions, embeddings, noise and squares, and
how often a condition is left out, by exact bounds."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from keifu.data.images.io import to_signed
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.training.objectives.diffusion import (
    DiffusionLoss,
    EncodedImages,
    TextDiffusionLoss,
    add_draws,
    draw_noise,
    use_latents,
)
from keifu.training.objectives.unclip import UnclipLoss

ROWS, LENGTH, SIDE, CROP = 3000, 3, 12, 8
NOISE = Noise("cosine", 50, target="velocity")
Likely = Callable[[int, int, float], bool]


class Read(NamedTuple):
    """What a text's encoder gives."""

    tokens: Tensor
    real: Tensor


class Recording(nn.Module):
    """A network that keeps what it is given and says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, Any] = {}
        self.config = SimpleNamespace(n_classes=3, null_class=True)
        self.prior = SimpleNamespace(normalised=lambda embeddings: embeddings / 100)

    def encode_text(self, tokens: Tensor, real: Tensor | None = None) -> Any:
        return tokens.float() if real is None else Read(tokens.float(), real)

    def project(self, hidden: Tensor) -> Tensor:
        return 10 * hidden

    def null_embedding(self, rows: int) -> Tensor:
        return torch.full((rows, 4), -9.0)

    def embed(self, image: Tensor, caption: Read) -> tuple[Tensor, Read]:
        return image, caption

    def forward(self, x: Tensor, timestep: Tensor, told: Any) -> Tensor:
        return self._keep("draw", x, timestep, told)

    def predict_embedding(self, x: Tensor, timestep: Tensor, caption: Any) -> Tensor:
        return self._keep("predict_embedding", x, timestep, caption)

    def upsample(self, x: Tensor, timestep: Tensor, small: Tensor) -> Tensor:
        return self._keep("upsample", x, timestep, small)

    def _keep(self, name: str, x: Tensor, timestep: Tensor, told: Any) -> Tensor:
        self.given[name] = SimpleNamespace(x=x, timestep=timestep, told=told)
        return torch.zeros_like(x)


def loss(**shares: float) -> UnclipLoss:
    empty = torch.full((1, LENGTH), 77), torch.ones(1, LENGTH, dtype=torch.bool)
    return UnclipLoss(
        DiffusionLoss(NOISE), DiffusionLoss(NOISE), DiffusionLoss(NOISE), (4, 4), CROP, empty,
        **{"prior_dropout": 0.1, "text_dropout": 0.5, "image_dropout": 0.2} | shares,
    )  # fmt: skip


def batch(rows: int = ROWS, step: int = 0) -> dict[str, Tensor]:
    """Return pictures whose first two channels are a place's row and column, and captions and embeddings of their
    own."""
    place = torch.arange(SIDE, dtype=torch.uint8) * 20
    picture = torch.stack([place[:, None].expand(SIDE, SIDE), place.expand(SIDE, SIDE), torch.zeros(SIDE, SIDE)])
    number = torch.arange(rows)
    return {
        "pictures": picture.byte().expand(rows, 3, SIDE, SIDE), "embeddings": 1.0 + number[:, None].expand(rows, 4) % 7,
        "tokens": number[:, None].expand(rows, LENGTH) % 7, "real": number[:, None].expand(rows, LENGTH) % 2 == 0,
        "draws": draw_noise(1, step, rows),
    }  # fmt: skip


def dropped_of(read: Read, given: dict[str, Tensor]) -> Tensor:
    """Return which rows got no text, after checking that all others got both parts of theirs."""
    gone = (read.tokens == 77).all(1)
    assert torch.equal(read.tokens[~gone], given["tokens"][~gone].float())
    assert torch.equal(read.real[~gone], given["real"][~gone]) and read.real[gone].all()
    return gone


def test_what_unclip_is_told_and_how_often_not(likely: Likely) -> None:
    model, given = Recording(), batch()
    outcome = loss()(model, given)
    heard, (image, told) = model.given["predict_embedding"].told, model.given["draw"].told
    prior, text = dropped_of(heard, given), dropped_of(told, given)
    embedding = (image == -9).all(1)
    assert torch.equal(image[~embedding], given["embeddings"][~embedding])
    for gone, share in ((prior, 0.1), (text, 0.5), (embedding, 0.2)):
        assert likely(int(gone.sum()), ROWS, share)
    for one, other, share in ((prior, text, 0.05), (text, embedding, 0.1), (prior, embedding, 0.02)):
        assert likely(int((one & other).sum()), ROWS, share)  # each by itself
    figures = torch.stack([outcome.figures[name] for name in ("prior", "decoder", "upsampler")])
    torch.testing.assert_close(outcome.total, figures.sum())
    assert outcome.weight == ROWS
    nothing = loss(prior_dropout=0.0, text_dropout=0.0, image_dropout=0.0)
    nothing(model, given)
    heard, (image, told) = model.given["predict_embedding"].told, model.given["draw"].told
    assert not dropped_of(heard, given).any() and not dropped_of(told, given).any() and not (image == -9).any()


def test_each_part_of_unclip_has_noise_of_its_own_and_sees_its_own_size(likely: Likely) -> None:
    model = Recording()
    loss()(model, batch())
    times = [model.given[name].timestep for name in ("predict_embedding", "draw", "upsample")]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert likely(int((times[one] == times[other]).sum()), ROWS, 1 / 50)
    assert model.given["predict_embedding"].x.shape == (ROWS, 4) and model.given["draw"].x.shape == (ROWS, 3, 4, 4)
    assert model.given["upsample"].x.shape == (ROWS, 3, CROP, CROP)
    quiet = model.given["predict_embedding"].timestep == 0  # hardly any noise: what is seen is the normalised embedding
    seen = model.given["predict_embedding"].x[quiet] / NOISE.alpha_bar[0].sqrt()
    wanted = batch()["embeddings"][quiet] / 100
    assert (seen - wanted).abs().mean() < 1.5 * (1 - NOISE.alpha_bar[0]).sqrt() < 0.2


def test_squares_of_the_upsampler_are_everywhere_and_beside_the_same_place(likely: Likely) -> None:
    model, given = Recording(), batch()
    objective = loss()
    whole = to_signed(given["pictures"])
    small = torch.nn.functional.interpolate(whole, (4, 4), mode="bicubic", antialias=True).clamp(-1, 1)
    squares, beside = objective._cut(whole, small, given["draws"])
    corner = ((squares[:, :2, 0, 0] + 1) * 127.5 / 20).round().long()
    steps = torch.arange(CROP)
    for row in range(5):  # the square at its corner, and no other
        top, left = corner[row].tolist()
        assert torch.equal(squares[row], whole[row][:, top + steps[:, None], left + steps])
    positions = SIDE - CROP + 1
    assert corner.min() == 0 and corner.max() == positions - 1
    for top in range(positions):
        assert likely(int((corner[:, 0] == top).sum()), ROWS, 1 / positions)
        both = int(((corner[:, 0] == top) & (corner[:, 1] == 0)).sum())
        assert likely(both, ROWS, 1 / positions**2)
    away = (squares - beside)[:, :2].flatten(1).abs().mean(1)
    assert away.max() < 0.2  # a slope is nearly the same, small and large: another place is further off
    objective(model, given)
    assert torch.equal(model.given["upsample"].told, beside)


def test_what_latent_diffusion_is_told_and_how_often_not(likely: Likely) -> None:
    empty = torch.tensor([70, 71, 72])
    given = {"pictures": torch.randn(ROWS, 2, 2, 2), "draws": draw_noise(1, 0, ROWS)}
    given["tokens"] = torch.arange(ROWS)[:, None].expand(ROWS, LENGTH) % 7
    for share in (0.1, 0.35):
        model = Recording()
        TextDiffusionLoss(NOISE, "simple", None, share, empty=empty)(model, given)
        told = model.given["draw"].told / 10  # projected
        gone = (told == empty).all(1)
        assert torch.equal(told[~gone], given["tokens"][~gone].float()) and likely(int(gone.sum()), ROWS, share)
        for quarter in range(2):
            inside = model.given["draw"].timestep // 25 == quarter
            assert likely(int(inside.sum()), ROWS, 0.5)
            assert likely(int((inside & gone).sum()), ROWS, share / 2)
    TextDiffusionLoss(NOISE, "simple", None, 0.0, empty=empty)(model, given)
    assert not (model.given["draw"].told / 10 == empty).all(1).any()


def test_labels_that_are_left_out_are_the_null_class(likely: Likely) -> None:
    given = {"pictures": torch.zeros(ROWS, 1, 2, 2), "draws": draw_noise(1, 0, ROWS), "labels": torch.arange(ROWS) % 3}
    given["labels"][::6] = -1
    model = Recording()
    DiffusionLoss(NOISE, label_dropout=0.15)(model, given)
    told, known = model.given["draw"].told, given["labels"] >= 0
    assert (told[~known] == 3).all()
    gone = told[known] == 3
    assert torch.equal(told[known][~gone], given["labels"][known][~gone])
    assert likely(int(gone.sum()), int(known.sum()), 0.15)


class Fixed:
    """Data whose batches are the same indices at every step."""

    fingerprint = "fixed"

    def batch(self, step: int) -> dict[str, Tensor]:
        return {"indices": torch.arange(200) % 2, "pictures": torch.zeros(200, 1, 1, 1)}

    def validation(self):
        yield from (self.batch(0), self.batch(1))


def test_draws_change_with_step_and_row_and_stay_for_what_is_held_out() -> None:
    mean, deviation = torch.tensor([0.0, 50.0])[:, None, None, None], torch.tensor([1.0, 2.0])[:, None, None, None]
    training, held = EncodedImages(mean, deviation), EncodedImages(mean + 1000, deviation)
    data = use_latents(add_draws(Fixed(), 3), training, held)
    first, again, second = data.batch(0), data.batch(0), data.batch(1)
    assert torch.equal(first["pictures"], again["pictures"]) and torch.equal(first["draws"], again["draws"])
    assert len({*first["draws"].tolist(), *second["draws"].tolist()}) == 400
    for number, (middle, spread) in enumerate(((0.0, 1.0), (50.0, 2.0))):
        rows = first["pictures"][number::2]
        assert abs(float(rows.mean()) - middle) < 0.6 * spread and 0.75 < float(rows.std()) / spread < 1.3
    held_out = list(data.validation())
    assert torch.equal(held_out[0]["pictures"], list(data.validation())[0]["pictures"])
    assert len({int(each) for batch in held_out for each in batch["draws"]}) == 400
    assert float(held_out[0]["pictures"].mean()) > 900  # of the held-out table


@pytest.mark.parametrize("step", [0, 3])
def test_timesteps_are_drawn_evenly(step: int, likely: Likely) -> None:
    model = Recording()
    given = {
        "pictures": torch.zeros(ROWS, 1, 2, 2),
        "draws": draw_noise(1, step, ROWS),
        "labels": torch.zeros(ROWS).long(),
    }
    DiffusionLoss(NOISE)(model, given)
    for number in (0, 1, 24, 49):
        assert likely(int((model.given["draw"].timestep == number).sum()), ROWS, 1 / 50)
