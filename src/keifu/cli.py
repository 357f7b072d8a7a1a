"""The command line: finds the command and turns every error into one sentence; knows no command's options or work."""

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
from keifu.threads import follow_load

FAULT = 70  # as sysexits.h has it
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
    """Return the work that the arguments ask for, not yet begun; an unknown command or option is a `UserError`."""
    if all(word in ("-h", "--help", "help") for word in arguments):
        return lambda: print(help_text())
    command, *rest = arguments
    if command == "help":
        return parse([*rest, "--help"])
    if command in ("-V", "--version", "version"):
        return lambda: print(f"keifu {__version__}")
    require_known("command", command, COMMANDS)
    return import_module(module_of(command)).parse(rest)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `keifu`: it exits with 0, 1 after an error, 2 if the command line is wrong, 70 after a fault of keifu's own,
    130 after Ctrl-C (128 and the number of another signal).
    """
    _open_standard_streams()
    follow_load()  # before torch is imported, which reads how many threads there are
    words, quiet, verbose = without_volume(sys.argv[1:] if arguments is None else arguments)
    began = time.perf_counter()
    try:
        _work(words, quiet, verbose or os.environ.get("KEIFU_DEBUG") == "1")
        if verbose:
            print(f"{_versions()}: {time.perf_counter() - began:.2f} s", file=sys.stderr)
    except BrokenPipeError:  # the reader of a pipe has gone, as in `keifu models | head`
        _give_up_output()
        sys.exit(1)
    except KeyboardInterrupt as stop:
        from keifu.training.signals import Interrupted

        _fail(str(stop) or "Stopped.", 128 + (stop.number if isinstance(stop, Interrupted) else signal.SIGINT))


def _open_standard_streams() -> None:
    """Open closed standard streams on nothing: else the next file that is opened would take their number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if vars(sys)[name] is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for the whole process)
        stream = vars(sys)[name]
        if WINDOWS and isinstance(stream, TextIOWrapper):  # a pipe has the code page's encoding there
            stream.reconfigure(encoding="utf-8")


def _give_up_output() -> None:
    """Discard what is still to be printed, so that Python does not try it again at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def without_volume(arguments: Sequence[str]) -> tuple[list[str], bool, bool]:
    """Return the words without those for quiet and verbose, which every command takes anywhere, and whether each was
    there."""
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)
    quiet, verbose = ({*words[:end]} & {*names} for names in (("-q", "--quiet"), ("-v", "--verbose")))
    kept = [word for index, word in enumerate(words) if index >= end or word not in quiet | verbose]
    return kept, bool(quiet), bool(verbose)


def _versions() -> str:
    import platform

    torch = sys.modules.get("torch")
    used = f", torch {torch.__version__}" if torch else ""
    return f"keifu {__version__}, Python {platform.python_version()}{used}"


def _work(arguments: Sequence[str], quiet: bool, traceback: bool) -> None:
    """Parse, then run; each of the two has its own exit status."""
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
    with suppress(OSError, ValueError):  # nobody reads it
        print(sentence, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:  # as on a full disk
        _give_up_output()
    sys.exit(status)
