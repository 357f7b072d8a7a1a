"""Lines of text files in any encoding; and records: CSV and TSV tables, JSON and JSONL objects, and Parquet rows, as
dictionaries.

A decoding error names the file, the line and the byte, and suggests a remedy. Each record comes with its position,
"FILE, line N", for error messages. The first line of a CSV or TSV file names its columns.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from keifu.errors import UserError, install, unknown
from keifu.untrusted import parse_json, plain_file

Problem = Callable[[str], None]
UTF8 = "utf-8"
MARKS = (  # byte order marks; UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, UTF8), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
COMMON = ("utf-8", "utf-16", "cp932", "shift_jis", "euc_jp", "iso2022_jp", "gb18030", "big5", "euc_kr", "cp1250",
          "cp1251", "cp1252", "koi8_r", "latin_1")  # fmt: skip
JAPANESE = ("cp932", "euc_jp", "iso2022_jp")
KANA = re.compile("[\u3041-\u30fe]")  # hiragana and full-width katakana
FULL_WIDTH = re.compile("[\0-\x7f\u3000-\u30fe\u4e00-\u9fff\uff01-\uff5e]*")  # ASCII and Japanese text
SNIFFED = 8192  # bytes examined at the start of a file, and in a faulty line
Record = dict[str, Any]  # values by field
Row = tuple[str, Record]  # position for errors, and the record
LONGEST_CELL = 2**31 - 1  # characters; csv's own limit is 131,072


def refuse(problem: str) -> None:
    """Raise a `UserError` with the sentence about an error in the data."""
    raise UserError(problem)


def lines(path: Path, problem: Problem = refuse, encoding: str | None = None) -> Iterator[str]:
    """Yield lines that end with "\\n", whatever the file's line ends are. A byte order mark decides the encoding.

    encoding: None means UTF-8 and that the user has no option to change it. problem: receives a sentence for each line
    that is not in the encoding, and for a binary file. If it returns, invalid bytes become U+FFFD, and a binary file
    has no lines. Raises `UserError`, with the nearest name, for an unknown encoding.
    """
    with plain_file(path).open("rb") as file:
        start = file.read(SNIFFED)
        mark, name = next((pair for pair in MARKS if start.startswith(pair[0])), (b"", encoding or UTF8))
        if _bits(name) > 8:
            file.seek(0)
            yield from _wide(file, path, name, problem)
            return
        if b"\0" in start:
            problem(f"{path} is binary, not text: byte {start.index(0) + 1} is zero.")
            return
        file.seek(len(mark))
        for number, line in enumerate(file, 1):
            try:
                text = line.decode(name)
            except UnicodeDecodeError as error:
                problem(f"{path}, line {number}: {_fault(error, line, name, encoding is not None)}")
                text = line.decode(name, errors="replace")
            yield text[:-2] + "\n" if text.endswith("\r\n") else text


def _bits(encoding: str) -> int:
    """Return the size of the encoding's unit in bits: 8 if the byte 10 always is the end of a line."""
    try:
        "".encode(encoding)
        wide = re.match(r"utf-(16|32)", codecs.lookup(encoding).name)
    except LookupError:
        raise unknown("encoding", encoding, COMMON) from None
    return int(wide[1]) if wide else 8


def _wide(file: BinaryIO, path: Path, encoding: str, problem: Problem) -> Iterator[str]:
    """Yield the lines of a file in UTF-16 or UTF-32. The whole file is read at once."""
    data = file.read()
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        problem(f"{path}: byte {error.start + 1} of the file is not {encoding.upper()} ({error.reason}).")
        text = data.decode(encoding, errors="replace")
    yield from io.StringIO(text.replace("\r\n", "\n"), newline="\n")


