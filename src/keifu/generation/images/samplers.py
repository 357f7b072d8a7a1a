"""From noise to pictures in steps that use what the network sees now: DDPM, DDIM, Euler, Heun; knows no network.

A sampler is a generator: it takes a denoiser, x at the first level, the path and the noise to draw from, and yields x
and the predicted picture after each step. x is what the network sees, x = alpha · picture + sigma · noise; where papers
write x / alpha (Karras et al., 2022), the arithmetic here is that, multiplied out.

From noise to pictures with what the network saw before, too: LMS, PLMS, DPM-Solver++, UniPC; knows no network.

Samplers as in `samplers.py`.

The samplers by name, each with its path, its usual number of steps and its bounds; knows no network.

Bounds are those of diffusers' scheduler of the same name, which clips a predicted picture in some and not in others.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from keifu.errors import UserError, unknown
from keifu.generation.images.denoiser import Denoiser, DenoiserOutput, Network, standard_deviation
from keifu.layers.diffusion.noise_schedule import Noise, Spacing
from keifu.layers.diffusion.sampling_schedule import (
    Level,
    SamplingPath,
    continuous_path,
    inner_path,
    jumping_path,
    whole_path,
)

Random: TypeAlias = Callable[[Tensor], Tensor]  # normal noise in the shape of x, each picture's from its own seed


class SamplerStep(NamedTuple):
    """Where a sampler stands after a step: x at the level it went to, and the picture that the network saw in it."""

    x: Float[Tensor, "batch *shape"]
    picture: Float[Tensor, "batch *shape"]


Walk: TypeAlias = Callable[[Denoiser, Tensor, SamplingPath, Random], Iterator[SamplerStep]]


def ddpm(
    denoise: Denoiser, x: Float[Tensor, "batch *shape"], path: SamplingPath, random: Random
) -> Iterator[SamplerStep]:
    """Ho et al. (2020), algorithm 2, from level to level: the posterior given the predicted picture, equation 7.

    Its variance is as the denoiser's `Noise` says. A step that ends at the clean picture adds no noise; diffusers adds
    it there unless the step begins at timestep 0.
    """
    for here, there in path.strides:
        seen = denoise(x, here)
        beta = 1 - (here.alpha / there.alpha) ** 2
        kept = here.alpha / there.alpha * there.sigma**2 / here.sigma**2
        x = there.alpha * beta / here.sigma**2 * seen.picture + kept * x
        if there.sigma:
            x = x + _spread(seen, denoise.noise.variance, here, there) * random(x)
        yield SamplerStep(x, seen.picture)


def _spread(seen: DenoiserOutput, variance: str, here: Level, there: Level) -> Tensor | float:
    """The standard deviation of a DDPM step: √β̃, √β, or what the network says lies between, in logarithms (Nichol and
    Dhariwal, 2021, equation 15)."""
    small, large = standard_deviation(here, there), math.sqrt(1 - (here.alpha / there.alpha) ** 2)
    if variance == "learned_range":
        assert seen.share is not None
        low, high = math.log(max(small, 1e-10)), math.log(large)
        return torch.exp(low + (seen.share + 1) / 2 * (high - low))
    return small if variance == "fixed_small" else large


def ddim(
    denoise: Denoiser, x: Float[Tensor, "batch *shape"], path: SamplingPath, random: Random, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Song et al. (2021), equation 12; `eta` of the noise that equation 16 has for DDPM, 0 for none.

    The noise in x is the network's own, also where the picture was clipped.
    """
    for here, there in path.strides:
        seen = denoise(x, here)
        fresh = eta * standard_deviation(here, there)
        x = there.alpha * seen.picture + math.sqrt(max(0.0, there.sigma**2 - fresh**2)) * seen.noise
        x = x + fresh * random(x) if eta else x
        yield SamplerStep(x, seen.picture)


