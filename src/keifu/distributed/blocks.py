"""The blocks of a model: the units that FSDP gathers, that are compiled, and whose activations are computed again."""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class HasBlocks(Protocol):
    """A module that lists its blocks."""

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """Return the blocks, of which none is inside another one."""
        ...


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that a model lists, or those of the models inside it if it lists none itself."""
    if isinstance(model, HasBlocks):
        return [*model.blocks]
    return [block for child in model.children() for block in blocks_of(child)]
