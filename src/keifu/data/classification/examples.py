"""Labelled texts, and their split into training and test examples."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from keifu.data.text.normalization import key
from keifu.errors import UserError


class Example(NamedTuple):
    """Example: its position for errors, its texts, and its label. In a choice the label is the index of the right
    answer."""

    where: str
    texts: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class Examples:
    """Labelled texts, and their source."""

    source: str
    rows: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def texts(self) -> tuple[str, ...]:
        """First text of each row."""
        return tuple(row.texts[0] for row in self.rows)

    @property
    def labels(self) -> tuple[str, ...]:
        """Label of each row."""
        return tuple(row.label for row in self.rows)

    @property
    def classes(self) -> tuple[str, ...]:
        """Every label once, sorted; numbers by value."""
        return sorted_labels(self.labels)

    def subset(self, indices: Iterable[int]) -> "Examples":
        """Return the rows with these indices."""
        return Examples(self.source, tuple(self.rows[index] for index in indices))

    def split(self, held_out: int) -> tuple["Examples", "Examples"]:
        """Split into training rows and at most `held_out` test rows: those with the smallest keys. Training rows are
        ordered by key.

        The key of a row depends on its first text. Rows with the same key are not separated, because premises come with
        several hypotheses and contexts with several questions. A label never occurs only in the test rows.
        """
        if not 0 <= held_out < len(self):
            raise UserError(f"{held_out} of {len(self)} rows cannot be held out: give a number between.")
        keys = [key(text) for text in self.texts]
        groups: dict[str, list[int]] = defaultdict(list)
        for index, text_key in enumerate(keys):
            groups[text_key].append(index)
        validation, training = list[int](), list[int]()
        for _, indices in sorted(groups.items()):
            (validation if len(validation) + len(indices) <= held_out else training).extend(indices)
        training_labels = {self.rows[index].label for index in training}
        alone = {keys[index] for index in validation if self.rows[index].label not in training_labels}
        training += [index for index in validation if keys[index] in alone]
        return self.subset(training), self.subset(index for index in validation if keys[index] not in alone)


DIGITS = 100  # maximal length of a label that is read as a number: Python refuses long ones


def sorted_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Return every label once, sorted; numbers by value."""
    numbers = {text: int(text) if text.isdecimal() and len(text) <= DIGITS else None for text in labels}
    return tuple(sorted(numbers, key=lambda text: (numbers[text] is None, numbers[text] or 0, text)))
