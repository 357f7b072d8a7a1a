"""`keifu compare`: shows two models' answers to the same prompts. The user chooses the better one blindly, or a reward
model does."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from keifu.commands.shared import flags
from keifu.commands.shared.terminal import for_terminal
from keifu.ranges import Count

if TYPE_CHECKING:
    from keifu.data.chat.prompts import Prompt
    from keifu.evaluation.pairwise import Choice

AHEAD = 8  # number of prompts that are answered together before the first is shown
KEYS = "1: the left one is better, 2: the right one, 0: equally good, s: skip, q: stop (what was chosen is kept)"
NARROW = 60  # in a terminal with fewer columns, the answers are shown one above the other


@dataclass(frozen=True)
class Options(flags.OnDevice):
    """Choose the better of two models' answers, without knowing which model wrote which.

    Each choice is saved at once, and the same command continues with the remaining prompts. keifu train dpo and keifu
    train reward learn from preferences.jsonl in the folder. The result is B's share of the decided prompts with its
    interval. --seed (unset: 0) also decides which answer is shown on the left.
    """

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A", help="A model, as for keifu chat.")]
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B", help="Another.")]
    prompts: str
    """A .jsonl or .json file whose objects have a prompt, a text or messages."""
    out: Path = Path("runs/compare")
    """Folder of the choices."""
    by: str | None = None
    """Reward that chooses instead of you: a run of keifu train reward, or file.py:function."""
    limit: Count | None = None
    """Most prompts to answer, the first ones. Unset: all."""
    json: bool = False
    """Print the figures as JSON."""
    sampling: Annotated[flags.Continuation, tyro.conf.arg(name="")] = flags.Continuation(max_tokens=256)

    @property
    def start(self) -> int:
        """Seed of sampling, and of the side on which each answer is shown."""
        return self.sampling.seed or 0


def run(options: Options) -> None:
    """Answer the prompts, show the answers, ask for choices and count them."""
    from keifu.data.chat.prompts import read_prompts
    from keifu.evaluation.pairwise import Judgement, Judgements

    about = {"A": options.a, "B": options.b, "by": options.by or "a person", "seed": options.start}
    unrecorded = ("seed", "stop", "logit_bias")  # passed separately, or not an option
    sampling_options = {name: value for name, value in asdict(options.sampling).items() if name not in unrecorded}
    judgements = Judgements(options.out, about | sampling_options)
    prompts = [*read_prompts(options.prompts)][: options.limit]
    remaining_prompts = [prompt for prompt in prompts if not judgements.holds(prompt.messages)]
    chooser = by_reward(options.by) if options.by else by_hand(options.start, len(remaining_prompts))
    for prompt, pair in generate_answers(options, remaining_prompts):
        choice: Choice | None = "even" if pair[0] == pair[1] else chooser(prompt, pair)
        if choice is None:
            break
        judgements.add(Judgement(prompt.messages, pair, choice))
    tally = judgements.tally()
    print(json.dumps(tally.figures()) if options.json else tally.sentence(options.a, options.b))


def generate_answers(options: Options, prompts: "Sequence[Prompt]") -> "Iterator[tuple[Prompt, tuple[str, str]]]":
    """Yield each prompt with the answers of A and B. A few prompts are answered ahead of the one that is shown."""
    from keifu.recipes.assistant.finetuning import open_model

    models = [open_model(name, "own") for name in (options.a, options.b)] if prompts else []
    for start in range(0, len(prompts), AHEAD):
        part = prompts[start : start + AHEAD]
        of_a, of_b = (answers_of(*model, part, options, side) for model, side in zip(models, "AB", strict=True))
        yield from zip(part, zip(of_a, of_b, strict=True), strict=True)


def answers_of(model: Any, tokenizer: Any, prompts: "Sequence[Prompt]", options: Options, side: str) -> list[str]:
    """Return one model's answers. They depend on the seed and the prompt, not on the other prompts."""
    from keifu.evaluation.pairwise import seed_of
    from keifu.inference.text.generate import generate_batch

    ids = [tokenizer.render_chat(prompt.messages) for prompt in prompts]
    seeds = [seed_of(options.start, prompt.messages, side) for prompt in prompts]
    completions = generate_batch(model, tokenizer, ids, [replace(options.sampling, seed=seed) for seed in seeds])
    return [answer.text.strip() for answer in completions]


def by_reward(name: str) -> "Callable[[Prompt, tuple[str, str]], Choice | None]":
    """Return a function that chooses the answer with the higher reward."""
    from keifu.recipes.assistant.finetuning import make_rewards

    scorer = make_rewards(name).scorer

    def choose(prompt: "Prompt", pair: tuple[str, str]) -> "Choice | None":
        a, b = scorer([prompt, prompt], list(pair))
        return "even" if a == b else "A" if a > b else "B"

    return choose


def by_hand(seed: int, total: int) -> "Callable[[Prompt, tuple[str, str]], Choice | None]":
    """Return a function that asks the user to choose. It does not show which model wrote which answer. It returns None
    if the user stops."""
    from keifu.evaluation.pairwise import a_is_left

    numbers = iter(range(1, total + 1))

    def choose(prompt: "Prompt", pair: tuple[str, str]) -> "Choice | None":
        a_on_left_side = a_is_left(seed, prompt.messages)
        show(f"{next(numbers)} of {total}", prompt.messages, pair if a_on_left_side else (pair[1], pair[0]))
        left, right = ("A", "B") if a_on_left_side else ("B", "A")
        sides: dict[str, Choice] = {"1": left, "2": right, "0": "even", "s": "skipped"}
        while True:
            try:
                key = input("> " if sys.stdin.isatty() else "").strip().lower()
            except (EOFError, KeyboardInterrupt):
                return None
            if key in sides or key == "q":
                return sides.get(key)
            print(KEYS)

    return choose


def show(title: str, messages: Sequence[dict[str, str]], pair: tuple[str, str]) -> None:
    """Print a conversation and two answers: side by side if the terminal is wide enough, else one above the other."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    pair = for_terminal(pair[0]), for_terminal(pair[1])
    said = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    console.print(Text(for_terminal(f"\n[{title}]\n{said}\n"), style="bold"))
    if sys.stdout.isatty() and shutil.get_terminal_size().columns >= NARROW:
        table = Table(box=box.SQUARE, expand=True)
        for name in ("1 (left)", "2 (right)"):
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*map(Text, pair))
        console.print(table)
    else:
        for number, answer in enumerate(pair, 1):
            console.print(Text(f"{number}:\n{answer}\n"))
    console.print(Text(KEYS))
