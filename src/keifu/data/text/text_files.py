"""Lines of text files in any encoding. A decoding error names the file, the line and the byte, and suggests a
remedy."""

import codecs
import io
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from keifu.errors import UserError, unknown
from keifu.untrusted import plain_file

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


def refuse(problem: str) -> None:
    """Raise a `UserError` with the sentence about a fault in the data."""
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
    """Describe the fault in a line, and suggest a remedy."""
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
