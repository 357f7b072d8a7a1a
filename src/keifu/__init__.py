"""keifu's Python interface, each name imported at first use, so that `import keifu` is free.

This file imports only modules that Python itself has loaded. With `python -m keifu` the current folder is still on the
path here, and a file such as `typing.py` in it would run (see `keifu.__main__`).

>>> import keifu
>>> model, tokenizer = keifu.load("smollm2")
>>> keifu.generate(model, tokenizer, "Once upon a time, in a small", max_tokens=3, raw=True)
' town, there'
"""

from importlib import import_module

TYPE_CHECKING = False  # type checkers take it as true, as that of `typing`
if TYPE_CHECKING:
    from typing import Any

    from keifu.checkpoints import load, load_weights, save
    from keifu.errors import UserError
    from keifu.inference.embeddings.encoders import embed
    from keifu.inference.text.engine import Engine
    from keifu.inference.text.sampling_params import SamplingParams
    from keifu.inference.text.translation import translate
    from keifu.interface import generate, train
    from keifu.recipes.own import job
    from keifu.training.job import Job
    from keifu.training.loop import Summary
    from keifu.training.protocols import LossOutput
    from keifu.training.settings import Settings

__version__ = "0.2.0"
__all__ = [
    "Engine",
    "Job",
    "LossOutput",
    "SamplingParams",
    "Settings",
    "Summary",
    "UserError",
    "__version__",
    "embed",
    "generate",
    "job",
    "load",
    "load_weights",
    "save",
    "train",
    "translate",
]

_HOMES = {
    "load": "keifu.checkpoints",
    "load_weights": "keifu.checkpoints",
    "save": "keifu.checkpoints",
    "generate": "keifu.interface",
    "train": "keifu.interface",
    "job": "keifu.recipes.own",
    "Job": "keifu.training.job",
    "Summary": "keifu.training.loop",
    "SamplingParams": "keifu.inference.text.sampling_params",
    "Engine": "keifu.inference.text.engine",
    "translate": "keifu.inference.text.translation",
    "embed": "keifu.inference.embeddings.encoders",
    "UserError": "keifu.errors",
    "LossOutput": "keifu.training.protocols",
    "Settings": "keifu.training.settings",
}


def __getattr__(name: str) -> "Any":
    """Import a public function at first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'keifu' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
