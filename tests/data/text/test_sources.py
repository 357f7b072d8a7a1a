"""Documents out of files and folders: every format, long ones in pieces, and every fault named with its place."""

import json
import re
from pathlib import Path

import pytest

from keifu.data.text import documents as sources
from keifu.data.text.documents import TextFileFormat, content_hash, documents, read_chunks
from keifu.errors import UserError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_text_file_is_one_document_with_unix_line_ends_and_no_mark(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    assert list(documents(file)) == list(documents(str(file))) == ["one\n\ntwo\n"]


def test_end_of_text_lines_part_documents(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "one\n<|endoftext|>\nsays <|endoftext|> inside\n<|endoftext|>\n")
    assert list(documents(file)) == ["one\n", "says <|endoftext|> inside\n"]


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_long_document_comes_in_pieces_that_begin_with_text(tmp_path: Path, monkeypatch, suffix: str) -> None:
    monkeypatch.setattr(sources, "LIMIT", 100)
    text = "".join(f"line {number}\n\n\n" for number in range(200))
    file = write(tmp_path / f"a.{suffix}", text if suffix == "txt" else json.dumps({"text": text}))
    parts = list(read_chunks(file))
    assert len(parts) > 10 and [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]
    assert all(100 <= len(part.text) < 130 and part.text.startswith("line") for part in parts[:-1])
    assert "".join(part.text for part in parts) == text == next(documents(file))


def test_json_lines_with_another_field_and_blank_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"body": "日本"}\n\n{"body": "two\\nlines", "n": 1}\n')
    assert list(documents(file, TextFileFormat("body"))) == ["日本", "two\nlines"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "二", None], "n": [1, 2, 3]}), file)
    problems: list[str] = []
    assert [piece.text for piece in read_chunks(file, problem=problems.append)] == ["one", "二"]
    assert problems == [f"{file}, row 3: the field 'text' is NoneType, not text."]
    with pytest.raises(UserError, match="row 1: there is no field 'body'. Known: n, text"):
        list(documents(file, TextFileFormat("body")))
    with pytest.raises(UserError, match="is no Parquet file"):
        list(documents(write(tmp_path / "bad.parquet", b"PAR1 not really")))


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=re.escape("pip install '.[parquet]' in keifu's checkout")):
        list(documents(write(tmp_path / "a.parquet", "x")))


