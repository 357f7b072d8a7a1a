"""Questions about pictures with answers: easy-VQA (V. Zhou) of the catalogue, or a user's folder.

A folder has pictures and questions.jsonl, with the fields image (a path in the folder), question, answer and, for test
questions, "part": "test". Axes: rows, length = tokens; channels, height, width of pictures.
"""

import json
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from keifu.data.catalogue import catalogue
from keifu.data.epochs import EpochBatches
from keifu.data.images.io import read_image
from keifu.data.images.preprocessing import Preprocessing
from keifu.data.padding import stack_rows
from keifu.data.records import read_parts
from keifu.errors import UserError
from keifu.files import hash_of

FILE, NAMES = "questions.jsonl", ("easy-vqa",)
CLOSED = {"yes", "no"}  # answers that name nothing visible
TOGETHER = 4  # questions about one picture that follow one another


class Question(NamedTuple):
    """Question about the picture of that name, with its answer."""

    image: str
    question: str
    answer: str


@dataclass(frozen=True)
class Questions:
    """Training and test questions. read: function that returns a picture's file by its name."""

    learned: Sequence[Question]
    tested: Sequence[Question]
    read: Callable[[str], bytes | Path]

    def picture(self, name: str) -> Image.Image:
        """Return the picture of that name."""
        return read_image(self.read(name), name).image

    @cached_property
    def words(self) -> dict[str, set[str]]:
        """For each picture the words of its questions and answers, except "yes" and "no"."""
        words_of: dict[str, set[str]] = defaultdict(set)
        for question in (*self.learned, *self.tested):
            if question.answer not in CLOSED:
                words_of[question.image] |= {*re.findall(r"\w+", f"{question.question} {question.answer}")}
        return words_of

    def without(self, words: Sequence[str]) -> list[Question]:
        """Return the training questions without those about pictures that may show all of these words. A picture may
        show a word unless one of its questions has another answer."""
        answers: dict[str, set[str]] = defaultdict(set)
        for question in self.learned:
            answers[question.question] |= {question.answer} - CLOSED
        other_answers = [
            set[str]().union(*(some for some in answers.values() if word in some)) - {word} for word in words
        ]
        if not all(other_answers):
            raise UserError(f"--left-out {' '.join(words)} needs words that are answers, among others, to a question.")
        return [row for row in self.learned if not words or any(self.words[row.image] & some for some in other_answers)]

    def commonest(self) -> tuple[str, dict[str, str]]:
        """Return the most frequent training answer, and the most frequent answer to each question."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for learned_row in self.learned:
            counts[learned_row.question][learned_row.answer] += 1
        first = {question: count.most_common(1)[0][0] for question, count in counts.items()}
        return Counter(row.answer for row in self.learned).most_common(1)[0][0], first


def read_questions(source: str) -> Questions:
    """Read the questions of the catalogue or of a folder. Raises `UserError` for anything else."""
    if source in NAMES:
        return _easy_vqa(next(catalogue.fetch(source).glob("*.whl")))
    folder = Path(source)
    learned, tested = (
        [Question(*(record[field] for field in Question._fields)) for record in part]
        for part in read_parts(folder, FILE, Question._fields, "picture")
    )
    return Questions(learned, tested, lambda name: folder / name)


def _easy_vqa(archive: Path) -> Questions:
    files = zipfile.ZipFile(archive)

    def part(name: str) -> list[Question]:
        rows = json.loads(files.read(f"easy_vqa/data/{name}/questions.json"))
        return [Question(f"{name}/images/{number}.png", text, answer) for text, answer, number in rows]

    return Questions(part("train"), part("test"), lambda name: files.read(f"easy_vqa/data/{name}"))


class QuestionBatches(EpochBatches):
    """Batches with one question in a row: {"tokens", "mask" (True on trained tokens), "pictures" as bytes}.

    Up to 4 questions about a picture follow one another, so that a batch has fewer pictures than rows. The first epoch
    begins with the questions whose answer names something visible, because a model that guesses yes and no is slow to
    learn to see. rows: ids and masks of the training and the held-out part, and the names of their pictures. named:
    which training rows have such an answer.
    """

    def __init__(
        self, rows: Sequence[Sequence[tuple[list[int], list[bool], str]]], questions: Questions, ready: Preprocessing,
        batch_size: int, seed: int, pad_id: int, names_picture: Sequence[bool],
    ):  # fmt: skip
        self.rows, self.pad_id = rows, pad_id
        names = sorted({name for part in rows for *_, name in part})
        self._place = {name: index for index, name in enumerate(names)}
        self._pictures = torch.stack([ready.cut(questions.picture(name)) for name in names])
        self._names_picture, self._picture_numbers = (
            np.array(names_picture),
            np.array([self._place[name] for *_, name in rows[0]]),
        )
        self.fingerprint = hash_of([json.dumps(rows), self._pictures.numpy().tobytes()])
        super().__init__(len(rows[0]), len(rows[1]), batch_size, seed, self._order)

    def _order(self, epoch: int) -> np.ndarray:
        """Return the indices of all rows in the order of an epoch."""
        random = np.random.default_rng([self.seed, epoch])
        rows = random.permutation(len(self._picture_numbers))
        first = self._names_picture[rows] & (epoch == 0)
        keys = 2 * self._picture_numbers[rows] + first
        by_key = np.argsort(keys, kind="stable")
        rank = np.empty_like(keys)
        rank[by_key] = np.arange(len(keys)) - np.searchsorted(keys[by_key], keys[by_key])
        groups = np.unique(keys * len(keys) + rank // TOGETHER, return_inverse=True)[1]
        return rows[np.lexsort([random.permutation(groups.max() + 1)[groups], ~first])]

    def largest(self) -> dict[str, Tensor]:
        """Return the batch of the longest rows."""
        return self.make_batch(False, np.argsort([len(ids) for ids, *_ in self.rows[0]])[-self.batch_size :])

    def make_batch(self, validating: bool, items: np.ndarray) -> dict[str, Tensor]:
        """Return the batch of these rows, padded on the right."""
        ids, masks, names = zip(*(self.rows[validating][item] for item in items), strict=True)
        tokens, real = stack_rows(ids, self.pad_id)
        learned, _ = stack_rows([list(map(int, mask)) for mask in masks], 0)
        pictures = self._pictures[[self._place[name] for name in names]]
        return {"tokens": tokens, "mask": learned.bool() & real, "pictures": pictures}
