"""Pruning of a large model: some of its layers and tokens are kept, and the smaller model is trained further.

DistilBERT (Sanh et al., 2019) keeps every other layer. "Shrink and fine-tune" (Shleifer and Rush, 2020) keeps evenly
spaced layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from keifu.data.tokenizers.bpe import first_merges, keep_tokens
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.generation.text.model import causal
from keifu.models import llama


def evenly(layers: int, kept: int) -> list[int]:
    """Return the indices of `kept` evenly spaced layers, with the first and the last."""
    if not (least := min(2, layers)) <= kept <= layers:
        raise UserError(f"A student of {kept} layers cannot be made of {layers}: choose {least} to {layers}.")
    return [round(number * (layers - 1) / max(1, kept - 1)) for number in range(kept)]


def keep_layers(model: Any, kept: Sequence[int]) -> None:
    """Remove all layers except `kept` from a LLaMA-like model with uniform layers."""
    if vars(model.config).keys() != vars(llama.Config()).keys():
        raise UserError("Only the layers of a model of LLaMA's type can be removed: choose another one.")
    model.blocks = nn.ModuleList(model.blocks[layer] for layer in kept)
    below = sum(layer < model.config.first_window_layer for layer in kept)
    model.config = replace(model.config, n_layers=len(kept), first_window_layer=below)


@torch.no_grad()
def keep_rows(model: Any, ids: Sequence[int]) -> None:
    """Remove the embeddings and the rows of the head except those of these tokens."""
    if "vocab_size" not in vars(causal(model).config):
        raise UserError("The tokens of a model that sees cannot be removed: choose another one, such as smollm2.")
    model.embedding.num_embeddings = len(ids)
    for part in [model.embedding] if model.head is None else [model.embedding, model.head]:
        for name, rows in part.named_parameters(recurse=False):
            part.register_parameter(name, nn.Parameter(rows[list(ids)], rows.requires_grad))
    if model.head is not None:
        model.head.out_features = len(ids)
    model.config = replace(model.config, vocab_size=len(ids))


def prune(
    model: Any, tokenizer: Tokenizer, layers: int | None, merges: int | None, uses: Mapping[int, int] | None = None
) -> tuple[Any, Tokenizer]:
    """Reduce a model, in place, to `layers` layers and a byte-level BPE with `merges` merges. Return it with its
    tokenizer.

    None keeps all. uses: token frequencies; if given, the most useful merges are kept instead of the first (see
    `first_merges`).
    """
    if layers is not None:
        keep_layers(model, evenly(len(model.blocks), layers))
    if merges is not None:
        tokenizer, ids = keep_tokens(tokenizer, first_merges(tokenizer, merges, uses))
        keep_rows(model, ids)
    return model, tokenizer
