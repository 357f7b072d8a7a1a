"""`keifu.generate` and `keifu.train`, which also take names: of a model, and of a recipe."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Unpack, cast, overload

from torch import Tensor, nn

from keifu.checkpoints import load
from keifu.data.own_batches import IndexedExamples
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError, require_known
from keifu.generation.text import generate as text
from keifu.generation.text.sampling_params import SamplingOptions
from keifu.recipes import own
from keifu.training.loop import Summary
from keifu.training.protocols import Data


@overload
def generate(
    model: nn.Module, tokenizer: Tokenizer, prompt: str, *, raw: bool = False, **sampling: Unpack[SamplingOptions]
) -> str: ...
@overload
def generate(
    model: nn.Module, tokenizer: Tokenizer, prompt: list[str], *, raw: bool = False, **sampling: Unpack[SamplingOptions]
) -> list[str]: ...
@overload
def generate(model: str | Path, tokenizer: str, *, raw: bool = False, **sampling: Unpack[SamplingOptions]) -> str: ...
@overload
def generate(
    model: str | Path, tokenizer: list[str], *, raw: bool = False, **sampling: Unpack[SamplingOptions]
) -> list[str]: ...
def generate(
    model: nn.Module | str | Path,
    tokenizer: Tokenizer | str | list[str],
    prompt: str | list[str] | None = None,
    *,
    raw: bool = False,
    **sampling: Unpack[SamplingOptions],
) -> str | list[str]:
    """Return what a model writes after a prompt (see `keifu.generation.text.generate.generate`).

    model: a loaded model with its tokenizer and the prompt, or the name of a model with the prompt alone. A name is
    loaded at each call: load the model once for several prompts.

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


def _generate_by_name(name: str | Path, prompt: Any, raw: bool, sampling: SamplingOptions) -> str | list[str]:
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
    """Train a model of your own (see `keifu.recipes.own.train`), or run a recipe by its name.

    A recipe takes its options by name, as `keifu train RECIPE --help` lists them, with underscores; `out`, `resume` and
    `replace` are those of the command. The folder of the run is returned, which `keifu.load` reads.

    >>> import contextlib, os, tempfile, keifu
    >>> with contextlib.redirect_stdout(open(os.devnull, "w")):
    ...     folder = keifu.train("mlp", data="xor", steps=9, out=tempfile.mkdtemp())
    >>> type(keifu.load(folder)[0]).__name__
    'MLP'
    """
    if not isinstance(model, str):
        return own.train(model, *arguments, **more)
    if arguments:
        raise UserError(f'The options of a recipe are given by name: keifu.train("{model}", data=...).')
    return _train_by_name(model, **more)


def _train_by_name(
    name: str, *, out: str | Path | None = None, resume: bool = False, replace: bool = False, **options: Any
) -> Path:
    """Run a recipe with these options, and return the folder of its run."""
    from keifu.commands.shared import flags, resuming
    from keifu.commands.shared.recipe_files import recipe_module
    from keifu.recipes.options import to_json

    module = recipe_module(name)
    kind = module.Recipe
    for option in options:
        require_known(f"option of the recipe {name}", option, [field.name for field in fields(kind)])
    directory = Path(out or Path("runs") / Path(name).stem)
    if resume:
        found = resuming.stored(name, module, directory)
        words = [f"--{option.replace('_', '-')}" for option in options]
        usual = found.usual(words) if found else kind()
        resuming.go_on(found, module, type(usual)(**{**vars(usual), **options}), directory)
        return directory
    recipe = kind(**options)
    flags.check_ranges(kind, to_json(recipe))
    resuming.begin(name, module, recipe, directory, replace)
    return directory
