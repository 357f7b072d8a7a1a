"""Building a model on the meta device: without memory and without initialisation."""

from collections.abc import Callable, Iterator
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


class _NothingDrawn(TorchFunctionMode):
    """Initialisation leaves a tensor as it is.

    On the meta device there is nothing to fill; but PyTorch's own way to fill nothing is written in Python and imports
    its compiler, which takes longer than to load a small model.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _INIT or func in _FILL:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """Make a context in which tensors have a shape and a type but no numbers, as within `torch.device("meta")`, and
    initialisation costs nothing."""
    with torch.device("meta"), _NothingDrawn():
        yield
