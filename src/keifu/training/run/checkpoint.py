"""Checkpoints: the training state on disk, from which a run is resumed.

A state is `state/step-N.safetensors` (the tensors) and `state/step-N.json` (everything else). The JSON file has the
version, the tensors' SHA-256 and its own. It is written last, so a state without it is incomplete. Random generators
are not stored: each step has its own seed.

The best weights of a run, those with the lowest validation loss, are `state/best.safetensors`. `state/best.json` has
their step, the validation figures and the hash of the tensors. It is written last: tensors without a matching hash are
ignored, and a resumed run evaluates again.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from keifu import __version__
from keifu.errors import UserError
from keifu.files import replacing, sha256, write_atomic, write_tensors
from keifu.processes import current
from keifu.untrusted import plain_file, read_json_object

FOLDER = "state"
FORMAT = 2  # format of the JSON file; versions before 0.2 wrote none


class SavedState(NamedTuple):
    """A state read from disk: the steps done, the content of its JSON file, its tensors, and their path."""

    step: int
    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    path: Path = Path()


def save(
    directory: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], prune: Callable[[int], None]
) -> None:
    """Write a state into a run directory. `prune` removes old states (see `remove_old`) after this one is complete on
    disk, so that a full disk or a crash loses nothing.
    """
    tensor_file, _ = _files(directory, step)
    with replacing(tensor_file) as temporary:
        write_tensors(tensors, temporary)
        digest = sha256(temporary)
    commit(directory, step, {"sha256": digest, **facts}, prune)


def commit(directory: Path, step: int, facts: Mapping[str, Any], prune: Callable[[int], None]) -> None:
    """Write the JSON file of a state whose tensors are on disk, and remove old states (see `save`)."""
    content = {"step": step, "format": FORMAT, "version": __version__, **facts}
    content["facts_sha256"] = _hash(content)
    write_atomic(_files(directory, step)[1], json.dumps(content, indent=1, ensure_ascii=False))
    prune(step)


def remove_old(directory: Path, step: int, keep: int, reach: int, due: Callable[[int], bool]) -> None:
    """Remove old states after the one of `step` is complete on disk.

    The last `keep` states are kept, and states at most `reach` steps older than the oldest of these. States of later
    steps are removed too: they are damaged, since this run was not resumed from them. due: whether a run saves a state
    at a step without interruption. States of other steps, saved when a run was stopped, are removed after the next
    state that is due, so that an interrupted run leaves the same states as an uninterrupted one.
    """
    due_states = [other for other in steps(directory) if other < step and due(other)]
    oldest = [*due_states, step][-keep:][0] - reach if due(step) else 0
    for other in steps(directory):
        if other > step or other < oldest or (due(step) and other < step and not due(other)):
            remove(directory, other)


def _hash(facts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the content of a state's JSON file."""
    plain = json.loads(json.dumps(facts))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def latest(directory: Path) -> tuple[SavedState, list[str]]:
    """Return the newest undamaged state of a run, and a sentence for each newer one that is damaged. Raises UserError
    if there is none.
    """
    problems = []
    for step in reversed(current().broadcast(steps(directory))):
        try:
            return read(directory, step), [f"{x} Going on from the one before, of step {step}." for x in problems]
        except UserError as error:
            problems.append(str(error))
    damaged = f" {' '.join(problems)}" if problems else ""
    raise UserError(f"There is no state to resume from in {directory / FOLDER}.{damaged} Start without resuming.")


def latest_facts(directory: Path) -> dict[str, Any]:
    """Return the content of the newest readable JSON file, without tensors; {} if there is none."""
    for step in reversed(steps(directory)):
        with suppress(UserError):
            return _facts(_files(directory, step)[1], step)
    return {}