def euler(
    denoise: Denoiser, x: Float[Tensor, "batch *shape"], path: SamplingPath, random: Random
) -> Iterator[SamplerStep]:
    """Euler's method on the probability flow (Karras et al., 2022, algorithm 1 of one order, without churn)."""
    for here, there in path.strides:
        picture = denoise(x, here).picture
        x = integrate_to(x, derivative(x, picture, here), here, there)
        yield SamplerStep(x, picture)


def euler_ancestral(
    denoise: Denoiser, x: Float[Tensor, "batch *shape"], path: SamplingPath, random: Random
) -> Iterator[SamplerStep]:
    """Euler's method to a level below, and noise up to the level that was meant: k-diffusion's (Crowson, 2022).

    In exact arithmetic this is DDIM with η = 1 on the continuous path.
    """
    for here, there in path.strides:
        picture = denoise(x, here).picture
        up = there.ratio * math.sqrt(max(0.0, 1 - (there.ratio / here.ratio) ** 2))
        down = there.ratio**2 / here.ratio
        step = integrate_to(
            x, derivative(x, picture, here), here, Level(there.timestep, there.alpha, there.alpha * down)
        )
        x = step + there.alpha * up * random(x)
        yield SamplerStep(x, picture)


def heun(
    denoise: Denoiser, x: Float[Tensor, "batch *shape"], path: SamplingPath, random: Random
) -> Iterator[SamplerStep]:
    """Karras et al. (2022), algorithm 1 without churn: the mean of the slopes at both ends; two evaluations a step,
    one in the last."""
    for here, there in path.strides:
        picture = denoise(x, here).picture
        first = derivative(x, picture, here)
        end = integrate_to(x, first, here, there)
        if there.sigma:
            picture = denoise(end, there).picture
            end = integrate_to(x, (first + derivative(end, picture, there)) / 2, here, there)
        x = end
        yield SamplerStep(x, picture)


def derivative(x: Float[Tensor, "batch *shape"], picture: Float[Tensor, "batch *shape"], level: Level) -> Tensor:
    """The noise in x beside this picture: d(x / alpha) / dσ of the probability flow."""
    return (x - level.alpha * picture) / level.sigma


def integrate_to(x: Float[Tensor, "batch *shape"], noise: Tensor, here: Level, there: Level) -> Tensor:
    """x moved to another level along a constant slope; with the network's noise, DDIM's deterministic step."""
    scale = there.alpha / here.alpha
    return scale * x + (there.sigma - scale * here.sigma) * noise


FEW = 15  # DPM-Solver++ ends with a step of first order below so many steps, and wherever it ends at the clean picture
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)  # weights of the outputs, the newest first, by how many there are


def lms(
    denoise: Denoiser, x: Float[Tensor, "batch *shape"], path: SamplingPath, random: Random
) -> Iterator[SamplerStep]:
    """The linear multistep method in σ of up to four slopes (k-diffusion's; Adams and Bashforth on uneven levels)."""
    slopes: deque[Tensor] = deque(maxlen=4)
    ratios = [stride.here.ratio for stride in path.strides]
    for number, (here, there) in enumerate(path.strides):
        picture = denoise(x, here).picture
        slopes.appendleft(derivative(x, picture, here))
        known = ratios[max(0, number - 3) : number + 1][::-1]
        weights = lms_weights(known, here.ratio, there.ratio)
        moved = sum((weight * each for weight, each in zip(weights, slopes, strict=True)), torch.zeros_like(x))
        x = there.alpha / here.alpha * x + there.alpha * moved
        yield SamplerStep(x, picture)


def lms_weights(known: Sequence[float], start: float, end: float) -> list[float]:
    """∫ from start to end of each Lagrange polynomial on the known points; two Gauss points are exact for four."""
    middle, half = (start + end) / 2, (end - start) / 2
    nodes = [middle - half / math.sqrt(3), middle + half / math.sqrt(3)]
    others = [[q for q in known if q != p] for p in known]
    return [
        half * sum(math.prod((node - q) / (p - q) for q in rest) for node in nodes)
        for p, rest in zip(known, others, strict=True)
    ]


