"""Interfaces of models: causal language models, encoders, translators and others; and checks for each.

Axes: batch = texts, length = tokens, vocab.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.attention.kv_cache import KVState
from keifu.native.model import NativeLM

PREFILL_TOKENS = 4096  # tokens of all rows in one pass: enough to use matrix multiplication well, few enough for memory

Tokens = Int[Tensor, "batch length"]
Padding = Int[Tensor, " batch"] | None
Mask = Bool[Tensor, "batch length"] | None


@runtime_checkable
class Model(Protocol):
    """Interface of a causal language model; its `config` has `vocab_size` and `context_length`."""

    config: Any

    def hidden(self, tokens: Tokens, state: Any, padding: Padding = None) -> Tensor: ...

    def logits(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]: ...

    def new_state(self, rows: int, capacity: int) -> KVState: ...

    def modules(self) -> Iterator[nn.Module]: ...


@runtime_checkable
class Encoder(Protocol):
    """Interface of an encoder such as BERT, with bidirectional attention. It cannot continue a text, but it predicts
    masked words and labels. Its `config` has `context_length`, `labels`, `words` and `pooling`."""

    config: Any

    def encode(self, tokens: Tokens, segments: Tokens | None, mask: Mask) -> Tensor: ...

    def classify(self, tokens: Tokens, segments: Tokens | None, mask: Mask) -> Tensor: ...

    def words(self, hidden: Tensor) -> Tensor: ...


@runtime_checkable
class MaskPredictor(Protocol):
    """Interface of a model of masked diffusion, such as LLaDA; its `config` has `context_length` and `mask_token`."""

    config: Any

    def predict_masked(self, tokens: Tokens) -> Float[Tensor, "batch length vocab"]: ...


@runtime_checkable
class TwoTowers(Protocol):
    """Interface of a model with an image tower and a text tower, such as CLIP. Its `config` has `pixels`, the
    preprocessing of images, and `context_length`. Similarities are multiplied by exp of its parameter
    `logit_scale`. (From Python 3.12 on, isinstance does not see parameters and parts of modules.)"""

    config: Any

    def encode_image(self, pixels: Tensor) -> Tensor: ...

    def encode_text(self, tokens: Tokens, mask: Mask = None) -> Tensor: ...


@runtime_checkable
class Translator(Protocol):
    """Interface of an encoder-decoder, which encodes a source before it generates a target. Its `config` has
    vocab_size, context_length, start_id, end_id and pad_id."""

    config: Any

    def start(self, source: Tokens, source_mask: Mask, capacity: int | None) -> Any: ...

    def hidden(self, target: Tokens, state: Any) -> Tensor: ...

    def logits(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]: ...


@runtime_checkable
class TaskHeadModel(Protocol):
    """Interface of a decoder fine-tuned to choose a label or an answer; its `config` has `form`, `labels`,
    `context_length` and the special ids."""

    config: Any

    def hidden(self, tokens: Tensor) -> Tensor: ...

    def judge(self, hidden: Tensor, mask: Tensor) -> Tensor: ...

    def classify(self, tokens: Tensor, mask: Tensor) -> Tensor: ...


def explain_not_causal(model: nn.Module) -> str:
    """Return why a model cannot generate text, and what it can do instead, as the end of an error message."""
    name = type(model).__name__
    if isinstance(model, Encoder):
        return (
            f"a {name} reads both sides of a text and cannot go on with one; it can embed texts (keifu embed), "
            "classify them (keifu classify) or fill in [MASK] (keifu.inference.text.fill.fill); smollm2 can write."
        )
    if isinstance(model, MaskPredictor):
        return f"a {name} fills masks in any order, not from left to right, and has no cache: use keifu generate."
    if isinstance(model, Translator):
        return "as an encoder-decoder, it turns one text into another and does not go on with it: use keifu translate."
    if isinstance(model, TaskHeadModel):
        return "it was fine-tuned to choose a label or an answer: use keifu classify."
    return f"{name} is not a language model; choose one, such as smollm2."


def causal(model: nn.Module) -> Model:
    """Return the model. Raises `UserError` if it is not a causal language model."""
    if not isinstance(model, Model):
        raise UserError(f"This model writes no text: {explain_not_causal(model)}")
    return model


def text_model(model: nn.Module) -> Model | NativeLM:
    """Return the model. Raises `UserError` if an engine cannot run it."""
    return model if isinstance(model, NativeLM) else causal(model)


def is_writer(model: nn.Module) -> bool:
    """Return whether the model is a causal language model, in PyTorch or packed for native code."""
    return isinstance(model, Model | NativeLM)


def continues_text(model: nn.Module) -> bool:
    """Return whether the model can continue a text, token by token or by masked diffusion."""
    return is_writer(model) or isinstance(model, MaskPredictor)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's weights; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def evaluation_mode(model: nn.Module, modules: Sequence[nn.Module] | None = None) -> Iterator[None]:
    """Put the model in evaluation mode for a block. Afterwards every module has its former mode.

    Blocks may be nested but must not overlap: a generator leaves its block before it yields.

    Args:
        model: The model.
        modules: All modules of the model, if the caller has a list of them.
    """
    training = [module for module in modules or model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
