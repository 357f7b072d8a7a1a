"""Starting, restarting and resuming runs of `keifu train`.

recipe.json in the run's folder has the recipe's name and all its options, so the folder is enough to resume. Options
given with --resume are compared with the stored ones. Options that do not change the training may differ; others are
refused. Data may have moved: their fingerprint is checked when they are read. Code that the folder names must be on the
command line (see `trust`).
"""

import json
import signal
from collections.abc import Mapping, Sequence
from contextlib import chdir, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from keifu.checkpoints.hf.native_config import check_kinds
from keifu.checkpoints.hub import may_be_model
from keifu.errors import UserError, shell
from keifu.files import sha256
from keifu.recipes import trust
from keifu.recipes.options import by_option, from_json, paths, put, to_json
from keifu.recipes.running import run_jobs
from keifu.training.run import checkpoint, run_directory
from keifu.training.run.signature import is_signed
from keifu.training.settings import ADJUSTABLE
from keifu.training.signals import Interrupted, LeftAtOnce

_TOO_OLD = "{path} does not name its recipe: it was written by a version before 0.2.0, which this one does not resume."
LENGTHS = ("steps", "minutes", "epochs", "rollouts")  # options for the length of a run
SHOWN = ("prompt", "prompts", "gaps", "guidance")  # options that affect only the samples
FREE = {name.replace("_", "-") for name in ADJUSTABLE} | {*SHOWN, "average", "data", "yes"}
OF_A_ROLLOUT = ("ppo", "grpo")  # recipes whose epochs are passes over a rollout, and whose prompts are its size


@dataclass(frozen=True)
class StoredRun:
    """Run in a folder: its recipe's name, the recipe as it was at the start, and the folder's record."""

    name: str
    then: Any
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int | None:
        """Number of steps of the whole run if it was changed after the start, else None."""
        return self.record.get("steps")

    def recipe_for(self, words: Sequence[str]) -> Any:
        """Return the recipe with stored values for options that are not given. Of --steps and --minutes only one is
        kept."""
        values, fresh = to_json(self.then), type(self.then)()
        given_options = trust.given_options(words)
        where, unset = paths(type(self.then), values), by_option(type(self.then), to_json(fresh))
        gone = (
            {"minutes"}
            if "steps" in given_options or self.steps
            else {"steps"}
            if "minutes" in given_options
            else set[str]()
        )
        if self.steps and "steps" in where:
            put(values, where["steps"], self.steps)
        for option in gone & where.keys():
            if unset[option] is None:
                put(values, where[option], None)
        return from_json(fresh, values)


def stored(name: str, module: ModuleType, out: Path) -> StoredRun | None:
    """Return the run in a folder, or None. Raises `UserError` for a run of another recipe."""
    content, default_recipe = run_directory.read_recipe(out), module.Recipe()
    if not content:
        return None
    if (record := content.get(run_directory.RECORD)) is None:
        raise UserError(_TOO_OLD.format(path=out / run_directory.RECIPE))
    files = name.endswith(".py") and record["name"].endswith(".py")  # one may be the other under another path
    if record["name"] != name and not (files and sha256(Path(name)) == trust.hashes(record).get("")):
        raise UserError(
            f"{out} holds a run of keifu train {shell(record['name'])}, not of {name}: go on with it by "
            f"{run_directory.command(out)}, or choose another folder with --out."
        )
    check_kinds(then := from_json(default_recipe, _completed(record["options"])), str(out / run_directory.RECIPE))
    return StoredRun(name, then, record)


