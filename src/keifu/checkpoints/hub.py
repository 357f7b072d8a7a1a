"""Locating a model: from a path, a catalogue name or a hub id to a file or folder on this machine."""

import re
from functools import cache
from pathlib import Path

from keifu.data.catalogue.catalogue import CATALOGUE, HUB, MODELS, fetch
from keifu.errors import UserError, unknown

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w.-]+)?")
WANTED = (
    "*.json", "model*.safetensors", "adapter_model.safetensors", "open_clip_model.safetensors", "*.jinja", "*.spm",
    "tokenizer.model", "merges.txt", "vocab.txt", "*diffusion_pytorch_model.safetensors",
    "*diffusion_pytorch_model-*.safetensors", "*_encoder/model*.safetensors", "tokenizer/merges.txt",
)  # fmt: skip


def locate(name: str | Path) -> Path:
    """Return the file or folder of a model: an existing path, a catalogue name, or a hub id "owner/name" (downloaded
    once).

    Raises UserError, with the nearest known name, for any other name.
    """
    if not isinstance(name, str | Path) or not str(name).strip() or "\0" in str(name):
        short_name = repr(str(name) if isinstance(name, Path) else name)[:60]
        raise UserError(f"{short_name} is no name of a model: give a path, a catalogue name or a hub id.")
    path = Path(name).expanduser()
    if path.exists():
        return path
    text = str(name)
    if text in MODELS:
        return fetch(text, MODELS)
    if text in CATALOGUE:
        raise UserError(f"{text!r} is {CATALOGUE[text].kind} in the catalogue, not a model.")
    if HUB_ID.fullmatch(text) and not path.parent.is_dir() and path.suffix != ".gguf":
        return download(text)
    nearby = [str(path.parent / other.name) for other in path.parent.glob("*") if may_be_model(other)]
    candidates = nearby if path.parent != Path() else [*MODELS, *nearby]
    raise unknown("model", text, candidates) if candidates else UserError(f"There is no file or folder {text!r}.")


def weights_identity(name: str) -> str:
    """Return a string with the path, sizes and times of a model's files. It changes when the weights change."""
    path = locate(name)
    files = sorted([*path.glob("*.safetensors"), *path.glob("*.gguf")]) if path.is_dir() else [path]
    return f"{path} " + " ".join(f"{file.stat().st_size}-{file.stat().st_mtime_ns}" for file in files)


def may_be_model(path: Path) -> bool:
    """Return whether a file or folder looks like a model, judged by names only."""
    names = ("config.json", "open_clip_config.json", "model_index.json")
    return path.suffix == ".gguf" or any((path / name).exists() for name in names)


@cache
def download(name: str) -> Path:
    """Return the folder of a model on the hub, downloaded unless it is in the hub's cache. "owner/name@revision" pins a
    commit, tag or branch.

    A process asks the hub only once. The commit is stored in `catalogue.HUB`, for a run's record.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    here = f"There is no folder {name!r} here, and"
    try:
        repository, _, revision = name.partition("@")
        snapshot = Path(snapshot_download(repository, revision=revision or None, allow_patterns=[*WANTED]))  # nosec B615
        HUB[name] = snapshot.name
        return snapshot
    except RepositoryNotFoundError as error:
        raise UserError(f"{here} the hub has no such model for everyone.") from error
    except LocalEntryNotFoundError as error:
        raise UserError(f"{here} the hub does not answer, nor is it in the hub's cache on this machine.") from error
    except (OSError, ValueError) as error:
        reason = re.split(r"\.\s|\n", str(error).strip())[0].rstrip(".")
        raise UserError(f"{here} from the hub it could not be fetched: {reason}.") from error
