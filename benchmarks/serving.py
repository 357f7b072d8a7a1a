"""Load test of the service: many clients with prompts and answers of mixed lengths, compared with llama.cpp's server.

python benchmarks/serving.py [--model smollm2] [--weights int8] [--clients 64] [--slots 16] [--minutes 10]
python benchmarks/serving.py --llama-server PATH [--gguf FILE] [--rounds 3] [--seconds 40] [--arrivals 2 8] [--sampled]

The first counts errors, compares every greedy answer with the answer to the same request alone, and prints tokens per
second, the time to first token and the memory. Meanwhile some clients leave early, some read slowly, and some open a
connection and send nothing. Then it tests the second turn of a long chat, the cost of rude clients for others, SIGTERM
under load, and SIGKILL with a restart. It ends with status 1 and a sentence for each failed check.

The second gives keifu and llama-server the same file, slots and clients, in turn, and prints the ratio of each round.
With --arrivals, requests come at random times, at each of these rates per second (a Poisson process, the same for
both), whether earlier ones are answered or not. It prints tokens per second until all are answered, and the seconds to
the first token, to each further one, and to the end of an answer. With --sampled answers are not greedy, but sampled
with the default settings of base models.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from _rounds import machine

from keifu.data.catalogue.catalogue import fetch

WORDS = ("the", "sea", "is", "wide", "and", "a", "small", "boat", "sails", "to", "an", "old", "town", "of", "stars")
MANNERS = ("leaves", "slow")
RUDE = 0.1  # share of clients that leave early or read slowly
SILENT = 4  # idle connections
SAMPLING: dict[str, float] = {"temperature": 0}
SAMPLED = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
FLAT = 0.02  # allowed growth of memory in the last half


@dataclass
class Outcome:
    """Measurements of the clients of one server."""

    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # tokens per second of each whole answer, after its first token
    whole: list[float] = field(default_factory=list)  # seconds of each whole answer
    texts: list[tuple[int, str, bool]] = field(default_factory=list)  # number, text, whether it is whole
    memory: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def tell(self, name: str) -> float:
        """Print the figures of an outcome, and return its tokens per second."""
        rate, late = self.tokens / self.seconds, statistics.quantiles(self.first, n=20)[-1]
        print(f"{name}: {len(self.texts)} answers, {rate:.1f} tokens/s, time to first token "
              f"{statistics.median(self.first):.2f} s at the median and {late:.2f} s at the 95th percentile, "
              f"{len(self.errors)} errors {self.errors[:3]}", flush=True)  # fmt: skip
        return rate


def request(number: int, model: str) -> dict[str, Any]:
    """Return the request of this number, always the same: greedy, 5 to 300 words, 8 to 96 tokens."""
    own = random.Random(number)
    text = " ".join(own.choices(WORDS, k=own.choice((5, 20, 60, 300))))
    return chat(model, [f"{number}: {text}"], own.choice((8, 32, 96)))


def chat(model: str, turns: list[str], max_tokens: int) -> dict[str, Any]:
    """Return the request body of a conversation. The turns alternate, beginning with the user's."""
    messages = [{"role": ("user", "assistant")[place % 2], "content": each} for place, each in enumerate(turns)]
    return {"model": model, "messages": messages, "max_tokens": max_tokens, "seed": 1, "stream": True, **SAMPLING}


