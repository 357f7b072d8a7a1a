"""Excerpts of documents: their lines, and the files that are left out."""

import os
from pathlib import Path

import pytest
from hypothesis import given, strategies

from keifu.data.text import excerpts
from keifu.data.text.excerpts import LARGEST, FolderOfDocuments, cut_all, cut_excerpts
from keifu.data.text.passages import LONGEST
from keifu.errors import UserError

TEXT = "# Notes\n\nThe cat\nsat.\n\nA dog ran.\n\n## Far\nSeven.\n"


def test_an_excerpt_has_the_lines_that_it_names() -> None:
    sources = [(part.source, part.heading, part.text) for part in cut_excerpts(TEXT, "n.md")]
    assert sources == [("n.md:3-6", "Notes", "The cat\nsat.\n\nA dog ran."), ("n.md:9", "Far", "Seven.")]
    [code] = cut_excerpts("# a comment\nx = 1\n", "a.py")
    assert code.source == "a.py:1-2" and code.heading == ""
    assert [part.source for part in cut_excerpts("a\r\nb\r\n", "w.txt")] == ["w.txt:1-2"]
    assert cut_excerpts("\n \n# Only a heading\n", "n.md") == []


@given(strategies.lists(strategies.sampled_from(["", "# H", "x" * 90, "y" * 1500, "z"]), max_size=40))
def test_no_line_is_lost_or_misnumbered(lines: list[str]) -> None:
    parts = cut_excerpts("\n".join(lines), "n.txt")
    assert all(len(part.text) <= LONGEST for part in parts)
    covered = {number for part in parts for number in range(part.line, part.last_line + 1)}
    assert covered >= {number for number, line in enumerate(lines, 1) if line and line != "# H"}
    for part in parts:
        [first, *others] = part.text.splitlines()
        assert first in lines[part.line - 1] and others == lines[part.line : part.last_line]


def test_files_that_are_no_documents_are_left_out_with_a_line_each(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("The cat.")
    (tmp_path / "b.pdf").write_bytes(b"%PDF")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "zero.txt").write_bytes(b"a\0b")
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(LARGEST + 1)
    (tmp_path / "out.md").symlink_to("/etc/hostname")
    lines = list[str]()
    documents = FolderOfDocuments(tmp_path, lines.append)
    assert [part.source for part in documents.refresh()] == ["a.md:1"]
    documents.refresh()
    assert len(lines) == 4, lines  # each once
    assert "b.pdf" in lines[0] and "at most 2,097,152" in lines[1] and "not UTF-8" in lines[2] and "binary" in lines[3]


def test_a_folder_without_a_document_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, told in {"": "no document", "missing": "no folder"}.items():
        with pytest.raises(UserError, match=told):
            FolderOfDocuments(tmp_path / name, print).refresh()
    (tmp_path / "a.md").write_text(" \n")
    with pytest.raises(UserError, match="have no text"):
        FolderOfDocuments(tmp_path, print).refresh()
    monkeypatch.setattr(excerpts, "MOST", 1)
    (tmp_path / "a.md").write_text(TEXT)
    for refused in (FolderOfDocuments(tmp_path, print).refresh, lambda: cut_all([("a.md", TEXT)])):
        with pytest.raises(UserError, match="2 passages, and at most 1"):
            refused()


def test_only_changed_files_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.md", "b.md"):
        (tmp_path / name).write_text("old")
    documents, read = FolderOfDocuments(tmp_path, print), list[str]()
    real = excerpts.read_text
    monkeypatch.setattr(excerpts, "read_text", lambda path: read.append(path.name) or real(path))
    documents.refresh()
    about = (tmp_path / "a.md").stat()
    (tmp_path / "a.md").write_text("new")
    os.utime(tmp_path / "a.md", ns=(about.st_atime_ns, about.st_mtime_ns + 1_000_000_000))
    assert [part.text for part in documents.refresh()] == ["new", "old"]
    (tmp_path / "b.md").unlink()
    assert [part.text for part in documents.refresh()] == ["new"]
    assert read == ["a.md", "b.md", "a.md"]
