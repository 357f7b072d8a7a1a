"""What reaches the training loop from a recipe: its last job, rows of a table for options, and the check that every
option has a row and reaches what that names."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from keifu import recipes
from keifu.errors import UserError
from keifu.recipes import running
from keifu.recipes.options import Logging
from keifu.training import loop, runs
from keifu.training.job import Computation
from keifu.training.settings import Settings

DIFFERENT = object()  # what a path gives must differ from what it gives without the option, and no more is known
MINUTES = 100  # steps that the stand-in for the measurement of pace finds in a minute


@dataclass(frozen=True)
class Reach:
    """An option's row: a value that is not its default, where that arrives, and as what.

    path: names through attributes, keys, arguments of a partial and variables of a closure, after the name of a part's
    folder and a colon where it is not the run's last; or a function of the record. `but`: fields left out of a
    comparison of dataclasses.
    """

    value: Any
    path: str | Callable[[Any], Any] | tuple[str, ...]
    expected: Any = ...
    but: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Options that are set together. given: what else is changed, with the options and without. refused: without the
    options the recipe refuses to start."""

    rows: Mapping[str, Reach]
    given: Mapping[str, Any] = field(default_factory=dict)
    refused: bool = False


def inside(thing: Any, name: str) -> Any:
    """Return one step of a path."""
    if isinstance(thing, Mapping):
        return thing[name]
    if isinstance(thing, list | tuple) and name.lstrip("-").isdigit():
        return thing[int(name)]
    if isinstance(thing, partial):
        return inspect.signature(thing.func).bind_partial(*thing.args, **thing.keywords).arguments[name]
    if inspect.isfunction(thing):
        return inspect.getclosurevars(inspect.unwrap(thing)).nonlocals[name]
    return getattr(thing, name)


def look(record: SimpleNamespace, path: Any) -> Any:
    """Return the value at the end of a path."""
    if callable(path):
        return path(record)
    part, _, names = path.rpartition(":")
    found: Any = record.parts[part] if part else record
    for name in names.split("."):
        found = inside(found, name)
    return found


def leaves(value: Any, prefix: str = "") -> Iterator[str]:
    """Yield the names of all options of a recipe, nested ones with dots."""
    for each in fields(value):
        inner = getattr(value, each.name)
        if is_dataclass(inner):
            yield from leaves(inner, f"{prefix}{each.name}.")
        else:
            yield f"{prefix}{each.name}"


def assign(recipe: Any, changes: Mapping[str, Any]) -> Any:
    """Return the recipe with these options."""
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        recipe = replace(recipe, **{first: assign(getattr(recipe, first), {rest: value}) if rest else value})
    return recipe


def logged(recipe: Any, groups: list[Group]) -> list[Group]:
    """Return the groups, the first of them with rows for the options that every recipe has."""
    if not isinstance(recipe, Logging):
        return groups
    rows = {name: Reach(True, f"settings.{name}") for name in ("tensorboard", "wandb")}
    rows |= {} if any("minutes" in group.rows for group in groups) else {"minutes": Reach(0.5, "settings.minutes", 0.5)}
    return [replace(groups[0], rows={**groups[0].rows, **rows}), *groups[1:]]


def distill_groups(teacher: str, given: Mapping[str, Any], more: Mapping[str, Reach] | None = None) -> list[Group]:
    """Return the groups of the options of `Distill`; more: rows of a recipe's further options."""
    rows = {
        "distill.beta": Reach(0.3, "objective.beta"),
        "distill.temperature": Reach(2.0, "objective.temperature"),
        "distill.hard": Reach(0.25, "objective.hard"),
        "distill.weights": Reach("f32", "run.options.distill.weights"),
    }
    learned = Reach(teacher, lambda r: type(r.objective).__name__, "Distillation")
    taught = {**given, "distill.teacher": teacher}
    named = Group({"distill.divergence": Reach("reverse", "objective.beta", 1.0)}, taught)
    return [Group({"distill.teacher": learned}, given), Group(rows | dict(more or {}), taught), named]


def uncovered(recipe: Any, groups: list[Group], free: Mapping[str, str]) -> list[str]:
    """Return options that have no row, neither their own nor one of a whole group such as `model`."""
    rows = {name for group in groups for name in group.rows} | {*free}
    return [name for name in leaves(recipe) if not any(name == row or name.startswith(f"{row}.") for row in rows)]


def check(groups: list[Group], records: Callable[[Mapping[str, Any]], SimpleNamespace]) -> None:
    """Check that each option of a group reaches the value that its row names, and that it changed this value."""
    without = dict[str, SimpleNamespace]()  # records by what groups are given: several are given the same
    for group in groups:
        changed = records({**group.given, **{name: reach.value for name, reach in group.rows.items()}})
        if group.refused:
            with pytest.raises(UserError):
                records(group.given)
            continue
        if repr(group.given) not in without:
            without[repr(group.given)] = records(group.given)
        _compare(group, changed, without[repr(group.given)])


def _compare(group: Group, changed: SimpleNamespace, before: SimpleNamespace) -> None:
    for option, reach in group.rows.items():
        for path in reach.path if isinstance(reach.path, tuple) else (reach.path,):
            now, then = _comparable(look(changed, path), reach.but), _comparable(look(before, path), reach.but)
            assert now != then, f"{option} does not reach {path}: it is {now!r} with it and without it"
            if reach.expected is not DIFFERENT:
                wanted = _comparable(reach.value if reach.expected is ... else reach.expected, reach.but)
                assert now == pytest.approx(wanted) if isinstance(wanted, float) else now == wanted, (option, path)


def _comparable(value: Any, but: tuple[str, ...]) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {name: each for name, each in asdict(value).items() if name not in but}
    return tuple(value) if isinstance(value, list) else value


def run(name: str, recipe: Any, out: Path, saved: bool = False) -> SimpleNamespace:
    """Return the last job of a recipe, which is not trained. Earlier stages are saved for the later ones; the last if
    `saved`."""
    module = import_module(f"{recipes.__name__}.{recipes.RECIPES[name.replace('_', '-')]}")
    parts: dict[str, SimpleNamespace] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "steps_within", lambda minutes, *rest, **more: round(MINUTES * minutes))
        generator, result = module.jobs(recipe), None
        while True:
            try:
                job = generator.send(result)
            except StopIteration:
                return parts["last"]
            if isinstance(job, Computation):
                result = job.work(out)
                continue
            directory = out / job.stage.folder if job.stage else out
            job = runs.resolve(job, directory, False)
            run = SimpleNamespace(options=job.facts.options, about=job.facts.report(), directory=directory)
            save = job.save or partial(running.save, job)
            found = SimpleNamespace(**{**vars(job), "run": run, "save": save, "parts": parts})
            parts[directory.name] = parts["last"] = found
            if saved or job.stage:
                directory.mkdir(parents=True, exist_ok=True)
                save(directory)
            assert isinstance(job.settings, Settings)
            result = loop.Summary(directory, job.settings.steps, 0.0, defaultdict(float))
