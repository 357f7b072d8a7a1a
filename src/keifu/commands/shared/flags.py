"""Conversion of a dataclass's fields into a command's options; errors as one sentence."""

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import tyro
from tyro import _errors as errors  # private names of tyro: pyproject.toml pins its version

from keifu.commands.shared.help_text import Argument, arguments_of, help_text
from keifu.devices import Choice, choose, choosing
from keifu.errors import UserError, unknown
from keifu.files import check_output
from keifu.inference.text.sampling_params import SamplingParams
from keifu.ranges import Bias, Likeliest, Natural
from keifu.recipes.options import check_ranges, to_json

Options = TypeVar("Options")
Model = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(metavar="MODEL", help="A run, a Hugging Face directory or hub id, a .gguf file or a catalogue name."),
]
Device = Annotated[str | None, tyro.conf.arg(metavar="cpu|cuda|cuda:1|mps", help=(
    "Device that the model runs on. Unset: KEIFU_DEVICE, else CUDA or ROCm if there is one, else MPS, else the CPU."
))]  # fmt: skip
PACKINGS = tyro.conf.arg(metavar="f32|bf16|int8|int4|int4_pure")
RESULTS = ("out", "output", "strip", "picture")  # options that name outputs; of these a folder may be the usual output
FOLDERS = ("prepare",)  # actions that write a folder where other actions write a file
ORDER = (tyro.conf.CascadeSubcommandArgs,)  # options of a nested dataclass may come before others
NAMES = {"INT": "a whole number", "FLOAT": "a number", "STR": "a text", "PATH": "a path"}


Images = tyro.conf.UseAppendAction[tuple[Path, ...]]


@dataclass(frozen=True)
class OnDevice:
    """Options of all commands that run a model."""

    device: Device = field(default=None, kw_only=True)
    precision: Literal["float32", "bfloat16", "float16"] | None = field(default=None, kw_only=True)
    """Type that the model computes in; float16 needs a GPU. Unset: as it is stored, but bfloat16 on a GPU that has it
    for a file in float32, and float32 on a CPU that would emulate the stored type."""
    allow_nonfinite: bool = field(default=False, kw_only=True)
    """Load weights that hold infinities or what is not a number."""


Thinking = Annotated[Literal["on", "off"] | None, tyro.conf.arg(help=(
    "Whether a reasoning model thinks before it answers (enable_thinking of its chat template). Unset: the template's."
))]  # fmt: skip


def template_variables(thinking: str | None) -> dict[str, Any]:
    """Return the variables that the options set in a chat template."""
    return {} if thinking is None else {"enable_thinking": thinking == "on"}


Guesses = Annotated[Natural | None, tyro.conf.arg(metavar="N", help=(
    "Tokens to guess from what followed the same words before; they are checked together, and the text is the same. 0: "
    "none. Unset: 4 in native code, for up to 4 texts, while that is faster."
))]  # fmt: skip


Drafting = Annotated[str | None, tyro.conf.arg(metavar="MODEL", help=(
    "Smaller model with the same tokenizer that guesses the next tokens (speculative decoding); the text is the same. "
    "Unset: none."
))]  # fmt: skip


CacheFolder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help=(
    "Folder that keeps the keys and values of long prompts, so that a later run does not read them again. It holds the "
    "prompts themselves. Unset: none."
))]  # fmt: skip


CacheSize = Annotated[str | None, tyro.conf.arg(metavar="SIZE", help=(
    "Size of the cache folder, such as 500M or 20G; what was not used for the longest time is removed. Unset: 4G."
))]  # fmt: skip


@dataclass(frozen=True)
class Packed(OnDevice):
    """Options of commands whose model may be packed."""

    weights: Annotated[str | None, PACKINGS] = field(default=None, kw_only=True)
    """Format of weights for native computation on the CPU (docs/native.md). Unset: as they are stored."""


