"""Inspection of a model's pass: the attention of each head, and the predictions of each layer.

Axes: heads, length = queries, seen = keys, layer, place = tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from keifu.errors import UserError
from keifu.inference.text.model import Model, device_of, evaluation_mode
from keifu.inference.text.translation import TranslationParams, search, translator

SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax)
Likely = list[tuple[int, float]]  # token ids with probabilities, the likeliest first


@runtime_checkable
class Aligner(Protocol):
    """Translator that returns its alignment (a single attention map) itself."""

    def alignment(self, source: Tensor, target: Tensor) -> Tensor: ...


@contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Record the weights of every attention layer inside the block, by module name; one tensor for each pass.

    Weights of fused attention are [batch, heads, length, seen]; those of an explicit softmax have its shape. Use it
    without gradients, in evaluation mode.
    """
    recorder = _AttentionRecorder()
    inside = recorder.inside
    with ExitStack() as hooks, recorder:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
            hooks.enter_context(module.register_forward_hook(lambda *_: inside.__delitem__(-1), always_call=True))
        yield recorder.maps


class _AttentionRecorder(TorchFunctionMode):
    """Recorder that intercepts torch functions and keeps attention weights.

    inside: names of the modules that are running, the innermost last.
    """

    def __init__(self):
        super().__init__()
        self.maps: dict[str, list[Tensor]] = {}
        self.inside: list[str] = []

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
    """Compute the weights of a fused attention call: the same call with the identity as values, with its mask, scale
    and groups."""
    eye = torch.eye(k.shape[-2], dtype=v.dtype, device=v.device).expand(*k.shape[:-1], k.shape[-2])
    return F.scaled_dot_product_attention(q, k, eye, *args, **kwargs)


class Inspection(NamedTuple):
    """Attention and lens of a text.

    rows: query tokens. columns: key tokens. attention: by layer name. lens: for each layer and position the likeliest
    next tokens, for causal models.
    """

    rows: list[int]
    columns: list[int]
    attention: dict[str, Float[Tensor, "heads length seen"]]
    lens: list[list[Likely]]


@torch.inference_mode()
def inspect_text(model: nn.Module, ids: Sequence[int], top: int = 5) -> Inspection:
    """Inspect a pass of a causal model or an encoder. The lens applies the last norm and the head to each layer's
    states (nostalgebraist, 2020)."""
    states: list[Tensor] = []
    layered: Any = model
    blocks = layered.blocks if isinstance(model, Model) and hasattr(model, "blocks") else ()
    with evaluation_mode(model), record_attention(model) as maps, ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_hook(lambda *args: states.append(args[2])))
        model(torch.tensor([list(ids)], device=device_of(model)))
        lens = [_likeliest(layered.logits(layered.norm(x[0])), top) for x in states]
    return Inspection(list(ids), list(ids), _joined_maps(maps, len(ids), len(ids)), lens)


def _likeliest(logits: Tensor, top: int) -> list[Likely]:
    best = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [list(zip(*pair, strict=True)) for pair in rows]


def _joined_maps(maps: dict[str, list[Tensor]], rows: int, columns: int) -> dict[str, Tensor]:
    """Return the maps [rows, columns] of each head. A layer that computes its window in pieces is left out."""
    first = {name: passes[0] for name, passes in maps.items()}
    return {name: head[0].cpu() for name, head in first.items() if head.ndim == 4 and head.shape[2:] == (rows, columns)}


@torch.inference_mode()
def inspect_translation(model: nn.Module, source: Sequence[int]) -> Inspection:
    """Translate a sentence, given as ids, and record each written token's attention to it. Raises `UserError` for a
    model without attention."""
    config = translator(model).config
    target = list(search(translator(model), [source], TranslationParams())[0].tokens)
    device = device_of(model)
    target_ids = torch.tensor([[config.start_id, *target]], device=device)[:, : len(target) or 1]
    source_ids = torch.tensor([list(source)], device=device)
    with evaluation_mode(model), record_attention(model) as maps:
        attention = (
            {"alignment": model.alignment(source_ids, target_ids)[0][None].cpu()} if isinstance(model, Aligner) else {}
        )
        if not attention:
            model(source_ids, target_ids)
            crossed = {name: weights for name, weights in maps.items() if name.endswith("cross_attention")}
            attention = _joined_maps(crossed, target_ids.shape[1], len(source))
    if not attention:
        raise UserError(f"A {type(model).__name__} has no attention over its source, so there is nothing to look at.")
    return Inspection(target or [config.end_id], list(source), attention, [])
