"""`keifu generate`: let a model continue a text or answer it."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from keifu.commands.shared import flags
from keifu.commands.shared.inputs import (
    ask,
    at_terminal,
    join_texts,
    load_writer,
    no_text,
    notice,
    proposer,
    read_pictures,
)
from keifu.commands.shared.terminal import say
from keifu.commands.shared.writing import SamplingFlags, choose_sampling, print_completion, print_text
from keifu.errors import UserError
from keifu.inference.text.sampling_params import SamplingParams
from keifu.ranges import Count

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
    prompt: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[PROMPT]")] = None
    """The text to continue."""
    file: Path | None = None
    """The file that has the text."""
    image: flags.Images = ()
    """File of a picture that the text is about, for a model that sees."""
    raw: bool = False
    """Give a chat model the text as it is, to be continued, and not as a message in its chat template."""
    json: bool = False
    """Print text, tokens, log-probabilities, seed, sampling and the reason for the end as JSON."""
    stream: bool = False
    """Print the text as it is written, in a pipe too."""
    guesses: flags.Guesses = None
    draft: flags.Drafting = None
    thinking: flags.Thinking = None
    steps: Count | None = None
    """Passes of a model of masked diffusion (LLaDA); unset, or more than there are tokens: one for each
    token."""
    block: Count | None = None
    """Masks that such a model fills before those behind them; unset: 32."""
    gap: Count | None = None
    """Tokens that such a model writes for each ___ in the text, instead of continuing it."""
    vote: Count | None = None
    """Number of texts that are drawn; the first of the most frequent ones is printed (self-consistency)."""
    best_of: Count | None = None
    """Number of texts that are drawn; the one with the highest --reward is printed."""
    reward: str | None = None
    """Reward for --best-of: file.py:function, whose code is run, or a reward model, a run of keifu train reward."""
    sampling: Annotated[SamplingFlags, tyro.conf.arg(name="")] = SamplingFlags()


def run(options: Options) -> None:
    """Print the text that the model writes, without the prompt."""
    rewards = check_drawing(options)
    text = join_texts(options.prompt, options.file) or (ask("Prompt: ", EXAMPLE) if at_terminal() else "")
    if not text and options.prompt is None:  # "" on the command line begins a text from nothing
        no_text(EXAMPLE)
    from keifu.inference.chat.prompts import refuse_pictures
    from keifu.inference.text.generate import as_prompt
    from keifu.inference.text.model import MaskPredictor, continues_text

    model, tokenizer = load_writer(options.model, options.weights, continues_text)
    if isinstance(model, MaskPredictor):
        return print_unmasked(options, model, tokenizer, text)
    if options.steps or options.block or options.gap:
        raise UserError("--steps, --block and --gap are of masked diffusion, and this model writes from left to right.")
    sampling, line = choose_sampling(tokenizer, options.sampling, max_tokens=256)
    variables = flags.template_variables(options.thinking)
    refuse_pictures(model.config, options.image)
    prompt = as_prompt(tokenizer, text, options.raw, model.config, read_pictures(options.image), **variables)
    notice(line if isinstance(prompt, str) else f"{line}; through the chat template, --raw leaves it out")
    guesses = proposer(options.draft, options.guesses, options.weights)
    if options.vote or options.best_of:
        return print_chosen(options, model, tokenizer, text, prompt, sampling, rewards, guesses)
    streamed = options.stream or sys.stdout.isatty()
    if print_text(model, tokenizer, prompt, sampling, options.json, streamed, guesses) == "context":
        print(f"The text fills the model's context of {model.config.context_length} tokens.", file=sys.stderr)


def check_drawing(options: Options) -> Any:
    """Check the options for drawing several texts. Return the scorer of --reward; None if it is not given."""
    if options.vote and options.best_of:
        raise UserError("--vote and --best-of choose in two ways: give one of them.")
    if (options.best_of is None) != (options.reward is None):
        raise UserError("--best-of and --reward belong together: give both, or none.")
    if options.vote or options.best_of:
        check_temperature(options.sampling.temperature)
    if options.reward is None:
        return None
    from keifu.recipes.assistant.finetuning import make_rewards

    return make_rewards(options.reward).scorer


def check_temperature(temperature: float | None) -> None:
    """Raise `UserError` for temperature 0: all texts would be equal."""
    if temperature == 0:
        raise UserError("At temperature 0 all texts are the same: give --temperature, such as --temperature 0.8.")


CAUSAL = ("image", "json", "stream", "guesses", "draft", "thinking", "vote", "best_of")  # masked diffusion lacks them


def print_unmasked(options: Options, model: Any, tokenizer: Any, text: str) -> None:
    """Print a masked-diffusion model's continuation of a text, or the text with its gaps filled."""
    from keifu.inference.text import unmasking
    from keifu.inference.text.generate import as_prompt

    if idle := [f"--{name.replace('_', '-')}" for name in CAUSAL if vars(options)[name] not in (None, False, ())]:
        raise UserError(f"{', '.join(idle)} is of models that write from left to right, and this is masked diffusion.")
    if options.gap and options.sampling.max_tokens is not None:
        raise UserError("--gap says how many tokens a gap gets: leave out --max-tokens.")
    settings = {name: vars(options)[name] for name in ("steps", "block") if vars(options)[name]}
    how = unmasking.Unmasking.of({**options.sampling.changes(), **settings})
    if options.gap:
        return say(unmasking.fill_gaps(model, tokenizer, text, options.gap, how))
    prompt: Any = as_prompt(tokenizer, text, options.raw)
    say(unmasking.write(model, tokenizer, prompt, how))


def print_chosen(
    options: Options, model: Any, tokenizer: Any, text: str, prompt: Any, sampling: SamplingParams, rewards: Any,
    guesses: Any,
) -> None:  # fmt: skip
    """Draw several texts and print one: the most frequent, or the one with the highest reward."""
    from keifu.data.chat.thoughts import with_opening
    from keifu.evaluation.text.few_shot import majority
    from keifu.inference.chat.prompts import ImagePrompt
    from keifu.inference.text.generate import generate_batch

    check_temperature(sampling.temperature)  # it may be the model's default
    seeds = [(sampling.seed or 0) + number for number in range(options.vote or options.best_of or 1)]
    samplings = [replace(sampling, seed=seed, log_probabilities=True) for seed in seeds]
    done = generate_batch(model, tokenizer, [prompt] * len(seeds), samplings, guesses=guesses)
    ids = prompt.tokens if isinstance(prompt, ImagePrompt) else [] if isinstance(prompt, str) else prompt
    texts = [with_opening(tokenizer, ids, one.text) for one in done]
    if rewards is None:
        index = majority(texts)
        notice(f"The answer of text {index + 1} of {len(done)} is the most frequent.")
    else:
        from keifu.data.chat.prompts import Prompt

        message = Prompt([{"role": "user", "content": text}], {"prompt": text})
        scores = rewards([message] * len(done), texts)
        index = max(range(len(done)), key=scores.__getitem__)
        notice(f"Text {index + 1} of {len(done)} has the highest reward, {scores[index]:.3g}.")
    if options.json:
        print_completion(done[index], sampling)
    else:
        say(done[index].text)
