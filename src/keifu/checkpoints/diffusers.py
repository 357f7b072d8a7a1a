"""diffusers' layout: a model's own folder, and a pipeline's, with a folder for each of its parts; knows no layers.

A model's config.json tells its class, a pipeline's model_index.json the classes of its parts. A scheduler is no model:
its file is read into the config of the network that it belongs to.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from keifu.checkpoints.families import FAMILIES, Family, read_config
from keifu.checkpoints.huggingface import read_json, source_of, weight_files
from keifu.checkpoints.source import Source
from keifu.errors import UserError, unknown

PIPELINE, CONFIG, WEIGHTS = "model_index.json", "config.json", "diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler"
# pipeline -> the file of each of its parts that says what it is
_NETWORK = {"unet": CONFIG, SCHEDULER: "scheduler_config.json"}
PARTS = {"DDPMPipeline": _NETWORK, "DDIMPipeline": _NETWORK, "PNDMPipeline": _NETWORK}
VERSION = "0.30.0"  # of diffusers, whose layout this is


def is_diffusers(path: Path) -> bool:
    """Whether a folder has diffusers' layout."""
    if (path / PIPELINE).exists():
        return True
    return (path / CONFIG).exists() and "_class_name" in read_json(path / CONFIG)


def open_diffusers(path: Path) -> Source:
    """The model in a folder: a pipeline with a network and its scheduler, or a network alone.

    A pipeline that lacks a part, and a pipeline or model that keifu has none of, is a `UserError` that names it.
    """
    if not (path / PIPELINE).exists():
        note = "There is no scheduler beside this network: DDPM's noise is assumed."
        return _network(path, path, {}, (note,))
    kind = read_json(path / PIPELINE).get("_class_name")
    if kind not in PARTS:
        raise unknown("diffusers pipeline", str(kind), PARTS)
    files = {part: path / part / file for part, file in PARTS[kind].items()}
    missing = [f"{part} ({file.relative_to(path)})" for part, file in files.items() if not file.exists()]
    if missing:
        raise UserError(f"{path} is a {kind} and lacks its {' and its '.join(missing)}.")
    return _network(path, path / "unet", {SCHEDULER: read_json(files[SCHEDULER])}, ())


def _network(path: Path, folder: Path, beside: Mapping[str, Any], notes: tuple[str, ...]) -> Source:
    """A network in its folder; `beside` is what its config takes from the files of other parts."""
    json = read_json(folder / CONFIG)
    known = [kind for kind, family in FAMILIES.items() if is_part(family)]
    kind = str(json.get("_class_name"))
    if kind not in known:
        raise unknown("model of diffusers", kind, known)
    family, config = read_config({**json, **beside, "model_type": kind}, str(folder / CONFIG))
    return source_of(path, "diffusers", family, config, weight_files(folder, WEIGHTS), notes)


def is_part(family: Family) -> bool:
    """Whether this family's files lie in a folder of a pipeline."""
    return len(PurePosixPath(family.files[0]).parts) > 1


def pipeline_files(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every JSON file of a pipeline of a network and its scheduler, by its place, from the network's config."""
    kind, scheduler = config["model_type"], config[SCHEDULER]
    version = {"_diffusers_version": VERSION}
    network = {name: value for name, value in config.items() if name not in ("model_type", SCHEDULER)}
    parts = {"unet": ["diffusers", kind], SCHEDULER: ["diffusers", scheduler["_class_name"]]}
    return {
        f"unet/{CONFIG}": {"_class_name": kind, **version, **network},
        f"{SCHEDULER}/scheduler_config.json": {**scheduler, **version},
        PIPELINE: {"_class_name": "DDPMPipeline", **version, **parts},
    }
