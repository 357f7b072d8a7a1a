"""Lets the tests of training import what they share."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    """Models this small are faster without a second one."""
    torch.set_num_threads(1)