@dataclass(frozen=True)
class Continuation(SamplingParams):
    """How a model continues a text. `--stop` may be given several times; commands set log-probabilities."""

    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    log_probabilities: tyro.conf.Suppress[bool] = False
    top_log_probabilities: tyro.conf.Suppress[Likeliest] = 0
    logit_bias: tyro.conf.Suppress[tuple[tuple[int, Bias], ...]] = ()


HAD_DTYPE = ("keifu draw", "keifu embed")


def parse_command(module: Any, arguments: Sequence[str], program: str) -> Callable[[], None]:
    """Parse the words of a command into its `Options`. Return its `run` with these options, which has not run yet.

    module: the command's file.
    """
    options = parse(module.Options, without_dtype(arguments) if program in HAD_DTYPE else arguments, program)
    work = partial(module.run, options)
    if not isinstance(options, OnDevice):
        return work
    if options.precision and vars(options).get("weights"):
        raise UserError("--weights is the format of native computation, --precision that of PyTorch: give one.")
    if options.precision == "float16" and choose(options.device).type == "cpu":
        raise UserError("float16 is for GPUs, and a CPU multiplies it very slowly: choose bfloat16 or float32.")
    nonfinite = options.allow_nonfinite or None
    return on_device(Choice(options.device, weights=options.precision or "auto", allow_nonfinite=nonfinite), work)


def without_dtype(words: Sequence[str]) -> list[str]:
    """Replace `--dtype` by `--precision` with a warning. The next minor release will not have `--dtype`."""
    parts = [*chain.from_iterable(word.split("=", 1) if word.startswith("--dtype=") else [word] for word in words)]
    if "--dtype" in parts[:-1]:
        place = parts.index("--dtype")
        parts[place], value = "--precision", parts[place + 1]
        parts[place + 1] = {"f32": "float32", "bf16": "bfloat16"}.get(value, value)
        print(f"--dtype {value} is deprecated: use {' '.join(parts[place : place + 2])}.", file=sys.stderr)
    return parts


def on_device(choice: Choice, work: Callable[[], None]) -> Callable[[], None]:
    """Return `work` as a function that runs with the device options of `choice`. Raises `UserError` at once for a
    missing device."""
    if choice.device is not None:
        choose(choice.device)

    def run() -> None:
        with choosing(choice):
            work()

    return run


def parse(
    cls: type[Options], arguments: Sequence[str], program: str, default_options: Options | None = None
) -> Options:
    """Parse words into the options dataclass. Raises `UserError` for wrong words; `--help` prints and exits.

    default_options: values of options that are not given, instead of the defaults of `cls`.
    """
    if asks_for_help(arguments):
        show_help(arguments_of(cls), program, inspect.cleandoc(cls.__doc__ or ""))
    default, args = (
        tyro.MISSING_NONPROP if default_options is None else default_options,
        [*_parts(cls, arguments), *arguments],
    )
    with errors.on_parse_error(partial(_refuse, cls, arguments, program)):
        options, extra = tyro.cli(cls, default=default, prog=program, args=args, return_unknown_args=True, config=ORDER)
    if extra:
        raise _unrecognised(cls, extra, program)
    check_ranges(cls, to_json(options))
    _check_paths(options, arguments)
    return options


def _parts(cls: type, words: Sequence[str]) -> set[str]:
    """Return tyro's words that create nested options whose default is None, for those of which an option is given."""
    given_options = {word.partition("=")[0] for word in words if word.count(".") > 1}
    groups = (
        {argument.group for argument in arguments_of(cls) if given_options & {*argument.names}}
        if given_options
        else set[str]()
    )
    return {group for group in groups if ":" in group and group not in words}


def show_help(arguments: Sequence[Argument], program: str, about: str) -> NoReturn:
    """Print the help text and exit."""
    print(help_text(arguments, program, about))
    raise SystemExit(0)


