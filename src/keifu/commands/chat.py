"""`keifu chat`: a conversation in the terminal, or a line a turn through a pipe; knows no model and no template."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from keifu.commands import flags
from keifu.commands.language import decoded, load_writer
from keifu.errors import UserError

if TYPE_CHECKING:
    from keifu.generation.chat import Conversation

HINT = "/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer."


@dataclass(frozen=True)
class Options:
    """Talk with a model. /reset forgets the conversation, /exit leaves, Ctrl-C stops an answer."""

    model: flags.Model
    system: str | None = None
    """What the model is told before the conversation; unset: what its own chat template says."""
    sampling: Annotated[flags.Continuation, tyro.conf.arg(name="")] = flags.Continuation(max_tokens=1024)


def run(options: Options) -> None:
    """Answers line after line."""
    from keifu.generation.chat import Conversation

    conversation = Conversation(*load_writer(options.model), options.system)
    typed = sys.stdin.isatty()
    converse(conversation, _typed() if typed else _piped(), vars(options.sampling), forgiving=typed)


def converse(conversation: "Conversation", lines: Iterator[str], sampling: dict[str, Any], forgiving: bool) -> None:
    """Prints an answer to each line. Where `forgiving`, an error or Ctrl-C ends the answer and not the conversation."""
    for line in lines:
        if line.strip() == "/exit":
            return
        if line.strip() == "/reset":
            conversation.reset()
        elif line.strip():
            try:
                _answer(conversation, line, sampling)
            except (UserError, KeyboardInterrupt) as error:
                if not forgiving:
                    raise
                print(f"\n{str(error) or 'Stopped.'}", file=sys.stderr)


def _answer(conversation: "Conversation", line: str, sampling: dict[str, Any]) -> None:
    for piece in conversation.reply(line, **sampling):
        print(piece, end="", flush=True)
    print(flush=True)
    if conversation.finish_reason in ("length", "context"):
        limit = {"length": "--max-tokens", "context": "the model's context, which is full"}[conversation.finish_reason]
        print(f"(The answer was cut by {limit}.)", file=sys.stderr)


def _typed() -> Iterator[str]:
    """Lines from a person; the end of input and Ctrl-C at the prompt leave."""
    import readline  # noqa: F401 (its import gives input() editing and history)

    print(HINT)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _piped() -> Iterator[str]:
    """Lines of standard input as they come."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        yield decoded(line, "standard input", number)


parse = flags.parser(Options, run, "keifu chat")
