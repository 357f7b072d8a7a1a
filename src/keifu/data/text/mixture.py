"""Weighted mixtures of texts: the sources, read from a YAML or JSON file and tokenized, and batches of them.

A mixture is one of `MIXTURES`, or a file:

    sources:
      english:  {data: wiki-summaries, weight: 0.5}
      letters:  {data: letters/*.txt, weight: 0.2}
      japanese: {data: tatoeba-ja, weight: 0.2}
      parallel: {data: pairs.tsv, weight: 0.1, languages: [German, English]}

`data` is one of:
- a catalogue name, a file, a folder or a pattern (see `keifu.data.text.documents`), relative to the mixture's folder;
- a Tatoeba language or pair (tatoeba-ja, tatoeba-en-de), whose test sentences are removed from all other sources (see
  `keifu.data.translation.tatoeba`);
- "arithmetic", generated problems with their steps;
- with `languages`: pairs of sentences that `keifu.data.translation.pairs` reads.

`field` names the text's field in files of records, `encoding` the encoding of files that are not UTF-8. The weights are
shares of the tokens. They must sum to 1, unless the file says `normalise: true`. `held_out: 0.05`, at the level of
`sources`, is the share of each source for validation. Validation also measures each source separately.

Axes: row, position = tokens of a row.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keifu.data.catalogue import catalogue
from keifu.data.epochs import BatchSizeSchedule, batch_size_stages
from keifu.data.interleaving import interleave, source_of_row
from keifu.data.text import documents as sources, synthetic_math
from keifu.data.text.held_out import SplitRule
from keifu.data.text.packed import PackedText
from keifu.data.text.span_corruption import CorruptionTask, Rows
from keifu.data.text.token_shards import Parts, Shards, prepare, prepare_parts
from keifu.data.tokenizers.tokenizer import Tokenizer, nothing_around_text
from keifu.data.translation import tatoeba
from keifu.data.translation.pairs import pair_names, read_pairs, split
from keifu.errors import UserError, require_known, unknown
from keifu.files import hash_of
from keifu.untrusted import parse_yaml, read_text

SUFFIXES = ".yaml", ".yml", ".json"
FIELDS = "sources", "normalise", "held_out"
HELD_OUT = 0.02  # share of each source that is held out for validation
ARITHMETIC = "arithmetic"
SUMS = 60_000  # number of problems of "arithmetic"


@dataclass(frozen=True)
class MixtureSource:
    """Text of a mixture; the fields are explained at the top of this file."""

    name: str
    data: str
    weight: float | int
    languages: tuple[str, ...] = ()
    field: str | None = None
    encoding: str = sources.UTF8

    @property
    def form(self) -> sources.TextFileFormat:
        """Format of the source's files."""
        return sources.TextFileFormat(self.field, self.encoding)

    def __post_init__(self) -> None:
        if len(self.languages) not in (0, 2):
            pair = f"The source {self.name!r} has {len(self.languages)} languages, and pairs have two"
            raise UserError(f"{pair}: write languages: [German, English], in the order of the file's columns.")


@dataclass(frozen=True)
class Mixture:
    """Sources whose weights sum to 1. name: the name or path that the user gave. held_out: share of each source for
    validation. split: rule that chooses it in plain text."""

    name: str
    sources: tuple[MixtureSource, ...]
    held_out: float = HELD_OUT
    split: SplitRule = "spread"

    def __post_init__(self) -> None:
        if not 0 < self.held_out <= 0.5:
            raise UserError(f"held_out of {self.name} is {self.held_out}, but the share is above 0 and at most 0.5.")
        if not self.sources:
            raise UserError(f"The mixture {self.name} has no sources: name at least one.")
        total = sum(source.weight for source in self.sources)
        if abs(total - 1) > 1e-6:
            ways = "change them, or write `normalise: true` into its file, which divides each by the sum"
            raise UserError(f"The weights of the mixture {self.name} sum to {total:.6g}, and must sum to 1: {ways}.")


MIXTURES = {"multilingual": Path(__file__).with_name("multilingual.yaml")}


def is_mixture(source: str) -> bool:
    """Return whether a name is that of a mixture, or of a file that can contain one."""
    return source in MIXTURES or (Path(source).suffix.lower() in SUFFIXES and Path(source).is_file())


