"""The gates of the service by themselves: which hosts, origins and keys pass, and what is said to the others."""

from typing import Any

import pytest
from starlette.datastructures import Headers

from keifu.serving.access import ApiKeys, Gate, Hosts, Origins, host_name


async def nothing(*_: Any) -> None:
    """Answer nothing."""


def refused(gate: Gate, path: str = "/v1/models", method: str = "POST", **headers: str) -> str | None:
    """Return the status, code and message of a refusal; None if the request passes."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    error = gate.refusal({"type": "http", "path": path, "method": method}, Headers(named))
    return error and f"{error.status} {error.code}: {error}"


@pytest.mark.parametrize(
    ("netloc", "name"),
    [
        ("Chat.Example:8443", "chat.example"), ("chat.example:", "chat.example"), ("[::1]:80", "[::1]"),
        ("[FE80::A]", "[fe80::a]"),
        ("", ""), ("a b", ""), ("user@host", ""), ("host:80/x", ""), ("host:x", ""), ("[::1]x", ""), ("[]", ""),
    ],
)  # fmt: skip
def test_a_host_is_a_name_and_a_port(netloc: str, name: str) -> None:
    assert host_name(netloc) == name


def test_hosts_are_exact_or_end_in_a_domain() -> None:
    gate = Hosts(nothing, ["Chat.Example", "*.lan", "[::1]"])
    for host in ("chat.example", "CHAT.EXAMPLE:80", "a.lan", "a.b.LAN:1", "[::1]:9"):
        assert refused(gate, host=host) is None, host
    for host in ("x.chat.example", "chat.example.x", "lan", "xlan", "a.lan.x", ".lan x"):
        text = f"400 unknown_host: This server does not answer to the host name {host_name(host) or '(none)'!r}"
        assert refused(gate, host=host) == f"{text}: start it with --allowed-host NAME."
    assert "host name '(none)'" in str(refused(gate)) and refused(Hosts(nothing, ["*"])) is None
    assert f"host name {'x' * 100!r}:" in str(refused(gate, host="x" * 101))
    assert refused(Hosts(nothing, ["x", "**.lan"]), host="a.lan") is not None, "only a leading *. is a domain"


def test_pages_of_others_may_read_and_change_nothing() -> None:
    gate = Origins(nothing, ["https://friend.example"], ["Proxy.Example", "localhost", "127.0.0.1", "[::1]"])
    mine = {"host": "chat.example:8443"}
    for origin in (
        "https://friend.example",
        "http://chat.example:8443",
        "http://CHAT.example:8443",
        "https://proxy.example:9",
    ):
        assert refused(gate, origin=origin, **mine) is None, origin
    for origin in (
        "https://friend.example:1",
        "http://chat.example",
        "null",
        "ftp://proxy.example",
        "http://localhost:9",
        "https://",
        "",
    ):
        text = f"403 unknown_origin: Pages of {origin!r} may not ask this server: start it with --cors ORIGIN to permit"
        assert refused(gate, origin=origin, **mine) == f"{text} them."
        assert all(refused(gate, method=method, origin=origin, **mine) is None for method in ("GET", "HEAD", "OPTIONS"))
        assert all(refused(gate, method=method, origin=origin, **mine) for method in ("PUT", "DELETE", "PATCH"))
        assert refused(gate, origin=origin, sec_fetch_site="same-origin", **mine) is None
        assert refused(gate, origin=origin, sec_fetch_site="same-site", **mine)
        assert refused(Origins(nothing, ["*"], []), origin=origin) is None
    assert refused(gate, **mine) is None, "a program is no page"
    assert refused(gate, origin="https://") and refused(gate, origin="http://x"), "without a host"
    assert f"Pages of {'x' * 100!r} may" in str(refused(gate, origin="x" * 101, **mine))


def test_keys_guard_what_costs_or_tells() -> None:
    gate = ApiKeys(nothing, ["one", "zwei ö"])
    sentence = "401 invalid_api_key: This server needs a key: send the header Authorization: Bearer KEY."
    for path in ("/v1/models", "/api/tags", "/metrics", "/metrics/x"):
        assert refused(gate, path) == sentence and refused(ApiKeys(nothing, []), path) is None
        assert refused(gate, path, authorization="Bearer one") is None
    for path in ("/", "/health", "/v1", "/page/v1/"):
        assert refused(gate, path) is None
    passing = {"bearer one": None, "BEARER   one ": None, "Basic x": "one", "": " one"}
    for authorization, key in passing.items():
        assert refused(gate, authorization=authorization, **({"x_api_key": key} if key else {})) is None, authorization
    for headers in (
        {"authorization": "Bearer one one"}, {"authorization": "Bearer on"}, {"authorization": "one"},
        {"authorization": "Bearer wrong", "x_api_key": "one"}, {"authorization": "Bearer"}, {"x_api_key": "two"},
        {"authorization": "Basic one"},
    ):  # fmt: skip
        assert refused(gate, **headers) == sentence, headers


@pytest.mark.parametrize(
    ("kind", "host", "passes"),
    [("http", b"evil", False), ("http", b"chat.example", True), ("websocket", b"", True), ("lifespan", b"", True)],
)
def test_a_refused_request_does_not_reach_the_application(kind: str, host: bytes, passes: bool) -> None:
    reached: list[Any] = []
    sent: list[Any] = []

    async def app(*given: Any) -> None:
        reached.append(given)

    async def send(message: Any) -> None:
        sent.append(message)

    scope: Any = {"type": kind, "path": "/v1/models", "method": "GET", "headers": [(b"host", host)]}
    call: Any = Hosts(app, ["chat.example"])(scope, nothing, send).__await__()
    with pytest.raises(StopIteration):
        next(call)
    assert reached == ([(scope, nothing, send)] if passes else [])
    assert [message.get("status") for message in sent[:1]] == ([] if passes else [400])
