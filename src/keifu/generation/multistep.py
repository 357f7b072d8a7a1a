"""From noise to pictures with what the network saw before, too: LMS, PLMS, DPM-Solver++, UniPC; knows no network.

Samplers as in `samplers.py`.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from keifu.generation.denoiser import Denoiser
from keifu.generation.samplers import Drawn, Random, along, slope
from keifu.layers.noise_levels import Level, Path

FEW = 15  # DPM-Solver++ ends with a step of first order below so many steps, and wherever it ends at the clean picture
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)  # weights of the outputs, the newest first, by how many there are


def lms(denoise: Denoiser, x: Float[Tensor, "batch *shape"], path: Path, random: Random) -> Iterator[Drawn]:
    """The linear multistep method in σ of up to four slopes (k-diffusion's; Adams and Bashforth on uneven levels)."""
    slopes: deque[Tensor] = deque(maxlen=4)
    ratios = [stride.here.ratio for stride in path.strides]
    for number, (here, there) in enumerate(path.strides):
        picture = denoise(x, here).picture
        slopes.appendleft(slope(x, picture, here))
        known = ratios[max(0, number - 3) : number + 1][::-1]
        weights = lms_weights(known, here.ratio, there.ratio)
        moved = sum((weight * each for weight, each in zip(weights, slopes, strict=True)), torch.zeros_like(x))
        x = there.alpha / here.alpha * x + there.alpha * moved
        yield Drawn(x, picture)


def lms_weights(known: Sequence[float], start: float, end: float) -> list[float]:
    """∫ from start to end of each Lagrange polynomial on the known points; two Gauss points are exact for four."""
    middle, half = (start + end) / 2, (end - start) / 2
    nodes = [middle - half / math.sqrt(3), middle + half / math.sqrt(3)]
    others = [[q for q in known if q != p] for p in known]
    return [
        half * sum(math.prod((node - q) / (p - q) for q in rest) for node in nodes)
        for p, rest in zip(known, others, strict=True)
    ]


def plms(denoise: Denoiser, x: Float[Tensor, "batch *shape"], path: Path, random: Random) -> Iterator[Drawn]:
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
            ahead = denoise.output(along(x, seen.noise, here, there), there)
            seen = denoise.read((mixed + ahead) / 2, x, here)
        x = along(x, seen.noise, here, there)
        yield Drawn(x, seen.picture)


def dpm_2m(
    denoise: Denoiser, x: Float[Tensor, "batch *shape"], path: Path, random: Random, stochastic: bool = False
) -> Iterator[Drawn]:
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
        yield Drawn(x, picture)


def unipc(
    denoise: Denoiser, x: Float[Tensor, "batch *shape"], path: Path, random: Random, order: int = 2
) -> Iterator[Drawn]:
    """UniPC (Zhao et al., 2023, algorithms 5 to 8) on the picture, with B₂(h) = e^h - 1.

    Each picture that the network sees first corrects the x that it was seen in, then predicts the next; no evaluation
    is spent on it.
    """
    known: list[tuple[Tensor, Level]] = []
    previous, used = x, 1
    for number, (here, there) in enumerate(path.strides):
        picture = denoise(x, here).picture
        if known:
            x = _unified(previous, known, here, used, picture)
        known = [*known, (picture, here)][-order:]
        used = min(order, len(path.strides) - number, number + 1)
        previous = x
        x = _unified(x, known, there, used)
        yield Drawn(x, picture)


def _unified(
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
