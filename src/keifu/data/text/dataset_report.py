"""Report on a data set before training: invalid bytes, empty and repeated documents, and the tokenizer's coverage.

Coverage is the number of unknown tokens and lost characters, and for each script (Latin, Han, ...) the tokens per
character.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from keifu.data.text import documents as sources
from keifu.data.text.documents import PLAIN, TextChunk, TextFileFormat, chunks
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError

CHARACTERS_SHOWN = 8  # characters that a sentence lists


@dataclass(frozen=True)
class TokenizerCoverage:
    """Counts of a text's characters, without spaces: all of them, and those that are not in any token, with examples.

    lost: number of characters that become the unknown token or cannot be encoded. The others are encoded as bytes.
    """

    characters: int
    missing_count: int
    lost: int
    examples: str

    @property
    def share(self) -> float:
        """Share of the characters that are in tokens of the vocabulary."""
        return 1 - self.missing_count / max(1, self.characters)

    def sentence(self, name: str) -> str:
        """Return a sentence with the share of a text that the vocabulary covers."""
        if not self.missing_count:
            return f"Every character of {name} is in the tokenizer's vocabulary."
        consequence = "are spelled in bytes, so nothing is unknown"
        if self.lost:
            consequence = f"are not, and {self.lost:,} of {self.characters:,} characters become unknown"
        stand = f"{self.share:.2%} of the characters of {name} stand in the tokenizer's vocabulary"
        return f"{stand}; the others ({self.examples}) {consequence}."


def coverage(tokenizer: Tokenizer, texts: Iterable[str]) -> TokenizerCoverage:
    """Count the characters of texts, and those that the tokenizer does not know."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    spelled = "".join(tokenizer.token_bytes(n).decode(errors="ignore") for n in range(tokenizer.vocab_size))
    known_characters = {character for character in counts if character.isspace()} | set(spelled)
    missing_characters = [c for c, _ in counts.most_common() if not set(_normalize(tokenizer, c)) <= known_characters]
    lost = [c for c in missing_characters if _is_lost(tokenizer, c)]
    characters = sum(n for c, n in counts.items() if not c.isspace())
    listed_characters = lost or missing_characters
    examples = "".join(listed_characters[:CHARACTERS_SHOWN]) + "..." * (len(listed_characters) > CHARACTERS_SHOWN)
    return TokenizerCoverage(
        characters, sum(counts[c] for c in missing_characters), sum(counts[c] for c in lost), examples
    )


def _normalize(tokenizer: Tokenizer, character: str) -> str:
    normalizer = tokenizer.backend.normalizer
    text = character if normalizer is None else normalizer.normalize_str(character)
    return text.replace("\N{LOWER ONE EIGHTH BLOCK}", "")


def _is_lost(tokenizer: Tokenizer, character: str) -> bool:
    unknown = tokenizer.special.get("unk_token")
    try:
        ids = tokenizer.encode(character)
    except UserError:
        return True
    return unknown is not None and tokenizer.token_id(unknown) in ids


_LINES = Path(__file__).with_name("scripts.txt").read_text(encoding="utf-8").splitlines()[1:]
# (script, first code point, last code point) of each block
_RANGES = [(name, int(ends[:5], 16), int(ends[7:], 16)) for ends, name in (line.split("; ") for line in _LINES)]
SCRIPTS = (*dict.fromkeys(name for name, *_ in _RANGES if name != "common"), "other", "common")
"""Names of scripts; the index is the script's number. "other" is any script not in the list; "common" is spaces,
digits, marks."""

_ORDERED = sorted((first, last, SCRIPTS.index(name)) for name, first, last in _RANGES)
_FIRST, _LAST, _SCRIPT = (np.array(column) for column in zip(*_ORDERED, strict=True))


def script_numbers(code_points: np.ndarray) -> np.ndarray:
    """Return the index in `SCRIPTS` of each code point's script."""
    block = np.searchsorted(_FIRST, code_points, side="right") - 1
    return np.where(code_points <= _LAST[block], _SCRIPT[block], SCRIPTS.index("other"))


def bytes_to_scripts(text: np.ndarray) -> np.ndarray:
    """Return for each byte of a UTF-8 text the script number of its character. Invalid bytes have the script
    "other"."""
    characters = text.tobytes().decode(errors="surrogateescape")  # an invalid byte becomes a surrogate
    points = np.frombuffer(characters.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64)
    lengths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    lengths[(points >= 0xD800) & (points <= 0xDFFF)] = 1
    return np.repeat(script_numbers(points), lengths)


FAULTS_SHOWN = 20  # faults with a line each; further ones are only counted
CHUNK = 1 << 20  # characters that are encoded at once


@dataclass
class Script:
    """Part of a text in one script: number of `bytes`, and number of `tokens` for them."""

    bytes: int = 0
    tokens: int = 0

    @property
    def tokens_per_byte(self) -> float:
        """Tokens per byte: near 0.25 if the tokenizer knows the script, 1 if it encodes byte by byte."""
        return self.tokens / max(self.bytes, 1)


