"""Who may ask the service, unfinished and expensive requests, names of models, ids of requests, and the access log."""

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from serving_toys import WAIT, running, until
from starlette.datastructures import Headers

from keifu import cli
from keifu.commands.serve import aliases
from keifu.errors import UserError
from keifu.serving import middleware, server
from keifu.serving.access import LOCAL, ApiKeys
from keifu.serving.app import Access
from keifu.serving.models import public_names, short_names
from keifu.serving.openai import generation
from keifu.serving.server import Address
from keifu.serving.worker import Limits

EVIL = "http://evil.example"


@pytest.mark.parametrize("host", ["", " "])
def test_an_empty_host_does_not_listen(host: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "a-model-that-is-not-there", "--host", host])  # refused before a model is looked for
    said = capsys.readouterr().err
    assert "--host is empty" in said and "WARNING" not in said


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.0.0.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)],
)
def test_addresses_of_this_machine(host: str, local: bool) -> None:
    assert Address(host).local == local


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Access]:
    """Return a list of the `Access` of each server that the command starts."""
    found: list[Access] = []
    monkeypatch.setattr("keifu.serving.app.application", lambda _, access: found.append(access))
    monkeypatch.setattr("keifu.serving.server.serve", lambda *_: None)
    return found


def test_a_server_that_all_can_reach_warns_without_a_key(
    base: str, started: list[Access], capsys: pytest.CaptureFixture
) -> None:
    cli.main(["serve", base, "--host", "0.0.0.0"])
    told = capsys.readouterr().err
    assert "WARNING: anyone who can reach 0.0.0.0 may use this server" in told and "--api-key" in told
    cli.main(["serve", base, "--host", "0.0.0.0", "--api-key", "secret"])
    cli.main(["serve", base])
    assert "WARNING" not in capsys.readouterr().err
    assert started[0].hosts == ("*",) and started[1].keys == ("secret",)
    assert started[2].hosts == (*LOCAL, "127.0.0.1")


def test_options_reach_the_server(base: str, started: list[Access]) -> None:
    cli.main(["serve", base, "--allowed-host", "chat.example", "--allowed-host", "*.lan", "--strict"])
    assert started[0].hosts == (*LOCAL, "127.0.0.1", "chat.example", "*.lan") and started[0].strict


def test_only_known_hosts_are_answered(folder: Path) -> None:
    hosts = ("127.0.0.1", "[::1]", "chat.example", "*.lan")
    with running([str(folder / "base")], Limits(), Access(hosts=hosts)) as served:
        for host in ("chat.example", "CHAT.example:8443", "a.lan", "[::1]:8000"):
            assert httpx.get(f"{served.url}/health", headers={"host": host}).status_code == 200
        for host in (
            "evil.example",
            "chat.example.evil",
            "lan",
            "xlan",
            "",
            "[::2]",
            "[::1]evil",
            "chat.example:1@evil.example",
        ):
            found = httpx.get(f"{served.url}/health", headers={"host": host})
            assert found.status_code == 400 and "--allowed-host" in found.json()["error"]["message"], host
            assert found.headers["x-request-id"] == found.json()["error"]["request_id"]


def test_pages_of_other_origins_cannot_send_forms(folder: Path) -> None:
    access = Access(origins=("https://friend.example",), hosts=(*LOCAL, "chat.example"))
    with running([str(folder / "ddpm")], Limits(), access) as served:

        def status(origin: str | None, path: str = "images/edits", **headers: str) -> int:
            headers |= {} if origin is None else {"origin": origin}
            files = {"image": ("x.png", b"none")}
            return httpx.post(f"{served.url}/v1/{path}", files=files, headers=headers).status_code

        for path in ("images/edits", "images/variations", "audio/transcriptions"):
            assert status(EVIL, path) == status("null", path) == 403
        assert httpx.post(f"{served.url}/v1/images/generations", json={}, headers={"origin": EVIL}).status_code == 403
        assert status("http://127.0.0.1:9") == status("http://localhost:9") == 403, "another program of this machine"
        for mine in (None, served.url, "https://friend.example", "https://chat.example"):
            assert status(mine) == 400  # the picture is none
        assert status("https://proxied.example", **{"sec-fetch-site": "same-origin"}) == 400
        assert httpx.get(f"{served.url}/v1/models", headers={"origin": EVIL}).status_code == 200


def connect(served: Any) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=WAIT)


def ends(connection: socket.socket) -> bytes:
    """Read everything until the server closes the connection."""
    came = b""
    while part := connection.recv(4096):
        came += part
    return came


def test_unfinished_heads_and_bodies_end(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.1)
    for sent in (b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"):
        with connect(served) as connection:
            connection.sendall(sent)
            assert ends(connection) == b""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    monkeypatch.setattr(server, "HEAD_SECONDS", WAIT)
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.1)
    with connect(served) as connection:
        connection.sendall(head + b"{")
        answer = ends(connection)
        assert b" 408 " in answer.split(b"\r\n")[0] and b"did not come in time" in answer
    with connect(served) as connection:  # a second head on one connection
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in connection.recv(4096)
        monkeypatch.setattr(server, "HEAD_SECONDS", 0.1)
        connection.sendall(b"GET /hea")
        ends(connection)


