"""The server's address and its end: a port in use is told with its user, a Unix socket, SIGTERM under load."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_toys import WAIT, until

from keifu import cli
from keifu.commands.serve import Options, found_models, keys_of
from keifu.commands.shared.inputs import size_of
from keifu.errors import UserError
from keifu.serving.server import Address
from keifu.threads import WAY, WHERE

ASK = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 300, "temperature": 1, "seed": 1}


def test_a_port_in_use_is_told_with_the_process_that_has_it() -> None:
    taken = Address(port=0).open()
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(UserError, match=f"Port {port} is in use") as error:
        Address(port=port).open()
    if Path("/proc/net/tcp").exists():
        assert f"by process {os.getpid()} (" in str(error.value)
    taken.close()
    Address(port=port).open().close()


def test_without_a_model_what_is_there_and_can_be_served_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("chat", "ddpm", "translator"):
        (tmp_path / "runs" / name).symlink_to(folder / name)
    (tmp_path / "runs" / "half").mkdir()
    (tmp_path / "runs" / "half" / "config.json").write_text("{")
    monkeypatch.setattr("keifu.data.catalogue.catalogue.is_cached", lambda name, among: name in ("network", "digits"))
    runs = "runs/chat", "runs/ddpm", "runs/translator"
    assert found_models() == (*runs, "smollm2", "digits")  # a network answers no request


def test_an_address_that_is_none() -> None:
    with pytest.raises(UserError, match="203.0.113.1:80 cannot be listened at"):
        Address("203.0.113.1", 80).open()


@pytest.mark.skipif(sys.platform == "win32", reason="no Unix sockets")
def test_a_socket_that_was_left_behind_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    address = Address(path=tmp_path / "keifu.sock")
    first = address.open()
    first.listen()
    with pytest.raises(UserError, match="A server listens at .*keifu.sock already"):
        address.open()
    first.close()
    address.open().close()
    with pytest.raises(UserError, match="cannot be listened at"):
        Address(path=tmp_path / "none" / "keifu.sock").open()


@pytest.mark.parametrize(("text", "size"), [("4G", 4 * 2**30), ("500M", 500 * 2**20), ("1.5 gib", 3 * 2**29), ("9", 9)])
def test_sizes(text: str, size: int) -> None:
    assert size_of(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "4X", "four"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="must be a size such as 500M or 4G"):
        size_of(text, "--memory")


def test_keys_come_from_options_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("second\n\nthird\n")
    monkeypatch.setenv("KEIFU_API_KEY", "fourth,fifth")
    assert keys_of(Options(api_key=("first",), api_key_file=file)) == ("first", "second", "third", "fourth", "fifth")
    monkeypatch.delenv("KEIFU_API_KEY")
    file.write_text("third\n", encoding="utf-8-sig")
    assert keys_of(Options(api_key_file=file)) == ("third",)
    file.write_bytes(b"\xff")
    with pytest.raises(UserError, match="keys is not UTF-8 text"):
        keys_of(Options(api_key_file=file))
    file.write_text("\n")
    for empty in (Options(api_key_file=file), Options(api_key=("",))):
        with pytest.raises(UserError, match="holds no key"):
            keys_of(empty)
    assert keys_of(Options()) == ()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--slots", "0"], "--slots must be a whole number from 1"),
        (["--memory", "lots"], "--memory is 'lots'"),
        (["smolm2"], "Did you mean 'smollm2'?"),
        (["--weights", "int3"], "There is no format of weights 'int3'. Did you mean 'int8'?"),
        (["--cors", "example.org"], "--cors is 'example.org', which must be an origin such as https://example.org"),
        (["--cors", "https://example.org/"], "--cors is 'https://example.org/', which must be an origin"),
    ],
)
def test_wrong_options_are_told(words: list[str], told: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", *words])
    assert told in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM")
def test_what_runs_is_finished_before_the_end_and_nothing_of_it_is_logged(chat: str, tmp_path: Path) -> None:
    place = tmp_path / "keifu.sock"
    command = [sys.executable, "-m", "keifu", "serve", chat, "--socket", str(place)]
    # without these variables a thread of the service reads the machine's load
    variables = {name: value for name, value in os.environ.items() if name not in (*WAY, *WHERE)}
    environment = {**variables, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(place.exists)
    client = httpx.Client(transport=httpx.HTTPTransport(uds=str(place)), timeout=WAIT)
    until(lambda: answers(client))
    came: list[str] = []

    def read() -> None:
        body = {"model": chat, **ASK, "stream": True}
        with client.stream("POST", "http://keifu/v1/chat/completions", json=body) as stream:
            came.extend(line for line in stream.iter_lines() if line)

    reading = threading.Thread(target=read)
    reading.start()
    until(lambda: len(came) > 3)
    assert arenas(process.pid) == 0
    process.send_signal(signal.SIGTERM)
    reading.join(WAIT)
    assert came[-1] == "data: [DONE]"
    assert json.loads(came[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("length", "stop")
    out, log = process.communicate(timeout=WAIT)
    assert process.returncode == 0 and b"Listening at the socket" in out
    lines: list[Any] = [json.loads(line) for line in log.decode().splitlines() if line.startswith("{")]
    assert {"path": "/v1/chat/completions", "status": 200}.items() <= lines[-1].items()
    assert b"messages" not in log and b"Traceback" not in log
    assert not place.exists()


def arenas(process: int) -> int:
    """Return the number of glibc's arenas besides the main one: each begins at a multiple of 64 MiB, of which the part
    that is not used yet cannot be read."""
    maps = Path(f"/proc/{process}/maps")
    lines = [line.split() for line in maps.read_text().splitlines()] if maps.exists() else []
    parts = [(*(int(end, 16) for end in line[0].split("-")), line[1]) for line in lines if len(line) == 5]
    pairs = itertools.pairwise(parts)
    return sum(
        a % 2**26 == 0 and b == c and end - a == 2**26 and (first, second) == ("rw-p", "---p")
        for (a, b, first), (c, end, second) in pairs
    )


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("http://keifu/health").status_code == 200
    except (OSError, httpx.TransportError):
        return False


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--host", "203.0.113.1"], "203.0.113.1:8000 cannot be listened at"),
        (["--socket", "t.txt"], "--socket is t.txt, which is a file and no socket: choose a path that is free."),
        (["--port", "0", "--search", "nowhere"], "There is no folder nowhere"),
        (["--port", "0", "--search", "t.txt"], "--search is t.txt, which is a file"),
    ],
)
def test_the_address_and_the_documents_are_checked_before_models_are_read(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("A file of mine.")
    monkeypatch.setattr("keifu.serving.models.ServedModels", lambda *_: pytest.fail("models were read"))
    with pytest.raises(SystemExit):
        cli.main(["serve", "smollm2", *words])
    assert told in capsys.readouterr().err
    assert Path("t.txt").read_text() == "A file of mine."


def test_a_checked_address_is_free_again(tmp_path: Path) -> None:
    address = Address(path=tmp_path / "keifu.sock")
    address.check()
    assert not (tmp_path / "keifu.sock").exists()
    address.open().close()
