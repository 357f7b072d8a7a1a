"""Attention maps: records the attention weights of any model with softmax attention while it computes, and draws them.

Axes: batch, heads, length = queries, seen = keys.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from keifu.errors import UserError

SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax)


@contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Records the weights of every attention layer, by module name and pass, while the context is open.

    Weights of fused attention are [batch, heads, length, seen]; those of a softmax that is written out have its shape.
    To be used without gradients, in evaluation mode.
    """
    maps: dict[str, list[Tensor]] = {}
    inside: list[str] = []
    hooks = [hook for name, module in model.named_modules() for hook in _attention_modules(module, name, inside)]
    try:
        with _AttentionRecorder(maps, inside):
            yield maps
    finally:
        for hook in hooks:
            hook.remove()


def _attention_modules(module: nn.Module, name: str, inside: list[str]) -> list[Any]:
    """Hooks that keep the names of the modules that compute at the moment, the innermost last."""
    enter = module.register_forward_pre_hook(lambda *_: inside.append(name))
    leave = module.register_forward_hook(lambda *_: inside.pop() and None, always_call=True)
    return [enter, leave]


class _AttentionRecorder(TorchFunctionMode):
    """Intercepts every call of a torch function and keeps the attention weights."""

    def __init__(self, maps: dict[str, list[Tensor]], inside: Sequence[str]):
        super().__init__()
        self.maps, self.inside = maps, inside

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self._keep(_weights(*args, **(kwargs or {})))
        elif func in SOFTMAX:
            self._keep(result)
        return result

    def _keep(self, weights: Tensor) -> None:
        self.maps.setdefault(self.inside[-1] if self.inside else "", []).append(weights.detach().float())


def _weights(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The same attention with the identity for values brings back its weights, whatever mask, scale and groups are."""
    eye = torch.eye(k.shape[-2], dtype=v.dtype, device=v.device).expand(*k.shape[:-1], k.shape[-2])
    return F.scaled_dot_product_attention(q, k, eye, *args, **kwargs)


def draw_maps(
    maps: dict[str, Tensor], rows: Sequence[str], columns: Sequence[str], title: str = "", width: int = 4
) -> bytes:
    """A PNG with a square for each head: `maps` gives [heads, rows, columns] weights for each name.

    rows are the query tokens, columns the key tokens.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heads = [(f"{name}, head {n + 1}", head) for name, each in maps.items() for n, head in enumerate(each)]
    if not heads:
        raise UserError("There is no attention to draw: the model computed none.")
    lines = -(-len(heads) // width)
    size = (min(width, len(heads)) * (1.1 + 0.24 * len(columns)), lines * (1.1 + 0.24 * len(rows)))
    with plt.rc_context({"font.family": _fonts(), "font.size": 7}):
        figure, grid = plt.subplots(lines, min(width, len(heads)), figsize=size, squeeze=False, layout="constrained")
        for axes in grid.flat[len(heads) :]:
            axes.set_axis_off()
        for axes, (name, head) in zip(grid.flat, heads, strict=False):
            axes.imshow(head.cpu().numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto")
            axes.set_title(name, fontsize=7)
            axes.set_xticks(range(len(columns)), columns, rotation=90)
            axes.set_yticks(range(len(rows)), rows)
        figure.suptitle(title, fontsize=9)
        file = BytesIO()
        figure.savefig(file, format="png", dpi=110)
        plt.close(figure)
    return file.getvalue()


def _fonts() -> list[str]:
    """A letter is drawn by the first of these fonts that has it; the second one has Japanese."""
    from matplotlib import font_manager

    from keifu.data.catalogue.catalogue import fetch

    path = fetch("japanese-font")
    font_manager.fontManager.addfont(path)
    return ["DejaVu Sans", font_manager.FontProperties(fname=path).get_name()]
