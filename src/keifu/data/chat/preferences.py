"""Preference data: pairs and rankings of responses to a prompt, read from files or the catalogue, and their batches.

A file is .jsonl or .json. The format is recognised by the fields: {"prompt", "chosen", "rejected"}, texts or lists of
messages; {"chosen", "rejected"}, two conversations with the same beginning (Anthropic, TRL); {"prompt", "answers"}, the
best first, or with {"scores"} in any order. For KTO also {"prompt", "completion", "label"}: one answer, good (true) or
bad.

The catalogue's preferences come from chitchat's ratings. People rated their conversation as witty, upbeat and
interesting, from 1 to 10. A preference compares two whole conversations that begin with the same question, not two
responses. Nobody saw both.

Axes: row = pairs or prompts, 2 = the better and the worse response, K = ranked responses, position. A response follows
its prompt.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from keifu.data.catalogue import catalogue, readers
from keifu.data.chat.conversations import Conversation, form_of, objects, parse_transcript, prompt_of, validate_messages
from keifu.data.chat.packing import TurnMasks, hash_turns
from keifu.data.epochs import EpochBatches
from keifu.data.padding import stack_sequences
from keifu.errors import UserError, unknown
from keifu.files import hash_of
from keifu.folders import neighbours

UNTOUCHED = 5  # initial value of the sliders: three such ratings perhaps mean that nobody rated
APART = 3.0  # minimal difference of mean ratings in a pair


def chitchat_preferences() -> Iterator[dict[str, Any]]:
    """Yield preferences between two conversations about one question: the best against the worst, the second best
    against the second worst, and so on. Each conversation is used once."""
    content = json.loads(catalogue.fetch("chitchat").read_text(encoding="utf-8"))
    rated: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for talk in content.values():
        marks, question = (talk.get("ratings") or {}).values(), (talk.get("prompt") or "").strip()
        spoken = readers.conversation_of(talk)
        if question and len(spoken) > 1 and any(mark != UNTOUCHED for mark in marks):
            rated[question].append((mean(marks), readers.as_document(spoken)))
    for question, talks in sorted(rated.items()):
        order = sorted(talks, key=lambda talk: (talk[0], hashlib.sha256(talk[1].encode()).digest()))
        for worse, better in zip(order, reversed(order), strict=True):
            if better[0] - worse[0] < APART:
                break
            prompt = f"Write a talk between two people, A and B, that begins with this question: {question}"
            yield {"prompt": prompt, "chosen": better[1], "rejected": worse[1]}


PREFERENCES: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {"chitchat-preferences": chitchat_preferences}


@dataclass(frozen=True)
class RankedResponses:
    """Prompt with its responses, the best first. levels: equal numbers mean equally good responses. A single response
    has level 1 (good) or 0 (bad)."""

    prompt: Conversation
    answers: tuple[str, ...]
    levels: tuple[float, ...]

    def pairs(self) -> list[tuple[int, int]]:
        """Return the indices (better, worse) of every pair of responses with different levels."""
        indices = combinations(range(len(self.answers)), 2)
        return [(first, second) for first, second in indices if self.levels[first] > self.levels[second]]

    def marks(self) -> list[bool]:
        """Return whether each response is good: a single one by its level, of several the best."""
        best = max(self.levels) if len(self.levels) > 1 else 1.0
        return [level == best for level in self.levels]


def read_preferences(source: str | Path, single: bool = False) -> Iterator[RankedResponses]:
    """Yield the preferences of a file or of a catalogue entry. single: whether single responses with a label are
    allowed.

    Raises `UserError`, with the line, if no format fits, two conversations begin differently, answers are equal, or the
    number of scores is wrong.
    """
    path, make_records = Path(source), PREFERENCES.get(str(source))
    if make_records is None and not path.is_file():
        raise unknown("file or set of preferences", str(source), [*PREFERENCES, *neighbours(path, "*.json*")])
    named_records = (
        ((f"{source}, entry {number}", record) for number, record in enumerate(make_records(), 1))
        if make_records
        else ()
    )
    for where, record in named_records if make_records else objects(path, "preference"):
        preference = form_of(record, FORMS, where, "preferences have")(record, where)
        has_several_answers = len(preference.answers) > 1
        if not has_several_answers and not single:
            raise UserError(f"{where}: one answer with a mark makes no pair: learn it by keifu train dpo --loss kto.")
        if has_several_answers and len({*preference.answers}) < len(preference.answers):
            raise UserError(f"{where}: two answers are equal, so there is nothing to prefer; leave one out.")
        if has_several_answers and not preference.pairs():
            raise UserError(f"{where}: no answer is better than another; leave the prompt out.")
        yield preference


def _pair(record: Mapping[str, Any], where: str) -> RankedResponses:
    answers = [_answer(record[name], f"{where}, {name}") for name in ("chosen", "rejected")]
    return RankedResponses(prompt_of(record["prompt"], f"{where}, prompt"), tuple(answers), (1.0, 0.0))


def _two_conversations(record: Mapping[str, Any], where: str) -> RankedResponses:
    """Read two conversations that differ only in their last message. Each is a list of messages, or a text
    (hh-rlhf)."""

    def messages(name: str) -> Conversation:
        value = record[name]
        side = f"{where}, {name}"
        return validate_messages(parse_transcript(value, side) if isinstance(value, str) else value, side)

    better, worse = messages("chosen"), messages("rejected")
    if better[:-1] != worse[:-1]:
        raise UserError(f"{where}: chosen and rejected differ before their last message: they must share the prompt.")
    return RankedResponses(better[:-1], (better[-1]["content"], worse[-1]["content"]), (1.0, 0.0))


def _list(record: Mapping[str, Any], where: str) -> RankedResponses:
    value = record["answers"]
    if not isinstance(value, list) or len(value) < 2:
        raise UserError(f"{where}: answers must be a list of at least two, not {str(value)[:40]!r}.")
    answers = [_answer(answer, f"{where}, answer {number}") for number, answer in enumerate(value, 1)]
    scores = record.get("scores", [-number for number in range(len(answers))])
    if not isinstance(scores, list) or len(scores) != len(answers):
        raise UserError(f"{where}: {len(answers)} answers need {len(answers)} scores.")
    if not all(isinstance(score, int | float) for score in scores):
        raise UserError(f"{where}: scores are numbers, and these are {scores}.")
    order = sorted(range(len(answers)), key=lambda number: -scores[number])
    ranked = tuple(answers[number] for number in order), tuple(float(scores[number]) for number in order)
    return RankedResponses(prompt_of(record["prompt"], f"{where}, prompt"), *ranked)


def _mark(record: Mapping[str, Any], where: str) -> RankedResponses:
    if not isinstance(label := record["label"], bool):
        raise UserError(f"{where}: label must be true or false, not {str(label)[:40]!r}.")
    answer = _answer(record["completion"], f"{where}, completion")
    return RankedResponses(prompt_of(record["prompt"], f"{where}, prompt"), (answer,), (float(label),))


FORMS: dict[tuple[str, ...], Callable[[Mapping[str, Any], str], RankedResponses]] = {
    ("prompt", "chosen", "rejected"): _pair,
    ("prompt", "answers"): _list,
    ("prompt", "completion", "label"): _mark,
    ("chosen", "rejected"): _two_conversations,
}


def _answer(value: Any, where: str) -> str:
    """Return the text of an answer, which may also be a list of one message."""
    alone = isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict)
    text = value[0].get("content") if alone else value
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: an answer must be a text, not {str(value)[:40]!r}.")
    return text


class Pair(NamedTuple):
    """Two responses, each after its prompt. The loss mask covers only the response."""

    better: TurnMasks
    worse: TurnMasks


class Ranking(NamedTuple):
    """Responses to one prompt, each after the prompt. A higher level is a better response."""

    answers: list[TurnMasks]
    levels: list[float]


Responses = Sequence[Sequence[TurnMasks]]  # for each prompt
References = tuple[Float[Tensor, "n k"], Float[Tensor, "m k"]]  # for the training and the held-out part


class PreferencePairs(EpochBatches):
    """Batches of pairs: {"tokens", "mask": True on the answers [row, 2, position], "reference" [row, 2]}.

    references: log-probabilities of the reference model [pairs, 2], for the training and the held-out pairs.
    """

    BESIDE = "reference"

    def __init__(
        self,
        training: Responses,
        validation: Responses,
        batch_size: int,
        seed: int,
        pad_id: int,
        references: References,
    ):
        if not training:
            raise UserError("There is no preference to train on.")
        super().__init__(len(training), len(validation), min(batch_size, len(training)), seed)
        self.parts, self.references, self.pad_id = (list(training), list(validation)), references, pad_id
        turns = (answer for part in self.parts for pair in part for answer in pair)
        self.fingerprint = hash_turns(f"{seed} {pad_id}", turns)

    def largest(self) -> dict[str, Tensor]:
        """Return the batch of the longest pairs, which needs the most memory, whether or not a step uses it."""
        lengths = [max(len(answer.ids) for answer in pair) for pair in self.parts[0]]
        return self.make_batch(False, np.argsort(lengths)[-self.batch_size :])

    def make_batch(self, validating: bool, items: np.ndarray) -> dict[str, Tensor]:
        """Return the batch of these pairs, with their reference log-probabilities."""
        batch = stack_rows([self.parts[validating][item] for item in items], self.pad_id)
        return batch | {self.BESIDE: self.references[validating][items, : batch["tokens"].shape[1]]}


class RankedAnswers(PreferencePairs):
    """Batches of rankings: {"tokens", "mask": True on real tokens [row, K, position], "levels" [row, K]}.

    All responses to a prompt are in one row (InstructGPT, section 3.5). A missing response has level NaN.
    """

    BESIDE = "levels"

    def __init__(
        self, training: Sequence[Ranking], validation: Sequence[Ranking], batch_size: int, seed: int, pad_id: int
    ):
        most = max((len(ranking.answers) for ranking in (*training, *validation)), default=2)
        levels = [
            torch.tensor([[*ranked.levels, *[torch.nan] * (most - len(ranked.levels))] for ranked in part]).view(
                -1, most
            )
            for part in (training, validation)
        ]
        training_answers, validation_answers = (
            [ranking.answers for ranking in part] for part in (training, validation)
        )
        super().__init__(training_answers, validation_answers, batch_size, seed, pad_id, (levels[0], levels[1]))
        self.fingerprint = hash_of([self.fingerprint, *(part.numpy().tobytes() for part in levels)])


def stack_rows(pairs: Responses, pad_id: int) -> dict[str, Tensor]:
    """Return the pairs or rankings as tensors, padded on the right."""
    tokens, _ = stack_sequences([[answer.ids for answer in pair] for pair in pairs], pad_id)
    mask, _ = stack_sequences([[answer.learned for answer in pair] for pair in pairs], 0)
    return {"tokens": tokens, "mask": mask.bool()}
