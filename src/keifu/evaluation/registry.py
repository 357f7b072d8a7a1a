"""The interface of an evaluation: its request and its result.

An evaluation is a module, and a line in commands/evaluate.py. It offers:

ABOUT: what it measures, in a line. OPTIONS: the options of `keifu evaluate` that it uses beyond the common ones;
"output" is one where it has `items`. takes(model) -> bool: whether it can evaluate such a model. names() -> names of
data that it has. accepts(on) -> bool: whether `on` is one of them or a file.
evaluate(model, tokenizer, request) -> EvalResult.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keifu.errors import UserError


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate, on which data and how; an evaluation uses the fields that it names in its OPTIONS.

    on: a catalogue name, a file or files. limit: at most so many of its items. towers: a CLIP with its
    tokenizer. judge: a classifier. text_field to encoding: how text lies in files. languages: what the model was
    trained to translate from and into, and held_out: the share of the pictures that was kept from training and whether
    only distinct ones were taken, where its run says so.
    """

    on: str
    limit: int | None = None
    reverse: bool = False
    language: str | None = None
    beam: int | None = None
    alpha: float | None = None
    batch_size: int | None = None
    by_length: bool = False
    shots: int | None = None
    by_shots: tuple[int, ...] = ()
    seed: int = 0
    metric: str | None = None
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    towers: Any = None
    judge: Any = None
    text_field: str | None = None
    source_field: str | None = None
    target_field: str | None = None
    encoding: str = "utf-8"
    languages: tuple[str, str] = ("", "")
    held_out: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}, which must be at least 1.")


@dataclass(frozen=True)
class ResultTable:
    """Rows of cells under the names of their columns."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found.

    figures: each with its name. notes: sentences that a reader of the figures must know. tables: requested details, by
    name. items: what the figures were computed from, one row an item, for a file. picture: a PNG that shows some of
    them, for a file.
    """

    figures: dict[str, float | int | str]
    notes: tuple[str, ...] = ()
    tables: dict[str, ResultTable] = field(default_factory=dict)
    items: ResultTable | None = None
    picture: bytes | None = None
