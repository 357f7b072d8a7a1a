"""An optimizer that takes each part of a joined tensor for a tensor of its own; knows no model and no optimizer.

Queries, keys and values stand above each other in one matrix, and what an optimizer says of a whole matrix (its
direction, its size) is to be said of each.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.optim import Optimizer

from keifu.layers.linear import JoinedLinear

Rows = tuple[int, ...]
Named = list[tuple[str, nn.Parameter]]


class Partwise:
    """`make` gets the parts, named `matrix.0`, `matrix.1`: views of the rows of each tensor, whose numbers `tensors`
    gives. The gradients are views too."""

    def __init__(self, tensors: dict[str, tuple[Tensor, Rows]], make: Callable[[Named], Optimizer]):
        self.tensors = list(tensors.values())
        views = (
            (f"{n}.{i}", part.detach()) for n, (w, rows) in tensors.items() for i, part in enumerate(_split(w, rows))
        )
        parts = [(name, nn.Parameter(part)) for name, part in views]
        self.parts = [part for _, part in parts]
        self.optimizer = make(parts)

    def attach(self) -> None:
        """Gives each part its rows of the gradient, without a copy."""
        gradients = [g for tensor, rows in self.tensors for g in _gradients(tensor, rows)]
        for part, gradient in zip(self.parts, gradients, strict=True):
            part.grad = gradient


def _gradients(tensor: Tensor, rows: Rows) -> tuple[Tensor | None, ...]:
    return (None,) * len(rows) if tensor.grad is None else _split(tensor.grad, rows)


def _split(tensor: Tensor, rows: Rows) -> tuple[Tensor, ...]:
    return tensor.split(rows) if tensor.dim() else (tensor,)


def learning(model: nn.Module) -> dict[str, tuple[Tensor, Rows]]:
    """Every parameter that learns, by its name, with the rows of its parts: one part, but for joined layers."""
    joined = {id(p): m.parts for m in model.modules() if isinstance(m, JoinedLinear) for p in m.parameters(False)}
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: (p, joined.get(id(p)) or tuple(p.shape[:1]) or (1,)) for name, p in named}


def hidden_matrices(model: nn.Module) -> dict[str, tuple[Tensor, Rows]]:
    """The weights of linear layers inside numbered layers (`blocks.3...`), each with the rows of its parts.

    Embeddings and heads lie outside; they, biases and gains are no business of Muon's.
    """
    linears = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    numbered = {name for name in linears if any(piece.isdigit() for piece in name.split("."))}
    return {name: entry for name, entry in learning(model).items() if name in numbered}