def read_mixture(name_or_path: str) -> Mixture:
    """Read the mixture of that name or in that file. Raises `UserError`, with the source's name, for an error in it."""
    path = MIXTURES.get(name_or_path, Path(name_or_path).expanduser())
    if not path.is_file():
        raise unknown("mixture, and no file,", name_or_path, MIXTURES)
    content = parse_yaml(read_text(path), path)
    if not isinstance(content, dict) or not isinstance(content.get("sources"), dict):
        raise UserError(f"{path} is no mixture: it needs `sources:`, and under it each source's name, data and weight.")
    for key in content:
        require_known(f"field of the mixture {path},", key, FIELDS)
    sources = [_source(str(name), facts, path) for name, facts in content["sources"].items()]
    total = sum(source.weight for source in sources) if content.get("normalise") else 1.0
    shares = (replace(source, weight=source.weight / total) for source in sources)
    held_out = content.get("held_out", HELD_OUT)
    if not isinstance(held_out, float):
        raise UserError(f"{path}: held_out is {held_out!r}, and it must be a share such as {HELD_OUT}.")
    return Mixture(name_or_path if name_or_path in MIXTURES else str(path), tuple(shares), held_out)


def _source(name: str, description: Any, path: Path) -> MixtureSource:
    field_names = [field.name for field in fields(MixtureSource)][1:]
    if not isinstance(description, Mapping):
        raise UserError(f"{path}: the source {name!r} needs data and weight: {{data: wiki-summaries, weight: 1}}.")
    for key in description:
        require_known(f"field of the source {name!r} in {path},", key, field_names)
    for key in ("data", "weight"):
        if description.get(key) in (None, ""):
            raise UserError(f"{path}: the source {name!r} has no {key}; it needs data and weight.")
    data, weight, languages = str(description["data"]), description["weight"], description.get("languages") or []
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e9:
        wrong = f"The weight of the source {name!r} is {weight!r}, and it must be a number above 0"
        raise UserError(f"{wrong}: correct it, or leave the source out.")
    if not isinstance(languages, list):
        raise UserError(f"{path}: languages of the source {name!r} is {languages!r}: write [German, English].")
    beside = not Path(data).expanduser().is_absolute() and glob(data, root_dir=path.parent, recursive=True)
    data = str(path.parent / data) if beside else data
    field = None if description.get("field") is None else str(description["field"])
    encoding = str(description.get("encoding", sources.UTF8))
    return MixtureSource(name, data, weight, tuple(map(str, languages)), field, encoding)


def prepare_mixture(mixture: Mixture, tokenizer: Tokenizer) -> list[Shards]:
    """Return the tokenized sources, from the cache if possible. The share `held_out` of each is held out. No tokens are
    added around texts."""
    tokenizer = tokenizer.replace(backend=nothing_around_text(tokenizer.backend))
    shards = []
    for source in mixture.sources:
        with _parts_of(source, mixture.held_out) as (parts, content):
            if parts is None:
                shards.append(prepare(source.data, tokenizer, mixture.held_out, form=source.form, split=mixture.split))
            else:
                shards.append(prepare_parts(source.data, content, parts, tokenizer))
    tatoeba.rows.cache_clear()  # it is large
    return shards


def texts(mixture: Mixture, characters: int) -> Iterator[str]:
    """Yield the first documents of each source, in all about `characters` by the weights, for training a tokenizer."""
    for source in mixture.sources:
        remaining = round(characters * source.weight)
        with _parts_of(source, mixture.held_out) as (parts, _):
            for document in sources.documents(source.data, source.form) if parts is None else parts()[0]:
                if remaining <= 0:
                    break
                yield from (
                    document[start : start + 10_000] for start in range(0, min(len(document), remaining), 10_000)
                )
                remaining -= len(document)


def content_hash(mixture: Mixture) -> str:
    """Return a hash of the texts and weights of all sources."""
    parts = []
    for source in mixture.sources:
        with _parts_of(source, mixture.held_out) as (own_parts, content):
            content = sources.content_hash(source.data, source.form) if own_parts is None else content
            parts.append(f"{source.weight} {content}{source.form.settings() or ''}")
    return "\n".join(parts)


