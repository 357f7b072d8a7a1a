"""What is in a text, told before anything is trained on it; it knows no model.

It finds what would be learned without anyone noticing: faulty bytes, empty and repeated documents, and scripts that the
tokenizer takes apart.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from keifu.data import sources
from keifu.data.scripts import SCRIPTS, bytes_to_scripts
from keifu.data.sources import PLAIN, Piece, TextFormat, chunks
from keifu.data.text import TextTokenizer

SHOWN = 20  # faults that are told one by one; the rest are counted
CHUNK = 1 << 20  # characters that are encoded at a time


@runtime_checkable
class SpellingTokenizer(TextTokenizer, Protocol):
    """A tokenizer that also tells what bytes a token stands for."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; they need not be whole characters."""
        ...


@dataclass
class Script:
    """How much of a text is in one script: `bytes` of tokens that write it, and how many `tokens` those are."""

    bytes: int = 0
    tokens: int = 0

    @property
    def tokens_per_byte(self) -> float:
        """Near 0.25 for a tokenizer that knows the script, 1 for one that spells it byte by byte."""
        return self.tokens / max(self.bytes, 1)


@dataclass
class Preflight:
    """The report. `lengths` counts documents by tokens: the key is the largest length that falls under it.

    A token that writes several scripts counts for the first of them in the order of `SCRIPTS`; spaces and marks that
    stand in a token with letters count for the letters' script, and those alone are "common".
    """

    source: str
    documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    empty: int = 0
    duplicates: int = 0
    n_problems: int = 0
    problems: list[str] = field(default_factory=list)
    lengths: dict[int, int] = field(default_factory=dict)
    scripts: dict[str, Script] = field(default_factory=dict)

    def problem(self, sentence: str) -> None:
        """Notes a fault; the first `SHOWN` with their places."""
        self.n_problems += 1
        if self.n_problems <= SHOWN:
            self.problems.append(sentence)

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        rates = {name: asdict(each) | {"tokens_per_byte": each.tokens_per_byte} for name, each in self.scripts.items()}
        return asdict(self) | {"lengths": {str(key): n for key, n in self.lengths.items()}, "scripts": rates}

    def __str__(self) -> str:
        return "\n".join([*self._totals(), "", *self._histogram(), "", *self._table(), "", *self._faults()])

    def _totals(self) -> Iterator[str]:
        yield f"{self.source}: {self.documents:,} documents, {self.characters:,} characters, {self.bytes:,} bytes, " + (
            f"{self.tokens:,} tokens ({self.tokens / max(self.bytes, 1):.3f} a byte)"
        )
        yield f"{self.empty:,} documents are empty, and {self.duplicates:,} repeat an earlier one exactly."

    def _histogram(self) -> Iterator[str]:
        yield "Documents by length in tokens"
        most = max(self.lengths.values(), default=1)
        for longest, count in self.lengths.items():
            yield f"  up to {longest:>11,} {count:>11,}  {'#' * -(-40 * count // most)}"

    def _table(self) -> Iterator[str]:
        yield f"{'Script':10} {'bytes':>15} {'tokens':>13} {'tokens/byte':>12}"
        for name, each in self.scripts.items():
            yield f"{name:10} {each.bytes:>15,} {each.tokens:>13,} {each.tokens_per_byte:>12.3f}"

    def _faults(self) -> Iterator[str]:
        yield from self.problems
        if self.n_problems > SHOWN:
            yield f"... and {self.n_problems - SHOWN:,} more faults."
        if not self.n_problems:
            yield "No faulty bytes, lines or files were found."


def check(source: str | Path, tokenizer: SpellingTokenizer, form: TextFormat = PLAIN) -> Preflight:
    """Reads all of a source (see `keifu.data.sources`) and encodes it; a fault is noted and reading goes on."""
    report = Preflight(str(source))
    documents, spelling = _Documents(report), _Spelling(tokenizer)
    for pieces in chunks(sources.pieces(source, form, report.problem), CHUNK):
        encoded = tokenizer.encode_batch([piece.text for piece in pieces])
        for piece, ids in zip(pieces, encoded, strict=True):
            documents.add(piece, len(ids))
        spelling.add(np.fromiter(chain.from_iterable(encoded), dtype=np.int64))
    report.lengths = dict(sorted(documents.lengths.items()))
    report.scripts = spelling.scripts()
    return report


class _Documents:
    """Counts documents while their pieces go by."""

    def __init__(self, report: Preflight):
        self.report = report
        self.seen: set[bytes] = set()
        self.lengths: Counter[int] = Counter()
        self._begin()

    def _begin(self) -> None:
        self.hash, self.tokens, self.blank = blake2b(digest_size=16), 0, True

    def add(self, piece: Piece, tokens: int) -> None:
        """Counts a piece, and its document where that ends."""
        data = piece.text.encode()
        self.report.characters += len(piece.text)
        self.report.bytes += len(data)
        self.report.tokens += tokens
        self.hash.update(data)
        self.tokens += tokens
        self.blank = self.blank and not piece.text.strip()
        if piece.ends:
            self._end()
            self._begin()

    def _end(self) -> None:
        self.report.documents += 1
        self.report.empty += self.blank
        self.lengths[1 << max(self.tokens - 1, 0).bit_length()] += 1  # the next power of two
        digest = self.hash.digest()
        self.report.duplicates += digest in self.seen and not self.blank
        self.seen.add(digest)


class _Spelling:
    """Counts tokens and their bytes by script."""

    def __init__(self, tokenizer: SpellingTokenizer):
        self.spelled = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.widths = np.array([len(each) for each in self.spelled])
        self.bytes, self.tokens = np.zeros(len(SCRIPTS), dtype=np.int64), np.zeros(len(SCRIPTS), dtype=np.int64)

    def add(self, ids: np.ndarray) -> None:
        """Counts these tokens; the bytes of neighbours may make a character together."""
        ids = ids[self.widths[ids] > 0]
        if len(ids):
            text = np.frombuffer(b"".join(map(self.spelled.__getitem__, ids)), dtype=np.uint8)
            starts = np.cumsum(self.widths[ids]) - self.widths[ids]
            script = np.minimum.reduceat(bytes_to_scripts(text), starts)
            self.tokens += np.bincount(script, minlength=len(SCRIPTS))
            self.bytes += np.bincount(script, weights=self.widths[ids], minlength=len(SCRIPTS)).astype(np.int64)

    def scripts(self) -> dict[str, Script]:
        """What was counted, the scripts with most bytes first."""
        found = {
            name: Script(int(self.bytes[n]), int(self.tokens[n])) for n, name in enumerate(SCRIPTS) if self.tokens[n]
        }
        return dict(sorted(found.items(), key=lambda item: -item[1].bytes))