def _check_paths(options: Any, words: Sequence[str]) -> None:
    """Raise `UserError` for an empty path, which would mean the current folder, and for an output path that cannot be
    written."""
    empty = any(word == "" or re.fullmatch("--[a-z-]+=", word) for word in words)
    for option in fields(options):
        value = vars(options)[option.name]
        if not isinstance(value, Path):
            continue
        if empty and value == Path():
            raise UserError(f"--{option.name.replace('_', '-')} is empty: give the name of a file or folder.")
        if option.name in RESULTS and option.default is not MISSING:  # keifu convert writes a file or a folder
            folder = option.default is not None or vars(options).get("action") in FOLDERS
            check_output(value, f"--{option.name}", folder)


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Return whether `--help` is among the words as an option, not as a value."""
    options = list(arguments)[: list(arguments).index("--")] if "--" in arguments else arguments
    return "-h" in options or "--help" in options


def flags(cls: type) -> list[str]:
    """Return every `--flag` of the dataclass."""
    return sorted(names_of(arguments_of(cls)))


def names_of(arguments: Sequence[Argument]) -> list[str]:
    """Return every `--name` of these options; `--[no-]name` gives two."""
    long_names = [name for argument in arguments for name in argument.names if name.startswith("--")]
    return [name.replace("[no-]", word) for name in long_names for word in (("", "no-") if "[no-]" in name else ("",))]


def _unrecognised(cls: type, words: Sequence[str], program: str) -> UserError:
    word = words[0].partition("=")[0]
    if word.startswith("-"):
        return unknown("option", word, set(flags(cls)) - {"--help"})
    advice = f"put a text that has spaces in quotation marks, or see {program} --help"
    return UserError(f"{program} has no use for {word!r}: {advice}.")


def _refuse(cls: type, arguments: Sequence[str], program: str, event: errors.ParseErrorEvent) -> NoReturn:
    """Convert tyro's parse error to a `UserError`. An unknown option is reported first."""
    known_options = {flag.replace("_", "-") for flag in flags(cls)}
    given_options = [word.partition("=")[0] for word in arguments if re.match(r"--[a-zA-Z]", word)]
    if strange := [word for word in given_options if word.replace("_", "-") not in known_options]:
        raise _unrecognised(cls, strange, program)
    match event:
        case errors.MissingArgs(missing_arguments=missing_arguments):
            needed_names = " and ".join(_name(error.arg) for error in missing_arguments)
            raise UserError(f"{program} needs {needed_names}: see {program} --help.")
        case errors.InvalidChoice(argument=argument, value=value, choices=choices):
            raise unknown(f"{_name(argument)} called", value, {*choices} - {"None"})
        case errors.BadValue(argument=argument):
            raise UserError(f"{_name(argument)} needs a value: see {program} --help.")
        case errors.InstantiationFailure(message=message, argument=argument):
            raise UserError(_sentence(message, argument and _name(argument)))
    raise UserError(f"These words are not understood: see {program} --help.")


def _name(argument: Any) -> str:
    """Return an option as the user types it, or a positional argument's placeholder."""
    return str(argument.lowered.metavar) if argument.is_positional() else argument.lowered.name_or_flags[-1]


def _sentence(message: str, name: str | None) -> str:
    """Return why a value does not fit its type. The option's name is added if there is only one value."""
    problem = _readable(re.sub(r"\s+", " ", message).strip().rstrip("."))
    return f"{name}: {problem}." if name else f"{problem[:1].upper()}{problem[1:]}."


def _readable(problem: str) -> str:
    """Rewrite Python's message about a value in plain words. Return any other message unchanged."""
    forms = {
        r"invalid literal for int\(\) with base 10: (?P<value>.*)": "INT",
        r"could not convert string to float: (?P<value>.*)": "FLOAT",
        r"no type matching (?P<types>\S+) could be instantiated from \[(?P<value>.*?)\]\..*": "",
    }
    for form, types in forms.items():
        if match := re.fullmatch(form, problem):
            words = {word.strip("{}") for word in match.groupdict().get("types", types).split("|")}
            words -= {"INT"} if "FLOAT" in words else set()
            return f"{' or '.join(NAMES.get(word, word) for word in sorted(words))} is needed, not {match['value']}"
    return problem