def digests(directory: Path) -> dict[Path, str]:
    """Return the SHA-256 of the tensors of each complete state and of the best weights, as written in their JSON
    files."""
    found = dict[Path, str]()
    for step in steps(directory):
        tensor_file, facts_file = _files(directory, step)
        with suppress(UserError):
            found[tensor_file] = _facts(facts_file, step).get("sha256", "")
    tensor_file, facts_file = _best_files(directory)
    with suppress(UserError, FileNotFoundError):
        found[tensor_file] = str(read_json_object(facts_file).get("sha256", ""))
    return found


def remove_incomplete(directory: Path) -> None:
    """Remove the tensors of incomplete states: a process died before it wrote their JSON file. This includes shards of
    split models.
    """
    there = directory / FOLDER
    for path in [*there.glob("step-*"), *there.glob(".step-*.part")]:
        if not path.with_suffix(".json").exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def steps(directory: Path) -> list[int]:
    """Return the steps of all complete states, in order."""
    there = (path for path in (directory / FOLDER).glob("step-*.json") if path.is_file())
    names = (path.stem.removeprefix("step-") for path in there)
    return sorted(int(step) for step in names if step.isdigit())


def remove(directory: Path, step: int) -> None:
    """Remove a state. Its JSON file goes first, so that a crash does not leave a state that seems complete."""
    for path in reversed(_files(directory, step)):
        path.unlink(missing_ok=True)
    shutil.rmtree(folder(directory, step), ignore_errors=True)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return trainable parameters and buffers, named `model.…`. Shared tensors are stored once, frozen parameters
    never.
    """
    first: dict[Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.requires_grad or not isinstance(tensor, nn.Parameter):
            first.setdefault(tensor, name)
    return {f"model.{name}": tensor.detach() for tensor, name in first.items()}


def load_into_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy a state's tensors into the model. Raises UserError that lists every missing, extra or misshapen tensor."""
    ours, theirs = model_tensors(model), {name: t for name, t in tensors.items() if name.startswith("model.")}
    saved, built = ({name: tuple(tensor.shape) for name, tensor in side.items()} for side in (theirs, ours))
    pairs = {name.removeprefix("model."): (saved.get(name), built.get(name)) for name in {**ours, **theirs}}
    texts = {name: ["none" if side is None else str(side) for side in pair] for name, pair in pairs.items()}
    if wrong := [f"{name}: {a} saved, {b} in the model" for name, (a, b) in texts.items() if a != b]:
        raise UserError(f"The state does not fit the model: {'; '.join(wrong)}. Resume with the model of that run.")
    for name, tensor in ours.items():
        tensor.copy_(theirs[name])


def folder(directory: Path, step: int) -> Path:
    """Return the folder of a split model's state, with one file for each rank. Other states' files have the same name
    with a suffix.
    """
    return directory / FOLDER / f"step-{step:08d}"


def _files(directory: Path, step: int) -> tuple[Path, Path]:
    stem = folder(directory, step)
    return stem.with_suffix(".safetensors"), stem.with_suffix(".json")


def read(directory: Path, step: int) -> SavedState:
    """Return the state of a step. Raises UserError with the file's name if it is damaged or incomplete.

    If the model is split, all ranks call this, and each reads its shards when it loads the state. Each rank hashes its
    share of the files; damage that one rank detects is an error on all.
    """
    if current().is_replicated:
        return _read(directory, step)
    problem, state = "", SavedState(step, {}, {})
    try:
        state = _read(directory, step)
    except UserError as error:
        problem = str(error)
    if problem := current().broadcast(next(filter(None, current().gather(problem)), "")):
        raise UserError(problem)
    return state


