"""`keifu generate`: a model continues a text, or answers it."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from keifu.commands.shared import flags
from keifu.commands.shared.inputs import at_terminal, join_texts, load_writer, notice, read_pictures
from keifu.commands.shared.terminal import ask
from keifu.commands.shared.writing import SamplingFlags, choose_sampling, print_text

EXAMPLE = 'keifu generate MODEL "Once upon a time"'


@dataclass(frozen=True)
class Options(flags.Packed):
    """Continue a text; a chat model answers it. It stands behind the model, in a file, or comes through a pipe, or
    several of these, which are then joined by an empty line.

    Sampling options that are not given have the model's own values (of its generation_config.json, or of the
    catalogue). Where there are none: chat models are greedy, and base models have temperature 0.8, top-k 40, top-p 0.95
    and min-p 0.05. What is in force is shown in a terminal, and by --json.
    """

    model: flags.Model
    prompt: Annotated[
        tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[PROMPT]", help="The text to continue.")
    ] = None
    file: Path | None = None
    """The file that has the text."""
    image: flags.Images = ()
    """File of a picture that the text is about, for a model that sees; may be given several times."""
    raw: bool = False
    """Give a chat model the text as it is, to be continued, and not as a message in its chat template."""
    json: bool = False
    """Print text, tokens, log-probabilities, seed, sampling and the reason for the end as JSON."""
    stream: bool = False
    """Print the text as it is written, in a pipe too."""
    guesses: flags.Guesses = None
    thinking: flags.Thinking = None
    sampling: Annotated[SamplingFlags, tyro.conf.arg(name="")] = SamplingFlags()


def run(options: Options) -> None:
    """Print what the model writes, without the prompt."""
    text = join_texts(options.prompt, options.file) or (ask("Prompt: ", EXAMPLE) if at_terminal() else "")
    model, tokenizer = load_writer(options.model, options.weights)
    from keifu.generation.text.generate import as_prompt

    sampling, line = choose_sampling(tokenizer, options.sampling, max_tokens=256)
    variables = flags.template_variables(options.thinking)
    prompt = as_prompt(tokenizer, text, options.raw, model.config, read_pictures(options.image), **variables)
    notice(line if isinstance(prompt, str) else f"{line}; through the chat template, --raw leaves it out")
    streamed = options.stream or sys.stdout.isatty()
    reason = print_text(model, tokenizer, prompt, sampling, options.json, streamed, options.guesses)
    if reason == "context":
        print(f"The text fills the model's context of {model.config.context_length} tokens.", file=sys.stderr)


parse = flags.parser(Options, run, "keifu generate")
