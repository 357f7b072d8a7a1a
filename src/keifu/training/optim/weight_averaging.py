"""Weight averaging: the mean of the last checkpoints, or an exponential moving average during training.

Training itself is not affected: the average is used for validation, samples and the saved model.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from keifu.training.run import checkpoint as state


def average_checkpoints(directory: Path, last: int) -> dict[str, Tensor]:
    """Return the mean of every model tensor over the last checkpoints of a run, at most `last`, by its name there
    (Vaswani et al., 2017, section 6.1).

    Sums are in float64. Tensors that are not floating-point are those of the newest checkpoint.
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
def replaced_weights(weights: Mapping[str, Tensor], new_weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Run a block in which the weights have the values of `new_weights`, by name; then restore their values."""
    before = {name: tensor.detach().clone() for name, tensor in weights.items()}
    try:
        for name, tensor in weights.items():
            tensor.detach().copy_(new_weights[name])
        yield
    finally:
        for name, tensor in weights.items():
            tensor.detach().copy_(before[name])


def averaged_weights(model: nn.Module, directory: Path, last: int) -> AbstractContextManager[None]:
    """Run a block in which the model has the mean of its run's last checkpoints; then restore its weights.

    Without a checkpoint, or with `last` below 2, the weights do not change.
    """
    if last < 2 or not state.steps(directory):
        return nullcontext()
    return replaced_weights(state.model_tensors(model), average_checkpoints(directory, last))


def _of_model(directory: Path, step: int) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.read(directory, step).tensors.items() if name.startswith("model.")}


class MovingAverage:
    """Exponential moving average of parameters (Polyak and Juditsky, 1992; DDPM's decay is 0.9999).

    Update n, from 1, has the decay min(decay, (1 + n) / (10 + n)), so that the average of a short run is not dominated
    by its first weights.
    """

    PREFIX = "average."

    def __init__(self, parameters: Mapping[str, Tensor], decay: float):
        self.parameters, self.decay = parameters, decay
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Start again from the current parameters."""
        self.updates = 0
        self.means = {name: tensor.detach().clone() for name, tensor in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages. Call this after each update of the parameters."""
        self.updates += 1
        share = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        means, now = [*self.means.values()], [*self.parameters.values()]
        torch._foreach_lerp_(means, now, share)  # pyright: ignore[reportPrivateImportUsage]

    def state(self) -> dict[str, Tensor]:
        """Return the averages and the number of updates, for a checkpoint."""
        entries = {**self.means, "": torch.tensor(self.updates)}
        return {f"{self.PREFIX}{name}": tensor for name, tensor in entries.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Load the entries that `state` wrote, and return the others."""
        self.updates = int(state[self.PREFIX])
        for name, mean in self.means.items():
            mean.copy_(state[f"{self.PREFIX}{name}"])
        return {name: tensor for name, tensor in state.items() if not name.startswith(self.PREFIX)}
