"""`POST /v1/search`: passages of a folder with file and line; files that change, paths, links and refusals."""

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_toys import WAIT, running

from keifu import cli
from keifu.inference.embeddings import encoders, search as searched
from keifu.serving.app import Access
from keifu.serving.openai import vectors as service
from keifu.serving.worker import Limits

DOGS = {"file": "more/dogs.html", "line": 2, "heading": "Dogs", "text": "seven dogs ran far"}


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return documents, one of them a link to a file outside, and an empty cache."""
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    notes = tmp_path / "notes"
    (notes / "more").mkdir(parents=True)
    (notes / "cat.md").write_text("the cat\n\nsat on a mat\n")
    (notes / "more" / "dogs.html").write_text("<h1>Dogs</h1>\n<p>seven dogs ran far</p>")
    (tmp_path / "secret.txt").write_text("the secret cat sat")
    (notes / "link.txt").symlink_to(tmp_path / "secret.txt")
    (notes / "away").symlink_to(tmp_path, target_is_directory=True)
    return notes


@pytest.fixture
def searching(folder: Path, notes: Path) -> Iterator[Any]:
    """Yield a server over an encoder and a model that generates, with these documents."""
    access = Access(keys=("k",), hosts=("127.0.0.1",), body=2000, documents=notes)
    with running([str(folder / "encoder"), str(folder / "base")], Limits(), access) as found:
        yield found


def search(server: Any, query: str, key: str = "k", headers: dict[str, str] | None = None, **more: Any) -> Any:
    """Return the status of an answer, and its JSON."""
    found = server.post(
        "/v1/search", {"query": query, **more}, headers={"authorization": f"Bearer {key}", **(headers or {})}
    )
    return found.status_code, found.json()


def test_the_nearest_passages_have_file_line_and_score(searching: Any, notes: Path) -> None:
    status, found = search(searching, "Dogs: seven dogs ran far", limit=2)
    assert status == 200 and found["object"] == "list" and found["model"] == "encoder"
    first, second = found["data"]
    assert first.pop("score") == pytest.approx(1, abs=1e-4) and first == DOGS
    assert second["file"] == "cat.md" and second["score"] < 1
    assert found["usage"]["prompt_tokens"] > 2
    status, found = search(searching, "the cat", model="encoder")
    assert [(each["file"], each["line"]) for each in found["data"]][:1] == [("cat.md", 1)] and len(found["data"]) == 3
    assert "secret" not in str(found) and str(notes.parent) not in str(found)


def test_the_index_follows_the_files_and_is_that_of_the_command(
    searching: Any, notes: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    counts = []

    def counted(model: Any, rows: Any, *rest: Any) -> Any:
        counts.append(len(rows))
        return encoders.embed_rows(model, rows, *rest)

    monkeypatch.setattr(searched, "embed_rows", counted)
    (notes / "link.txt").unlink()
    cli.main(["search", str(notes), "a mat", "--model", str(folder / "encoder"), "--json"])
    assert len(capsys.readouterr().out.splitlines()) == 3 == counts.pop()
    assert len(search(searching, "a mat")[1]["data"]) == 3 and not counts
    (notes / "cat.md").write_text("the cat\n\nsat on a mat\n\nthe mat is far away\n")
    (notes / "bad.txt").write_bytes(b"\xff\xfe\xff")
    data = search(searching, "the mat is far away")[1]["data"]
    assert (data[0]["file"], data[0]["line"], len(data)) == ("cat.md", 5, 4) and counts == [1]
    (notes / "more" / "dogs.html").unlink()
    assert {each["file"] for each in search(searching, "dogs")[1]["data"]} == {"cat.md"}


def test_documents_that_are_gone_are_an_error_without_their_path(searching: Any, notes: Path) -> None:
    (notes / "cat.md").write_text("")
    (notes / "more" / "dogs.html").write_text("")
    for _ in range(2):
        status, found = search(searching, "the cat")
        assert status == 503 and found["error"]["code"] == "no_index" and str(notes.parent) not in str(found)
        if notes.exists():
            notes.rename(notes.with_name("renamed"))
    notes.with_name("renamed").rename(notes)
    (notes / "cat.md").write_text("the cat")
    assert search(searching, "the cat")[0] == 200


REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("cat", {"limit": 0}, 400, "limit is 0"), ("cat", {"limit": 51}, 400, "limit is 51"),
    ("cat", {"limit": "5"}, 400, 'limit is "5"'), ("cat", {"top": 3}, 400, "There is no field 'top'"),
    (" ", {}, 400, "Text 1 of 1 is empty"), ("cat " * 30, {}, 400, "the model takes 16: .* the field cut"),
    ("cat", {"model": "base"}, 400, "for this, ask encoder"), ("cat", {"model": "x"}, 404, "There is no model 'x'"),
    ("cat", {"key": "other"}, 401, "needs a key"), ("c" * 3000, {}, 413, "2,000 bytes"),
    ("cat", {"headers": {"origin": "http://evil.example"}}, 403, "may not ask"),
]  # fmt: skip


def test_a_request_that_is_wrong_is_refused(searching: Any) -> None:
    for query, more, status, words in REFUSED:
        code, found = search(searching, query, **more)
        assert code == status and re.search(words, found["error"]["message"]), (query[:9], more, found)
    assert search(searching, "cat " * 30, cut=True)[0] == 200


def test_a_server_without_documents_names_the_option(served: Any) -> None:
    found = served.post("/v1/search", {"query": "cat"})
    error = found.json()["error"]
    assert found.status_code == 404 and error["code"] == "no_documents" and "--search FOLDER" in error["message"]


def test_an_index_that_is_built_does_not_delay_other_models(searching: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on = threading.Event(), threading.Event()
    build = service.build_index

    def waiting(*arguments: Any) -> Any:
        began.set()
        assert go_on.wait(WAIT)
        return build(*arguments)

    monkeypatch.setattr(service, "build_index", waiting)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(search(searching, "the cat")))
    asking.start()
    assert began.wait(WAIT)
    body, headers = {"model": "base", "prompt": "abc", "max_tokens": 1}, {"authorization": "Bearer k"}
    assert searching.post("/v1/completions", body, headers=headers).status_code == 200 and not answers
    go_on.set()
    asking.join(WAIT)
    assert answers[0][0] == 200


def test_a_folder_that_cannot_be_searched_is_refused_before_the_start(
    folder: Path, notes: Path, capsys: pytest.CaptureFixture
) -> None:
    (notes / "empty").mkdir()
    encoder, base = str(folder / "encoder"), str(folder / "base")
    for model, place, words in (
        (encoder, notes / "none", "There is no folder"), (encoder, notes / "empty", "holds no document"),
        (encoder, notes / "cat.md", "is a file"), (base, notes, "--search needs an encoder"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            cli.main(["serve", model, "--search", str(place), "--port", "0"])
        printed = capsys.readouterr()
        assert words in printed.err and "Listening" not in printed.out


def test_a_question_that_the_encoder_cannot_read_is_answered_with_a_warning(
    searching: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searched, "ENGLISH", ("encoder",))
    assert search(searching, "猫はどこ")[1]["warning"].startswith("encoder reads English")
    assert "warning" not in search(searching, "the cat")[1]