async def pieces(url: str, body: dict[str, Any]) -> AsyncGenerator[str, None]:
    """Yield the text of each event of one answer. It reads a plain socket, because a client must cost little."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=2**20)
    try:
        sent = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n".encode() + sent)
        status = (await reader.readline()).split()
        if status[1:2] != [b"200"]:
            raise OSError(f"{status} {(await reader.read())[-300:]!r}")
        async for line in reader:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise OSError(str(event["error"]))
                if event["choices"] and (text := event["choices"][0]["delta"].get("content")):
                    yield text
            elif line.startswith(b"data: [DONE]"):
                return
        raise OSError("The answer has no end.")
    finally:
        writer.close()


async def answer(url: str, body: dict[str, Any], found: Outcome, number: int = 0, manner: str = "") -> str:
    """Return the text of one answer. manner: whether the client leaves early or reads slowly."""
    began, first, text, count = time.monotonic(), 0.0, "", 0
    async with aclosing(pieces(url, body)) as parts:
        async for part in parts:
            first = first or time.monotonic()
            text, count = text + part, count + 1
            found.tokens += 1
            if manner == "leaves" and count > 4:
                break
            if manner == "slow":
                await asyncio.sleep(0.2)
    if first:
        found.first.append(first - began)
    found.whole.append(time.monotonic() - began)
    if count > 20 and not manner:
        found.rates.append((count - 1) / (time.monotonic() - first))
    found.texts.append((number, text, manner != "leaves"))
    return text


@dataclass
class Load:
    """Clients that send one request after another. distinct: number of different requests; None: unlimited."""

    url: str
    model: str
    clients: int
    seconds: float
    distinct: int | None = None
    rude: float = RUDE
    silent: int = SILENT
    process: int | None = None
    whole: bool = True  # whether to wait for running answers at the end

    async def run(self, found: Outcome | None = None) -> Outcome:
        """Run the clients, and add their measurements to those in `found`."""
        found = found or Outcome()
        began, self._numbers, self._end = time.monotonic(), iter(range(10**9)), time.monotonic() + self.seconds
        host, port = self.url.removeprefix("http://").split(":")
        silent = [socket.create_connection((host, int(port))) for _ in range(self.silent)]
        asking = asyncio.gather(*(self._ask(found) for _ in range(self.clients)))
        watching = asyncio.create_task(self._watch(found))
        with suppress(TimeoutError):
            await asyncio.wait_for(asking, None if self.whole else self.seconds)
        watching.cancel()
        found.seconds += time.monotonic() - began
        for each in silent:
            each.close()
        return found

    async def _ask(self, found: Outcome) -> None:
        while time.monotonic() < self._end:
            number = next(self._numbers)
            chance = random.Random(-number)
            manner = chance.choice(MANNERS) if chance.random() < self.rude else ""
            number = number % self.distinct if self.distinct else number
            try:
                await answer(self.url, request(number, self.model), found, number, manner)
            except OSError as error:
                found.errors.append(repr(error))
                await asyncio.sleep(0.1)

    async def _watch(self, found: Outcome) -> None:
        while self.process is not None:
            pages = Path(f"/proc/{self.process}/statm").read_text().split()[1]
            found.memory.append(int(pages) * os.sysconf("SC_PAGE_SIZE"))
            await asyncio.sleep(self.seconds / 20)


async def arrive(url: str, model: str, rate: float, seconds: float, seed: int) -> Outcome:
    """Send new requests for some seconds, `rate` per second on average at random times. Return the measurements."""
    found, chance, asked = Outcome(), random.Random(seed), []
    began, at, number = time.monotonic(), 0.0, 10_000 * seed + round(1_000_000 * rate)
    while (at := at + chance.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, began + at - time.monotonic()))
        asked.append(asyncio.create_task(answer(url, request(number, model), found, number)))
        number += 1
    ended = await asyncio.gather(*asked, return_exceptions=True)
    found.errors += [repr(each) for each in ended if isinstance(each, BaseException)]
    found.seconds = time.monotonic() - began
    return found


def percentiles(values: list[float]) -> str:
    """Return the median and the 95th percentile."""
    return f"{statistics.median(values):.3f} | {statistics.quantiles(values, n=20)[-1]:.3f}"


def start(command: list[str], url: str, path: str, seconds: float = 120) -> tuple[subprocess.Popen, float]:
    """Start a server, wait until it answers, and return the process and the seconds that it took."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while time.monotonic() - began < seconds:
        try:
            if httpx.get(url + path, timeout=5).status_code == 200:
                return process, time.monotonic() - began
        except httpx.HTTPError:
            time.sleep(0.02)
    process.kill()
    raise SystemExit(f"{command} does not answer.")


def free_url() -> str:
    """Return a URL at which nothing listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{found.getsockname()[1]}"


def keifu(options: argparse.Namespace, url: str, model: str) -> list[str]:
    """Return the command of keifu's server."""
    command = [sys.executable, "-m", "keifu", "serve", model, "--port", url.rpartition(":")[2], "--no-access-log"]
    command += ["--slots", str(options.slots), "--cache", options.cache]
    return command + (["--weights", options.weights] if options.weights else [])


def llama(options: argparse.Namespace, url: str) -> list[str]:
    """Return the command of llama.cpp's server, with as many slots, and a thread for each client."""
    command = [options.llama_server, "-m", str(options.gguf), "--port", url.rpartition(":")[2], "-np"]
    command += [str(options.slots), "-c", str(options.slots * 2048), "-t", str(len(os.sched_getaffinity(0)))]
    return [*command, "--threads-http", str(options.clients + 2 * SILENT)]