def _read(directory: Path, step: int) -> SavedState:
    """Return a state after this rank has checked its share of the files. A split model's state has no tensors here."""
    tensor_file, facts_file = _files(directory, step)
    facts = _facts(facts_file, step)
    there = folder(directory, step) if "files" in facts else tensor_file
    files = {there / name: digest for name, digest in facts.get("files", {"": facts.get("sha256")}).items()}
    if strangers := {*there.glob("*.safetensors")} - {*files}:
        raise UserError(f"{min(strangers)} is not of this state, whose files are listed in {facts_file}.")
    processes = current()
    share = slice(0, None, 1) if processes.is_replicated else slice(processes.rank, None, processes.world_size)
    for path, digest in [*files.items()][share]:
        if not path.exists():
            raise UserError(f"{path} is missing.")
        if sha256(plain_file(path)) != digest:
            raise UserError(f"{path} is damaged: its hash is not the one stored.")
    if not processes.is_replicated:
        return SavedState(step, facts, {}, there)
    try:
        return SavedState(step, facts, _read_sharded_state(there) if "files" in facts else load_file(there), there)
    except SafetensorError as error:
        raise UserError(f"{there} is damaged: {error}.") from None


def _facts(path: Path, step: int) -> dict[str, Any]:
    """Return the content of a state's JSON file. Raises UserError if it is damaged or of another format."""
    try:
        facts = read_json_object(path)
    except UserError as error:
        raise UserError(f"{path} is damaged: {str(error).removeprefix(f'{path} ')}") from None
    if facts.get("format") != FORMAT:
        origin = f"of keifu {facts['version']}" if "version" in facts else "damaged, or of keifu before 0.2"
        raise UserError(f"{path} is {origin}, in a format that {__version__} does not read: resume with that version.")
    if facts.pop("facts_sha256", None) != _hash(facts) or facts.get("step") != step:
        raise UserError(f"{path} is damaged: its hash is not the one stored.")
    return facts


def _read_sharded_state(directory: Path) -> dict[str, Tensor]:
    """Return the whole tensors of a state that several ranks have written."""
    tensors = read_sharded(directory, {})
    parts = sorted((name for name in tensors if "#" in name), key=lambda name: int(name.rpartition("#")[2]))
    joined: dict[str, list[Tensor]] = {}
    for name in parts:
        joined.setdefault(name.rpartition("#")[0], []).append(tensors.pop(name))
    return tensors | {name: torch.cat(parts) for name, parts in joined.items()}


def read_sharded(directory: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fill these tensors, or this rank's chunks of them, from a folder of a state's safetensors files. Return
    the state's other tensors, unsharded. Raises UserError if the state lacks a wanted tensor.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(directory))
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    if missing_names := sorted(tensors.keys() - stored.keys()):
        raise UserError(f"The state does not fit the model: it has no {', '.join(missing_names)}.")
    other_tensors = {
        name: torch.empty(md.size, dtype=md.properties.dtype) for name, md in stored.items() if name not in tensors
    }
    dcp.load({**tensors, **other_tensors}, storage_reader=reader, no_dist=True)  # pyright: ignore[reportPrivateImportUsage]
    return other_tensors


LOSS = "validation_loss"


class Best(NamedTuple):
    """The step with the lowest validation loss, and its validation figures."""

    step: int
    figures: dict[str, float]


def read_best(directory: Path) -> Best | None:
    """Return the best step of a run, or None if none is on disk."""
    tensors, facts = _best_files(directory)
    with suppress(UserError, FileNotFoundError):
        content = read_json_object(facts)
        step, figures = cast(Any, content.get("step")), cast(Any, content.get("figures"))
        is_complete = isinstance(step, int) and isinstance(figures, dict) and isinstance(figures.get(LOSS), float | int)
        if is_complete and content.get("sha256") == sha256(tensors):
            return Best(step, figures)
    return None


def keep_best(directory: Path, model: nn.Module, best: Best) -> None:
    """Write the model's weights as the best ones of its run."""
    tensors, facts = _best_files(directory)
    with replacing(tensors) as temporary:
        write_tensors(model_tensors(model), temporary)
        digest = sha256(temporary)
    write_atomic(facts, json.dumps(best._asdict() | {"sha256": digest}, indent=1))


def restore_best(directory: Path, model: nn.Module) -> None:
    """Load the best weights of a run into its model."""
    load_into_model(model, load_file(_best_files(directory)[0]))


def _best_files(directory: Path) -> tuple[Path, Path]:
    folder = directory / FOLDER
    return folder / "best.safetensors", folder / "best.json"
