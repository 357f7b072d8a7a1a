"""The score network: what it learns, and the objective by hand."""

import torch

from keifu.data.classification.points import clusters
from keifu.inference.images import samplers
from keifu.inference.images.score_sde import ScoreDenoiser, guided_score
from keifu.layers.counter_rng import normal
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.layers.diffusion.sampling_schedule import ddpm_schedule
from keifu.models.diffusion import score
from keifu.training.objectives.diffusion import draw_noise
from keifu.training.objectives.score_matching import ScoreMatching
from keifu.training.settings import Settings
from keifu.training.trainer import Trainer


def test_the_objective_is_the_squared_error_of_the_score_times_the_variance() -> None:
    torch.manual_seed(0)
    model = score.build(score.Config(hidden_dim=8))
    batch = {"inputs": torch.randn(5, 2), "targets": torch.tensor([0, 1, 0, 1, 1]), "draws": draw_noise(0, 0, 5)}
    found = ScoreMatching(0.3, 0.3, label_dropout=0.0)(model, batch)
    noise = normal(batch["draws"], (2,))
    x, sigma = batch["inputs"] + 0.3 * noise, torch.full((5,), 0.3)
    expected = 0.3**2 * (model(x, sigma, batch["targets"]) + noise / 0.3).square().mean(1).sum()
    torch.testing.assert_close(found.total, expected)
    hidden = ScoreMatching(0.3, 0.3, label_dropout=0.999999)(model, batch)
    expected = 0.3**2 * (model(x, sigma) + noise / 0.3).square().mean(1).sum()
    torch.testing.assert_close(hidden.total, expected)
    assert found.weight == 5


def test_a_network_learns_the_exact_score_of_clusters_and_draws_them() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    exact, generator, steps = clusters(), torch.Generator().manual_seed(0), 400
    model = score.build(score.Config(hidden_dim=64)).train()
    settings = Settings(
        steps=steps, batch_size=256, micro_batch=256, learning_rate=1e-2, final_ratio=0.0, weight_decay=0.0,
        betas=(0.9, 0.99), precision="float32",
    )  # fmt: skip
    trainer = Trainer(model, ScoreMatching(0.02, 160.0, 0.3), settings)
    for step in range(steps):
        points, labels = exact.draw(256, generator)
        gradient = trainer.gradient(step, {"inputs": points, "targets": labels, "draws": draw_noise(0, step, 256)})
        assert gradient is not None
        trainer.update(gradient)
    model.eval()
    points, labels = exact.draw(1000, generator)
    with torch.no_grad():
        for deviation, most in ((0.3, 0.4), (1.0, 0.05), (10.0, 0.05)):
            x, sigma = points + deviation * torch.randn(1000, 2, generator=generator), torch.full((1000,), deviation)
            for label in (None, labels):
                right = exact.score(x, sigma, label)
                assert (model(x, sigma, label) - right).square().mean() < most * right.square().mean()
        denoise = ScoreDenoiser(guided_score(model, labels, 2.0), Noise(clip=None))
        start, schedule = torch.randn(1000, 2, generator=generator), ddpm_schedule(denoise.noise, 30, "trailing")
        drawn = samplers.last_x(samplers.ddim(denoise, start, schedule, torch.randn_like))
    nearest = torch.cdist(drawn, exact.means).min(1)
    assert (nearest.values < 0.6).float().mean() > 0.97
    assert (exact.labels[nearest.indices] == labels).float().mean() > 0.97
    assert nearest.indices.unique().numel() == 8
