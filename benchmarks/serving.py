"""Load on the service: many clients at a time with prompts and answers of mixed lengths, beside llama.cpp's server.

python benchmarks/serving.py [--model smollm2] [--weights int8] [--clients 64] [--slots 16] [--minutes 10] [--peer GGUF]

It counts errors, checks that every greedy answer is what the same request gets alone, and prints tokens a second, the
95th percentile of the time to first token, and the memory in each twentieth of the time. Meanwhile some clients leave
early, some read slowly, and some open a connection and say nothing; at the end the slots must be free. Then SIGTERM
under load, and SIGKILL and a start. --peer: the same load on llama-cpp-python's server or, where it is found,
llama-server; the numbers of both come from the same run.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from _rounds import machine

WORDS = ("the", "sea", "is", "wide", "and", "a", "small", "boat", "sails", "to", "an", "old", "town", "of", "stars")
LEAVE, SLOW = 0.05, 0.05  # the shares of clients that leave early, and that read slowly


@dataclass
class Outcome:
    """What the clients of one server saw."""

    tokens: int = 0
    answers: int = 0
    errors: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    memory: list[int] = field(default_factory=list)
    seconds: float = 0.0


def request(number: int, model: str) -> dict[str, Any]:
    """The request of this number, always the same: greedy, from 5 to 300 words, from 8 to 96 tokens."""
    own = random.Random(number)
    text = " ".join(own.choices(WORDS, k=own.choice((5, 20, 60, 300))))
    options = {"max_tokens": own.choice((8, 32, 96)), "temperature": 0, "seed": 1, "stream": True}
    return {"model": model, "messages": [{"role": "user", "content": f"{number}: {text}"}], **options}


async def answer(client: httpx.AsyncClient, body: dict[str, Any], found: Outcome, manner: str = "") -> str:
    """The text of one answer; `manner`: whether the client leaves early or reads slowly."""
    began, text = time.monotonic(), ""
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            found.errors.append(f"{response.status_code} {(await response.aread())[:200]!r}")
            return text
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                found.errors.append(str(event["error"]))
                return text
            piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
            if piece:
                if not text:
                    found.first.append(time.monotonic() - began)
                text += piece
                found.tokens += 1
            if manner == "leaves" and len(text) > 20:
                return text
            if manner == "slow":
                await asyncio.sleep(0.2)
    found.answers += 1
    return text


async def load(url: str, model: str, clients: int, seconds: float, process: int | None) -> Outcome:
    """So many clients that ask one request after another."""
    found, began = Outcome(), time.monotonic()
    numbers = iter(range(10**9))
    limits = httpx.Limits(max_connections=clients)

    async def ask(client: httpx.AsyncClient) -> None:
        while time.monotonic() - began < seconds:
            number = next(numbers)
            own = random.Random(-number)
            chance = own.random()
            manner = "leaves" if chance < LEAVE else "slow" if chance < LEAVE + SLOW else ""
            try:
                text = await answer(client, request(number, model), found, manner)
            except httpx.HTTPError as error:
                found.errors.append(repr(error))
                continue
            if manner != "leaves":
                found.texts[number] = text

    async def watch() -> None:
        while process is not None:
            found.memory.append(resident(process))
            await asyncio.sleep(seconds / 20)

    host, port = url.removeprefix("http://").split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(4)]  # half-open
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(ask(client) for _ in range(clients)))
        watching.cancel()
    found.seconds = time.monotonic() - began
    for each in silent:
        each.close()
    return found


def resident(process: int) -> int:
    """Bytes of memory of a process."""
    pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def start(command: list[str], url: str, path: str, seconds: float = 120) -> tuple[subprocess.Popen, float]:
    """A server that answers, and how long it took."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while time.monotonic() - began < seconds:
        try:
            if httpx.get(url + path, timeout=5).status_code == 200:
                return process, time.monotonic() - began
        except httpx.HTTPError:
            time.sleep(0.02)
    raise SystemExit(f"{command} does not answer.")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def tell(name: str, found: Outcome) -> None:
    first = sorted(found.first)
    late = first[int(0.95 * len(first))] if first else float("nan")
    print(f"{name}: {found.answers} answers, {found.tokens / found.seconds:.1f} tokens/s, time to first token")
    print(f"  p50 {first[len(first) // 2]:.2f} s, p95 {late:.2f} s; {len(found.errors)} errors {found.errors[:3]}")
    if found.memory:
        half = found.memory[len(found.memory) // 2 :]
        print(f"  memory {' '.join(str(each >> 20) for each in found.memory)} MiB, last half within "
              f"{100 * (max(half) / min(half) - 1):.1f}%")  # fmt: skip


async def one(url: str, model: str) -> str:
    """The text of one answer."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        return await answer(client, request(0, model), Outcome())


async def check_alone(url: str, model: str, texts: dict[int, str], most: int) -> int:
    """How many of the answers are not what the same request gets alone, of `most` that are asked again."""
    wrong = 0
    chosen = random.Random(0).sample(sorted(texts), min(most, len(texts)))
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        for number in chosen:
            wrong += await answer(client, request(number, model), Outcome()) != texts[number]
    print(f"  of {len(chosen)} answers {wrong} are not what the request gets alone")
    return wrong


def stop_under_load(process: subprocess.Popen, url: str, model: str) -> None:
    """SIGTERM while answers are written: each must come to its end."""

    async def several() -> tuple[Outcome, list[str]]:
        found = Outcome()
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            asked = [asyncio.create_task(answer(client, request(number, model), found)) for number in range(8)]
            while not found.tokens:
                await asyncio.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            return found, await asyncio.gather(*asked)

    found, texts = asyncio.run(several())
    print(f"SIGTERM under load: {found.answers} of {len(texts)} answers were finished, exit status {process.wait(120)}")


def peer_command(path: str, port: int, slots: int, context: int) -> tuple[list[str], str, str]:
    """llama.cpp's server over a GGUF file: its command, its health path and its name."""
    if found := shutil.which("llama-server"):
        words = [found, "-m", path, "--port", str(port), "-np", str(slots), "-c", str(slots * context)]
        return words, "/health", "llama-server"
    words = [sys.executable, "-m", "llama_cpp.server", "--model", path, "--port", str(port), "--n_ctx", str(context)]
    return [*words, "--interrupt_requests", "false"], "/v1/models", "llama-cpp-python's server (one slot)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--weights")
    parser.add_argument("--cache", default="1G")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--again", type=int, default=50, help="answers that are asked for again, alone")
    parser.add_argument("--peer", help="a .gguf file for llama.cpp's server")
    options = parser.parse_args()
    port, name = free_port(), options.model
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "keifu", "serve", name, "--port", str(port), "--slots", str(options.slots)]
    command += ["--cache", options.cache, "--no-access-log"]
    command += ["--weights", options.weights] if options.weights else []
    print(machine())
    process, _ = start(command, url, "/ready")
    asyncio.run(one(url, name))  # loads the model
    found = asyncio.run(load(url, name, options.clients, 60 * options.minutes, process.pid))
    tell(f"keifu, {options.slots} slots, {options.clients} clients, {found.seconds:.0f} s", found)
    time.sleep(2)
    print(f"  afterwards {httpx.get(url + '/ready').json()['pending']} texts are pending")
    asyncio.run(check_alone(url, name, found.texts, options.again))
    stop_under_load(process, url, name)
    process, _ = start(command, url, "/ready")
    process.kill()
    process.wait()
    process, took = start(command, url, "/ready")
    began = time.monotonic()
    asyncio.run(one(url, name))
    print(f"SIGKILL and start: ready after {took:.2f} s, the first answer {time.monotonic() - began:.2f} s later")
    process.terminate()
    process.wait()
    if options.peer:
        port = free_port()
        words, path, title = peer_command(options.peer, port, options.slots, 2048)
        process, _ = start(words, f"http://127.0.0.1:{port}", path)
        found = asyncio.run(load(f"http://127.0.0.1:{port}", name, options.clients, 60 * options.minutes, process.pid))
        tell(title, found)
        process.terminate()


if __name__ == "__main__":
    main()
