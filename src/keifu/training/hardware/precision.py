"""Mixed precision: the number format of matrix multiplications, TF32, and loss scaling for float16."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import ceil, log2

import torch

from keifu.devices import has_bfloat16


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the number format of a precision setting on this device. `auto` is bfloat16 if the device supports it,
    otherwise float16 on a GPU and float32 on a CPU.
    """
    if precision == "auto":
        half = torch.float32 if device.type == "cpu" else torch.float16
        return torch.bfloat16 if has_bfloat16(device) else half
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


@contextmanager
def tensor_float32(device: torch.device, precision: str) -> Iterator[None]:
    """Let an NVIDIA GPU multiply float32 matrices in TF32 (10 bits of mantissa), unless `precision` is float32.

    Only the older API sets the flags, so that inductor and other libraries can read them. (After `fp32_precision` of a
    backend is set, reading the older flags raises an error.)
    """
    cudnn, allowed = torch.backends.cudnn, precision != "float32"
    with ExitStack() as restoring:
        if device.type == "cuda":
            restoring.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            restoring.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
            torch.set_float32_matmul_precision("high" if allowed else "highest")
            torch.backends.cudnn.allow_tf32 = allowed
        yield


@contextmanager
def deterministic(device: torch.device, enabled: bool) -> Iterator[None]:
    """Let a GPU use only deterministic kernels, if `enabled`. A CPU always does.

    An operation without such a kernel raises torch's error, which names the operation.
    """
    cudnn = torch.backends.cudnn
    with ExitStack() as restoring:
        if enabled and device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at first use
            restoring.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
            restoring.callback(setattr, cudnn, "deterministic", cudnn.deterministic)
            restoring.callback(setattr, cudnn, "benchmark", cudnn.benchmark)
            torch.use_deterministic_algorithms(True)
            cudnn.deterministic, cudnn.benchmark = True, False
        yield


class LossScale:
    """Dynamic loss scaling: a factor of the loss before the backward pass, so that small gradients do not underflow in
    float16 (Micikevicius et al., 2018, section 3.2). It is 1 for every other format.

    As in torch.amp.GradScaler, it starts at 65,536, is halved after a gradient that is not finite, and doubled after
    2,000 finite steps. Unlike there, a step with such a gradient is computed again with the lower scale, not skipped.
    `value` is the scale of the mean loss. Objectives return sums, so `factor` divides it by the number of elements of
    the first micro-batch, rounded up to a power of two.
    """

    FIRST, INTERVAL = 65_536.0, 2_000

    def __init__(self, dtype: torch.dtype):
        self.moves = dtype == torch.float16
        self.load(elements=0.0)

    @property
    def factor(self) -> float:
        """The factor of a loss that is a sum over elements."""
        return self.value / self.elements

    @property
    def is_set(self) -> bool:
        """Whether the number of elements is known, or not needed."""
        return not self.moves or self.elements > 0

    def begin(self, elements: float) -> None:
        """Set the number of elements, from the first micro-batch."""
        self.elements = 2.0 ** ceil(log2(max(1.0, elements)))

    def load(self, value: float | None = None, steps: int = 0, elements: float = 1.0) -> None:
        """Restore the result of `facts`. States of keifu 0.2.0 have no elements: their scale is that of the sum."""
        self.value = (value or self.FIRST) if self.moves else 1.0
        self.elements = elements if self.moves else 1.0
        self.steps = steps

    def lower(self) -> bool:
        """Halve the scale and return True; return False if it is fixed or already 1."""
        if not self.moves or self.value <= 1:
            return False
        self.value /= 2
        self.steps = 0
        return True

    def count(self) -> None:
        """Count a successful step, and double the scale after `INTERVAL` steps."""
        self.steps += self.moves
        if self.steps == self.INTERVAL:
            self.value *= 2
            self.steps = 0

    def facts(self) -> dict[str, float]:
        """Return the scale, the steps since its last change, and the elements, for a checkpoint."""
        return {"value": self.value, "steps": self.steps, "elements": self.elements}