def test_a_folder_is_read_in_order_without_what_is_hidden_or_no_text(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/c.jsonl", ".hidden/d.txt", "e.png"):
        write(tmp_path / name, json.dumps({"text": name}))
    assert list(documents(tmp_path)) == ["a/c.jsonl", '{"text": "a/z.md"}', '{"text": "b.txt"}']


def test_a_pattern_takes_files_of_any_kind(tmp_path: Path) -> None:
    write(tmp_path / "x" / "b.py", "b")
    write(tmp_path / "a.py", "a")
    assert list(documents(f"{tmp_path}/**/*.py")) == ["a", "b"]


def test_the_hash_follows_content_not_place(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one" / "a.txt", "same"), write(tmp_path / "two" / "b.txt", "same")
    assert content_hash(one) == content_hash(two) == content_hash(tmp_path / "one")
    assert content_hash(write(tmp_path / "c.txt", "other")) != content_hash(one)
    assert content_hash("sotu") != content_hash("recipes")


def test_a_catalogue_name_wins_over_a_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "python-code", "mine")
    assert next(documents("python-code")) != "mine"
    assert list(documents("./python-code")) == ["mine"]


FAULTS = {
    "no utf-8": ("a.txt", b"good\nba\xffd\n", "a.txt, line 2: 0xFF at byte 3 of the line is not UTF-8"),
    "cut character": ("a.txt", "good\n日本".encode()[:-1], "a.txt, line 2: 0xE6 0x9C at byte 4 of the line"),
    "binary": ("a.txt", b"\x7fELF\0\0", "a.txt is binary, not text: byte 5 is zero"),
    "empty": ("a.txt", b"", "There is no text in .*a.txt: it is empty"),
    "blank": ("a.txt", b" \n\n", "There is no text in .*a.txt: it is empty"),
    "no field": (
        "a.jsonl",
        b'{"text": "x"}\n{"body": "y"}',
        "a.jsonl, line 2: there is no field 'text'. Known: body",
    ),
    "no text": ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1: the field 'text' is int, not text"),
    "no json": ("a.jsonl", b'{"text": "x"}\n{"te', r"a.jsonl, line 2: this is no JSON \(Unterminated string"),
    "no object": ("a.jsonl", b"[1]\n", "a.jsonl, line 1: this is list, where an object with fields"),
    "surrogate": ("a.jsonl", b'{"text": "\\ud83d"}\n', "a.jsonl, line 1 holds .*, which is half of a character"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_with_their_place(tmp_path: Path, fault: str) -> None:
    name, content, sentence = FAULTS[fault]
    with pytest.raises(UserError, match=sentence):
        list(documents(write(tmp_path / name, content)))


def test_reading_can_go_on_after_a_fault(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"ba\xffd\nge\xfe\n")
    write(tmp_path / "b.jsonl", '{"text": "one"}\n{\n{"text": "two"}')
    problems: list[str] = []
    texts = [piece.text for piece in read_chunks(tmp_path, problem=problems.append)]
    assert texts == ["ba\ufffdd\nge\ufffd\n", "one", "two"]
    assert len(problems) == 3


def test_no_such_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "shakespeare.txt", "x")
    with pytest.raises(UserError, match=f"Did you mean '{tmp_path}/shakespeare.txt'"):
        list(documents(tmp_path / "shakespear.txt"))
    with pytest.raises(UserError, match="no file, folder or catalogue entry 'stou'. Did you mean 'sotu'"):
        list(documents("stou"))


def test_a_folder_without_text_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is empty"):
        list(documents(tmp_path))
    write(tmp_path / "a.py", "x")
    with pytest.raises(UserError, match=re.escape(f"holds .py: name them with a pattern such as {tmp_path}/**/*.py")):
        list(documents(tmp_path))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_table_is_not_learned_with_its_commas_and_numbers(tmp_path: Path, name: str) -> None:
    parting = "," if name == "a.csv" else "\t"
    rows = [("id", "review"), ("1", "Good."), ("2", "Bad.")]
    file = write(tmp_path / name, "\n".join(parting.join(row) for row in rows))
    with pytest.raises(UserError, match="there is no field 'text'. Known: id, review. .*--text-field"):
        list(documents(file))
    with pytest.raises(UserError, match="there is no field 'reviews'. Did you mean 'review'"):
        list(documents(file, TextFileFormat("reviews")))
    assert list(documents(file, TextFileFormat("review"))) == ["Good.", "Bad."]


def test_tables_in_a_folder_are_read_where_their_field_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "plain")
    write(tmp_path / "b.csv", "n,body\n1,from a table\n")
    assert list(documents(tmp_path)) == ["plain"]
    assert list(documents(tmp_path, TextFileFormat("body"))) == ["plain", "from a table"]


@pytest.mark.parametrize("encoding", ["cp932", "shift-jis", "euc_jp", "iso2022_jp", "utf-16", "utf-16-le", "gb18030"])
def test_a_text_in_another_encoding(tmp_path: Path, encoding: str) -> None:
    text = "これは日本語の文章です。\r\n二行目\n"
    file = write(tmp_path / "a.txt", text.encode(encoding))
    assert list(documents(file, TextFileFormat(encoding=encoding))) == [text.replace("\r", "")]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_decides_whatever_encoding_is_named(tmp_path: Path, encoding: str) -> None:
    for name, content in (("a.txt", "日本\n"), ("b.jsonl", '{"text": "日本\\n"}\n')):
        file = write(tmp_path / name, content.encode(encoding))
        assert list(documents(file)) == list(documents(file, TextFileFormat(encoding="cp1252"))) == ["日本\n"]


@pytest.mark.parametrize(
    ("text", "encoding", "advice"),
    [
        ("ok\nこれは\n", "cp932", "line 2: 0x82 at byte 1 of the line is not UTF-8: it may be cp932; name it"),
        ("ok\nこれは\n", "euc_jp", "line 2: 0xA4 .* it may be euc_jp; name it with --encoding euc_jp, or convert it"),
        ("感想,評価\n", "cp932", "line 1: 0x8A at byte 1 of the line is not UTF-8: it may be cp932; name it with"),
        ("感想,評価\n", "euc_jp", "it may be euc_jp; name it with"),
        ("café\n", "cp1252", "line 1: 0xE9 at byte 4 .* may be cp1252; .* `iconv -f CP1252 -t UTF-8`"),
    ],
)
def test_a_wrong_encoding_names_the_byte_and_what_to_try(tmp_path: Path, text: str, encoding: str, advice: str) -> None:
    with pytest.raises(UserError, match=advice):
        list(documents(write(tmp_path / "a.txt", text.encode(encoding))))


def test_bytes_that_are_not_in_the_encoding_that_was_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a.txt, line 1: 0x80 .* is not EUC_JP"):
        list(documents(write(tmp_path / "a.txt", b"a\x80b\n"), TextFileFormat(encoding="euc_jp")))
    with pytest.raises(UserError, match=r"a.txt: byte 5 of the file is not UTF-16 \(truncated data\)"):
        list(documents(write(tmp_path / "a.txt", b"\xff\xfea\0b"), TextFileFormat()))
    for name, near in (("shift_jsi", "Did you mean 'shift_jis'"), ("rot13", "There is no encoding 'rot13'")):
        with pytest.raises(UserError, match=near):
            list(documents(write(tmp_path / "b.txt", "x"), TextFileFormat(encoding=name)))


def test_the_text_of_a_page_without_its_tags(tmp_path: Path) -> None:
    page = (
        "<!doctype html><html><head><title>A &amp; B</title><style>p {color: red}</style>\n"
        "<script>if (a < b) x()</script>"
        "</head><body><h1>Tea</h1><p>Green <b>tea</b>\n  and caf&eacute;.<br>Next</p><ul><li>one<li>two</ul>"
        "<pre>  kept\n   as  it is</pre></body></html>"
    )
    write(tmp_path / "a.html", page)
    write(tmp_path / "b.md", "# Title\n\n*kept*\n")
    expected = "A & B\n\nTea\n\nGreen tea and café.\nNext\n\none\ntwo\n\n  kept\n   as  it is"
    assert list(documents(tmp_path)) == [expected, "# Title\n\n*kept*\n"]
