"""Few-shot evaluation of language models: tasks with examples in the prompt (Brown et al., 2020).

Multiple choice is scored by likelihood, in four ways; generated answers by exact match after normalisation. A cloze
item is correct if each of its tokens is the most likely one. Intervals are 95%: Wilson's or the bootstrap's.
docs/tasks.md describes the format of task files.
"""

import math
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from keifu.data.chat.thoughts import answer_of, with_opening
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.evaluation.intervals import bootstrap, wilson
from keifu.evaluation.registry import EvalRequest, EvalResult, ResultTable
from keifu.evaluation.text.prompt_runner import PromptRunner
from keifu.evaluation.text.tasks import SCORES, TASKS, SampledItem, TaskItem, is_task, read_task
from keifu.inference.text.likelihood import Likelihood, ScoredPair, join_tokens
from keifu.inference.text.model import is_writer
from keifu.inference.text.sampling_params import SamplingParams

ABOUT = "a language model on a task given by examples in the prompt: accuracy with its 95% interval"
takes, NAMES = is_writer, TASKS  # language models; tasks without a file
OPTIONS = {"shots", "by_shots", "seed", "metric", "batch_size", "output", "samples"}
SHARE = ("accuracy", "95% from", "95% to")
ROW = ("shots", "prompt", "right", "given", "correct", "details")
QUOTES = "\"'“”‘’"
NUMBER = re.compile(r"(?<=\d),(?=\d{3}\b)")


def accepts(on: str) -> bool:
    """Return whether `on` is a file that describes a task."""
    return is_task(Path(on))


class ScoredItem(NamedTuple):
    """Scores of all items: which are correct by each measure, the model's answers, and further figures."""

    right: dict[str, list[bool]]
    answers: list[str]
    details: list[str]
    figures: dict[str, float | str] = {}


def evaluate(model: nn.Module, tokenizer: Tokenizer, request: EvalRequest) -> EvalResult:
    """Evaluate the items with each number of shots. The figures of the last number are the headline."""
    task = TASKS[request.on]() if request.on in TASKS else read_task(Path(request.on))
    task = task if request.metric is None else replace(task, metric=request.metric)
    numbers = request.by_shots or (request.shots or 0,)
    if (request.samples or 1) > 1 and task.metric != "exact":
        raise UserError(f"--samples votes on generated answers (--metric exact), and this metric is {task.metric}.")
    sample = task.sample(max(numbers), request.seed, request.limit)
    lines: list[tuple[Any, ...]] = []
    items: list[tuple[Any, ...]] = []
    figures, start = {}, time.perf_counter()
    for shots in numbers:
        runner = PromptRunner(model, tokenizer, request.batch_size)
        asking = _Prompting(runner, sample, sample.prompts(shots), shots, request.samples or 1, request.seed)
        scored = SCORERS[task.metric](asking)
        headline = task.score if task.score in scored.right else next(iter(scored.right))
        lines += [(shots, name, *_share(right)) for name, right in scored.right.items()]
        items += asking.rows(scored, headline)
        figures = {**dict(zip(SHARE, _share(scored.right[headline]), strict=True)), "scored by": headline}
        figures |= scored.figures
    seconds = time.perf_counter() - start
    figures |= {"shots": numbers[-1], "items": len(sample.items), **baselines(sample.items)}
    figures["items/s"] = round(len(numbers) * len(sample.items) / seconds, 2)
    notes = ("Intervals of accuracies are Wilson's.", *filter(None, [task.note]))
    tables = {"by shots": ResultTable(("shots", "scored by", *SHARE), lines)}
    return EvalResult(figures, notes, tables, ResultTable(ROW, items))