def plms(
    denoise: Denoiser, x: Float[Tensor, "batch *shape"], path: SamplingPath, random: Random
) -> Iterator[SamplerStep]:
    """Pseudo linear multistep (Liu et al., 2022, equation 12) without Runge-Kutta steps: the first step is taken twice,
    with the mean of the outputs at both ends, as the released Stable Diffusion has it.

    Outputs are combined before they are read, so a velocity is combined as such.
    """
    outputs: deque[Tensor] = deque(maxlen=4)
    for here, there in path.strides:
        outputs.appendleft(denoise.output(x, here))
        weights = ADAMS_BASHFORTH[len(outputs) - 1]
        mixed = sum((w * each for w, each in zip(weights, outputs, strict=True)), torch.zeros_like(outputs[0]))
        seen = denoise.read(mixed, x, here)
        if len(outputs) == 1 and len(path.strides) > 1:
            ahead = denoise.output(integrate_to(x, seen.noise, here, there), there)
            seen = denoise.read((mixed + ahead) / 2, x, here)
        x = integrate_to(x, seen.noise, here, there)
        yield SamplerStep(x, seen.picture)


def dpm_2m(
    denoise: Denoiser, x: Float[Tensor, "batch *shape"], path: SamplingPath, random: Random, stochastic: bool = False
) -> Iterator[SamplerStep]:
    """DPM-Solver++(2M) (Lu et al., 2022, algorithm 2): linear in λ between the last two pictures.

    First order where nothing came before, and in the last step. `stochastic` is SDE-DPM-Solver++(2M) of the same paper,
    equation 18, whose fresh noise is DDPM's.
    """
    before: tuple[Tensor, Level] | None = None
    for number, (here, there) in enumerate(path.strides, 1):
        picture, h = denoise(x, here).picture, there.log_snr - here.log_snr
        last = number == len(path.strides) and (number < FEW or not there.sigma)
        line = picture
        if before is not None and not last:
            earlier, level = before
            line = picture + (picture - earlier) * (h / (2 * (here.log_snr - level.log_snr)))
        decay = math.exp(-h)
        shrunk = there.sigma / here.sigma
        if stochastic:
            fresh = there.sigma * math.sqrt(max(0.0, 1 - decay**2))
            x = shrunk * decay * x + there.alpha * (1 - decay**2) * line + fresh * random(x)
        else:
            x = shrunk * x + there.alpha * (1 - decay) * line
        before = picture, here
        yield SamplerStep(x, picture)


def unipc(
    denoise: Denoiser, x: Float[Tensor, "batch *shape"], path: SamplingPath, random: Random, order: int = 2
) -> Iterator[SamplerStep]:
    """UniPC (Zhao et al., 2023, algorithms 5 to 8) on the picture, with B₂(h) = e^h - 1.

    Each picture that the network sees first corrects the x that it was seen in, then predicts the next; no evaluation
    is spent on it.
    """
    known: list[tuple[Tensor, Level]] = []
    previous, used = x, 1
    for number, (here, there) in enumerate(path.strides):
        picture = denoise(x, here).picture
        if known:
            x = _unified_corrector(previous, known, here, used, picture)
        known = [*known, (picture, here)][-order:]
        used = min(order, len(path.strides) - number, number + 1)
        previous = x
        x = _unified_corrector(x, known, there, used)
        yield SamplerStep(x, picture)


def _unified_corrector(
    x: Tensor, known: Sequence[tuple[Tensor, Level]], there: Level, order: int, picture: Tensor | None = None
) -> Tensor:
    """x at the newest known level moved to another one: UniP, or where the picture there is known, UniC."""
    newest, here = known[-1]
    h = there.log_snr - here.log_snr
    growth = math.expm1(-h)
    earlier = known[-order:-1][::-1]
    places = [(level.log_snr - here.log_snr) / h for _, level in earlier]
    differences = [(each - newest) / place for (each, _), place in zip(earlier, places, strict=True)]
    if picture is not None:
        differences.append(picture - newest)
        places.append(1.0)
    moved = there.sigma / here.sigma * x - there.alpha * growth * newest
    for weight, difference in zip(_weights(places, -h, growth), differences, strict=True):
        moved = moved - there.alpha * growth * weight * difference
    return moved


