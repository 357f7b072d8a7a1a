# %% [markdown]
# # Diffusion, step by step
#
# Points in the plane in place of pictures: two half moons go into noise, a small network learns to say what noise was
# added, and points come out of noise again, by DDPM's chain and by DPM-Solver++ in a few steps.

# %%
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from keifu.inference.images import samplers
from keifu.layers.diffusion.noise_schedule import Noise, add_noise

torch.manual_seed(0)
angle = torch.rand(4000) * torch.pi
side = torch.arange(4000) % 2
moons = torch.stack([angle.cos() + side - 0.5, angle.sin() * (1 - 2 * side) + side * 0.5 - 0.25], 1)
moons = moons + 0.05 * torch.randn_like(moons)

# %% [markdown]
# Noise at five of 200 levels: any number of steps is made at once.

# %%
noise = Noise(schedule="cosine", steps=200, clip=None)
levels = [0, 40, 80, 140, 199]
figure, axes = plt.subplots(1, 5, figsize=(14, 3), layout="constrained", sharex=True, sharey=True)
for each, level in zip(axes, levels, strict=True):
    x = add_noise(moons, torch.randn_like(moons), noise.alpha_bar, torch.full((len(moons),), level))
    each.scatter(*x.T, s=1)
    each.set(title=f"t = {level}", xlim=(-3, 3), ylim=(-3, 3))

# %% [markdown]
# The network sees a noisy point and the level, and is asked for the noise.


# %%
class Network(nn.Module):
    """Three layers; the level comes in as a few sines and cosines."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 16, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)
        )

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        phase = timestep.float()[:, None] / 200 * torch.pi * 2 ** torch.arange(8)
        return self.layers(torch.cat([x, phase.sin(), phase.cos()], 1))


network = Network()
optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
for _step in range(1500):
    picture = moons[torch.randint(len(moons), (256,))]
    timestep = torch.randint(200, (256,))
    added = torch.randn_like(picture)
    loss = (network(add_noise(picture, added, noise.alpha_bar, timestep), timestep) - added).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"squared error of the noise {float(loss.detach()):.3f} (1 would be knowing nothing)")

# %% [markdown]
# Out of noise: a sampler asks the network at each level and goes a step.

# %%
start = torch.randn(1000, 2)
figure, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained", sharex=True, sharey=True)
for each, (name, steps) in zip(axes, {"ddpm": 200, "dpm++-2m": 20}.items(), strict=True):
    ours = samplers.configure_sampler(noise, name, steps)
    with torch.no_grad():
        *_, last = ours.run(ours.denoiser(network), start, ours.schedule, torch.randn_like)
    nearest = torch.cdist(last.x, moons).min(1).values
    each.scatter(*last.x.T, s=2)
    each.set(title=f"{name}, {steps} steps", xlim=(-3, 3), ylim=(-3, 3))
    print(f"{name}: a drawn point is {nearest.median():.3f} from the nearest real one (median)")
    assert nearest.median() < 0.15
