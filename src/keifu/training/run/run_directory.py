"""The run directory: recipe.json and samples, protection of an existing run, and hashes of its files.

A training command first writes the recipe's name and options into recipe.json, under RECORD, so that the directory
alone is enough to resume. A run of several parts has a subdirectory for each part.
"""

import json
import platform
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from keifu.data.catalogue.catalogue import HUB
from keifu.data.tokenizers.load import KEPT, LEARNED
from keifu.devices import processor_name
from keifu.errors import UserError, printable, shell
from keifu.files import remove_left, sha256, write_atomic
from keifu.locks import hold
from keifu.processes import current
from keifu.training.protocols import Run
from keifu.training.run import checkpoint, metrics
from keifu.training.run.signature import sign
from keifu.untrusted import read_json_object

RECIPE = "recipe.json"
# entry of recipe.json: name and options of the recipe, and its number of steps if that was changed later
RECORD = "recipe"
SAMPLES = "samples"
BEFORE = ".replaced"  # contains the earlier run until the run that replaces it has saved a state
MOVING = ".replacing"  # the same, while files are moved to it or back
PACKAGES = ("keifu", "torch", "numpy", "tokenizers", "safetensors")


@contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Lock a run directory for this process (see `locks.hold`), and clean up after a dead process.

    If several processes share a run (torchrun), rank 0 locks it for all.
    """
    if not current().is_main:
        yield
        return
    with hold(directory) as first:
        if first:
            remove_left(directory)
            if (directory / MOVING).exists() or ((directory / BEFORE).exists() and last_step(directory) is None):
                _restore_replaced(directory)
            shutil.rmtree(directory / BEFORE, ignore_errors=True)
            for folder in _directories(directory):
                checkpoint.remove_incomplete(folder)
        yield


def claim_directory(run: Run) -> None:
    """Prepare the directory for a new run. Raises UserError if it contains another run, unless `run.replace` is set:
    then remove that run.
    """
    if run.resume or not current().is_main:
        return
    if (steps := checkpoint.steps(run.directory)) and not run.replace:
        ways = f"go on with it ({how_to_resume(run)}), or choose another folder"
        raise UserError(f"{run.directory} already holds a run, saved at step {steps[-1]:,}: {ways}.")
    content = read_recipe(run.directory)
    # a record alone, or of a run killed early, belongs to this run
    if RECORD in content and not (run.replace and len(content) > 1):
        write(run.directory, {RECORD: content[RECORD]})
    else:
        (run.directory / RECIPE).unlink(missing_ok=True)
    for name in (checkpoint.FOLDER, SAMPLES):
        shutil.rmtree(run.directory / name, ignore_errors=True)
    (run.directory / metrics.FILE).unlink(missing_ok=True)


def keep_tokenizers(run: Run) -> None:
    """Write the tokenizers that a new run has learned into its folder. A resumed run reads them there."""
    if not run.resume and current().is_main:
        for name, tokenizer in LEARNED.items():
            tokenizer.save(run.directory / KEPT / name)
    LEARNED.clear()


def write_recipe(run: Run, facts: Mapping[str, Any], steps: int) -> None:
    """Write recipe.json: the run's description, settings, results and package versions. The recipe's name and options
    that are already there stay. steps: number of steps of the whole run.
    """
    record = recorded(run.directory)
    if "steps" in record:
        record["steps"] = steps
    content = {"title": run.directory.name, **run.about, "options": run.options, "versions": versions(), **facts}
    write(run.directory, content | ({RECORD: record} if record else {}))


def write(directory: Path, content: Mapping[str, Any]) -> None:
    """Write recipe.json, on rank 0 only."""
    if current().is_main:
        write_atomic(directory / RECIPE, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def read_recipe(directory: Path) -> dict[str, Any]:
    """Return the content of recipe.json, {} if there is none. Raises UserError for invalid JSON."""
    path = directory / RECIPE
    try:
        content = read_json_object(path) if path.is_file() else {}
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}). Start the run again with --replace.") from None
    kinds = {"name": str, "options": dict, "steps": int | None, "place": str | None, "named": dict | None}
    record: Any = content.get(RECORD)
    fine = isinstance(record, dict) and all(isinstance(record.get(name), expected) for name, expected in kinds.items())
    fine = fine and _is_shell_safe(record)
    if RECORD in content and not fine:
        raise UserError(f"{path} is damaged (its {RECORD} lacks a name, or options). Start again with --replace.")
    return content


def _is_shell_safe(record: Mapping[str, Any]) -> bool:
    """Return whether the recipe's name and the named options are words without control characters. They are part of
    the commands that errors advise, and the folder may be another person's."""
    words = [record["name"]]
    for option, value in (record.get("named") or {}).items():
        if not (re.fullmatch(r"[\w.-]+", option) and isinstance(value, str)):
            return False
        try:
            words += shlex.split(value)
        except ValueError:  # a quotation without its end
            return False
    return all(word == printable(word) and "\n" not in word for word in words)


def recorded(directory: Path) -> dict[str, Any]:
    """Return the RECORD of recipe.json: the recipe's name and options, and its number of steps if that was changed; {}
    if there is none.
    """
    return read_recipe(directory).get(RECORD, {})


