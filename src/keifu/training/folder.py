"""A run's folder: recipe.json, samples and the question whether it is free; knows no model and no loop."""

import json
import platform
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from keifu.errors import UserError
from keifu.files import sha256, write_atomic
from keifu.training import metrics, state
from keifu.training.precision import processor_name
from keifu.training.protocols import Run

RECIPE = "recipe.json"
SAMPLES = "samples"
PACKAGES = ("keifu", "torch", "numpy", "tokenizers", "safetensors")


def claim(run: Run) -> None:
    """Makes sure that a new run writes over no other one; `run.replace` removes what is there."""
    if run.resume:
        return
    if (steps := state.steps(run.directory)) and not run.replace:
        raise UserError(
            f"{run.directory} already holds a run, saved at step {steps[-1]:,}: go on with it ({run.how_to_resume}), "
            "or choose another folder."
        )
    for name in (state.FOLDER, SAMPLES):
        shutil.rmtree(run.directory / name, ignore_errors=True)
    for name in (metrics.FILE, RECIPE):
        (run.directory / name).unlink(missing_ok=True)


def write_recipe(run: Run, facts: Mapping[str, Any]) -> None:
    """recipe.json: what the run is about, everything that was resolved, and the versions in use."""
    content = {"title": run.directory.name, **run.about, "options": run.options, "versions": versions(), **facts}
    write_atomic(run.directory / RECIPE, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def write_sample(directory: Path, step: int, sample: str | bytes) -> None:
    """A text or a PNG picture under samples/, by step."""
    suffix = "txt" if isinstance(sample, str) else "png"
    write_atomic(directory / SAMPLES / f"step-{step:08d}.{suffix}", sample)


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every weight file and saved state of a run, by its name in the folder."""
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("*/*.safetensors")])
    return {path.relative_to(directory).as_posix(): sha256(path) for path in files}


def versions() -> dict[str, str]:
    """What the run was computed by."""
    programs = {name: version for name in PACKAGES if (version := _version(name))}
    machine = {"system": platform.platform(), "processor": processor_name()}
    return {"python": platform.python_version(), **programs, **machine}


def _version(package: str) -> str | None:
    """None where the package is used from its source, without having been installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """The device as a person knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
