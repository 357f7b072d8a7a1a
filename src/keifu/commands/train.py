"""`keifu train`: loads a recipe by its name, turns its fields into options, and starts several processes.

torchrun sets the environment variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. If they are set, this process is
one of several. Otherwise keifu starts the processes on this machine, as torchrun does.
"""

import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from keifu.commands.shared import flags, recipe_options, tables
from keifu.commands.shared.errors import explain
from keifu.devices import Choice
from keifu.distributed.mesh import Mesh
from keifu.errors import UserError
from keifu.recipes import files

RESTARTS = "TORCHELASTIC_RESTART_COUNT"
ENDING = 120  # seconds for processes to save their state after Ctrl-C
VOLUME = ("-q", "--quiet", "-v", "--verbose")


def parse(arguments: Sequence[str]) -> Callable[[], None]:
    """Parse the arguments and return the run as a function; without a recipe, a function that lists the recipes.

    `--resume FOLDER` instead of a recipe continues the run in that folder.
    """
    if is_started():
        silence()
    if not arguments or arguments[0] in ("-h", "--help"):
        return _list
    if strange := next((ascii(word) for word in arguments if re.search("[\ud800-\udfff]", word)), None):
        raise UserError(f"{strange} is not UTF-8, in which a run's options are kept: give the file another name.")
    name, *words = _folder_of_resume(arguments)
    if name == "--out" and words:
        from keifu.recipes import resuming  # imports torch, which a help text does not need
        from keifu.training.run import run_directory as folder

        out = Path(words[0])
        if not folder.read_recipe(out):
            return lambda: print(resuming.name_of(out))  # raises its error when the command runs
        name, words = resuming.name_of(out), ["--out", *words]
    if name.startswith("-"):
        raise UserError(f"A recipe comes first, or --resume FOLDER, and {name} is neither: keifu train lists recipes.")
    files.path_of(name)
    return parse_recipe(name, words, f"keifu train {name}")


def _folder_of_resume(arguments: Sequence[str]) -> list[str]:
    """Rewrite `--resume FOLDER` as `--out FOLDER --resume`, if no recipe comes before it."""
    words = [piece for word in arguments for piece in (word.split("=", 1) if word.startswith("--resume=") else [word])]
    position = words.index("--resume") + 1 if "--resume" in words else len(words)
    if position < len(words) and not words[position].startswith("-"):
        folder_words = ["--out", words[position], "--resume"]
        other_words = [*words[: position - 1], *words[position + 1 :]]
        return (
            [*folder_words, *other_words]
            if words[0].startswith("-")
            else [other_words[0], *folder_words, *other_words[1:]]
        )
    return words


def parse_recipe(name: str, arguments: Sequence[str], program: str, replaces: bool = False) -> Callable[[], None]:
    """Parse the options of a recipe: its `Recipe` fields, `--out`, `--resume`, `--replace` and device options. Return
    its run as a function.

    With `--resume`, options that are not given have the values of the run in the folder. replaces: whether an earlier
    run is always started over.
    """
    if flags.asks_for_help(arguments):
        known_arguments, about = recipe_options.arguments(name), files.docstring(files.path_of(name))
        flags.show_help(known_arguments, program, re.sub(r"\n(?=[A-Z]\w+: )", "\n\n", about))
    from keifu.recipes import resuming, trust
    from keifu.training.run.run_directory import last_step

    module = files.recipe_module(name)
    words = list(arguments)
    options_class = recipe_options.with_folder(module.Recipe, name)
    name = str(Path(name).resolve()) if files.is_own(name) else name
    stored_run, out = None, Path(_value_of("--out", words) or Path("runs") / Path(name).stem)
    if is_restart() and last_step(out) is not None:
        words = [*(word for word in words if word != "--replace"), "--resume"]
    if "--resume" in words:
        stored_run = resuming.stored(name, module, out)
    default_options = None
    if stored_run:
        default_options = options_class(recipe=stored_run.recipe_for(words))
    elif published := files.published_recipe(module, _value_of("--recipe-of", words)):
        default_options = options_class(recipe=published)
    options = flags.parse(options_class, words, program, default_options=default_options)
    if options.resume and options.replace:
        raise UserError("--resume goes on with a run and --replace starts over: give one of them.")
    if stored_run:
        trust.check_resumed(out, stored_run.record, options.recipe, words)
    processes = options.processes or options.mesh.asks
    if (processes > 1 or options.mesh != Mesh()) and not is_started():
        options.mesh.fit(processes)
        return lambda: start(processes, options.restarts, ["train", name, *words])
    choice = Choice(options.device, **{part: vars(options).get(part) or None for part in recipe_options.COMPUTING})
    if options.resume:
        work = partial(resuming.go_on, stored_run, module, options.recipe, options.out)
    else:
        work = partial(resuming.begin, name, module, options.recipe, options.out, options.replace or replaces)
    return flags.on_device(choice, partial(together, options.mesh, work) if is_started() else work)


def _value_of(option: str, words: Sequence[str]) -> str | None:
    """Return the word after an option, or the part after its "="."""
    pieces = [piece for word in words for piece in word.split("=", 1)]
    position = max((number for number, piece in enumerate(pieces) if piece == option), default=len(pieces))
    return pieces[position + 1] if position + 1 < len(pieces) else None


def _list() -> None:
    print("Usage: keifu train RECIPE [OPTIONS]      keifu train RECIPE --help tells a recipe's options")
    print("       keifu train --resume FOLDER       goes on with the run in a folder\n")
    tables.show(("recipe", "what it trains"), files.recipes().items())


def is_started() -> bool:
    """Return whether torchrun, or `start`, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_restart() -> bool:
    """Return whether this process replaces one that died."""
    return int(os.environ.get(RESTARTS, 0)) > 0


def silence() -> None:
    """Discard the further output of this process, unless its rank is 0 or KEIFU_DEBUG=1."""
    if os.environ.get("RANK", "0") != "0" and os.environ.get("KEIFU_DEBUG") != "1":
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())


def together(mesh: Mesh, work: Callable[[], None]) -> None:
    """Run `work` as one of the processes that torchrun has started."""
    from keifu.distributed.failures import explained
    from keifu.distributed.group import join

    with join(mesh, is_restart()) as group, explained(group, group.store, explain):
        work()


def start(processes: int, restarts: int, words: Sequence[str]) -> None:
    """Run `keifu` with these words in `processes` processes. Restart them at most `restarts` times if one dies. Exit
    with their status."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    threads = os.environ["OMP_NUM_THREADS"]
    described = f"{threads} thread{'s' * (threads != '1')} each"
    print(f"Starting {processes} process{'es' * (processes != 1)} of {described}.", file=sys.stderr, flush=True)
    volume = [word for word in sys.argv[1:] if word in VOLUME]
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id=f"keifu-{os.getpid()}", max_restarts=restarts, shutdown_timeout=ENDING,
    )  # fmt: skip
    logging.disable(logging.ERROR)  # the processes print their errors themselves
    try:
        # -P: do not import modules of the current folder
        elastic_launch(config, sys.executable)("-P", "-m", "keifu", *words, *volume)
    except SignalException as stop:
        raise SystemExit(128 + int(stop.sigval)) from stop
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise UserError(f"Process {number} of {processes} was ended by {name}; go on with --resume.") from None
        raise SystemExit(failure.exitcode) from None
