"""The one reader of records: every format gives the same rows, and a fault comes with its file and line."""

import json
import re
from pathlib import Path

import pytest

from keifu.data.records import read_cells, read_records
from keifu.errors import UserError

RECORDS = [{"text": 'Tea, "green"', "label": "日本"}, {"text": "two\nlines", "label": "x"}]
CSV = 'text,label\n"Tea, ""green""",日本\n\n"two\nlines",x\n'


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(path: Path) -> list[dict[str, str]]:
    return [record for _, record in read_records(path)]


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_every_format_gives_the_same_rows(tmp_path: Path, mark: bytes, ends: str) -> None:
    objects = [json.dumps(each, ensure_ascii=False) for each in RECORDS]
    texts = {"a.csv": CSV, "b.csv": CSV.replace("text,label", "text;label").replace('",', '";'),
             "c.jsonl": "\n\n".join(objects), "d.JSON": f"[{','.join(objects)}]\n"}  # fmt: skip
    for name, text in texts.items():
        assert rows(write(tmp_path / name, mark + text.replace("\n", ends).encode())) == RECORDS


def test_parquet_gives_the_same_rows_and_one_column_alone(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet") == RECORDS
    assert [*read_records(tmp_path / "a.parquet", only="label")][1] == (f"{tmp_path}/a.parquet, row 2", {"label": "x"})


def test_a_damaged_part_of_a_parquet_file_is_refused_with_its_first_row(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file, texts = tmp_path / "a.parquet", [f"text {number}" for number in range(70_000)]
    table = pyarrow.table({"text": texts})
    parquet.write_table(table, file, row_group_size=1 << 16, compression="gzip", use_dictionary=False)
    start = parquet.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(file.read_bytes())
    content[start + 40 : start + 400] = bytes(360)
    records = read_records(write(file, bytes(content)))
    assert [next(records)[1]["text"] for _ in range(1 << 16)] == texts[: 1 << 16]
    with pytest.raises(UserError, match="a.parquet is damaged: its rows from 65,537 on cannot be read"):
        next(records)


def test_quotation_marks_mean_nothing_in_tsv(tmp_path: Path) -> None:
    assert rows(write(tmp_path / "a.tsv", 'text\tlabel\n"half\t1\n')) == [{"text": '"half', "label": "1"}]


def test_places_are_the_lines_where_rows_begin(tmp_path: Path) -> None:
    places = [place for place, _ in read_records(write(tmp_path / "a.csv", CSV))]
    assert places == [f"{tmp_path}/a.csv, line 2", f"{tmp_path}/a.csv, line 4"]


FAULTS = {
    "cells": ("a.csv", "a,b\n1,2\n1\n", "a.csv, line 3, has 1 cells where the first line has 2"),
    "tsv cells": ("a.tsv", "a\tb\n1\t2\t3\n", "a.tsv, line 2, has 3 cells where the first line has 2"),
    "quote": ("a.csv", 'a,b\n1,2\n"1,2\n3,4\n', "a.csv, line 3: this cannot be read as a row of a table"),
    "same name": ("a.csv", "a,b,a\n", "a.csv, line 1: two columns are called 'a'"),
    "json line": ("a.jsonl", '{"a": 1}\n\n{"a"\n', "a.jsonl, line 3: this is no JSON"),
    "json": ("a.json", '[{"a": 1},\n{"a" 2}]', "a.json, line 2: this is no JSON"),
    "one object": ("a.json", "{}", "a.json holds one object, where a list of objects is needed"),
    "no object": ("a.json", '[{"a": 1}, "b"]', "a.json, entry 2: this is str, where an object with fields is needed"),
    "bytes": ("a.jsonl", b'{"a": "x"}\n{"a": "\xe9t\xe9"}\n', "line 2: 0xE9 at byte 8 of the line is not UTF-8"),
    "kind": ("a.xls", "", r"a.xls is no table of records: its name must end in \.csv, .*\.parquet"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_place(tmp_path: Path, fault: str) -> None:
    name, content, message = FAULTS[fault]
    with pytest.raises(UserError, match=message):
        rows(write(tmp_path / name, content))


def test_reading_goes_on_after_a_fault_that_is_only_noted(tmp_path: Path) -> None:
    problems: list[str] = []
    file = write(tmp_path / "a.jsonl", b'{"a": 1}\n[]\n{"a"\n{"a": "\xff"}\n')
    assert [record for _, record in read_records(file, problems.append)] == [{"a": 1}, {"a": "\ufffd"}]
    assert [re.sub(r".*a.jsonl, (line \d).*", r"\1", each) for each in problems] == ["line 2", "line 3", "line 4"]


def test_cells_have_no_header_and_blank_rows_are_left_out(tmp_path: Path) -> None:
    assert [cells for _, cells in read_cells(write(tmp_path / "a.txt", "1;2\n\n ; \n3;4"))] == [["1", "2"], ["3", "4"]]
    assert not [*read_cells(write(tmp_path / "a.txt", ""))]


def test_rows_are_named_by_the_line_where_they_begin(tmp_path: Path) -> None:
    """A cell with line breaks and a blank line: the number of the row, of the line and of the last line all differ."""
    file = tmp_path / "a.csv"
    file.write_text('a,b\n"x\ny\nz",1\n2,3\n\n"4\n5",6\n7,8\n')
    places = [where.rpartition(" ")[2] for where, _ in read_cells(file)]
    assert places == ["1", "2", "5", "7", "9"]
