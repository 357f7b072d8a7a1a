"""How `keifu train` starts, restarts and resumes a run.

The name of the recipe and all its options are in recipe.json, so a run is resumed from its folder alone. Options given
beside --resume are compared with those by name: those that do not change the training may differ, others are refused.
Data may have another place: whether they are the same, their fingerprint says when they are read.
"""

from collections.abc import Mapping, Sequence
from contextlib import chdir, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from keifu.checkpoints.hf.native_config import check_kinds
from keifu.checkpoints.hub import may_be_model
from keifu.errors import UserError
from keifu.recipes.options import by_option, current, from_json, paths, put, to_json
from keifu.training.run import checkpoint
from keifu.training.run import directory as run_directory
from keifu.training.settings import ADJUSTABLE, flat
from keifu.training.signals import Interrupted

LENGTHS = ("steps", "minutes", "epochs", "rollouts")  # options that say how long a run is
SHOWN = ("prompt", "prompts", "gaps", "guidance")  # options of samples alone
FREE = {name.replace("_", "-") for name in ADJUSTABLE} | {*SHOWN, "average", "data"}
OF_A_ROLLOUT = ("ppo", "grpo")  # recipes whose epochs are passes over a rollout, and whose prompts are its size


@dataclass(frozen=True)
class Stored:
    """A run that stands in a folder: the name of its recipe, and the recipe as it was begun.

    known: the options that the folder names, which are all but in a folder of an earlier version. steps: of the whole
    run, where they were changed since. place: the directory that it was begun in.
    """

    name: str
    then: Any
    known: frozenset[str]
    steps: int | None = None
    place: str | None = None

    def usual(self, words: Sequence[str]) -> Any:
        """The recipe with what an option has that these words do not give: of --steps and --minutes one alone."""
        values, fresh = to_json(self.then), type(self.then)()
        given = {word.removeprefix("--").partition("=")[0].replace("_", "-") for word in words}
        where, unset = paths(type(self.then), values), by_option(type(self.then), to_json(fresh))
        gone = {"minutes"} if "steps" in given or self.steps else {"steps"} if "minutes" in given else set[str]()
        if self.steps and "steps" in where:
            put(values, where["steps"], self.steps)
        for option in gone & where.keys():
            if unset[option] is None:
                put(values, where[option], None)
        return from_json(fresh, values)


def stored(name: str, module: ModuleType, out: Path) -> Stored | None:
    """The run in a folder, if there is one; that of another recipe is a `UserError`."""
    content, usual = run_directory.read_recipe(out), module.Recipe()
    if (record := content.get(run_directory.RECORD)) is None:
        return _of_an_earlier_version(name, usual, content) if content else None
    if record["name"] != name:
        raise UserError(
            f"{out} holds a run of keifu train {record['name']}, not of {name}: go on with it by "
            f"{run_directory.command(out)}, or choose another folder with --out."
        )
    options = by_option(type(usual), current(type(usual), record["options"]))
    check_kinds(then := from_json(usual, record["options"]), str(out / run_directory.RECIPE))
    return Stored(name, then, frozenset(options), record.get("steps"), record.get("place"))


def name_of(out: Path) -> str:
    """The name of the recipe whose run stands in a folder."""
    if not (content := run_directory.read_recipe(out)):
        raise UserError(f"There is no run in {out} to go on with: it has no {run_directory.RECIPE}.")
    if run_directory.RECORD in content:
        return content[run_directory.RECORD]["name"]
    raise UserError(
        f"{out / run_directory.RECIPE} was written by an earlier version and does not name its recipe: add it, as in "
        f"keifu train RECIPE --out {out} --resume, with the options of that run."
    )


def _of_an_earlier_version(name: str, usual: Any, content: Mapping[str, Any]) -> Stored:
    """What can be read of a run whose folder does not name its options: settings and facts of the same name."""
    values, known = to_json(usual), set[str]()
    facts, settings = current(type(usual), flat(content.get("options", {}))), content.get("settings", {})
    for option, path in paths(type(usual), values).items():
        found = _found(path, facts, settings)
        kind = type(by_option(type(usual), values)[option])
        if found and (kind is type(None) or type(found[0]) is kind):
            put(values, path, found[0])
            known.add(option)
    return Stored(name, from_json(usual, values), frozenset(known))


def _found(path: tuple[str, ...], facts: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Any]:
    """The value of an option among a run's facts and settings, as a list of one; empty where it is not there."""
    own = ".".join(path[1:] if path[0] == "training" else path)
    if ".".join(path) in facts:
        return [facts[".".join(path)]]
    if own in settings:
        return [settings[own]]
    suffixes = [value for key, value in facts.items() if key.split(".")[-1] == path[-1] and len(path) == 1]
    return suffixes[:1] if len(suffixes) == 1 else [facts[f"text.{own}"]] if f"text.{own}" in facts else []


def begin(name: str, module: ModuleType, recipe: Any, out: Path, replace: bool) -> None:
    """A new run; the folder is checked before anything is read or fetched."""
    with run_directory.owned(out):
        if not replace:
            run_directory.check_free(out)
            if may_be_model(out) and not run_directory.read_recipe(out):
                raise UserError(f"{out} holds a model of no run: name another --out, or write over it by --replace.")
        with run_directory.replaced(out) if replace else nullcontext():
            run_directory.record(out, name, to_json(recipe), place=str(Path.cwd()))
            try:
                module.run(recipe, out, False)
            except KeyboardInterrupt as stop:
                _stop(out, stop)
            except BaseException:
                if run_directory.last_step(out) is None:
                    run_directory.forget(out)
                raise
            run_directory.close(out)