def _fault(error: UnicodeDecodeError, line: bytes, encoding: str, option: bool) -> str:
    """Describe the error in a line, and suggest a correction."""
    wrong = " ".join(f"0x{byte:02X}" for byte in line[error.start : max(error.end, error.start + 1)])
    guess = _guess(line[: SNIFFED + error.end])
    ways = [f"name it with --encoding {guess}"] if option and guess else []
    ways += [f"convert it, as with `iconv -f {(guess or 'ENCODING').upper().replace('_', '-')} -t UTF-8`"]
    looks = f"it may be {guess}" if guess else "it may be in another encoding, or damaged"
    return f"{wrong} at byte {error.start + 1} of the line is not {encoding.upper()}: {looks}; {', or '.join(ways)}."


def _guess(line: bytes) -> str | None:
    """Guess the encoding of a line: a Japanese one if that gives Japanese text, else Windows-1252 (Western Europe)."""
    for encoding in (*JAPANESE, "cp1252"):
        with suppress(UnicodeDecodeError):
            text = line.decode(encoding)
            if encoding == "cp1252" or KANA.search(text) or FULL_WIDTH.fullmatch(text):
                return encoding
    return None


def read_records(
    path: Path, problem: Problem = refuse, encoding: str | None = None, only: str | None = None
) -> Iterator[Row]:
    """Yield the records of a .csv, .tsv, .jsonl, .json (a list of objects) or .parquet file, in order.

    problem, encoding: see `lines`. `problem` also gets bad JSON, values that are not objects, and rows whose
    number of cells differs from the header's; if it returns, the record is skipped. only: the only column to read from
    a .parquet file that has it. Raises `UserError` for any other kind of file.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path} is no table of records: its name must end in {', '.join(SUFFIXES)}.")
    if path.suffix.lower() == ".parquet":
        yield from _parquet(path, only)
        return
    for where, record in READERS[path.suffix.lower()](path, problem, encoding):
        if isinstance(record, dict):
            yield where, record
        else:
            problem(f"{where}: this is {type(record).__name__}, where an object with fields is needed.")


def read_cells(
    path: Path, problem: Problem = refuse, encoding: str | None = None, delimiter: str | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Yield (position, cells) of each row of a table that is not blank, including the header.

    delimiter: None: the most frequent of comma, semicolon and tab in the first line; cells may be quoted and span
    lines. If it is given, quotation marks have no meaning.
    """
    text = lines(path, problem, encoding)
    first = next(text, "")
    csv.field_size_limit(LONGEST_CELL)
    if delimiter is None:
        table = csv.reader(chain([first], text), strict=True, delimiter=max(",;\t", key=first.count))
    else:
        table = csv.reader(chain([first], text), delimiter=delimiter, quoting=csv.QUOTE_NONE)
    begins = 1
    try:
        for cells in table:
            if any(cell.strip() for cell in cells):
                yield f"{path}, line {begins}", cells
            begins = table.line_num + 1
    except csv.Error as error:
        problem(f"{path}, line {begins}: this cannot be read as a row of a table ({error}).")


def content(where: str, record: Mapping[str, Any], field: str) -> Any:
    """Return the value of a record's field. Raises `UserError`, with the nearest name, for an unknown field."""
    if field not in record:
        raise unknown(f"column (in {where})", field, record)
    return record[field]


def cell(where: str, record: Mapping[str, Any], field: str) -> str:
    """Return the text in a record's field. Raises `UserError`, with the line, if it is missing, empty or of another
    type."""
    value = content(where, record, field)
    if isinstance(value, dict | list):
        raise UserError(f"{where}: the column {field!r} holds a {type(value).__name__} where text is needed.")
    text = "" if value is None else str(value).strip()
    if not text:
        raise UserError(f"{where}: the column {field!r} is empty; fill it in, or leave the row out.")
    return text