def baselines(items: Sequence[TaskItem]) -> dict[str, float | str]:
    """Return baselines without a model: accuracy of the most frequent answer, and of guessing among the choices."""
    if all(item.choices for item in items):
        shared = len({item.choices for item in items}) == 1
        kinds = Counter(item.answer if shared else f"choice {item.right + 1}" for item in items)
        chance = {"chance": round(sum(1 / len(item.choices) for item in items) / len(items), 4)}
    else:
        kinds, chance = Counter(normalize_answer(item.answer) for item in items), {}
    answer, count = kinds.most_common(1)[0]
    return {"majority": round(count / len(items), 4), "majority answer": answer, **chance}


def normalize_answer(text: str) -> str:
    """Normalise a generated answer for exact match: NFKC, lower case, single spaces, no commas in numbers, no
    punctuation at the end, no quotation marks around it."""
    text = NUMBER.sub("", " ".join(unicodedata.normalize("NFKC", text).casefold().split()))
    return text.lstrip(f"{QUOTES} ").rstrip(f"{QUOTES} .,;:!?")


class _Prompting(NamedTuple):
    """Prompts of items with their shots, and the model's runner."""

    runner: PromptRunner
    sampled: SampledItem
    prompts: Sequence[str]
    shots: int
    samples: int = 1
    seed: int = 0

    def pairs(self, answers: Sequence[Sequence[str]]) -> list[list[ScoredPair]]:
        """Return the tokens of each prompt with each of its answers. Raises `UserError`, with both lengths, if one is
        longer than the context."""
        delimiter = self.sampled.task.delimiter
        texts = [(p, delimiter + a) for p, answer in zip(self.prompts, answers, strict=True) for a in answer]
        remaining_pairs = iter(join_tokens(self.runner.tokenizer, texts))
        scored_pairs = [[next(remaining_pairs) for _ in answer] for answer in answers]
        excess, context = max(self.runner.excess(p) for row in scored_pairs for p in row), self.runner.context
        if excess > 0:
            fewer = "ask for fewer shots" if self.shots else "shorten the items"
            raise UserError(
                f"With {self.shots} shots the longest prompt and its answer have {context + excess:,} tokens, but this "
                f"model's context is {context:,}: {fewer}."
            )
        return scored_pairs

    def rows(self, scored: ScoredItem, headline: str) -> list[tuple[Any, ...]]:
        """Return a row with prompt, answer and score for each item."""
        answers = [item.answer for item in self.sampled.items]
        columns = self.prompts, answers, scored.answers, scored.right[headline], scored.details
        return [(self.shots, *row) for row in zip(*columns, strict=True)]

    @property
    def label(self) -> str:
        """Label of the progress bar."""
        return f"Asking with {self.shots} shots"


def _by_choice(asking: _Prompting) -> ScoredItem:
    """Choose the most likely answer by each of `SCORES`; of equal ones, the first."""
    task, items = asking.sampled.task, asking.sampled.items
    pairs = asking.pairs([item.choices for item in items])
    alone = list(dict.fromkeys(choice for item in items for choice in item.choices))
    free = join_tokens(asking.runner.tokenizer, [(task.unconditional, task.delimiter + choice) for choice in alone])
    scored = asking.runner.likelihoods([*free, *(pair for row in pairs for pair in row)], asking.label)
    unconditional = {choice: likelihood.total for choice, likelihood in zip(alone, scored, strict=False)}
    remaining_scores = iter(scored[len(free) :])
    right: dict[str, list[bool]] = {name: [] for name in SCORES}
    given_answers, details = [], []
    for item in items:
        likely = [next(remaining_scores) for _ in item.choices]
        scores = _scores(item, likely, [unconditional[choice] for choice in item.choices])
        for name, values in scores.items():
            right[name].append(_best(values) == item.right)
        given_answers.append(item.choices[_best(scores[task.score])])
        details.append("; ".join(f"{c}: {score.total:.4f}" for c, score in zip(item.choices, likely, strict=True)))
    return ScoredItem(right, given_answers, details)


