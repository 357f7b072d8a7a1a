"""Lets the tests of training import what they share."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from keifu.training.hardware import cost

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module", autouse=True)
def _timed_passes(timed_passes: Callable[..., tuple[float, float, int]]) -> Iterator[None]:
    """Time passes and count their FLOPs before a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "_timed", timed_passes)
        yield


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    """Use one thread: models this small are faster without a second one."""
    torch.set_num_threads(1)
