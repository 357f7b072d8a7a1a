"""The loss of removing noise: by hand, split anywhere, with labels left out and with a learned variance."""

import math

import numpy as np
import pytest
import torch
from diffusion_toys import Batches, Toy, greys

from keifu.layers.counter_rng import normal, uniform
from keifu.layers.diffusion.noise_schedule import Noise, loss_weights
from keifu.models.diffusion import autoencoder_kl
from keifu.processes import Processes
from keifu.training.objectives.autoencoders import AutoencoderKLLoss
from keifu.training.objectives.diffusion import TIMESTEP, DiffusionLoss, add_draws, draw_noise

NOISES = [
    Noise(steps=20, beta_end=0.3),
    Noise("cosine", 20, target="velocity", variance="learned_range"),
    Noise("cosine", 20, target="picture"),
]


@pytest.mark.parametrize("noise", NOISES)
def test_a_batch_may_be_split_anywhere(noise: Noise) -> None:
    model, loss = Toy(noise, n_classes=3), DiffusionLoss(noise, "min_snr", label_dropout=0.3)
    batch = add_draws(Batches(labels=True), seed=5).batch(17)
    whole = loss(model, batch)
    for rows in (1, 3, 8):
        parts = [loss(model, part.batch) for part in Processes().micro_batches(batch, rows)]
        torch.testing.assert_close(sum(part.total for part in parts), whole.total)
        assert sum(part.weight for part in parts) == whole.weight == 8
        for name, value in whole.figures.items():
            torch.testing.assert_close(sum(part.figures[name] for part in parts), value)


@pytest.mark.parametrize("noise", NOISES)
def test_the_loss_is_what_its_definition_gives(noise: Noise) -> None:
    model, loss = Toy(noise).requires_grad_(False), DiffusionLoss(noise, "p2", bound_weight=0.0)
    batch = add_draws(Batches(), seed=1).batch(3)
    expected = 0.0
    for row, seed in enumerate(batch["draws"]):
        t = int(float(uniform(seed[None], torch.tensor([TIMESTEP]))) * 20)
        picture = batch["pictures"][row].double() / 127.5 - 1
        added = normal(seed[None], picture.shape)[0].double()
        alpha, sigma = float(noise.alpha_bar[t].sqrt()), float((1 - noise.alpha_bar[t]).sqrt())
        output = model((alpha * picture + sigma * added).float()[None], torch.tensor([t]))[0].double()
        target = {"noise": added, "picture": picture, "velocity": alpha * added - sigma * picture}[noise.target]
        expected += float(loss_weights(noise, "p2")[t] * (output[:2] - target).square().mean())
    assert float(loss(model, batch).total) == pytest.approx(expected, rel=1e-5)


def test_draws_depend_on_the_seed_the_step_and_the_row_alone() -> None:
    data = add_draws(Batches(), seed=5)
    assert torch.equal(data.batch(3)["draws"], data.batch(3)["draws"])
    others = [data.batch(4), add_draws(Batches(), seed=6).batch(3)]
    every = torch.cat([data.batch(3)["draws"], *(each["draws"] for each in others)])
    assert len(every.unique()) == len(every)
    held = [batch["draws"] for batch in data.validation()]
    assert len(torch.cat(held).unique()) == 16 and torch.equal(held[0], next(data.validation())["draws"])
    assert data.fingerprint != add_draws(Batches(), seed=6).fingerprint
    timesteps = uniform(draw_noise(0, 0, 4000), torch.full((4000,), TIMESTEP))
    assert abs(float(timesteps.mean()) - 0.5) < 0.02


def test_labels_are_left_out_at_the_rate_asked_for() -> None:
    noise = Noise(steps=20)
    model, seen = Toy(noise, n_classes=3), []
    model.label.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    batch = {"pictures": greys(400), "draws": draw_noise(0, 0, 400), "labels": torch.arange(400) % 3}
    DiffusionLoss(noise, label_dropout=0.25)(model, batch)
    assert 0.18 < float((seen[0] == 3).float().mean()) < 0.32
    DiffusionLoss(noise)(model, batch)
    assert torch.equal(seen[1], batch["labels"])
    DiffusionLoss(noise)(model, batch | {"labels": torch.full((400,), -1)})
    assert (seen[2] == 3).all()


