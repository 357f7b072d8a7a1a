"""What the recipes that make an assistant of a language model have in common; knows no objective.

What they begin with, its chat template, what of it is trained, and what is left in the run's folder.
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from keifu import checkpoints
from keifu.checkpoints.adapters import adapt, low, save_adapter
from keifu.checkpoints.saving import generation_config
from keifu.data.chat import CHATML, PLAIN
from keifu.data.tokenizer_core import Tokenizer
from keifu.data.tokenizer_formats import GENERATION_CONFIG
from keifu.errors import UserError
from keifu.files import write_atomic
from keifu.generation.decoding import causal
from keifu.layers.lora import adapters, merge

Template = Literal["own", "plain", "chatml"]
TEMPLATES = {"plain": PLAIN, "chatml": CHATML}
T = TypeVar("T")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters in place of the whole model."""

    rank: int = 0
    """Of each adapter; 0 trains the whole model."""
    alpha: float = 16.0
    """The adapter's product is multiplied with alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Ends of the names of layers as the model's files call them, such as q_proj v_proj; all-linear: every one."""
    dropout: float = 0.0
    """Of the adapters' inputs."""
    dora: bool = False
    """Learn the length of each row apart from its direction (Liu et al., 2024)."""


def opened(name: str, template: Template) -> tuple[Any, Tokenizer]:
    """A causal model and its tokenizer, with the chat template that was chosen; adapters are worked into it."""
    model, tokenizer = checkpoints.load(name)
    causal(merge(model))
    if tokenizer is None:
        raise UserError(f"{name} has no tokenizer, so it cannot read a conversation.")
    return model, templated(tokenizer, template)


def templated(tokenizer: Tokenizer, template: Template) -> Tokenizer:
    """The tokenizer with that template; one whose tokens it lacks is a `UserError`."""
    if template == "own" and tokenizer.chat_template:
        return tokenizer
    if template == "chatml":
        _ = [tokenizer.token_id(token) for token in ("<|im_start|>", "<|im_end|>")]
    elif tokenizer.eos_id is None:
        raise UserError("This tokenizer has no end-of-text token, so no turn could end: take another model.")
    return tokenizer.with_chat_template(TEMPLATES["plain" if template == "own" else template])


def padding(tokenizer: Tokenizer, texts: Sequence[Sequence[int]]) -> Tokenizer:
    """The tokenizer with a padding token in which none of these texts ends, so that the end of one can be told.

    Where it has none, another of its special tokens is taken; where no other is, it stays without.
    """
    ends = {text[-1] for text in texts}
    if tokenizer.pad_id is not None and tokenizer.pad_id not in ends:
        return tokenizer
    free = sorted(tokenizer.special_ids - ends - tokenizer.stop_ids) or sorted(tokenizer.special_ids - ends)
    roles = {role: token for role, token in tokenizer.special.items() if role != "pad_token"}
    if free and (token := tokenizer.backend.id_to_token(free[0])):
        roles["pad_token"] = token
    return tokenizer.replace(special=roles)


def row_length(model: Any, wanted: int | None) -> int:
    """Tokens of a row: as many as wanted, or 1024 at most; more than the model takes is a `UserError`."""
    room = causal(model).config.context_length
    if wanted is not None and wanted > room:
        raise UserError(f"A row of {wanted} tokens does not fit this model's context of {room}: choose a smaller one.")
    return wanted or min(1024, room)


def to_train(model: nn.Module, lora: Lora, seed: int) -> nn.Module:
    """The model with new adapters, all else frozen; or with all its weights in float32, apart from their file."""
    torch.manual_seed(seed)
    if lora.rank:
        return adapt(model, lora.targets, low(lora.rank, lora.alpha, lora.dropout, lora.dora))
    for parameter in model.float().parameters():  # a file's memory map must stay as it is
        parameter.data = parameter.data.clone()
    return model.requires_grad_(True)


def before(model: nn.Module, lora: Lora) -> nn.Module:
    """What a model that will be trained begins as: a frozen copy, or with adapters the model itself, which they leave
    as it is (see `unadapted`)."""
    return model if lora.rank else copy.deepcopy(model).float().requires_grad_(False)


def held_out(items: Sequence[T], texts: Sequence[str], share: float) -> tuple[list[T], list[T]]:
    """To learn from, and held out, by a hash of each item's text: those with the same text stay on one side."""
    if not 0 <= share < 1:
        raise UserError(f"held_out is a share from 0 up to below 1, and it is {share}.")
    keys = [hashlib.sha256(text.strip().lower().encode()).digest() for text in texts]
    held = {*sorted({*keys})[: round(share * len({*keys}))]}
    sides: tuple[list[T], list[T]] = [], []
    for key, item in zip(keys, items, strict=True):
        sides[key in held].append(item)
    return sides


def leave(model: nn.Module, tokenizer: Tokenizer, directory: Path, base: str) -> None:
    """Writes what was trained: a whole model, or adapters beside the name of their base; the tokenizer either way."""
    if next(adapters(model), None) is None:
        checkpoints.save(model, tokenizer, directory)
        return
    save_adapter(model, directory, str(Path(base).resolve()) if Path(base).exists() else base)
    tokenizer.save(directory)
    write_atomic(directory / GENERATION_CONFIG, json.dumps(generation_config(tokenizer), indent=2) + "\n")
