"""Entry point of the command line: it finds the command and turns every exception into one sentence. It knows no
command's options."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, suppress
from importlib import import_module
from io import TextIOWrapper
from typing import NoReturn

from keifu import __version__
from keifu.commands.shared.command_names import COMMANDS, module_of
from keifu.errors import require_known
from keifu.files import WINDOWS
from keifu.folders import place_matplotlib
from keifu.threads import limit_threads

FAULT = 70  # exit status of sysexits.h for an internal error
OF_RECIPES = ("train", "demo")  # commands whose options are those of a recipe
USAGE = "Usage: keifu COMMAND [OPTIONS]"
MORE = """\
keifu help COMMAND [RECIPE] prints its options. For all commands:
  -q, --quiet    nothing but results and errors
  -v, --verbose  versions and seconds at the end, and errors with their traceback
  -V, --version  the version"""


def help_text() -> str:
    """Return the text of `keifu --help`."""
    width = max(map(len, COMMANDS))
    return "\n".join([USAGE, "", *(f"  {command:{width}}  {line}" for command, line in COMMANDS.items()), "", MORE])


def parse(arguments: Sequence[str]) -> Callable[[], None]:
    """Parse the arguments and return the command as a function without arguments. It does not run yet. Raises
    `UserError` for an unknown command or option."""
    if all(word in ("-h", "--help", "help") for word in arguments):
        return lambda: print(help_text())
    command, *further = arguments
    if command == "help":
        return parse([*further, "--help"])
    if command in ("-V", "--version", "version"):
        return lambda: print(f"keifu {__version__}")
    require_known("command", command, COMMANDS)
    module = import_module(module_of(command))
    if command in OF_RECIPES:
        return module.parse(further)
    from keifu.commands.shared.flags import parse_command

    return parse_command(module, further, f"keifu {command}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `keifu` and exit: status 0; 1 after an error; 2 if the command line is wrong; 70 after a bug of keifu; 128 +
    n after signal n, so 130 after Ctrl-C."""
    _open_standard_streams()
    place_matplotlib()
    limit_threads()  # before the import of torch, which reads the number of threads
    words, quiet, verbose = without_volume(sys.argv[1:] if arguments is None else arguments)
    began = time.perf_counter()
    try:
        _work(words, quiet, verbose or os.environ.get("KEIFU_DEBUG") == "1")
        if verbose:
            print(f"{_versions()}: {time.perf_counter() - began:.2f} s", file=sys.stderr)
    except BrokenPipeError:  # the reader of the pipe closed it, as in `keifu models | head`
        _give_up_output()
        sys.exit(1)
    except KeyboardInterrupt as stop:
        from keifu.training.signals import Interrupted

        _fail(str(stop) or "Stopped.", 128 + (stop.number if isinstance(stop, Interrupted) else signal.SIGINT))


def _open_standard_streams() -> None:
    """Open standard streams that are closed, on the null device. Otherwise the next file that is opened would get their
    descriptor."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if vars(sys)[name] is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for the whole process)
        stream = vars(sys)[name]
        if WINDOWS and isinstance(stream, TextIOWrapper):  # a pipe has the code page's encoding there
            stream.reconfigure(encoding="utf-8")


def _give_up_output() -> None:
    """Discard buffered output, so that Python does not try to write it again at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def without_volume(arguments: Sequence[str]) -> tuple[list[str], bool, bool]:
    """Remove the options for quiet and verbose, which every command accepts at any position. Return the other words,
    and whether quiet and verbose were given."""
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)
    quiet, verbose = ({*words[:end]} & {*names} for names in (("-q", "--quiet"), ("-v", "--verbose")))
    remaining_words = [word for index, word in enumerate(words) if index >= end or word not in quiet | verbose]
    return remaining_words, bool(quiet), bool(verbose)


def _versions() -> str:
    import platform

    torch = sys.modules.get("torch")
    torch_version = f", torch {torch.__version__}" if torch else ""
    return f"keifu {__version__}, Python {platform.python_version()}{torch_version}"


def _work(arguments: Sequence[str], quiet: bool, traceback: bool) -> None:
    """Parse the arguments, then run the command. Errors of the two have different exit statuses."""
    status = 2
    try:
        run = parse(arguments)
        status = 1
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere if quiet else sys.stderr):
            run()
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except Exception as error:
        from keifu.commands.shared.errors import explain, fault

        if traceback:
            raise
        sentence = explain(error)
        if sentence is None:
            _fail(fault(error), FAULT)
        _fail(sentence, status)


def _fail(sentence: str, status: int) -> NoReturn:
    with suppress(OSError, ValueError):  # stderr is closed
        print(sentence, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:  # for example a full disk
        _give_up_output()
    sys.exit(status)
