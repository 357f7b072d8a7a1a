"""Failures of a training step and their explanation: NaN or infinite numbers, out of memory, divergence."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.training.run.progress import format_bytes

ALLOCATION = re.compile(
    r"out of memory|can't allocate memory|not enough memory|DefaultCPUAllocator|CU(BLAS|DNN)_STATUS_ALLOC_FAILED|"
    "(?i:unable to find an engine)"  # cuDNN raises it if no engine's workspace fits
)
ASKED = re.compile(r"(?:allocate:?|allocating) *([\d.]+) *(bytes|[KMGT]i?B)?")
ADVICE = "lower micro_batch (it changes no loss), the length of the rows, or the model's size"
NOT_AGAIN = "it did not happen again when the step was repeated"
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class NotFinite(UserError):
    """Error: the loss or a gradient of a step is not finite. The step was not applied."""


class OutOfMemory(UserError):
    """Error: a step did not fit into memory. The step was not applied."""


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turn every kind of out-of-memory error in a block into an `OutOfMemory` with the requested amount and advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not ALLOCATION.search(str(error)):
            raise
        raise OutOfMemory(f"There is not enough memory{_requested_bytes(str(error))}; {ADVICE}.") from error


def _requested_bytes(message: str) -> str:
    if match := ASKED.search(message):
        return f": {format_bytes(float(match[1].rstrip('.')) * UNITS.get(match[2] or 'bytes', 1))} more were asked for"
    return ""


def is_finite(tensor: Tensor) -> bool:
    """Return whether every number is finite. This waits for the device."""
    return bool(tensor.isfinite().all())


def first_not_finite(model: nn.Module, work: Callable[[], Tensor]) -> str:
    """Return a phrase that names the first tensor of a step that is not finite.

    work: runs the forward pass and returns the loss. The order of the checks: weights, outputs of modules as they are
    computed, the loss, gradients as they are computed.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not is_finite(tensor):
            return f"{name} itself holds {_bad(tensor)}"
    complaints: list[str] = []
    with _watch_modules(model, complaints):
        loss = work()
        if not complaints and not is_finite(loss):
            complaints.append("the loss is the first number that is not finite: the outputs of all modules are")
        if not complaints:
            loss.backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None and not is_finite(parameter.grad):
                    complaints.append(f"the gradient of {name} holds {_bad(parameter.grad)}")
    return complaints[0] if complaints else NOT_AGAIN


@contextmanager
def _watch_modules(model: nn.Module, complaints: list[str]) -> Iterator[None]:
    """Run a block with hooks that add a phrase to `complaints` for each module whose output, or the gradient of its
    output, is not finite.
    """
    with ExitStack() as hooks, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # modules whose inputs have no gradient
        for name, module in model.named_modules():
            layer = f"{name or 'the model'} ({type(module).__name__})"
            output = partial(_check, complaints, f"output of {layer}")
            gradient = partial(_check, complaints, f"gradient that reaches {layer}")
            hooks.callback(module.register_forward_hook(output).remove)
            hooks.callback(module.register_full_backward_pre_hook(gradient).remove)
        yield


def _check(complaints: list[str], tensor_name: str, *call: object) -> None:
    """Add a phrase to `complaints` if a tensor in a hook's last argument (the output, or the gradients of outputs) is
    not finite.
    """
    for tensor in call[-1] if isinstance(call[-1], tuple | list) else call[-1:]:
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not is_finite(tensor):
            complaints.append(f"the {tensor_name} is the first that holds {_bad(tensor)}")
            return


def _bad(tensor: Tensor) -> str:
    nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    kinds = [f"{n:,} {word}" for n, word in ((nan, "NaN"), (infinite, "infinite")) if n]
    return f"{' and '.join(kinds)} of {tensor.numel():,} values"


@dataclass(kw_only=True)
class Running:
    """Running mean and variance of a series: an exponential moving average with decay 0.9."""

    mean: float = 0.0
    variance: float = 0.0
    readings: int = 0

    def take(self, loss: float, rise: float) -> bool:
        """Update the mean and the variance with a loss, and return True. Return False and ignore the loss if it exceeds
        the mean by six standard deviations and by `rise` times the mean.
        """
        if self.readings >= 5 and loss > self.mean + max(6 * self.variance**0.5, rise * abs(self.mean)):
            return False
        share = max(0.1, 1 / (self.readings + 1))
        change = loss - self.mean
        self.mean += share * change
        self.variance = (1 - share) * (self.variance + share * change**2)
        self.readings += 1
        return True


class Divergence(Running):
    """Detector of divergence: `watch` warns if the loss is far above its running mean (by at least half of it). It does
    not warn again until the loss has come back.
    """

    warned = False

    def watch(self, loss: float) -> str | None:
        """Return a warning, or None."""
        before = self.warned
        self.warned = not self.take(loss, 0.5)
        text = f"The loss is {loss:.4g}, far above its running mean of {self.mean:.4g}: the run may be diverging; "
        text += "a lower learning rate, a longer warm-up or a smaller clip helps."
        return text if self.warned and not before else None