def test_a_slow_but_steady_body_is_read(served: Any, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on with each part of the body, soon beyond the seconds that every body may take."""
    clock = [0.0]
    monkeypatch.setattr(middleware, "time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time))
    monkeypatch.setattr(middleware, "BODY_SECONDS", WAIT)
    monkeypatch.setattr(middleware, "BODY_RATE", 20 / WAIT)
    body = json.dumps({"model": base, "prompt": "abc", "max_tokens": 1, "user": "x" * 40}).encode()

    def slowly() -> Any:
        for start in range(0, len(body), 20):
            clock[0] += 0.8 * WAIT
            yield body[start : start + 20]
            time.sleep(0.05)  # the server reads a part before the clock goes on

    headers = {"content-type": "application/json"}
    found = httpx.post(f"{served.url}/v1/completions", content=slowly(), headers=headers, timeout=WAIT)
    assert found.status_code == 200


def test_too_many_connections_leave_the_others_answered(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "most_connections", lambda: 20)
    with httpx.Client() as client:
        assert client.get(f"{served.url}/health").status_code == 200
        idle = [connect(served) for _ in range(40)]
        assert client.get(f"{served.url}/health").status_code == 200
        assert httpx.get(f"{served.url}/health").status_code == 200  # the oldest idle one was closed for it
        for each in idle:
            each.close()
    until(lambda: status_of(served) == 200)


def status_of(served: Any) -> int:
    try:
        return httpx.get(f"{served.url}/health").status_code
    except httpx.TransportError:
        return 0


def test_slow_preparation_ends_and_delays_no_small_request(
    served: Any, chat: str, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "PREPARE_SECONDS", 0.5)
    goes_on = threading.Event()
    monkeypatch.setattr(generation, "constraints", lambda *_: goes_on.wait(WAIT))
    slow = {"model": chat, "messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}}
    answers: list[httpx.Response] = []
    ask = lambda: answers.append(served.post("/v1/chat/completions", slow))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(WAIT)
    monkeypatch.setattr(generation, "PREPARE_SECONDS", WAIT)
    found = served.post("/v1/completions", {"model": base, "prompt": "abc", "max_tokens": 1})
    assert found.status_code == 200, "the slow ones are still being prepared"
    goes_on.set()
    assert {each.status_code for each in answers} == {503}
    assert {each.json()["error"]["code"] for each in answers} == {"preparation_timeout"}


def test_more_messages_than_the_context_has_tokens_are_refused_at_once(served: Any, chat: str) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * 4_000
    found = served.post("/v1/chat/completions", {"model": chat, "messages": messages})
    assert found.status_code == 400
    assert "messages has 8,000 entries, and the context of this model has 512" in found.json()["error"]["message"]


def test_public_names_show_no_path_of_the_server(tmp_path: Path) -> None:
    run = str(tmp_path / "moved run")
    found = public_names([run, "runs/bard", "../other/x", "org/name", "smollm2"], {"style": "/srv/secret"})
    expected = {"style": "/srv/secret", "moved run": run, "runs/bard": "runs/bard", "x": "../other/x"}
    assert found == expected | {"org/name": "org/name", "smollm2": "smollm2"}
    with pytest.raises(UserError, match="would both be called 'moved run'.*--name ALIAS=PATH"):
        public_names([run, "/srv/moved run"], {})
    assert short_names(["runs/bard", "a/x", "b/x", "models/y.gguf", "z"]) == {"bard": "runs/bard", "y": "models/y.gguf"}


@pytest.mark.parametrize("name", ["bard", "=x", "a b=x", "bard=", "/srv=x"])
def test_wrong_aliases_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="must be ALIAS=PATH"):
        aliases([name])
    with pytest.raises(UserError, match="The alias 'a' is given twice"):
        aliases(["a=x", "a=y"])


def test_a_model_answers_to_its_short_name_and_alone_to_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for kind in ("base", "encoder"):
        (tmp_path / "runs" / kind).symlink_to(folder / kind)
    with running(["runs/base", "runs/encoder"], Limits(), Access()) as served:
        ask = {"prompt": "abc", "max_tokens": 1}
        assert [model.id for model in served.openai.models.list()] == ["runs/base", "runs/encoder"]
        for name in ({"model": "base"}, {"model": "runs/base"}, {}):  # one of the two completes texts
            assert served.post("/v1/completions", {**name, **ask}).json()["model"] == "runs/base"
        found = served.post("/v1/tokenize", {"input": "abc"})
        assert found.status_code == 400 and "must be one of runs/base, runs/encoder" in found.text
        assert served.openai.models.retrieve("base").id == "runs/base"


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """Yield a list of what the service logs."""
    found: list[logging.LogRecord] = []
    handler, service, access = logging.Handler(), *map(logging.getLogger, ("keifu.serving", "keifu.serving.access"))
    handler.emit = found.append
    level = access.level
    service.addHandler(handler)
    access.setLevel(logging.INFO)
    yield found
    access.setLevel(level)
    service.removeHandler(handler)


def test_the_log_says_why_and_every_answer_has_an_id(served: Any, base: str, records: list[logging.LogRecord]) -> None:
    ask = {"model": base, "prompt": "secret words", "max_tokens": 3}

    def line(found: httpx.Response) -> dict[str, Any]:
        until(lambda: any(found.headers["x-request-id"] in record.getMessage() for record in records))
        (own,) = [record.getMessage() for record in records if found.headers["x-request-id"] in record.getMessage()]
        assert "secret" not in own
        return json.loads(own)

    good = line(served.post("/v1/completions", ask))
    assert good["model"] == "base" and good["prompt_tokens"] == 12 and 0 < good["completion_tokens"] <= 3
    assert line(served.post("/api/chat", {"model": "chat", "messages": [], "stream": False}))["path"] == "/api/chat"
    lost = served.post("/v1/secret-key", ask)
    assert lost.json()["error"]["request_id"] == lost.headers["x-request-id"]
    assert line(lost)["path"] == "(none)" and "There is nothing at" in line(lost)["reason"]
    wrong = line(served.post("/v1/completions", {**ask, "temperature": "secret"}))
    assert wrong["status"] == 400 and wrong["reason"] == "temperature: input should be a valid number."
    own = served.post("/v1/completions", {**ask, "nonsense": 1}, headers={"x-request-id": "mine-7"})
    assert own.headers["x-request-id"] == "mine-7" == own.json()["error"]["request_id"]
    for forged in ("a b", "x" * 65, '"}'):
        assert served.post("/v1/completions", {}, headers={"x-request-id": forged}).headers["x-request-id"] != forged
    stream = served.post("/v1/completions", {**ask, "stream": True, "max_tokens": 4})
    assert line(stream)["completion_tokens"] > 0


def test_an_error_of_the_server_itself_has_the_id_too(
    served: Any, base: str, monkeypatch: pytest.MonkeyPatch, records: list[logging.LogRecord]
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(generation, "sampling_for", broken)
    found = served.post("/v1/completions", {"model": base, "prompt": "x"})
    assert found.status_code == 500 and "bug of the server" in found.json()["error"]["message"]
    assert found.json()["error"]["request_id"] == found.headers["x-request-id"]
    assert sum(record.exc_info is not None for record in records) == 1


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("chat/completions", {"metadata": {"a": "b"}, "reasoning_effort": "low", "store": True}),
        ("completions", {"service_tier": "flex"}),
        ("responses", {"reasoning": {"effort": "low"}, "truncation": "auto"}),
        ("images/generations", {"quality": "hd", "style": "vivid"}),
        ("messages", {"thinking": {"type": "enabled"}}),
    ],
)
def test_hints_are_ignored_and_named_unless_strict(served: Any, strict: Any, path: str, field: dict[str, Any]) -> None:
    text: dict[str, Any] = {"max_tokens": 1}
    bodies: dict[str, dict[str, Any]] = {
        "chat/completions": {"model": "chat", "messages": [{"role": "user", "content": "x"}], **text},
        "completions": {"model": "base", "prompt": "x", **text},
        "responses": {"model": "chat", "input": "x", "max_output_tokens": 1},
        "messages": {"model": "chat", "messages": [{"role": "user", "content": "x"}], **text},
        "images/generations": {"model": "ddpm", "label": "cat", "steps": 1},
    }
    found = served.post(f"/v1/{path}", {**bodies[path], **field})
    assert found.status_code == 200, found.text
    assert found.headers["x-keifu-ignored"] == ", ".join(field)
    assert "x-keifu-ignored" not in served.post(f"/v1/{path}", bodies[path]).headers
    if path == "messages":
        assert "has no thoughts" in strict.post("/v1/messages", {**bodies[path], **field}).json()["error"]["message"]
        return
    refused = strict.post(f"/v1/{path}", {**bodies[path], **field})
    assert refused.status_code == 400 and "is not supported by this server" in refused.json()["error"]["message"]


@pytest.fixture(scope="module")
def strict(folder: Path) -> Any:
    names = [str(folder / kind) for kind in ("chat", "base", "encoder", "ddpm")]
    with running(names, Limits(), Access(strict=True)) as found:
        yield found


def test_keys_of_a_file_with_windows_line_ends_and_spaces_fit(base: str, started: list[Access], tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"one \r\n\r\n  two\r\n")
    cli.main(["serve", base, "--api-key", " three\n", "--api-key-file", str(file)])
    keys = started[0].keys
    assert keys == ("three", "one", "two")
    gate = ApiKeys(lambda *_: None, keys)  # type: ignore[arg-type]
    scope: Any = {"path": "/v1/models", "method": "GET"}
    for sent, fits in (("Bearer one", True), ("Bearer  two ", True), ("bearer three\t", True), ("Bearer on", False)):
        assert (gate.refusal(scope, Headers({"authorization": sent})) is None) == fits, sent
        assert (gate.refusal(scope, Headers({"x-api-key": sent.partition(" ")[2]})) is None) == fits, sent