def _parts(source: MixtureSource, held_out: float) -> tuple[Parts | None, str]:
    """Return a function that returns the training and held-out parts of a source, and their hash. For plain text return
    None instead of the function."""
    if source.data in tatoeba.names():
        return lambda: tatoeba.parts(source.data, held_out), tatoeba.identity(source.data, held_out)
    if source.data == ARITHMETIC:
        content = f"arithmetic {synthetic_math.VERSION} {SUMS} {held_out}"
        return lambda: synthetic_math.documents(SUMS, held_out), content
    if source.languages:
        return _pairs(source, held_out)
    if source.data in pair_names():
        raise UserError(f"{source.data} holds pairs: give its languages, as in languages: [Japanese, English].")
    exists = Path(source.data).expanduser().exists() or glob(source.data, recursive=True)
    is_resolved = source.data in catalogue.CATALOGUE or exists
    if not is_resolved and not Path(source.data).is_absolute():
        raise unknown("file, folder, catalogue entry or other source", source.data, source_names())
    return None, ""


def _pairs(source: MixtureSource, held_out: float) -> tuple[Parts, str]:
    pairs = read_pairs(source.data)

    def parts() -> tuple[Iterable[str], Iterable[str]]:
        divided = split(pairs, held_out=max(1, round(held_out * len(pairs))))
        training, validation = (
            tatoeba.translations(rows, source.languages) for rows in (divided.train, divided.validation)
        )
        return training, validation

    return parts, f"{pairs.fingerprint} {source.languages} {held_out}"


def source_names() -> list[str]:
    """Return all names that `data` may have."""
    return sorted({*chain(catalogue.names(), tatoeba.names(), [ARITHMETIC])})


@contextmanager
def _parts_of(source: MixtureSource, held_out: float) -> Iterator[tuple[Parts | None, str]]:
    """Yield the parts of a source and their hash (see `_parts`). Errors in the block name the source."""
    try:
        yield _parts(source, held_out)
    except UserError as error:
        raise UserError(f"The source {source.name!r}: {error}") from error


Batch = dict[str, Tensor]
VALIDATION = 20_220_510  # fixed seed of the held-out rows, so that runs with different seeds can be compared


@dataclass(frozen=True)
class WeightedSource:
    """Source of a mixture: its name, its share of all rows, and its ids."""

    name: str
    weight: float | int
    shards: Shards


@dataclass(frozen=True)
class Check:
    """Validation metric on each source's held-out text: the loss of `task`, times `scale(shards)`."""

    task: CorruptionTask
    scale: Callable[[Shards], float] = lambda shards: 1.0


