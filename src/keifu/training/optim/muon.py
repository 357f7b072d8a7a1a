"""Muon for many small matrices at once.

Muon (Jordan et al., 2024) replaces the update of a matrix by the nearest orthogonal one. Torch's class handles one
matrix after another; for a small model with many small matrices this costs as much as the rest of a step. Stacked by
shape, the same operations take a third of the time (2 cores, AMX, width 128: 23 ms → 6 ms; one core: 13 → 7).
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

STACK = 2**20  # elements per stack, so that they fit a core's cache; a larger matrix is computed alone


Matrices = Float[Tensor, "matrices rows columns"]


def orthogonalize(
    x: Matrices, coefficients: tuple[float, float, float], steps: int, eps: float, dtype: torch.dtype = torch.bfloat16
) -> Matrices:
    """Make the singular values of each matrix about 1 by Newton-Schulz iteration (Jordan et al., 2024: in bfloat16)."""
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).to(dtype).contiguous()
    x = x / x.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class MuonRows(NamedTuple):
    """Rows of a parameter that are updated as one matrix, with the same rows of its gradient and of its momentum."""

    weight: Tensor
    gradient: Tensor
    momentum: Tensor


class StackedMuon(torch.optim.Muon):
    """`torch.optim.Muon` with the same settings, state and arithmetic, but a `step` over stacks of matrices of one
    shape.

    rows: row counts of the matrices of each joined parameter; any other parameter is one matrix. dtype: dtype of the
    matrix multiplications.
    """

    def __init__(
        self, params: Iterable[Any], rows: Mapping[Tensor, tuple[int, ...]], dtype: torch.dtype, **settings: Any
    ):
        super().__init__(params, **settings)
        self.rows, self.dtype = rows, dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for stack in _stacks(self._matrices(group)):
                self._update(stack, group)

    def _matrices(self, group: dict[str, Any]) -> list[MuonRows]:
        parts: list[MuonRows] = []
        for p in group["params"]:
            if p.grad is not None:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                rows = self.rows.get(p, len(p))
                parts += map(MuonRows, p.split(rows), p.grad.split(rows), self.state[p]["momentum_buffer"].split(rows))
        return parts

    def _update(self, stack: list[MuonRows], group: dict[str, Any]) -> None:
        weights, gradients, means = map(list, zip(*stack, strict=True))
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])  # pyright: ignore
        updates = torch._foreach_lerp(gradients, means, group["momentum"])  # pyright: ignore (Nesterov's)
        how = group["ns_coefficients"], group["ns_steps"], group["eps"], self.dtype
        directions = orthogonalize(torch.stack(updates), *how)
        rate, (rows, columns) = group["lr"], weights[0].shape
        torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])  # pyright: ignore
        steps = directions.to(weights[0].dtype) * -(rate * max(1, rows / columns) ** 0.5)
        torch._foreach_add_(weights, steps.unbind())  # pyright: ignore


def _stacks(matrices: Iterable[MuonRows]) -> Iterator[list[MuonRows]]:
    """Yield stacks of matrices of one shape, each as large as `STACK` allows."""
    by_shape = attrgetter("weight.shape")
    for shape, same in groupby(sorted(matrices, key=by_shape), key=by_shape):
        alike, size = list(same), max(1, STACK // shape.numel())
        yield from (alike[i : i + size] for i in range(0, len(alike), size))