def test_the_bound_teaches_the_variance_alone() -> None:
    """With the bound, the gradient of the prediction's own half is that of the plain loss."""
    noise = Noise("cosine", 20, variance="learned_range")
    model, batch = Toy(noise), add_draws(Batches(), seed=1).batch(0)
    gradients = []
    for weight in (0.0, 0.001):
        model.zero_grad()
        DiffusionLoss(noise, bound_weight=weight)(model, batch).total.backward()
        gradients.append(model.mix.weight.grad.clone())
    assert torch.equal(gradients[0][:2], gradients[1][:2])
    assert gradients[0][2:].abs().max() == 0 < gradients[1][2:].abs().max()


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_bound_is_that_of_an_independent_computation(variance, clip) -> None:
    from keifu.evaluation.images.generative import bound

    noise = Noise("linear", 12, 1e-3, 0.4, variance=variance, clip=clip)
    model = Toy(noise).double()
    pictures, seeds = greys(3).double() / 127.5 - 1, draw_noise(0, -1, 3)
    found = bound(model, noise, pictures, seeds)
    beta = np.linspace(1e-3, 0.4, 12).astype(np.float32).astype(float)
    left = np.cumprod(1 - beta)
    before = np.append(1.0, left[:-1])
    small = beta * (1 - before) / (1 - left)
    small[0] = small[1]
    x0 = pictures.numpy()
    for t in range(12):
        added = normal(seeds + t, (2, 6, 6)).double()
        x = np.sqrt(left[t]) * x0 + np.sqrt(1 - left[t]) * added.numpy()
        with torch.no_grad():
            output = model(torch.from_numpy(x), torch.full((3,), t)).numpy()
        picture = (x - np.sqrt(1 - left[t]) * output[:, :2]) / np.sqrt(left[t])
        picture = picture if clip is None else np.clip(picture, -1, 1)
        large = small[0] if t == 0 else beta[t]
        share = (output[:, 2:] + 1) / 2 if variance == "learned_range" else 0
        log_variance = {
            "fixed_small": np.full_like(x, np.log(small[t])),
            "fixed_large": np.full_like(x, np.log(large)),
            "learned_range": np.log(small[t]) + share * (np.log(beta[t]) - np.log(small[t])),
        }[variance]
        weight = np.sqrt(before[t]) * beta[t] / (1 - left[t])
        rest = np.sqrt(1 - beta[t]) * (1 - before[t]) / (1 - left[t])
        if t:
            gap = (weight * (picture - x0)) ** 2
            nats = 0.5 * (log_variance - np.log(small[t]) - 1 + (small[t] + gap) / np.exp(log_variance))
        else:
            mean, deviation = weight * picture + rest * x, np.exp(0.5 * log_variance)
            cdf = np.vectorize(lambda z: 0.5 * math.erfc(-z / math.sqrt(2)))
            upper = np.where(x0 > 0.999, 1.0, cdf((x0 + 1 / 255 - mean) / deviation))
            lower = np.where(x0 < -0.999, 0.0, cdf((x0 - 1 / 255 - mean) / deviation))
            nats = -np.log(np.maximum(upper - lower, 1e-12))
        np.testing.assert_allclose(found.steps[:, t], nats.mean((1, 2, 3)) / np.log(2), rtol=1e-6)
    prior = 0.5 * (left[-1] * x0**2 - left[-1] - np.log(1 - left[-1]))
    np.testing.assert_allclose(found.prior, prior.mean((1, 2, 3)) / np.log(2), rtol=1e-6)


class TinyAutoencoder:
    """Latents are twice the picture's mean over each 2 x 2 pixels; pictures come back at half of that."""

    def encode(self, pictures):
        mean = 2 * torch.nn.functional.avg_pool2d(pictures, 2)
        return autoencoder_kl.Gaussian(mean, torch.full_like(mean, -2.0))

    def decode(self, latents):
        return torch.nn.functional.interpolate(latents, scale_factor=2.0) / 2


def test_the_loss_of_an_autoencoder_is_written_out():
    pictures = torch.randint(0, 256, (3, 1, 4, 6), dtype=torch.uint8)
    batch = {"pictures": pictures, "draws": draw_noise(0, 0, 3)}
    found = AutoencoderKLLoss(kl_weight=0.3, edges=0.7)(TinyAutoencoder(), batch)
    x = pictures.double() / 127.5 - 1
    latents = 2 * torch.nn.functional.avg_pool2d(x, 2)
    noisy = latents + math.exp(-1) * normal(batch["draws"], latents.shape[1:]).double()
    y = torch.nn.functional.interpolate(noisy, scale_factor=2.0) / 2
    of_x, of_y = ((z.diff(dim=2), z.diff(dim=3)) for z in (x, y))
    edges = sum((a.abs() - b.abs()).abs().mean((1, 2, 3)) for a, b in zip(of_x, of_y, strict=True))
    kl = 0.5 * (latents.square() + math.exp(-2) + 2 - 1).sum((1, 2, 3)) / 24
    expected = (x - y).abs().mean((1, 2, 3)) + (x - y).square().mean((1, 2, 3)) + 0.7 * edges + 0.3 * kl
    assert torch.allclose(found.total.double(), expected.sum(), rtol=1e-5)
    parts = [AutoencoderKLLoss(0.3, 0.7)(TinyAutoencoder(), {n: t[rows] for n, t in batch.items()}) for rows in
             (slice(0, 2), slice(2, 3))]  # fmt: skip
    assert torch.allclose(parts[0].total + parts[1].total, found.total, rtol=1e-5)
