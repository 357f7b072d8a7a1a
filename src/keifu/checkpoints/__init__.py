"""Loading and saving of models: Hugging Face and diffusers directories, GGUF files, LoRA adapters.

Public functions are imported at first use, so that listing the models does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keifu.checkpoints.gguf.write import save_gguf
    from keifu.checkpoints.hf.write import save
    from keifu.checkpoints.loading import convert, inspect, load, load_model
    from keifu.checkpoints.own_module import load_weights
    from keifu.checkpoints.plan import Report

__all__ = ["Report", "convert", "inspect", "load", "load_model", "load_weights", "save", "save_gguf"]

_HOMES = {"load_weights": "own_module", "save_gguf": "gguf.write", "Report": "plan", "save": "hf.write"}


def __getattr__(name: str) -> Any:
    """Import a public function at first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'loading')}"), name)
