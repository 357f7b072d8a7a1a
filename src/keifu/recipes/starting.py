"""Runs that start from a trained model: lower learning rates, a suitable warm-up, and selection of the best weights.

Rates for new weights destroy what a trained model has learned. A tenth of them adapts it (measured with the recipes for
translators and language models). Validation runs before the first step and after the last one, and the loop keeps the
weights with the lowest loss.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from keifu import checkpoints
from keifu.checkpoints.hub import locate
from keifu.data.images.splits import recorded
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.training.settings import Settings

SHARE = 0.1  # share of the rates for new weights


def load_start(name: str, config: type, option: str = "--start-from") -> tuple[Any, Tokenizer | None]:
    """Load the model that a run starts from, in float32, and its tokenizer.

    Raises `UserError` if the model's config has another class.
    """
    loaded, tokenizer = checkpoints.load(name, torch.float32)
    check_start(name, loaded, config, option)
    return loaded.requires_grad_(True), tokenizer


def check_start(name: str, model: Any, config: type, option: str = "--start-from") -> None:
    """Raise a `UserError` unless the config of the model that the run starts from has that class."""
    if not isinstance(model.config, config):
        raise UserError(f"{option} {name} is of the type {type(model).__name__}, which this recipe does not train.")


def scaled(rate: float, start_from: str | None) -> float:
    """Return the default learning rate of a run: `rate` for new weights, a tenth of it for trained ones."""
    return rate if start_from is None else SHARE * rate


def keeps_best(start_from: str | None, keep: bool = True) -> dict[str, Any]:
    """Return the settings that keep the best weights of a run, if it starts from a trained model and this is wanted."""
    return {} if start_from is None else {"keep_best": keep}


def holds_families(start_from: str | None) -> bool:
    """Return whether to hold out whole families of pictures: as the model did that the run starts from, or True."""
    return start_from is None or recorded(locate(start_from)).get("whole_families", True)


def adapted(settings: Settings, defaults: Settings, start_from: str | None) -> Settings:
    """Return the settings of a run that starts from a trained model, for a recipe whose settings are options.

    Rates that equal the recipe's defaults are reduced to a tenth, and a default warm-up to at most a tenth of the
    steps. Other values are not changed. The rates are printed.
    """
    if start_from is None:
        return settings
    changed: dict[str, Any] = {"keep_best": True}
    rates = ("learning_rate", "matrix_rate") if settings.optimizer == "muon" else ("learning_rate",)
    for name in rates:
        if vars(settings)[name] == vars(defaults)[name]:
            changed[name] = SHARE * vars(defaults)[name]
    if settings.warmup == defaults.warmup:
        changed["warmup"] = min(settings.warmup, -(-settings.steps // 10))
    print(_sentence(start_from, changed), flush=True)
    return replace(settings, **changed)


def _sentence(start_from: str, changed: Mapping[str, Any]) -> str:
    rate = changed.get("learning_rate")
    share = "" if rate is None else f" at a learning rate of {rate:g}, a tenth of that for new weights"
    return f"Training goes on from {start_from}{share}."
