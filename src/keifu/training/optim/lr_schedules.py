"""Learning rate schedules: the rate at each update, as a share of the highest rate."""

import math


def constant(progress: float, final_ratio: float) -> float:
    """Return 1: the highest rate, always."""
    return 1.0


def linear(progress: float, final_ratio: float) -> float:
    """Return a straight line from 1 to `final_ratio`."""
    return 1.0 - (1.0 - final_ratio) * progress


def cosine(progress: float, final_ratio: float) -> float:
    """Return half a cosine from 1 to `final_ratio` (Loshchilov and Hutter, 2017, equation 5, without restarts)."""
    return final_ratio + (1.0 - final_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


DECAYS = {"constant": constant, "linear": linear, "cosine": cosine}


def ratio(
    schedule: str, step: float | int, steps: float | int, warmup: int, final_ratio: float, hold: int = 0
) -> float:
    """Return the learning rate of update number `step` (from 0) as a share of the highest rate.

    The rate rises linearly over the first `warmup` updates, reaches the highest rate in the last of them, and is
    constant for `hold` more. "inverse_sqrt" then falls as √((warmup + hold) / (step + 1)), independently of `steps` and
    `final_ratio`: without a hold as in Vaswani et al. (2017, section 5.3), without a warm-up as in PaLM. The other
    schedules reach `final_ratio` at the end of `steps`. A step is a fraction if batches grow and rows are counted.
    """
    if warmup and step < warmup:
        return min(1.0, (step + 1) / warmup)
    flat = warmup + hold
    if schedule == "inverse_sqrt":
        return min(1.0, math.sqrt(max(flat, 1) / (step + 1)))
    return DECAYS[schedule](min(1.0, max(0.0, (step - flat) / max(1, steps - 1 - flat))), final_ratio)
