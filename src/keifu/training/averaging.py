"""The mean of a run's last saved weights (Vaswani et al., 2017, section 6.1); knows no model and no loop.

A run's states stay as they are, and so does the model that is trained: only what is written at the end is the mean.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from keifu.training import state


def average(directory: Path, last: int) -> dict[str, Tensor]:
    """The mean over the last saved states of a run, at most `last`, of every tensor of the model, by its name there.

    Sums are made in float64. What is no floating-point number is that of the newest state.
    """
    *earlier, newest = state.steps(directory)[-last:]
    tensors = _of_model(directory, newest)
    sums = {name: tensor.double() for name, tensor in tensors.items() if tensor.is_floating_point()}
    for step in earlier:
        before = _of_model(directory, step)
        sums = {name: total + before[name].double() for name, total in sums.items()}
    means = {name: total / (1 + len(earlier)) for name, total in sums.items()}
    return {name: means[name].to(tensor.dtype) if name in means else tensor for name, tensor in tensors.items()}


@contextmanager
@torch.no_grad()
def averaged(model: nn.Module, directory: Path, last: int) -> Iterator[None]:
    """Gives the model the mean of its run's last states in this block, and its own weights back after it.

    Without a saved state, or with `last` below 2, the weights are its own in the block too.
    """
    if last < 2 or not state.steps(directory):
        yield
        return
    own = {name: tensor.detach().clone() for name, tensor in state.of_model(model).items()}
    state.into_model(model, average(directory, last))
    try:
        yield
    finally:
        state.into_model(model, own)


def _of_model(directory: Path, step: int) -> dict[str, Tensor]:
    tensors = state.read(directory, step).tensors
    return {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
