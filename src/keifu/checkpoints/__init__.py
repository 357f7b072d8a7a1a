"""Published formats in and out: Hugging Face directories and GGUF files; the one place that knows every model.

Each name is imported at first use: what only lists the models needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keifu.checkpoints.gguf.write import save_gguf
    from keifu.checkpoints.hf.write import save
    from keifu.checkpoints.load import convert, inspect, load, load_model
    from keifu.checkpoints.own_module import load_weights
    from keifu.checkpoints.report import Report

__all__ = ["Report", "convert", "inspect", "load", "load_model", "load_weights", "save", "save_gguf"]

_HOMES = {"load_weights": "own_module", "save_gguf": "gguf_saving", "Report": "report", "save": "saving"}


def __getattr__(name: str) -> Any:
    """Imports a public function at first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'opening')}"), name)