def read_parts(folder: Path, file: str, fields: Sequence[str], thing: str) -> tuple[list[Record], list[Record]]:
    """Return the training and the test records of a folder's metadata file; a test record has "part": "test".

    fields: those that must be texts. The first one names a file of the folder, which errors call `thing`.
    """
    parts: tuple[list[Record], list[Record]] = ([], [])
    for where, record in read_records(folder / file):
        texts, part = [record.get(field) for field in fields], record.get("part", "train")
        if not all(isinstance(text, str) and text.strip() and "\0" not in text for text in texts):
            raise UserError(f"{where}: {', '.join(fields)} must be texts, not {texts}.")
        if not (folder / str(texts[0])).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{where}: the {thing} {texts[0]} is outside of the folder.")
        if part not in ("train", "test"):
            raise UserError(f'{where}: part must be "train" or "test", not {part!r}.')
        parts[part == "test"].append(record)
    return parts


def listed(record: Mapping[str, Any]) -> str:
    """Return the names of a record's fields as a list for errors."""
    return ", ".join(map(repr, [*record][:10])) or "none"


def _table(path: Path, problem: Problem, encoding: str | None, delimiter: str | None = None) -> Iterator[Row]:
    header: list[str] = []
    for where, cells in read_cells(path, problem, encoding, delimiter):
        if not header:
            header = [cell.strip() for cell in cells]
            if twice := next((name for name in header if header.count(name) > 1), None):
                raise UserError(f"{where}: two columns are called {twice!r}; rename one.")
        elif len(cells) != len(header):
            problem(f"{where}, has {len(cells)} cells where the first line has {len(header)}.")
        else:
            yield where, dict(zip(header, cells, strict=True))


def _jsonl(path: Path, problem: Problem, encoding: str | None) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines(path, problem, encoding), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", _parse_json(line, path, number)
            except UserError as error:
                problem(str(error))


def _json(path: Path, problem: Problem, encoding: str | None) -> Iterator[tuple[str, Any]]:
    content = _parse_json("".join(lines(path, problem, encoding)) or "[]", path)
    if not isinstance(content, list):
        type_name = "object" if isinstance(content, dict) else type(content).__name__
        advice = "a list of objects is needed; or write one object a line into a .jsonl file"
        raise UserError(f"{path} holds one {type_name}, where {advice}.")
    yield from ((f"{path}, entry {number}", record) for number, record in enumerate(content, 1))


def _parse_json(text: str, path: Path, line: int | None = None) -> Any:
    """Parse one line of a file, or all of it. Raises `UserError`, with line and column, for invalid JSON."""
    try:
        return parse_json(text, path if line is None else f"{path}, line {line}")
    except UserError as error:
        if not isinstance(cause := error.__cause__, json.JSONDecodeError):
            raise
        where = f"{path}, line {line or cause.lineno}"
        raise UserError(f"{where}: this is no JSON ({cause.msg}, column {cause.colno}).") from error


def _parquet(path: Path, only: str | None) -> Iterator[Row]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ModuleNotFoundError:
        raise UserError(f"Reading {path} needs pyarrow: {install('parquet')} brings it.") from None
    try:
        file = parquet.ParquetFile(plain_file(path))
    except (ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is no Parquet file, or it is damaged: {error}") from error
    number, columns = 0, [only] if only in file.schema_arrow.names else None
    try:
        with file:
            batches = file.iter_batches(columns=columns)
            for number, record in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1):
                yield f"{path}, row {number}", record
    except (ArithmeticError, OSError, ValueError, TypeError, NotImplementedError) as error:  # of pyarrow too
        reason = " ".join(str(error).split()).rstrip(".")[:200]
        raise UserError(f"{path} is damaged: its rows from {number + 1:,} on cannot be read ({reason}).") from error


Reader = Callable[[Path, Problem, str | None], Iterator[tuple[str, Any]]]
READERS: dict[str, Reader] = {".csv": _table, ".tsv": partial(_table, delimiter="\t"), ".jsonl": _jsonl, ".json": _json}
SUFFIXES = (*READERS, ".parquet")