def _completed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return stored options with the rule of held-out text of earlier versions, which did not write it."""

    def with_rule(values: dict[str, Any]) -> dict[str, Any]:
        of_text = "held_out" in values and {"text_field", "shares"} & values.keys()  # the latter in palm2
        return {"split": "end", **values} if of_text else values

    return json.loads(json.dumps(options), object_hook=with_rule)


def name_of(out: Path) -> str:
    """Return the recipe's name of the run in a folder."""
    if not (content := run_directory.read_recipe(out)):
        raise UserError(f"There is no run in {out}: it has no {run_directory.RECIPE}.")
    if run_directory.RECORD not in content:
        raise UserError(_TOO_OLD.format(path=out / run_directory.RECIPE))
    record = content[run_directory.RECORD]
    trust.refuse_recipe_file(out, record["name"], record)
    return record["name"]


def begin(name: str, module: ModuleType, recipe: Any, out: Path, replace: bool) -> None:
    """Start a new run. The folder is checked before data are read or downloaded."""
    with run_directory.owned(out):
        if not replace:
            run_directory.check_free(out)
            if may_be_model(out) and not run_directory.read_recipe(out):
                raise UserError(f"{out} holds a model of no run: name another --out, or write over it by --replace.")
        with run_directory.replaced(out) if replace else nullcontext():
            code = {"code": trust.code_hashes(name, recipe), "named": trust.options_with_code(recipe)}
            run_directory.record(out, name, to_json(recipe), place=str(Path.cwd()), **code)
            trust.show_code(name, recipe, {})
            try:
                if "check_before_start" in vars(module):
                    module.check_before_start(recipe)
                run_jobs(module.jobs(recipe), out)
            except KeyboardInterrupt as stop:
                _stop(out, stop)
            except BaseException:
                if run_directory.last_step(out) is None:
                    run_directory.forget(out)
                raise
            run_directory.close(out)


def go_on(run: StoredRun | None, module: ModuleType, recipe: Any, out: Path) -> None:
    """Resume a run. Options that may change have their values in `recipe`."""
    if run is None:
        raise UserError(f"There is no run in {out}: it has no {run_directory.RECIPE}. Start without --resume.")
    with run_directory.owned(out):
        _go_on(run, module, recipe, out)


def _go_on(run: StoredRun, module: ModuleType, new_recipe: Any, out: Path) -> None:
    lengths, new_recipe = _check(run, new_recipe), _moved(run, new_recipe)
    recipe, steps = _lengthened(run, new_recipe, lengths, out)
    step, before = run_directory.last_step(out), run_directory.read_recipe(out)
    begun_in = run.record.get("place", "")  # used if it is still there, and this user started the run
    usable = begun_in and is_signed(run.record) and Path(begun_in).is_dir()
    directory = begun_in if usable else str(Path.cwd())
    facts: dict[str, Any] = {"place": directory} | ({} if steps is None else {"steps": steps})
    if step is None:
        print(f"No state of the run in {out} was saved: it starts from its first step.", flush=True)
    out = out if Path(directory) == Path.cwd() else out.absolute()
    with chdir(directory):  # relative paths in the options refer to the directory of the start
        facts |= {"code": trust.code_hashes(run.name, recipe), "named": trust.options_with_code(recipe)}
        run_directory.record(out, run.name, to_json(recipe), **facts)
        trust.show_code(run.name, recipe, run.record)
        try:
            run_jobs(module.jobs(recipe), out, step is not None)
        except KeyboardInterrupt as stop:
            _stop(out, stop)
        except Exception:
            if run_directory.last_step(out) == step:
                run_directory.write(out, before)
            raise
    run_directory.close(out)


def _moved(run: StoredRun, recipe: Any) -> Any:
    """Return the recipe with absolute paths for data files that have moved."""
    recipe_class, values = type(recipe), to_json(recipe)
    then, now = by_option(recipe_class, to_json(run.then)), by_option(recipe_class, values)
    for option, path in paths(recipe_class, values).items():
        if _last(option) == "data" and now[option] and now[option] != then[option]:
            files = now[option].split(",")  # --data may name two files
            put(values, path, ",".join(str(Path(file).absolute()) if Path(file).exists() else file for file in files))
    return from_json(recipe, values)


