"""`keifu.generate` and `keifu.train`. They also accept the name of a model or of a recipe."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Unpack, cast, overload

import numpy as np
from torch import Tensor, nn

from keifu.checkpoints import load
from keifu.checkpoints.hf.native_config import check_kinds
from keifu.data.epochs import IndexedExamples
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError, require_known
from keifu.inference.chat.prompts import Messages
from keifu.inference.text import generate as text
from keifu.inference.text.generate import GenerateOptions
from keifu.recipes import own, resuming
from keifu.recipes.files import published_recipe, recipe_module
from keifu.recipes.options import check_ranges, from_json, to_json
from keifu.training.loop import Summary
from keifu.training.protocols import Data
from keifu.untrusted import as_path


@overload
def generate(
    model: nn.Module, tokenizer: Tokenizer, prompt: str | Messages, *, raw: bool = False,
    **sampling: Unpack[GenerateOptions],
) -> str: ...  # fmt: skip
@overload
def generate(
    model: nn.Module, tokenizer: Tokenizer, prompt: list[str], *, raw: bool = False, **sampling: Unpack[GenerateOptions]
) -> list[str]: ...
@overload
def generate(
    model: str | Path, tokenizer: str | Messages, *, raw: bool = False, **sampling: Unpack[GenerateOptions]
) -> str: ...
@overload
def generate(
    model: str | Path, tokenizer: list[str], *, raw: bool = False, **sampling: Unpack[GenerateOptions]
) -> list[str]: ...
def generate(
    model: nn.Module | str | Path,
    tokenizer: Tokenizer | str | list[str] | Messages,
    prompt: str | list[str] | Messages | None = None,
    *,
    raw: bool = False,
    **sampling: Unpack[GenerateOptions],
) -> str | list[str]:
    """Return the text that a model writes after a prompt; also by the model's name.

    Args:
        model: A loaded model, or the name of one. A name is loaded at each call: load the model once for several
            prompts.
        tokenizer: The model's tokenizer; with a name, the prompt.
        prompt: The text to answer or to continue, or a list of texts; or the messages of a conversation to answer, such
            as [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}].
        raw: Whether the prompt is continued as plain text, without the chat template.
        **sampling: Settings such as max_tokens, temperature and seed, and images for a model that sees
            (`keifu.inference.text.generate.generate`).

    Returns:
        The text, or a list of texts for a list of prompts.

    Examples:
        >>> import keifu
        >>> keifu.generate("smollm2", "Once upon a time, in a small", max_tokens=3, raw=True)
        ' town, there'
    """
    if isinstance(model, str | Path):
        return _generate_by_name(model, tokenizer if prompt is None else prompt, raw, sampling)
    if prompt is None and isinstance(tokenizer, str | list):
        raise UserError(
            "keifu.generate takes a model, its tokenizer and a prompt, or a model's name and a prompt: "
            'keifu.generate("smollm2", "Once upon a time").'
        )
    return text.generate(model, cast(Any, tokenizer), cast(Any, prompt), raw=raw, **sampling)


def _generate_by_name(name: str | Path, prompt: Any, raw: bool, sampling: GenerateOptions) -> str | list[str]:
    model, tokenizer = load(name)
    return text.generate(model, tokenizer, prompt, raw=raw, **sampling)


@overload
def train(model: str, *, out: str | Path | None = None, resume: bool = False, **options: Any) -> Path: ...
@overload
def train(
    model: nn.Module,
    objective: own.Loss,
    data: Data | Mapping[str, Tensor] | IndexedExamples,
    *arguments: Any,
    **more: Any,
) -> Summary: ...
def train(model: nn.Module | str, *arguments: Any, **more: Any) -> Summary | Path:
    """Train a model of your own (`keifu.recipes.own.train`), or run a recipe by its name.

    Args:
        model: A module, or the name of a recipe.
        *arguments: For a module: the objective, the data, the settings and the folder.
        **more: For a recipe: its options by name, as `keifu train RECIPE --help` lists them, with underscores, and
            `out`, `resume` and `replace`.

    Returns:
        For a recipe the folder of the run, which `keifu.load` reads; for a module a `Summary`.

    Examples:
        >>> import contextlib, os, tempfile, keifu
        >>> with contextlib.redirect_stdout(open(os.devnull, "w")):
        ...     folder = keifu.train("mlp", data="xor", steps=9, out=tempfile.mkdtemp())
        >>> type(keifu.load(folder)[0]).__name__
        'MLP'
    """
    if not isinstance(model, str | nn.Module):
        raise UserError(f"keifu.train takes a module or the name of a recipe, and not {model!r:.60}.")
    if not isinstance(model, str):
        return own.train(model, *arguments, **more)
    if arguments:
        raise UserError(f'The options of a recipe are given by name: keifu.train("{model}", data=...).')
    return _train_by_name(model, **more)


def _train_by_name(
    name: str, *, out: str | Path | None = None, resume: bool = False, replace: bool = False, **options: Any
) -> Path:
    """Run a recipe by name with these options. Return the folder of the run."""
    module = recipe_module(name)
    recipe_class = module.Recipe
    for option in options:
        require_known(f"option of the recipe {name}", option, [field.name for field in fields(recipe_class)])
    directory = as_path(out or Path("runs") / Path(name).stem, "out")
    plain = {option: value.item() if isinstance(value, np.generic) else value for option, value in options.items()}

    def checked(default_recipe: Any) -> Any:
        """Return the recipe with the options, whose types are right. Lists become tuples, and texts paths."""
        recipe = from_json(default_recipe, plain)
        check_kinds(recipe, f"keifu.train({name!r})")
        return recipe

    if resume:
        stored_run = resuming.stored(name, module, directory)
        words = [f"--{option.replace('_', '-')}" for option in options]
        default_recipe = stored_run.recipe_for(words) if stored_run else recipe_class()
        resuming.go_on(stored_run, module, checked(default_recipe), directory)
        return directory
    recipe = checked(published_recipe(module, options.get("recipe_of")) or recipe_class)
    check_ranges(recipe_class, to_json(recipe))
    resuming.begin(name, module, recipe, directory, replace)
    return directory