def record(directory: Path, name: str, options: Mapping[str, Any], **facts: Any) -> None:
    """Write the name and options of a recipe as the RECORD of recipe.json; other entries stay."""
    content = {"name": name, "options": options, **facts}
    content |= {"signature": sign(content)}
    write(directory, read_recipe(directory) | {RECORD: content})


def restore(directory: Path, record: Mapping[str, Any]) -> None:
    """Create a run directory again that was removed during the run, with its record if it had one."""
    directory.mkdir(parents=True, exist_ok=True)
    if record:
        write(directory, {RECORD: record})


def how_to_resume(run: Run) -> str:
    """Return how to resume a run: the command for its directory, or for the run that it is a part of."""
    for directory in (run.directory, run.directory.parent):
        if recorded(directory):
            return command(directory)
    return f"the same call of keifu.train with out={str(run.directory)!r} and resume=True"


def command(directory: Path) -> str:
    """Return the command that resumes the run in a directory, including options that name the user's code."""
    record = recorded(directory)
    words = [record["name"]] if record.get("name", "").endswith(".py") else []
    words += ["--resume", str(directory)]
    for option, value in (record.get("named") or {}).items():
        words += [f"--{option}", *shlex.split(value)]
    return f"keifu train {shell(*words)}"


def last_step(directory: Path) -> int | None:
    """Return the step of the newest saved state of a run or its parts; None if none was saved."""
    return max((step for folder in _directories(directory) for step in checkpoint.steps(folder)), default=None)


def _directories(directory: Path) -> list[Path]:
    """Return the directories of a run and of its parts."""
    parts = (path.parent for path in sorted(directory.glob(f"*/{RECIPE}")))
    return [directory, *(part for part in parts if part.name not in (BEFORE, MOVING))]


def check_free(directory: Path) -> None:
    """Raise UserError if a run in this directory has saved a state or is finished."""
    step, finished = last_step(directory), read_recipe(directory).get("finished")
    if step is not None or finished:
        where = "a finished run" if step is None else f"a run, saved at step {step:,}"
        ways = f"go on with it ({command(directory)}), start over with --replace, or choose another folder with --out"
        raise UserError(f"{directory} already holds {where}: {ways}.")


@contextmanager
def replaced(directory: Path) -> Iterator[None]:
    """Run a block in which a new run replaces the one in the directory. Restore the old run if the new one fails before
    it has saved a state.
    """
    if not current().is_main:
        yield
        return
    _move(directory, directory / MOVING)
    if (directory / MOVING).exists():
        (directory / MOVING).rename(directory / BEFORE)
    try:
        yield
    except BaseException:
        if last_step(directory) is None:
            _restore_replaced(directory)
        raise
    finally:
        shutil.rmtree(directory / BEFORE, ignore_errors=True)


def _restore_replaced(directory: Path) -> None:
    """Restore the run that a new run replaced. It is safe to call this again after a crash."""
    if (directory / BEFORE).exists():
        (directory / BEFORE).rename(directory / MOVING)
    _move(directory / MOVING, directory)
    shutil.rmtree(directory / MOVING, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    """Move the files and folders that a run and its parts have written for resuming and for the report."""
    names = (RECIPE, metrics.FILE, checkpoint.FOLDER, SAMPLES)
    paths = [folder / name for folder in _directories(source) for name in names]
    for path in filter(Path.exists, paths):
        destination = target / path.relative_to(source)
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(destination, ignore_errors=True)
        path.replace(destination)


def forget(directory: Path) -> None:
    """Remove the record of a run that failed before its first step, and the directory if it is then empty."""
    if not current().is_main:
        return
    if read_recipe(directory).keys() == {RECORD}:
        (directory / RECIPE).unlink()
    with suppress(OSError):
        directory.rmdir()


def close(directory: Path) -> None:
    """Mark a run that did not use the training loop as finished."""
    if (content := read_recipe(directory)).keys() == {RECORD}:
        write(directory, content | {"finished": True})


def write_sample(directory: Path, step: int, sample: str | bytes) -> None:
    """Write a text or a PNG picture under samples/, named by its step."""
    suffix = "txt" if isinstance(sample, str) else "png"
    write_atomic(directory / SAMPLES / f"step-{step:08d}.{suffix}", sample)


def hashes(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every weight file and saved state of a run, by its relative path.

    Those of the states and the best weights are in their JSON files: gigabytes are not read again at a stop.
    """
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("*/*.safetensors")])
    known = checkpoint.digests(directory)
    return {path.relative_to(directory).as_posix(): known.get(path) or sha256(path) for path in files}


def versions() -> dict[str, str]:
    """Return the versions of Python, the main packages and the system, the processor's name, and the revisions of
    models from the hub.
    """
    programs = dict[str, str]()
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):  # not installed, but run from source
            programs[name] = metadata.version(name)
    machine = {"system": platform.platform(), "processor": processor_name()}
    hub = {f"hub {name}": revision for name, revision in HUB.items()}
    return {"python": platform.python_version(), **programs, **machine, **hub}
