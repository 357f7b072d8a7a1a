"""Building a model on the meta device: without memory and without initialisation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_INIT = {vars(nn.init)[name] for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")}
_FILL = {
    Tensor.normal_, Tensor.uniform_, Tensor.bernoulli_, Tensor.random_, Tensor.exponential_, Tensor.copy_,
    Tensor.exp_, Tensor.expm1_, Tensor.log_, Tensor.fill_, Tensor.zero_, Tensor.add_, Tensor.sub_, Tensor.mul_,
    Tensor.div_, Tensor.clamp_, Tensor.__setitem__,
}  # fmt: skip


class _NoInitialisation(TorchFunctionMode):
    """Mode in which initialisation does not change a tensor.

    On the meta device there are no numbers to set. But PyTorch's own fill functions for it import its compiler, which
    takes longer than loading a small model.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _INIT or func in _FILL:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """Create tensors in this block with a shape and a dtype but no numbers, as within `torch.device("meta")`.
    Initialisation has no cost."""
    with torch.device("meta"), _NoInitialisation():
        yield
