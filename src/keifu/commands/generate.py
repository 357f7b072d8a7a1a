"""`keifu generate`: a model continues a text; knows no model and no way to choose a token."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from keifu.commands import flags
from keifu.commands.language import load_writer, text_from

EXAMPLE = 'keifu generate MODEL "Once upon a time"'


@dataclass(frozen=True)
class Options:
    """Continue a text. It stands behind the model, or in a file, or comes through a pipe."""

    model: flags.Model
    prompt: Annotated[
        tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[PROMPT]", help="The text to continue.")
    ] = None
    file: Path | None = None
    """The file that has the text."""
    json: bool = False
    """Print text, tokens, log-probabilities, seed and the reason for the end as JSON."""
    stream: bool = False
    """Print the text as it is written, in a pipe too."""
    sampling: Annotated[flags.Continuation, tyro.conf.arg(name="")] = flags.Continuation()


def run(options: Options) -> None:
    """Prints what the model writes, without the prompt."""
    prompt = text_from(options.prompt, options.file, EXAMPLE)
    model, tokenizer = load_writer(options.model)
    if options.json:
        from keifu.generation.generate import generate_batch

        [done] = generate_batch(model, tokenizer, [prompt], replace(options.sampling, log_probabilities=True))
        print(json.dumps(vars(done), ensure_ascii=False))
        return
    pieces = _told(model, tokenizer, prompt, options.sampling)
    if options.stream or sys.stdout.isatty():
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    else:
        print("".join(pieces))


def _told(model: Any, tokenizer: Any, prompt: str, sampling: flags.Continuation) -> Iterator[str]:
    """The pieces of text; that the context is full is said on stderr."""
    from keifu.generation.generate import stream

    reason = None
    for piece in stream(model, tokenizer, [prompt], sampling):
        reason = piece.finish_reason
        yield piece.text
    if reason == "context":
        print(f"The text fills the model's context of {model.config.context_length} tokens.", file=sys.stderr)


parse = flags.parser(Options, run, "keifu generate")
