"""The best weights of a run: those with the lowest validation loss, stored so that further training cannot make the
model worse.

`state/best.safetensors` has the tensors. `state/best.json` has the step, the validation figures and the hash of the
tensors. It is written last: tensors without a matching hash are ignored, and a resumed run evaluates again.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from keifu.errors import UserError
from keifu.files import replacing, sha256, write_atomic, write_tensors
from keifu.training.run.checkpoint import FOLDER, load_into_model, model_tensors
from keifu.untrusted import read_json_object

LOSS = "validation_loss"


@dataclass(frozen=True)
class Best:
    """The step with the lowest validation loss, and its validation figures."""

    step: int
    figures: dict[str, float]

    @property
    def loss(self) -> float:
        """The validation loss of that step."""
        return self.figures[LOSS]


def read(directory: Path) -> Best | None:
    """Return the best step of a run, or None if none is on disk."""
    tensors, facts = _files(directory)
    if not (tensors.exists() and facts.exists()):
        return None
    try:
        content = read_json_object(facts)
    except UserError:
        return None
    if content.get("sha256") != sha256(tensors):
        return None
    return Best(content["step"], content["figures"])


def keep(directory: Path, model: nn.Module, step: int, figures: Mapping[str, float]) -> Best:
    """Write the model's weights as the best ones of its run."""
    tensors, facts = _files(directory)
    with replacing(tensors) as temporary:
        write_tensors(model_tensors(model), temporary)
        digest = sha256(temporary)
    best = Best(step, dict(figures))
    write_atomic(facts, json.dumps({"step": step, "figures": best.figures, "sha256": digest}, indent=1))
    return best


def restore(directory: Path, model: nn.Module) -> None:
    """Load the best weights of a run into its model."""
    load_into_model(model, load_file(_files(directory)[0]))


def _files(directory: Path) -> tuple[Path, Path]:
    folder = directory / FOLDER
    return folder / "best.safetensors", folder / "best.json"
