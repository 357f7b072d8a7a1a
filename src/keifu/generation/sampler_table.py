"""The samplers by name, each with its path, its usual number of steps and its bounds; knows no network.

Bounds are those of diffusers' scheduler of the same name, which clips a predicted picture in some and not in others.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from keifu.errors import UserError, unknown
from keifu.generation import multistep, samplers
from keifu.generation.denoiser import Denoiser, Network
from keifu.generation.samplers import Drawn, Walk
from keifu.layers.noise import Noise, Spacing
from keifu.layers.noise_levels import Path, continuous_path, inner_path, jumping_path, whole_path


@dataclass(frozen=True)
class Sampler:
    """A way from noise to a picture.

    path: from a noise, a number of steps and a spacing. steps: how many are usual; None for all that the noise has.
    karras: whether the path takes levels of Karras et al. (2022). eta: whether the walk takes η.
    clip, threshold: which of the noise's bounds on predicted pictures it keeps.
    """

    walk: Callable[..., Iterator[Drawn]]
    path: Callable[..., Path]
    about: str
    steps: int | None = 50
    karras: bool = True
    eta: bool = False
    clip: bool = False
    threshold: bool = False


SAMPLERS = {
    "ddpm": Sampler(
        samplers.ddpm, whole_path, "the chain of the paper, random", None, False, clip=True, threshold=True
    ),
    "ddim": Sampler(
        samplers.ddim,
        jumping_path,
        "few steps, without chance unless --eta",
        50,
        False,
        True,
        clip=True,
        threshold=True,
    ),
    "euler": Sampler(samplers.euler, continuous_path, "the plainest solver", 30),
    "euler-ancestral": Sampler(samplers.euler_ancestral, continuous_path, "Euler with fresh noise", 30),
    "heun": Sampler(samplers.heun, continuous_path, "second order, two evaluations a step", 20, clip=True),
    "lms": Sampler(multistep.lms, continuous_path, "of the last four slopes", 30),
    "plms": Sampler(multistep.plms, jumping_path, "the first default of Stable Diffusion", 50, False),
    "dpm++-2m": Sampler(multistep.dpm_2m, inner_path, "good pictures in 10 to 25 steps", 20, threshold=True),
    "dpm++-2m-sde": Sampler(
        partial(multistep.dpm_2m, stochastic=True), inner_path, "the same with fresh noise", 25, threshold=True
    ),
    "unipc": Sampler(multistep.unipc, inner_path, "good pictures in 8 to 20 steps", 20, threshold=True),
}


def sampler(name: str) -> Sampler:
    """The sampler of that name; an unknown one is a `UserError` with the nearest."""
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    return SAMPLERS[name]


@dataclass(frozen=True)
class Route:
    """A sampler made ready for a noise: what walks, along which levels, with which bounds."""

    walk: Walk
    path: Path
    sampler: Sampler
    noise: Noise

    def denoiser(self, network: Network, kind: Callable[..., Denoiser] = Denoiser) -> Denoiser:
        """The denoiser that this sampler takes, or one of another kind with the same bounds."""
        return kind(network, self.noise, self.sampler.clip, self.sampler.threshold)


def route(
    noise: Noise,
    name: str,
    steps: int | None = None,
    spacing: Spacing | None = None,
    karras: bool = False,
    eta: float = 0.0,
) -> Route:
    """A sampler with its settings; what it does not take is a `UserError`."""
    chosen = sampler(name)
    if karras and not chosen.karras:
        raise UserError(f"The sampler {name} visits the timesteps of the training; Karras levels are for others.")
    if eta and not chosen.eta:
        raise UserError(f"eta is ddim's share of fresh noise; the sampler {name} has none.")
    if not 0 <= eta <= 1:
        raise UserError(f"eta is a share of fresh noise between 0 and 1, not {eta}.")
    walk = partial(chosen.walk, eta=eta) if chosen.eta else chosen.walk
    more = {"karras": True} if karras else {}
    try:
        path = chosen.path(noise, steps or min(chosen.steps or noise.steps, _most(chosen, noise)), spacing, **more)
    except ValueError as error:
        raise UserError(str(error)) from None
    return Route(walk, path, chosen, noise)


def _most(chosen: Sampler, noise: Noise) -> int:
    """All levels of a noise that has fewer than are usual, but for the lowest where the sampler leaves it out."""
    return max(1, noise.steps - (chosen.path is inner_path))
