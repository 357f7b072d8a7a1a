"""keifu's Python interface: load, save and generate, each imported at first use, so that `import keifu` is free."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keifu.checkpoints import load as load
    from keifu.checkpoints import save as save
    from keifu.generation.generate import generate as generate

__version__ = "0.1.0"
__all__ = ["__version__", "generate", "load", "save"]

_HOMES = {"load": "keifu.checkpoints", "save": "keifu.checkpoints", "generate": "keifu.generation.generate"}


def __getattr__(name: str) -> Any:
    """Imports a public function at first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'keifu' has no attribute {name!r}")
    import_module("keifu.threads").follow_load()
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
