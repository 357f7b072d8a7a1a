"""Timing in rounds: every contender runs once in each round, so that a slow phase of the machine affects all."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from keifu.devices import processor_name

PAUSE = 0.3  # seconds


def machine() -> str:
    """Return the line about the machine that is printed above each table."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{processor_name()}, {torch.get_num_threads()} threads, {versions}"


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Return the mean; for several values also the lowest and the highest in brackets."""
    around = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{around}"


def interleaved(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warm: bool = False
) -> dict[str, list[float]]:
    """Return the seconds of each contender in each round, after an uncounted round.

    warm: run each twice and count the second run, because its caches were lost while it waited. There is a pause before
    each run: threads of the previous contender may still spin on the cores.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, work in contenders.items():
            time.sleep(PAUSE)
            if warm:
                work()
            start = time.perf_counter()
            work()
            if number:
                seconds[name].append(round(time.perf_counter() - start, 7))
    return seconds