def go_on(found: Stored | None, module: ModuleType, wanted: Any, out: Path) -> None:
    """Goes on with a run, with the options that may change as they are wanted now."""
    if found is None:
        raise UserError(
            f"There is no run in {out} to go on with: it has no {run_directory.RECIPE}. Start without --resume."
        )
    with run_directory.owned(out):
        _go_on(found, module, wanted, out)


def _go_on(found: Stored, module: ModuleType, wanted: Any, out: Path) -> None:
    lengths, wanted = _check(found, wanted), _moved(found, wanted)
    if missing := sorted(by_option(type(wanted), to_json(wanted)).keys() - found.known):
        print(
            f"{out / run_directory.RECIPE} was written by an earlier version and does not say these options, which are "
            f"taken as given or as usual: {', '.join(f'--{each}' for each in missing)}.",
            flush=True,
        )
    recipe, steps = _lengthened(found, wanted, lengths, out)
    step, before = run_directory.last_step(out), run_directory.read_recipe(out)
    place = found.place if found.place and Path(found.place).is_dir() else str(Path.cwd())
    own = {"place": place} | ({} if steps is None else {"steps": steps})
    run_directory.record(out, found.name, to_json(recipe), **own)
    if step is None:
        print(f"No state of the run in {out} was saved: it starts from its first step.", flush=True)
    out = out if Path(place) == Path.cwd() else out.absolute()
    with chdir(place):  # names of files in the options are seen from where the run was begun
        try:
            module.run(recipe, out, step is not None)
        except KeyboardInterrupt as stop:
            _stop(out, stop)
        except Exception:
            if run_directory.last_step(out) == step:
                run_directory.write(out, before)
            raise
    run_directory.close(out)


def _moved(found: Stored, wanted: Any) -> Any:
    """The recipe, in which files of data that have another place now are named from the root."""
    kind, values = type(wanted), to_json(wanted)
    then, now = by_option(kind, to_json(found.then)), by_option(kind, values)
    for option, path in paths(kind, values).items():
        if _last(option) == "data" and now[option] and now[option] != then[option]:
            places = now[option].split(",")  # --data may name two files
            put(values, path, ",".join(str(Path(each).absolute()) if Path(each).exists() else each for each in places))
    return from_json(wanted, values)


def _check(found: Stored, wanted: Any) -> dict[str, tuple[Any, Any]]:
    """The options of a run's length that differ, with both values; any other that may not change is a `UserError`."""
    kind = type(wanted)
    then, now = (by_option(kind, to_json(each)) for each in (found.usual(()), wanted))
    changed = {name for name in found.known if name in now and then[name] != now[name]}
    free = {name for name in now if _may_change(found.name, name)}
    lengths = {name for name in LENGTHS if name in now and not (name == "epochs" and found.name in OF_A_ROLLOUT)}
    if refused := sorted(changed - free - lengths):
        differing = ", ".join(f"--{name} {_words(then[name])} → {_words(now[name])}" for name in refused)
        may = ", ".join(f"--{name}" for name in sorted(free | lengths))
        raise UserError(
            f"A resumed run keeps its options, and these differ: {differing}; leave them out, or start a "
            f"new run in another folder.{f' What may change: {may}.' if may else ''}"
        )
    return {name: (then[name], now[name]) for name in changed & lengths}


def _words(value: Any) -> str:
    """A value as it stands on a command line."""
    if value is None:
        return "(unset)"
    return " ".join(map(_words, value)) if isinstance(value, list) else str(value)


def _may_change(recipe: str, option: str) -> bool:
    last = _last(option)
    return last in FREE - {"steps"} and not (last == "prompts" and recipe in OF_A_ROLLOUT)


def _last(option: str) -> str:
    return option.rpartition(".")[2]


def _lengthened(
    found: Stored, wanted: Any, lengths: Mapping[str, tuple[Any, Any]], out: Path
) -> tuple[Any, int | None]:
    """The recipe with the length that it was begun with, and the steps that the whole run shall have now, where those
    are others. Before the last part of a run has begun, its length is simply another."""
    if not (facts := checkpoint.latest_facts(out)):
        return wanted, found.steps if not lengths else None
    kind, values = type(wanted), to_json(wanted)
    then = by_option(kind, to_json(found.then))
    for name, path in paths(kind, values).items():
        if name == "steps" and "steps" in lengths:
            put(values, path, then[name] or facts["described"]["settings"]["steps"])  # in place of minutes
        elif name in LENGTHS and not (name in ("steps", "minutes") and {"steps", "minutes"} & lengths.keys()):
            put(values, path, then[name])
    steps = _steps(lengths, facts)
    if steps is not None and steps < facts["step"]:
        raise UserError(f"{facts['step']:,} steps are done, so the run cannot be made as short as {steps:,}.")
    return from_json(wanted, values), found.steps if steps is None else steps


def _steps(lengths: Mapping[str, tuple[Any, Any]], facts: Mapping[str, Any]) -> int | None:
    """The steps of the whole run by the options that changed; minutes count at the pace so far."""
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
    """What is said after Ctrl-C: the line that goes on."""
    if isinstance(stop, Interrupted):
        raise stop
    step = run_directory.last_step(out)
    kept = " before a state was saved" if step is None else f"; the state of step {step:,} is saved"
    raise KeyboardInterrupt(f"Stopped{kept}. To go on:\n{run_directory.command(out)}") from stop