async def alone(url: str, model: str, count: int) -> list[str]:
    """Return the answer to each request without other requests."""
    return [await answer(url, request(number, model), Outcome()) for number in range(count)]


def second_turn(url: str, model: str) -> float:
    """Print the time to first token of two turns of a long chat. Return the ratio of the first to the second."""

    async def ask(turns: list[str]) -> tuple[str, float]:
        found = Outcome()
        text = await answer(url, chat(model, turns, 32), found)
        return text, found.first[0]

    async def both(number: int) -> tuple[float, float]:
        turns = [f"{number} " + " ".join(random.Random(number).choices(WORDS, k=1200))]
        text, first = await ask(turns)
        return first, (await ask([*turns, text, "And what then?"]))[1]

    times = [asyncio.run(both(number)) for number in range(5)]
    first, second = (statistics.median(each) for each in zip(*times, strict=True))
    print(f"  a chat of 1,200 words: first token after {first:.3f} s in turn 1, {second:.3f} s in turn 2", flush=True)
    return first / second


def manners(url: str, model: str, clients: int, seconds: float) -> float:
    """Return the ratio of token rates with and without rude clients, and print both.

    Half of the clients are measured, first next to polite clients, then next to rude ones, which leave early or read
    slowly, and 32 silent ones, which only connect.
    """
    rates: dict[float, list[float]] = {0.0: [], 1.0: []}

    async def beside(rude: float) -> list[float]:
        polite = Load(url, model, clients // 2, seconds, rude=0, silent=0, whole=False)
        others = Load(url, model, clients // 2, seconds, rude=rude, silent=32 if rude else 0, whole=False)
        found, _ = await asyncio.gather(polite.run(), others.run())
        return found.rates

    for _ in range(2):
        for rude, own in rates.items():
            own += asyncio.run(beside(rude))
    calm, rude = (statistics.median(own) for own in rates.values())
    print(f"  a client's tokens/s: {calm:.1f} beside {clients // 2} others, {rude:.1f} beside as many without manners")
    return rude / calm


def stop_under_load(process: subprocess.Popen, url: str, model: str) -> bool:
    """Send SIGTERM while answers are generated. Return whether each answer was completed."""

    async def several() -> list[str | BaseException]:
        found = Outcome()
        asked = [asyncio.create_task(answer(url, request(number, model), found)) for number in range(8)]
        while not found.tokens:
            await asyncio.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        return await asyncio.gather(*asked, return_exceptions=True)

    texts = asyncio.run(several())
    ended = sum(isinstance(text, str) for text in texts)
    print(f"SIGTERM under load: {ended} of {len(texts)} answers were finished, exit status {process.wait(120)}")
    return ended == len(texts) and not process.returncode


def endure(options: argparse.Namespace) -> Iterable[str]:
    """Run the long load, and return the checks that fail."""
    url, name = free_url(), options.model
    command = keifu(options, url, name)
    process, _ = start(command, url, "/ready")
    expected = asyncio.run(alone(url, name, options.distinct))
    load = Load(url, name, options.clients, 60 * options.minutes, options.distinct, process=process.pid)
    found = asyncio.run(load.run())
    found.tell(f"keifu, {options.slots} slots, {options.clients} clients, {found.seconds:.0f} s")
    half = found.memory[len(found.memory) // 2 :]
    grown = max(half) / min(half) - 1
    print(f"  memory {' '.join(str(each >> 20) for each in found.memory)} MiB, last half within {grown:.1%}")
    same = [text == expected[n] if whole else expected[n].startswith(text) for n, text, whole in found.texts]
    print(f"  {sum(same)} of {len(same)} answers are what the request gets alone")
    time.sleep(2)
    pending = httpx.get(url + "/ready").json()["pending"][name]
    checks = {
        f"{len(found.errors)} errors: {found.errors[:3]}": not found.errors,
        f"{len(same) - sum(same)} answers differ from those alone": all(same),
        f"memory moved by {grown:.1%} in the last half": grown <= FLAT,
        f"{pending} answers hold their slots after all clients have left": not pending,
        "a second turn takes more than half of the time of the first": second_turn(url, name) > 2,
        "clients without manners slow the others by more than a tenth": manners(url, name, options.slots, 15) > 0.9,
        "SIGTERM cut answers": stop_under_load(process, url, name),
        "a start after SIGKILL took 3 s or more": start_again(command, url, name) < 3,
    }
    return [sentence for sentence, holds in checks.items() if not holds]


def start_again(command: list[str], url: str, model: str) -> float:
    """Print and return the seconds from a start after SIGKILL until the server is ready."""
    process, _ = start(command, url, "/ready")
    process.kill()
    process.wait()
    process, took = start(command, url, "/ready")
    began = time.monotonic()
    asyncio.run(alone(url, model, 1))
    print(f"SIGKILL and start: ready after {took:.2f} s, the first answer {time.monotonic() - began:.2f} s later")
    process.terminate()
    process.wait()
    return took


def compare(options: argparse.Namespace) -> Iterable[str]:
    """Compare keifu's and llama.cpp's server with the same file, in turns. Return failed checks."""
    urls = {"keifu": free_url(), "llama-server": free_url()}
    model = str(options.gguf)
    running = [
        start(keifu(options, urls["keifu"], model), urls["keifu"], "/ready")[0],
        start(llama(options, urls["llama-server"]), urls["llama-server"], "/health")[0],
    ]
    try:
        rounds: dict[str, list[float]] = {name: [] for name in urls}
        found = {name: Outcome() for name in urls}
        for url in urls.values():
            asyncio.run(alone(url, model, 2))
        if options.arrivals:
            return [error for rate in options.arrivals for error in arrivals(rate, urls, model, options)]
        for _ in range(options.rounds):
            for name, url in urls.items():
                before = found[name].tokens
                asyncio.run(Load(url, model, options.clients, options.seconds, whole=False).run(found[name]))
                rounds[name].append((found[name].tokens - before) / options.seconds)
                time.sleep(1)
        for name, url in urls.items():
            found[name].tell(f"{name}, {options.slots} slots, {options.clients} clients")
            second_turn(url, model)
        for name, rates in rounds.items():
            print(f"  {name}, each round: {', '.join(f'{rate:.0f}' for rate in rates)} tokens/s")
        ratios = [ours / theirs for ours, theirs in zip(*rounds.values(), strict=True)]
        print(f"keifu / llama-server: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        return [f"{name}: {outcome.errors[:3]}" for name, outcome in found.items() if outcome.errors]
    finally:
        for process in running:
            process.kill()


def arrivals(rate: float, urls: dict[str, str], model: str, options: argparse.Namespace) -> Iterable[str]:
    """Print a row for each server at this rate of requests, over all rounds. Return the errors."""
    print(f"\n{rate:g} requests a second, {options.rounds} rounds of {options.seconds:g} s\n")
    print("| | tokens/s | first token, s: median | 95% | further ones: median | 95% | whole answer: median | 95% |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    found: dict[str, list[Outcome]] = {name: [] for name in urls}
    for seed in range(options.rounds):
        for name, url in urls.items():
            found[name].append(asyncio.run(arrive(url, model, rate, options.seconds, seed)))
    for name, rounds in found.items():
        each = [[value for one in rounds for value in getattr(one, part)] for part in ("first", "rates", "whole")]
        speed = sum(one.tokens for one in rounds) / sum(one.seconds for one in rounds)
        further = percentiles([1 / value for value in each[1]])
        print(f"| {name} | {speed:.0f} | {percentiles(each[0])} | {further} | {percentiles(each[2])} |", flush=True)
    return [f"{name}: {error}" for name, rounds in found.items() for one in rounds for error in one.errors[:3]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--weights")
    parser.add_argument("--cache", default="1G")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--distinct", type=int, default=200, help="requests of the long load, each asked alone before")
    parser.add_argument("--llama-server", help="llama.cpp's server; compares the two")
    parser.add_argument("--gguf", type=Path, help="what both serve; smollm2's file unless given")
    parser.add_argument("--arrivals", type=float, nargs="+", help="requests a second that come by themselves")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each server in each round")
    parser.add_argument("--sampled", action="store_true", help="with --llama-server: answers that are not greedy")
    options = parser.parse_args()
    if options.sampled:
        SAMPLING.update(SAMPLED)
    print(machine(), flush=True)
    if options.llama_server:
        options.gguf = options.gguf or fetch("smollm2")
    sys.exit("\n".join(compare(options) if options.llama_server else endure(options)) or None)


if __name__ == "__main__":
    main()
