"""Tensors that a file arranges in another way than by joining, transposing or moving rows."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class Arrangement(NamedTuple):
    """Another arrangement of one of keifu's tensors in a file. split: returns the file's tensors. join: its inverse."""

    split: Callable[[Tensor], list[Tensor]]
    join: Callable[[Sequence[Tensor]], Tensor]