class MixedText:
    """Training data from several sources, interleaved by weight: the shares are exact after any number of rows.

    Each source is cut into windows and read in epochs like `PackedText`; a small one is repeated more often. A batch
    depends only on the seed and the step. `task` converts windows to rows. `batch_size` may grow over the steps.

    `validation` yields batches for the task's loss, of held-out windows with the same shares. Then it yields for each
    check and each source `check_rows` evenly spaced held-out windows of `context_length` tokens. "figure" [row] is 0
    for the former, otherwise the position in `figures` (names `source/check`), counted from 1. "factor" [row]
    multiplies the batch's summed loss so that the sum over all batches, divided by the elements of the former, is that
    figure (see `masked_share_loss` in `keifu.training.objectives.language_modeling`).
    """

    def __init__(
        self, sources: Sequence[WeightedSource], task: CorruptionTask, context_length: int,
        batch_size: int | BatchSizeSchedule, seed: int = 0, checks: Mapping[str, Check] | None = None,
        validation_rows: int = 256, check_rows: int = 32,
    ):  # fmt: skip
        self.growth = batch_size if isinstance(batch_size, BatchSizeSchedule) else batch_size_stages((), batch_size)
        self.sources, self.task, self.seed = sources, task, seed
        self.checks, self.context_length = checks or {}, context_length
        self.validation_rows, self.check_rows = validation_rows, check_rows
        self.weights = np.array([source.weight for source in sources])
        seeds = (seed * len(sources) + n for n in range(len(sources)))
        self._packed = [PackedText(s.shards, task.width - 1, 1, n) for s, n in zip(sources, seeds, strict=True)]
        self.figures = [f"{source.name}/{check}" for check in self.checks for source in sources]
        facts = [f"{source.name} {source.weight} {source.shards.fingerprint}" for source in sources]
        self.fingerprint = hash_of(["\n".join([*facts, task.name, f"{self.growth} {seed}"])])

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0. It is the same in every process and does not depend on earlier
        calls."""
        turns = interleave(self.weights, self.growth.before(step), self.growth.before(step + 1))
        windows = self._windows(turns.whose, lambda packed, rows: packed.windows(turns.numbers[rows]))
        return _tensors(self.task.rows(windows, turns.numbers, np.random.default_rng([self.seed, step])))

    def largest(self) -> Batch:
        """Return a batch with the most rows."""
        return self.batch(self.growth.largest)

    def epochs(self, steps: int) -> dict[str, float]:
        """Return the number of epochs, with fraction, that `steps` steps take of each source."""
        whose = np.ceil(self.growth.before(steps) * self.weights)
        return {
            source.name: float(count) / packed.windows_per_epoch
            for source, count, packed in zip(self.sources, whose, self._packed, strict=True)
        }

    def validation(self) -> Iterator[Batch]:
        """Yield the batches described in the class, always the same."""
        yield from self._loss_windows
        units = float(sum(elements(batch) for batch in self._loss_windows))
        for index, (check, source) in enumerate((c, s) for c in self.checks.values() for s in self.sources):
            windows = held_out(source.shards, self.context_length, self.check_rows)[:, : check.task.width]
            validation_batches = batches(check.task, windows, max(self.growth.rows))
            factor = check.scale(source.shards) * units / sum(elements(batch) for batch in validation_batches)
            yield from (_mark(batch, index + 1, factor) for batch in validation_batches)

    @cached_property
    def _loss_windows(self) -> list[Batch]:
        """Held-out windows of all sources by their weights, for the task's loss."""

        def spread(packed: PackedText, rows: np.ndarray) -> np.ndarray:
            windows = packed.held_out
            return windows[np.arange(len(rows)) * max(1, len(windows) // len(rows)) % len(windows)]

        windows = self._windows(source_of_row(self.weights, np.arange(self.validation_rows)), spread)
        return [_mark(batch, 0, 1.0) for batch in batches(self.task, windows, max(self.growth.rows))]

    def _windows(self, whose: np.ndarray, take: Callable[[PackedText, np.ndarray], np.ndarray]) -> np.ndarray:
        """Return one window for each row. whose: index of each row's source. take: function that returns windows of a
        source."""
        windows = np.empty((len(whose), self.task.width), np.int64)
        for index, packed in enumerate(self._packed):
            if len(rows := np.flatnonzero(whose == index)):
                windows[rows] = take(packed, rows)
        return windows


def held_out(shards: Shards, context_length: int, rows: int) -> np.ndarray:
    """Return at most `rows` evenly spaced windows of the held-out part, [row, position]."""
    return PackedText(shards, context_length - 1, 1, validation_tokens=rows * (context_length - 1)).held_out


def batches(task: CorruptionTask, windows: np.ndarray, size: int) -> list[Batch]:
    """Convert windows to batches of `size` rows, always the same."""
    random, numbers = np.random.default_rng(VALIDATION), np.arange(len(windows))
    tensors = _tensors(task.rows(windows.astype(np.int64), numbers, random))
    starts = range(0, len(windows), size)
    return [{name: tensor[start : start + size] for name, tensor in tensors.items()} for start in starts]


def elements(batch: Batch) -> int:
    """Return the number of predicted tokens in a batch."""
    mask = batch.get("mask")
    return batch["tokens"][:, 1:].numel() if mask is None else int(mask[:, 1:].sum())


def _mark(batch: Batch, figure: int, factor: float) -> Batch:
    rows = len(next(iter(batch.values())))
    return batch | {"figure": torch.full((rows,), figure), "factor": torch.full((rows,), factor)}


def _tensors(rows: Rows) -> Batch:
    return {name: torch.from_numpy(array) for name, array in rows.items()}