@dataclass
class DatasetReport:
    """Report on a data set. repeats: sentences that name the first repeated documents. lengths: number of documents by
    their tokens; a key is the upper limit of its range.

    A token with several scripts counts for the first of them in `SCRIPTS`. Spaces and marks in a token with letters
    count for the letters' script; without letters they are "common".
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
    repeats: list[str] = field(default_factory=list)
    lengths: dict[int, int] = field(default_factory=dict)
    scripts: dict[str, Script] = field(default_factory=dict)

    def problem(self, sentence: str) -> None:
        """Record a fault. The first `FAULTS_SHOWN` are kept with their lines."""
        self.n_problems += 1
        if self.n_problems <= FAULTS_SHOWN:
            self.problems.append(sentence)

    def to_json(self) -> dict[str, Any]:
        """Return the whole report as a JSON object."""
        rates = {name: asdict(each) | {"tokens_per_byte": each.tokens_per_byte} for name, each in self.scripts.items()}
        return asdict(self) | {"lengths": {str(key): n for key, n in self.lengths.items()}, "scripts": rates}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        rate = f"{self.tokens:,} tokens ({self.tokens / max(self.bytes, 1):.3f} a byte)"
        sizes = f"{self.characters:,} characters, {self.bytes:,} bytes, {rate}"
        yield f"{self.source}: {self.documents:,} documents, {sizes}"
        yield f"{self.empty:,} documents are empty, and {self.duplicates:,} repeat an earlier one exactly."
        yield from (f"  {sentence}" for sentence in self.repeats)
        yield "\nDocuments by length in tokens"
        most = max(self.lengths.values(), default=1)
        for longest, count in self.lengths.items():
            yield f"  up to {longest:>11,} {count:>11,}  {'#' * -(-40 * count // most)}"
        yield f"\n{'Script':10} {'bytes':>15} {'tokens':>13} {'tokens/byte':>12}"
        for name, script in self.scripts.items():
            yield f"{name:10} {script.bytes:>15,} {script.tokens:>13,} {script.tokens_per_byte:>12.3f}"
        yield ""
        yield from self.problems
        if self.n_problems > FAULTS_SHOWN:
            yield f"... and {self.n_problems - FAULTS_SHOWN:,} more faults."
        if not self.n_problems:
            yield "No faulty bytes, lines or files were found."


def check_dataset(source: str | Path, tokenizer: Tokenizer, form: TextFileFormat = PLAIN) -> DatasetReport:
    """Read and encode a whole source (see `keifu.data.text.documents`). Faults are recorded, and reading continues."""
    report = DatasetReport(str(source))
    documents, spelling = _Documents(report), _Spelling(tokenizer)
    for pieces in chunks(sources.read_chunks(source, form, report.problem), CHUNK):
        encoded = tokenizer.encode_batch([piece.text for piece in pieces])
        for piece, ids in zip(pieces, encoded, strict=True):
            documents.add(piece, len(ids))
        spelling.add(np.fromiter(chain.from_iterable(encoded), dtype=np.int64))
    report.lengths = dict(sorted(documents.lengths.items()))
    report.scripts = spelling.scripts()
    return report


class _Documents:
    """Counter of documents. It receives them in chunks."""

    def __init__(self, report: DatasetReport):
        self.report = report
        self.first_numbers: dict[bytes, int] = {}  # the number of the document with this hash, over all files
        self.files: list[tuple[int, str]] = []  # the number of the first document of each file, and its path
        self.lengths: Counter[int] = Counter()
        self.hash, self.tokens, self.blank = blake2b(digest_size=16), 0, True  # of the present document

    def add(self, piece: TextChunk, tokens: int) -> None:
        """Count a chunk, and its document if the chunk ends it."""
        data = piece.text.encode()
        self.report.characters += len(piece.text)
        self.report.bytes += len(data)
        self.report.tokens += tokens
        self.hash.update(data)
        self.tokens += tokens
        self.blank = self.blank and not piece.text.strip()
        if piece.ends:
            number = self.report.documents
            self.report.documents += 1
            if not self.files or self.files[-1][1] != piece.file:
                self.files.append((number, piece.file))
            self.report.empty += self.blank
            self.lengths[1 << max(self.tokens - 1, 0).bit_length()] += 1  # the next power of two
            digest = self.hash.digest()
            if (first := self.first_numbers.setdefault(digest, number)) != number and not self.blank:
                self.report.duplicates += 1
                if len(self.report.repeats) < FAULTS_SHOWN:
                    self.report.repeats.append(f"{self._place(number)} is a copy of {self._place(first)}")
            self.hash, self.tokens, self.blank = blake2b(digest_size=16), 0, True

    def _place(self, number: int) -> str:
        """Return the file and the number in it, counted from 1, of a document that is numbered over all files."""
        first, file = self.files[bisect_right(self.files, number, key=lambda start: start[0]) - 1]
        return f"document {number - first + 1:,} of {file}" if file else f"document {number + 1:,}"


class _Spelling:
    """Counter of tokens and their bytes by script."""

    def __init__(self, tokenizer: Tokenizer):
        self.spelled = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.widths = np.array([len(word) for word in self.spelled])
        self.bytes, self.tokens = np.zeros(len(SCRIPTS), dtype=np.int64), np.zeros(len(SCRIPTS), dtype=np.int64)

    def add(self, ids: np.ndarray) -> None:
        """Count these tokens. Neighbouring tokens may together encode one character."""
        ids = ids[self.widths[ids] > 0]
        if len(ids):
            text = np.frombuffer(b"".join(map(self.spelled.__getitem__, ids)), dtype=np.uint8)
            starts = np.cumsum(self.widths[ids]) - self.widths[ids]
            script = np.minimum.reduceat(bytes_to_scripts(text), starts)
            self.tokens += np.bincount(script, minlength=len(SCRIPTS))
            self.bytes += np.bincount(script, weights=self.widths[ids], minlength=len(SCRIPTS)).astype(np.int64)

    def scripts(self) -> dict[str, Script]:
        """Return the counts by script, the scripts with most bytes first."""
        used_scripts = ((n, name) for n, name in enumerate(SCRIPTS) if self.tokens[n])
        counts = {name: Script(int(self.bytes[n]), int(self.tokens[n])) for n, name in used_scripts}
        return dict(sorted(counts.items(), key=lambda item: -item[1].bytes))
