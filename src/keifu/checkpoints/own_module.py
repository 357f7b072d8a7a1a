"""A user's `nn.Module` as a folder: its settings as config.json, its weights as model.safetensors.

`load_weights` fills a module that is built the same way.
"""

import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keifu.checkpoints.hf.read import open_weights
from keifu.checkpoints.plan import damaged_numbers, misfits
from keifu.errors import UserError
from keifu.files import replacing, write_atomic
from keifu.untrusted import as_path

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE = "own"


def save_module(model: nn.Module, tokenizer: Any, directory: Path) -> None:
    """Write a module's weights, with shared tensors once, its `config` (a dataclass or a dict) if it has one, and the
    tokenizer's files."""
    from safetensors.torch import save_model

    config = vars(model).get("config", {})
    class_name = f"{type(model).__module__}.{type(model).__qualname__}"
    settings = asdict(config) if is_dataclass(config) and not isinstance(config, type) else config
    about = {"model_type": MODEL_TYPE, "class": class_name, "config": settings}
    text = json.dumps(about, indent=2, ensure_ascii=False, default=str) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / WEIGHTS) as temporary:
        save_model(model, str(temporary), metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save(directory)
    write_atomic(directory / CONFIG, text)


def load_weights(model: nn.Module, directory: str | Path) -> nn.Module:
    """Fill a module with the weights of `keifu.save` or of a run of `keifu.train`.

    Args:
        model: The module, built like the saved one.
        directory: The folder with the weights.

    Returns:
        The same module, ready for evaluation.

    Raises:
        UserError: Tensors are missing, extra or of another shape, or not finite. The module stays unchanged.

    Examples:
        >>> import tempfile, keifu
        >>> folder = tempfile.mkdtemp()
        >>> keifu.save(nn.Linear(3, 2), None, folder)
        >>> keifu.load_weights(nn.Linear(3, 2), folder)
        Linear(in_features=3, out_features=2, bias=True)
    """
    path = as_path(directory, "The folder of the weights")
    path = path / WEIGHTS if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"There are no weights in {directory}: it has no {WEIGHTS}.")
    state = model.state_dict(keep_vars=True)
    file = open_weights(path)
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}  # a buffer may be a mask of -inf
    stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    if damaged := [name for name in weights & stored.keys() if damaged_numbers(stored[name])]:
        names = ", ".join(sorted(damaged)[:3])
        raise UserError(
            f"{path} has numbers in {names} that are not finite, or beyond 1e19: it is damaged, or its training failed."
        )
    for name, same in (file.metadata() or {}).items():  # an omitted name → the stored name with the same numbers
        if name in state and same in stored:
            stored.setdefault(name, stored[same])
    shapes = [{name: tensors[name].shape for name in sorted(tensors)} for tensors in (state, stored)]
    if wrong := misfits(shapes[0], shapes[1], {*stored} - {*state}, "the module", "the module has"):
        raise UserError(f"The tensors of {path} are not those of this module: {wrong}.")
    last = {id(tensor): name for name, tensor in state.items()}  # one name of each shared tensor
    pairs = [(name, last[id(tensor)]) for name, tensor in state.items() if stored[name] is not stored[last[id(tensor)]]]
    if unequal_pairs := [f"{one} and {other}" for one, other in pairs if not torch.equal(stored[one], stored[other])]:
        raise UserError(f"{path} holds different numbers for what this module shares: {', '.join(unequal_pairs)}.")
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(stored[name])
    return model.eval()
