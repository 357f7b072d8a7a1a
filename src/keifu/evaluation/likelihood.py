"""How many bits a diffusion model needs for a picture, at most: the variational bound; knows no kind of network.

Ho et al. (2020), equation 5, with the discretised decoder of equation 13. Axes: batch, steps = T, `*shape` a picture's.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.generation.denoiser import Denoiser, Network
from keifu.layers.counted_random import normal
from keifu.layers.noise import Noise, add_noise, at
from keifu.layers.noise_levels import Level
from keifu.layers.noise_targets import normal_kl, posterior
from keifu.training.diffusion import HELD_OUT, bits_of_step, draws


@dataclass(frozen=True)
class Bound:
    """Bits per dimension (number of a picture) of each picture.

    prior: what the end of the noising still tells of it. steps [batch, T]: each step back, the decoder's at timestep 0.
    squared_error [batch, T]: of the noise that the network sees, for comparison with the training's loss.
    """

    prior: Float[Tensor, " batch"]
    steps: Float[Tensor, "batch steps"]
    squared_error: Float[Tensor, "batch steps"]

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """The bound itself."""
        return self.prior + self.steps.sum(1)


@torch.inference_mode()
def bound(
    network: Network,
    noise: Noise,
    pictures: Float[Tensor, "batch *shape"],
    seeds: Int[Tensor, " batch"],
    advance: Callable[[], None] = lambda: None,
) -> Bound:
    """The bound of some pictures, grey values from -1 to 1, by all T steps with one draw of noise each.

    The noise is a function of a picture's seed and the timestep. `advance` is called after each step.
    """
    denoise, exact, rows = Denoiser(network, noise), posterior(noise), []
    for step in range(noise.steps):
        timestep = torch.full((len(pictures),), step, device=pictures.device)
        added = normal(seeds + step, pictures.shape[1:]).to(pictures)
        x = add_noise(pictures, added, noise.alpha_bar, timestep)
        left = float(noise.alpha_bar[step])
        seen = denoise(x, Level(float(step), math.sqrt(left), math.sqrt(1 - left)))
        bits = bits_of_step(noise, exact, pictures, seen.picture, x, timestep, seen.share)
        rows.append(torch.stack([bits, (seen.noise - added).square().flatten(1).mean(1)]))
        advance()
    steps, errors = torch.stack(rows, -1)
    return Bound(prior_bits(noise, pictures), steps, errors)


def prior_bits(noise: Noise, pictures: Float[Tensor, "batch *shape"]) -> Float[Tensor, " batch"]:
    """The divergence of x_T, given the picture, from pure noise, in bits per dimension."""
    last = torch.full((len(pictures),), noise.steps - 1, device=pictures.device)
    mean = at(noise.alpha_bar.sqrt(), last, pictures) * pictures
    zero = torch.zeros_like(mean)
    apart = normal_kl(mean, at((1 - noise.alpha_bar).log(), last, pictures), zero, zero)
    return apart.flatten(1).mean(1) / math.log(2)


def bits_per_dimension(
    network: Callable[[Tensor | None], Network],
    noise: Noise,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The bound's mean over pictures, under ""; the means of its parts, which add up to it; and its standard error.

    `batches` are pictures from -1 to 1 and their labels, `network` the model's for labels. Parts: prior is the end of
    the noising, steps (the paper's rate, with the prior) the way back to timestep 0, decoder (its distortion) what the
    grey values then still need.
    """
    found, first = [], 0
    for pictures, labels in batches:
        seeds = draws(seed, HELD_OUT, len(pictures), first).to(pictures.device)
        found.append(bound(network(labels), noise, pictures, seeds, advance))
        first += len(pictures)
    total = torch.cat([each.total for each in found])
    parts = {
        "": total,
        "prior": torch.cat([each.prior for each in found]),
        "steps": torch.cat([each.steps[:, 1:].sum(1) for each in found]),
        "decoder": torch.cat([each.steps[:, 0] for each in found]),
    }
    error = {"standard error": float(total.std() / math.sqrt(first))} if first > 1 else {}
    return {name: float(value.mean()) for name, value in parts.items()} | error
