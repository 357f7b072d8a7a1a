# %% [markdown]
# # Scores: an SDE, an ODE, and guidance
#
# Points of two classes whose score is known in closed form: first the arrows at three levels of noise, then points that
# come out of noise along them, with fresh noise (SDE) and without (ODE), then a sum of two scores (guidance).

# %%
import matplotlib.pyplot as plt
import torch

from keifu.data.classification import points
from keifu.inference.images import samplers
from keifu.inference.images.score_sde import ScoreDenoiser, guided_score, reverse_sde, ve_schedule
from keifu.layers.diffusion.noise_schedule import Noise

torch.manual_seed(0)
moons = points.moons()
clean, labels = moons.draw(2000, torch.Generator().manual_seed(0))

# %% [markdown]
# The score at a level: the mean of all clean points that a noisy one can come from, minus the noisy one, over sigma
# squared. At much noise all arrows point to the middle.

# %%
line = torch.linspace(-2, 2, 13)
grid = torch.cartesian_prod(line, line)
figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
for each, sigma in zip(axes, (2.0, 0.5, 0.1), strict=True):
    arrows = sigma * moons.score(grid, torch.full((len(grid),), sigma))
    arrows = arrows / (1 + arrows.norm(dim=1, keepdim=True))
    each.scatter(*clean.T, s=1, color="#ccc")
    each.quiver(*grid.T, *arrows.T, scale=14)
    each.set(title=f"sigma = {sigma}")

# %% [markdown]
# The score is the gradient of the log-density: a finite difference agrees.


# %%
def log_density(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Return the logarithm of the density of noisy points, up to a constant."""
    variance = moons.deviation**2 + sigma**2
    return (-(x[:, None] - moons.means).square().sum(-1) / (2 * variance)).logsumexp(1)


place, step = torch.tensor([[0.4, -0.7]], dtype=torch.float64), 1e-4
right, up = torch.tensor([[step, 0.0]]), torch.tensor([[0.0, step]])
differences = [(log_density(place + way, 0.5) - log_density(place - way, 0.5)) / (2 * step) for way in (right, up)]
score = moons.score(place, torch.tensor([0.5]))
print(torch.cat(differences), score[0])
assert torch.allclose(torch.cat(differences), score[0], atol=1e-3)

# %% [markdown]
# The same noise, and two ways back: with fresh noise in each step, and without any.

# %%
levels = ve_schedule(0.01, 10.0, 50)
start = levels.initial_sigma * torch.randn(1000, 2)
denoise = ScoreDenoiser(moons.score, Noise(clip=None))
drawn = {
    name: samplers.last_x(run(denoise, start, levels, torch.randn_like))
    for name, run in (("SDE", reverse_sde), ("ODE", samplers.ddim))
}
again = samplers.last_x(samplers.ddim(denoise, start, levels, torch.randn_like))
assert torch.equal(drawn["ODE"], again)
assert torch.allclose(drawn["SDE"].std(0), drawn["ODE"].std(0), atol=0.1)

# %% [markdown]
# Guidance: the score with the class, moved further from the score without. The points vary less.

# %%
label = torch.arange(1000) % 2
figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained", sharex=True, sharey=True)
spread = {}
for each, guidance in zip(axes, (0.0, 1.0, 3.0), strict=True):
    guided = ScoreDenoiser(guided_score(moons.score, label, guidance), Noise(clip=None))
    x = samplers.last_x(samplers.ddim(guided, start, levels, torch.randn_like))
    spread[guidance] = x[label == 0].std(0).norm()
    each.scatter(*x.T, s=2, c=label, cmap="coolwarm")
    each.set(title=f"guidance {guidance}")
print({guidance: round(float(value), 2) for guidance, value in spread.items()})
assert spread[3.0] < spread[1.0] < spread[0.0]
