"""Interface of evaluations: request and result.

An evaluation is a module that is listed in commands/evaluate.py. It has:

ABOUT: one line about its metric. OPTIONS: the options of `keifu evaluate` that it uses in addition to the common ones,
with "output" if it returns `items`. takes(model) -> bool: whether it can evaluate such a model. NAMES: names of its
data. accepts(on) -> bool: whether `on` is another suitable name, file or folder. evaluate(model, tokenizer, request) ->
EvalResult.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from keifu.ranges import Count, Finite, Natural, Seed, check

Figures = dict[str, float | int | str]  # of an evaluation, by name


@dataclass(frozen=True)
class EvalOptions:
    """Options of all evaluations; each evaluation lists those that it supports in OPTIONS."""

    on: str
    """The data."""
    limit: Count | None = None
    """Most pairs, windows of text or items of a task; pictures that are drawn (unset: 1000), found again in
    noise (256) or counted in bits (64)."""
    samples: Count | None = None
    """Answers that are drawn for each item at temperature 1; their majority counts. Unset: the likeliest answer."""
    shots: Natural | None = None
    """Examples with their answers in the prompt of each item; unset: 0."""
    by_shots: tuple[Natural, ...] = ()
    """Several numbers of examples, such as 0 1 4 16, each for the same items."""
    seed: Seed = 0
    """Seed of the choice of examples; for pictures, the first one's seed."""
    metric: str | None = None
    """choice (the likeliest of a task's choices), exact (a written answer) or cloze; unset: the task's own. Of a model
    that draws: distances, reconstruction or bits, unset: all three; or classes (see --judge). Of one that draws from
    text: clip-score or distances; unset: both."""
    guidance: Finite | None = None
    """How far towards the text, or with --metric classes the class, they are drawn; unset: 7.5, and 1 for a class."""
    sampler: str | None = None
    """How pictures are drawn; unset: ddim, for a text dpm++-2m."""
    steps: Count | None = None
    """Steps of the sampler; unset: as many as are usual with it."""
    reverse: bool = False
    """Swap the sides of the pairs: the second is the source."""
    language: str | None = None
    """The code of the language that is translated into, such as ja, where the data does not tell it; or of the captions
    that are drawn, or of the speech."""
    beam: Count | None = None
    """Translations held open at a time, unset: 4; or transcripts, unset: 1."""
    alpha: Finite | None = None
    """Exponent of the length penalty; unset: 0.6."""
    batch_size: Count | None = None
    """How much is computed at a time: it changes no figure but the speed."""
    text_field: str | None = None
    """The field, or column, that holds the text in .jsonl, .json, .csv, .tsv and .parquet files; unset: text."""
    source_field: str | None = None
    """The field, or column, of the source in a file of pairs; unset: source, or the first of two."""
    target_field: str | None = None
    """The field of the translation; unset: target, or the second of two."""
    encoding: str = "utf-8"
    """Encoding of text files without a byte order mark, such as cp932 (Shift-JIS), euc_jp or cp1252."""
    by_length: bool = False
    """Show the figures by the length of the source too."""


@dataclass(frozen=True)
class EvalRequest(EvalOptions):
    """Request of an evaluation: the data, the options, and facts about the model.

    towers: a CLIP with its tokenizer. judge: a classifier. languages: source and target of a translator's training, or
    the caption languages of a CLIP's training. held_out: share of the pictures that the run held out, and whether it
    used only distinct ones.
    """

    towers: Any = None
    judge: Any = None
    languages: tuple[str, ...] = ("", "")
    held_out: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self)


class ResultTable(NamedTuple):
    """Rows of cells with column names."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]


@dataclass(frozen=True)
class EvalResult:
    """Result of an evaluation.

    figures: by name. notes: sentences that a reader of the figures must know. tables: requested details, by name.
    items: data behind the figures, one row for each item, for a file. picture: a PNG of some items, for a file.
    """

    figures: Figures
    notes: tuple[str, ...] = ()
    tables: dict[str, ResultTable] = field(default_factory=dict)
    items: ResultTable | None = None
    picture: bytes | None = None