def _check(run: StoredRun, new_recipe: Any) -> dict[str, tuple[Any, Any]]:
    """Return the changed options of the run's length, each with both values. Raises `UserError` for any other option
    that must not change."""
    then, now = (by_option(type(new_recipe), to_json(recipe)) for recipe in (run.recipe_for(()), new_recipe))
    changed = {name for name in then.keys() & now.keys() if then[name] != now[name]}
    rollout = run.name in OF_A_ROLLOUT
    free = {name for name in now if _last(name) in FREE - {"steps"} and not (_last(name) == "prompts" and rollout)}
    lengths = {name for name in LENGTHS if name in now and not (name == "epochs" and rollout)}
    if refused := sorted(changed - free - lengths):
        differing = ", ".join(f"--{name} {_words(then[name])} → {_words(now[name])}" for name in refused)
        may = ", ".join(f"--{name}" for name in sorted(free | lengths))
        raise UserError(
            f"A resumed run keeps its options, and these differ: {differing}; leave them out, or start a "
            f"new run in another folder.{f' These may change: {may}.' if may else ''}"
        )
    return {name: (then[name], now[name]) for name in changed & lengths}


def _words(value: Any) -> str:
    """Format a value as on a command line."""
    if value is None:
        return "(unset)"
    return " ".join(map(_words, value)) if isinstance(value, list) else str(value)


def _last(option: str) -> str:
    return option.rpartition(".")[2]


def _lengthened(
    run: StoredRun, new_recipe: Any, lengths: Mapping[str, tuple[Any, Any]], out: Path
) -> tuple[Any, int | None]:
    """Return the recipe with its length at the start, and the new number of steps of the whole run; None if it is
    unchanged.

    Before the last part of a run has begun, a new length simply replaces the old one.
    """
    if not (facts := checkpoint.latest_facts(out)):
        return new_recipe, run.steps if not lengths else None
    recipe_class, values = type(new_recipe), to_json(new_recipe)
    then = by_option(recipe_class, to_json(run.then))
    for name, path in paths(recipe_class, values).items():
        if name == "steps" and "steps" in lengths:
            put(values, path, then[name] or facts["described"]["settings"]["steps"])  # instead of minutes
        elif name in LENGTHS and not (name in ("steps", "minutes") and {"steps", "minutes"} & lengths.keys()):
            put(values, path, then[name])
    steps = _steps(lengths, facts)
    if steps is not None and steps < facts["step"]:
        raise UserError(f"{facts['step']:,} steps are done, so the run cannot end at step {steps:,}.")
    return from_json(new_recipe, values), run.steps if steps is None else steps


def _steps(lengths: Mapping[str, tuple[Any, Any]], facts: Mapping[str, Any]) -> int | None:
    """Return the number of steps of the whole run by the changed options. Minutes are converted by the speed so far."""
    for name, (then, now) in lengths.items():
        if now is None or (name == "minutes" and lengths.get("steps", (None, None))[1] is not None):
            continue
        if name == "steps":
            return now
        if name == "minutes":
            seconds = facts["seconds"] / max(1, facts["step"])
            return max(1, round(60 * now / seconds)) if seconds else None
        if then is None:
            raise UserError(f"The run was begun without --{name}, so its length is given in --steps.")
        return max(1, round(facts["described"]["settings"]["steps"] * now / then))
    return None


def _stop(out: Path, stop: KeyboardInterrupt) -> NoReturn:
    """After Ctrl-C, end with the command that resumes the run."""
    if isinstance(stop, Interrupted) and not isinstance(stop, LeftAtOnce):
        raise stop
    number = stop.number if isinstance(stop, LeftAtOnce) else signal.SIGINT
    step = run_directory.last_step(out)
    saved_state = " before a state was saved" if step is None else f"; the state of step {step:,} is saved"
    raise Interrupted(f"Stopped{saved_state}. To go on:\n{run_directory.command(out)}", number) from stop
