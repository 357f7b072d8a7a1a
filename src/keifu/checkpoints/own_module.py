"""A user's own `nn.Module` as a folder: its settings as config.json, its weights as model.safetensors.

`load_weights` fills a module that is built the same way.
"""

import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn

from keifu.errors import UserError
from keifu.files import replacing, write_atomic

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE = "own"
NAMED = 10  # how many tensors an error names


def _is_instance(config: Any) -> TypeGuard[Any]:
    """Whether it is an object of a dataclass, and not the class."""
    return is_dataclass(config) and not isinstance(config, type)


def save_module(model: nn.Module, tokenizer: Any, directory: Path) -> None:
    """Writes the module's weights, each shared one once, and what `model.config` says, a dataclass or a dict, if it has
    one; and the tokenizer's files."""
    from safetensors.torch import save_model

    config = vars(model).get("config", {})
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    about = {"model_type": MODEL_TYPE, "class": kind, "config": asdict(config) if _is_instance(config) else config}
    text = json.dumps(about, indent=2, ensure_ascii=False, default=str) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / WEIGHTS) as temporary:
        save_model(model, str(temporary), metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save(directory)
    write_atomic(directory / CONFIG, text)


def load_weights(model: nn.Module, directory: str | Path) -> nn.Module:
    """Fills a module with the weights that `keifu.save` or a run of `keifu.train` left, and returns it for evaluation.

    The module must be built as the saved one was: tensors that are missing, extra or of another shape are a `UserError`
    that names them, and the module stays as it was.

    >>> import tempfile, keifu
    >>> folder = tempfile.mkdtemp()
    >>> keifu.save(nn.Linear(3, 2), None, folder)
    >>> keifu.load_weights(nn.Linear(3, 2), folder)
    Linear(in_features=3, out_features=2, bias=True)
    """
    from safetensors import safe_open

    path = Path(directory) / WEIGHTS if Path(directory).is_dir() else Path(directory)
    if not path.is_file():
        raise UserError(f"There are no weights in {directory}: it has no {WEIGHTS}.")
    state = model.state_dict(keep_vars=True)
    with safe_open(path, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        twins = file.metadata() or {}  # a tensor that was left out -> the one that holds its numbers
    for name, kept in twins.items():
        if name in state and kept in stored:
            stored.setdefault(name, stored[kept])
    _check(state, stored, path)
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(stored[name])
    return model.eval()


def _check(state: dict[str, Any], stored: dict[str, torch.Tensor], path: Path) -> None:
    shapes = [
        f"{name} is {list(stored[name].shape)} where the module has {list(tensor.shape)}"
        for name, tensor in state.items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    groups = {
        "missing": [*state.keys() - stored.keys()],
        "not part of the module": [*stored.keys() - state.keys()],
        "of another shape": shapes,
    }
    wrong = [f"{len(names)} {what} ({', '.join(sorted(names)[:NAMED])})" for what, names in groups.items() if names]
    if wrong:
        raise UserError(f"The tensors of {path} are not those of this module: {'; '.join(wrong)}.")
