"""`keifu train`: loads a recipe by its name and turns its fields into options."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from keifu.commands.shared import flags, launch, recipe_options, tables
from keifu.commands.shared.errors import explain
from keifu.devices import Choice
from keifu.distributed.mesh import Mesh
from keifu.errors import UserError


def parse(arguments: Sequence[str]) -> Callable[[], None]:
    """Parse the arguments and return the run as a function; without a recipe, a function that lists the recipes.

    `--resume FOLDER` instead of a recipe continues the run in that folder.
    """
    if launch.is_started():
        launch.silence()
    if not arguments or arguments[0] in ("-h", "--help"):
        return _list
    if strange := next((ascii(word) for word in arguments if re.search("[\ud800-\udfff]", word)), None):
        raise UserError(f"{strange} is not UTF-8, in which a run's options are kept: give the file another name.")
    name, *words = _folder_of_resume(arguments)
    if name == "--out" and words:
        from keifu.commands.shared import resuming  # imports torch, which a help text does not need
        from keifu.training.run import run_directory as folder

        out = Path(words[0])
        if not folder.read_recipe(out):
            return lambda: print(resuming.name_of(out))  # raises its error when the command runs
        name, words = resuming.name_of(out), ["--out", *words]
    if name.startswith("-"):
        raise UserError(f"A recipe comes first, or --resume FOLDER, and {name} is neither: keifu train lists recipes.")
    recipe_options.path_of(name)
    return parse_recipe(name, words, f"keifu train {name}")


def _folder_of_resume(arguments: Sequence[str]) -> list[str]:
    """Rewrite `--resume FOLDER` as `--out FOLDER --resume`, if no recipe comes before it."""
    words = [piece for word in arguments for piece in (word.split("=", 1) if word.startswith("--resume=") else [word])]
    position = words.index("--resume") + 1 if "--resume" in words else len(words)
    if position < len(words) and not words[position].startswith("-"):
        named = ["--out", words[position], "--resume"]
        rest = [*words[: position - 1], *words[position + 1 :]]
        return [*named, *rest] if words[0].startswith("-") else [rest[0], *named, *rest[1:]]
    return words


def parse_recipe(name: str, arguments: Sequence[str], program: str, replaces: bool = False) -> Callable[[], None]:
    """Parse the options of a recipe: its `Recipe` fields, `--out`, `--resume`, `--replace` and device options. Return
    its run as a function.

    With `--resume`, options that are not given have the values of the run in the folder. replaces: whether an earlier
    run is always started over.
    """
    if flags.asks_for_help(arguments):
        known, about = recipe_options.arguments(name), recipe_options.docstring(recipe_options.path_of(name))
        flags.show_help(known, program, re.sub(r"\n(?=[A-Z]\w+: )", "\n\n", about))
    from keifu.commands.shared import resuming, trust
    from keifu.training.run.run_directory import last_step

    module = recipe_options.recipe_module(name)
    words = list(arguments)
    options_class = recipe_options.with_folder(module.Recipe, name)
    name = str(Path(name).resolve()) if recipe_options.is_own(name) else name
    stored_run, out = None, Path(_value_of("--out", words) or Path("runs") / Path(name).stem)
    if launch.is_restart() and last_step(out) is not None:
        words = [*(word for word in words if word != "--replace"), "--resume"]
    if "--resume" in words:
        stored_run = resuming.stored(name, module, out)
    usual = options_class(recipe=stored_run.usual(words)) if stored_run else None
    options = flags.parse(options_class, words, program, usual=usual)
    if options.resume and options.replace:
        raise UserError("--resume goes on with a run and --replace starts over: give one of them.")
    if stored_run:
        trust.check_resumed(out, stored_run.record, options.recipe, words)
    processes = options.processes or options.mesh.asks
    if (processes > 1 or options.mesh != Mesh()) and not launch.is_started():
        options.mesh.fit(processes)
        return lambda: launch.start(processes, options.restarts, ["train", name, *words])
    choice = Choice(options.device, **{part: vars(options).get(part) or None for part in recipe_options.COMPUTING})
    if options.resume:
        work = partial(resuming.go_on, stored_run, module, options.recipe, options.out)
    else:
        work = partial(resuming.begin, name, module, options.recipe, options.out, options.replace or replaces)
    return flags.placed(choice, partial(launch.together, options.mesh, work, explain) if launch.is_started() else work)


def _value_of(option: str, words: Sequence[str]) -> str | None:
    """Return the word after an option, or the part after its "="."""
    pieces = [piece for word in words for piece in word.split("=", 1)]
    position = max((number for number, piece in enumerate(pieces) if piece == option), default=len(pieces))
    return pieces[position + 1] if position + 1 < len(pieces) else None


def _list() -> None:
    print("Usage: keifu train RECIPE [OPTIONS]      keifu train RECIPE --help tells a recipe's options")
    print("       keifu train --resume FOLDER       goes on with the run in a folder\n")
    tables.show(("recipe", "what it trains"), recipe_options.recipes().items())
