"""Checkpoints: the training state on disk, from which a run is resumed.

A state is `state/step-N.safetensors` (the tensors) and `state/step-N.json` (everything else). The JSON file holds the
tensors' SHA-256 and is written last, so a state without it is incomplete. The state of random generators is not stored:
each step has its own seed.
"""

import errno
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.files import replacing, sha256, write_atomic

FOLDER = "state"


@dataclass(frozen=True)
class State:
    """A state read from disk: the steps done, the content of its JSON file, and its tensors."""

    step: int
    facts: dict[str, Any]
    tensors: dict[str, Tensor]


def save(
    directory: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], keep: int, reach: int = 0
) -> str:
    """Writes a state into a run directory, removes old ones, and gives the hash of the tensors.

    The last `keep` states are kept, and those at most `reach` steps older than these. Old ones are removed only when
    the new one is complete on disk, so a full disk or a crash loses nothing. States of later steps are removed too:
    they are damaged ones that this run could not be resumed from.
    """
    tensor_file, facts_file = _files(directory, step)
    with replacing(tensor_file) as temporary:
        write(tensors, temporary)
        digest = sha256(temporary)
    write_atomic(facts_file, json.dumps({"step": step, "sha256": digest, **facts}, indent=1, ensure_ascii=False))
    written = [other for other in steps(directory) if other <= step]
    oldest = written[-keep:][0] - reach
    for other in steps(directory):
        if other > step or other < oldest:
            remove(directory, other)
    return digest


def latest(directory: Path) -> tuple[State, list[str]]:
    """The newest complete state of a run, and a sentence for each newer one that is damaged; a `UserError` if none."""
    complaints = []
    for step in reversed(steps(directory)):
        try:
            state = read(directory, step)
        except UserError as error:
            complaints.append(str(error))
            continue
        return state, [f"{text} Going on from the one before, of step {step}." for text in complaints]
    damaged = f" {' '.join(complaints)}" if complaints else ""
    raise UserError(f"There is no state to resume from in {directory / FOLDER}.{damaged} Start without resuming.")


def latest_facts(directory: Path) -> dict[str, Any]:
    """The content of the newest JSON file that can be read, without tensors; empty where there is none."""
    for step in reversed(steps(directory)):
        try:
            return json.loads(_files(directory, step)[1].read_text(encoding="utf-8"))
        except ValueError:
            continue
    return {}


def steps(directory: Path) -> list[int]:
    """The steps of all complete states, in order."""
    found = (path.stem.removeprefix("step-") for path in (directory / FOLDER).glob("step-*.json"))
    return sorted(int(step) for step in found if step.isdigit())


def remove(directory: Path, step: int) -> None:
    """Removes a state, the JSON file first, so that the rest is not taken for a complete state after a crash."""
    for path in reversed(_files(directory, step)):
        path.unlink(missing_ok=True)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and buffers, named `model.…`; shared ones are stored once, frozen parameters not at all."""
    first: dict[Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.requires_grad or not isinstance(tensor, nn.Parameter):
            first.setdefault(tensor, name)
    return {f"model.{name}": tensor.detach() for tensor, name in first.items()}


def load_into_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies a state's tensors into the model; every missing, extra or misshapen one is named in a `UserError`."""
    ours, theirs = model_tensors(model), {name: t for name, t in tensors.items() if name.startswith("model.")}
    saved, built = ({name: tuple(tensor.shape) for name, tensor in side.items()} for side in (theirs, ours))
    pairs = {name.removeprefix("model."): (saved.get(name), built.get(name)) for name in {**ours, **theirs}}
    wrong = [f"{name}: {a or 'none'} saved, {b or 'none'} in the model" for name, (a, b) in pairs.items() if a != b]
    if wrong:
        raise UserError(f"The state does not fit the model: {'; '.join(wrong)}. Resume with the model of that run.")
    for name, tensor in ours.items():
        tensor.copy_(theirs[name])


def write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors as safetensors; a full disk is an `OSError`, as for other files."""
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        if "os error 28" in str(error):  # the package has its own error for a full disk
            raise OSError(errno.ENOSPC, "No space left on device", str(path)) from error
        raise


def _files(directory: Path, step: int) -> tuple[Path, Path]:
    stem = directory / FOLDER / f"step-{step:08d}"
    return stem.with_suffix(".safetensors"), stem.with_suffix(".json")


def read(directory: Path, step: int) -> State:
    """The state of a step; a damaged or incomplete one is a `UserError` that names the file."""
    tensor_file, facts_file = _files(directory, step)
    try:
        facts = json.loads(facts_file.read_text(encoding="utf-8"))
        whole = tensor_file.exists() and sha256(tensor_file) == facts["sha256"]
        tensors = load_file(tensor_file) if whole else {}
    except (ValueError, KeyError, SafetensorError):
        raise UserError(f"{facts_file} is damaged.") from None
    if not whole:
        what = "damaged: its hash is not the one stored" if tensor_file.exists() else "missing"
        raise UserError(f"{tensor_file} is {what}.")
    return State(step, facts, tensors)