def _scores(item: TaskItem, likely: Sequence[Likelihood], unconditional: Sequence[float]) -> dict[str, list[float]]:
    """Return for each name in `SCORES` the scores of all choices."""
    totals = [score.total for score in likely]
    by_token = [score.total / len(score.log_probabilities) for score in likely]
    by_character = [total / max(1, len(choice)) for total, choice in zip(totals, item.choices, strict=True)]
    beside = [total - free for total, free in zip(totals, unconditional, strict=True)]
    return dict(zip(SCORES, (totals, by_token, by_character, beside), strict=True))


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def majority(answers: Sequence[str]) -> int:
    """Return the index of the first answer whose normal form, without thoughts, is the most frequent (self-consistency,
    Wang et al., 2022)."""
    forms = [normalize_answer(answer_of(text)) for text in answers]
    return forms.index(Counter(forms).most_common(1)[0][0])


def _by_exact(asking: _Prompting) -> ScoredItem:
    """Score exact match of the greedily generated answer, up to a stop string. With several samples: of the majority's
    answer, of a single sample and of the best one."""
    task, items, count = asking.sampled.task, asking.sampled.items, asking.samples
    prompts = [pair.prompt for [pair] in asking.pairs([[item.answer] for item in items]) for _ in range(count)]
    sampling = SamplingParams(max_tokens=task.max_tokens, temperature=float(count > 1), stop=task.until, seed=0)
    samplings = [replace(sampling, seed=asking.seed * len(prompts) + number) for number in range(len(prompts))]
    completions = asking.runner.write(prompts, samplings, asking.label)
    opened = partial(with_opening, asking.runner.tokenizer)
    completions = [replace(done, text=opened(p, done.text)) for p, done in zip(prompts, completions, strict=True)]
    groups = [completions[first : first + count] for first in range(0, len(completions), count)]
    accepted = [{normalize_answer(text) for text in (item.answer, *item.accepted)} for item in items]
    forms = [[normalize_answer(answer_of(done.text)) for done in group] for group in groups]
    able = [[form in good for form in answers] for answers, good in zip(forms, accepted, strict=True)]
    votes = [majority([done.text for done in group]) for group in groups]
    by_majority = [group[vote] for group, vote in zip(groups, votes, strict=True)]
    right = {"exact match": [row[vote] for row, vote in zip(able, votes, strict=True)]}
    if count > 1:
        single, any_right = [row[0] for row in able], [any(row) for row in able]
        right = {f"majority of {count}": right["exact match"], "one sample": single, f"any of {count}": any_right}
    return ScoredItem(right, [done.text for done in by_majority], [done.finish_reason for done in by_majority])


def _by_cloze(asking: _Prompting) -> ScoredItem:
    """Return whether greedy decoding would generate each answer, and how likely the answer is."""
    pairs = [pair for [pair] in asking.pairs([[item.answer] for item in asking.sampled.items])]
    scored = asking.runner.likelihoods(pairs, asking.label)
    losses = [-score.total for score in scored]
    perplexities = [math.exp(min(value, 700.0)) for value in (sum(losses) / len(losses), *bootstrap(losses))]
    names = ("perplexity of an answer", "perplexity, 95% from (bootstrap)", "perplexity, 95% to (bootstrap)")
    figures: dict[str, Any] = {name: round(value, 2) for name, value in zip(names, perplexities, strict=True)}
    given_answers = [
        item.answer if score.greedy else "" for item, score in zip(asking.sampled.items, scored, strict=True)
    ]
    details = [f"{score.total:.4f}" for score in scored]
    return ScoredItem({"greedy answer": [score.greedy for score in scored]}, given_answers, details, figures)


SCORERS: dict[str, Callable[[_Prompting], ScoredItem]] = {"choice": _by_choice, "exact": _by_exact, "cloze": _by_cloze}


def _share(right: Sequence[bool]) -> tuple[float, float, float]:
    """Return the share of right answers and its 95% interval."""
    low, high = wilson(sum(right), len(right))
    return round(sum(right) / len(right), 4), round(low, 4), round(high, 4)