def _weights(places: Sequence[float], h: float, growth: float) -> list[float]:
    """What each difference weighs: the solution of equation 9; a single one weighs 1/2, which is of the same order."""
    if len(places) < 2:
        return [0.5] * len(places)
    phi, factorial, right = growth / h - 1, 1.0, []
    for power in range(1, len(places) + 1):
        right.append(phi * factorial / growth)
        factorial *= power + 1
        phi = phi / h - 1 / factorial
    points = torch.tensor(places, dtype=torch.float64)
    powers = torch.stack([points**power for power in range(len(places))])
    return torch.linalg.solve(powers, torch.tensor(right, dtype=torch.float64)).tolist()


@dataclass(frozen=True)
class Sampler:
    """A way from noise to a picture.

    path: from a noise, a number of steps and a spacing. steps: how many are usual; None for all that the noise has.
    karras: whether the path takes levels of Karras et al. (2022). eta: whether the walk takes η.
    clip, threshold: which of the noise's bounds on predicted pictures it keeps.
    """

    walk: Callable[..., Iterator[SamplerStep]]
    path: Callable[..., SamplingPath]
    about: str
    steps: int | None = 50
    karras: bool = True
    eta: bool = False
    clip: bool = False
    threshold: bool = False


SAMPLERS = {
    "ddpm": Sampler(ddpm, whole_path, "the chain of the paper, random", None, False, clip=True, threshold=True),
    "ddim": Sampler(
        ddim,
        jumping_path,
        "few steps, without chance unless --eta",
        50,
        False,
        True,
        clip=True,
        threshold=True,
    ),
    "euler": Sampler(euler, continuous_path, "the plainest solver", 30),
    "euler-ancestral": Sampler(euler_ancestral, continuous_path, "Euler with fresh noise", 30),
    "heun": Sampler(heun, continuous_path, "second order, two evaluations a step", 20, clip=True),
    "lms": Sampler(lms, continuous_path, "of the last four slopes", 30),
    "plms": Sampler(plms, jumping_path, "the first default of Stable Diffusion", 50, False),
    "dpm++-2m": Sampler(dpm_2m, inner_path, "good pictures in 10 to 25 steps", 20, threshold=True),
    "dpm++-2m-sde": Sampler(
        partial(dpm_2m, stochastic=True), inner_path, "the same with fresh noise", 25, threshold=True
    ),
    "unipc": Sampler(unipc, inner_path, "good pictures in 8 to 20 steps", 20, threshold=True),
}


def sampler(name: str) -> Sampler:
    """The sampler of that name; an unknown one is a `UserError` with the nearest."""
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    return SAMPLERS[name]


@dataclass(frozen=True)
class SamplerRoute:
    """A sampler made ready for a noise: what walks, along which levels, with which bounds."""

    walk: Walk
    path: SamplingPath
    sampler: Sampler
    noise: Noise

    def denoiser(self, network: Network, kind: Callable[..., Denoiser] = Denoiser) -> Denoiser:
        """The denoiser that this sampler takes, or one of another kind with the same bounds."""
        return kind(network, self.noise, self.sampler.clip, self.sampler.threshold)


def plan_route(
    noise: Noise,
    name: str,
    steps: int | None = None,
    spacing: Spacing | None = None,
    karras: bool = False,
    eta: float = 0.0,
) -> SamplerRoute:
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
    return SamplerRoute(walk, path, chosen, noise)


def _most(chosen: Sampler, noise: Noise) -> int:
    """All levels of a noise that has fewer than are usual, but for the lowest where the sampler leaves it out."""
    return max(1, noise.steps - (chosen.path is inner_path))
