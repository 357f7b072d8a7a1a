"""Memory of `keifu serve` over an hour of mixed requests: chats, completions, embeddings, rankings, searches, streams,
clients that leave, long prompts, and broken requests.

python benchmarks/mixed_load.py [--minutes 60] [--clients 6] [--distinct 40] [--every 15] [--write JSON] [--picture SVG]

One process serves gpt-en, chat-en, bert-en and minilm with a cache folder that is soon full. Each client sends one
request after another, of a kind drawn at random. There are `distinct` different requests of each kind, all greedy, and
each must get the same answer whenever it is sent; broken requests must get a status from 400 to 499. The resident
memory, the threads and the open files of the process are read every few seconds. It ends with status 1 if an answer
is wrong, or if the memory of the last third grows by more than 2 percent of that of the middle third.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from _charts import chart
from _results import publish, typed, usual
from _rounds import machine
from serving import WORDS, free_url, start

SECTION = "Memory of the service under mixed load"
MODELS = "gpt-en", "chat-en", "bert-en", "minilm"
GROWTH = 0.02  # allowed growth of the median memory from the middle third to the last third
MIB = 2**20
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

Call = tuple[str, dict[str, Any]]


def words(draw: random.Random, count: int) -> str:
    """Return random words."""
    return " ".join(draw.choices(WORDS, k=count))


def chat_call(draw: random.Random, **others: Any) -> Call:
    """Return a call for an answer of the chat model."""
    messages = [{"role": "user", "content": f"Tell me of {words(draw, 8)}."}]
    return CHAT, {"model": "chat-en", "messages": messages, "max_tokens": 24, "temperature": 0, "seed": 0, **others}


def completion(draw: random.Random, count: int, **others: Any) -> Call:
    """Return a call for the continuation of a text of `count` words."""
    prompt = f"Once {words(draw, count)}"
    body = {"model": "gpt-en", "prompt": prompt, "max_tokens": 16, "temperature": 0, "seed": 0}
    return COMPLETIONS, {**body, **others}


def schema_call(draw: random.Random) -> Call:
    """Return a call for an answer that follows a schema."""
    schema = {"type": "object", "properties": {"town": {"enum": ["old", "new"]}}, "required": ["town"]}
    form = {"type": "json_schema", "json_schema": {"name": "town", "schema": schema}}
    return chat_call(draw, response_format=form, max_tokens=40)


def tool_call(draw: random.Random) -> Call:
    """Return a call that must call a tool."""
    parameters = {"type": "object", "properties": {"place": {"enum": ["sea", "town"]}}, "required": ["place"]}
    tool = {"type": "function", "function": {"name": "go", "parameters": parameters}}
    return chat_call(draw, tools=[tool], tool_choice="required", max_tokens=60)


def message_call(draw: random.Random) -> Call:
    """Return a call in Anthropic's form."""
    messages = [{"role": "user", "content": words(draw, 8)}]
    return "/v1/messages", {"model": "chat-en", "messages": messages, "max_tokens": 16, "temperature": 0}


def response_call(draw: random.Random) -> Call:
    """Return a call for a response that the service stores."""
    return "/v1/responses", {"model": "chat-en", "input": words(draw, 8), "max_output_tokens": 16, "temperature": 0}


def ollama_call(draw: random.Random) -> Call:
    """Return a call in ollama's form, streamed."""
    options = {"temperature": 0, "num_predict": 16}
    messages = [{"role": "user", "content": words(draw, 8)}]
    return "/api/chat", {"model": "chat-en", "messages": messages, "options": options}


def embedding(draw: random.Random) -> Call:
    """Return a call for embeddings."""
    texts = [words(draw, draw.choice((3, 20, 60))) for _ in range(draw.choice((1, 8)))]
    return "/v1/embeddings", {"model": draw.choice(("bert-en", "minilm")), "input": texts}


def ranking(draw: random.Random) -> Call:
    """Return a call that orders documents."""
    documents = [words(draw, 12) for _ in range(8)]
    return "/v1/rerank", {"model": draw.choice(("bert-en", "minilm")), "query": words(draw, 4), "documents": documents}


def broken(draw: random.Random) -> Call:
    """Return a call that must be refused."""
    path, body = chat_call(draw)
    changes: list[Call] = [
        (path, {**body, "temprature": 1}), (path, {**body, "model": words(draw, 1)}), (path, {**body, "messages": 1}),
        (path, {**body, "max_tokens": -3}), (path, {**body, "tool_choice": "required"}), ("/v1/nothing", body),
        completion(draw, 2000), ("/v1/embeddings", {"model": "minilm", "input": [1, None]}),
        ("/v1/rerank", {"model": "minilm", "query": "x"}), (path, {**body, "response_format": {"type": "xml"}}),
    ]  # fmt: skip
    return draw.choice(changes)


KINDS: dict[str, tuple[int, Callable[[random.Random], Call]]] = {  # by name: how often it is drawn, and its call
    "chat": (4, chat_call),
    "chat, streamed": (4, lambda draw: chat_call(draw, stream=True)),
    "completion": (3, lambda draw: completion(draw, 12)),
    "completions, streamed": (2, lambda draw: completion(draw, 12, n=2, stream=True)),
    "long prompt": (3, lambda draw: completion(draw, 380)),
    "schema": (2, schema_call),
    "tool": (2, tool_call),
    "Anthropic": (2, message_call),
    "stored response": (2, response_call),
    "ollama": (2, ollama_call),
    "embeddings": (4, embedding),
    "ranking": (3, ranking),
    "search": (2, lambda draw: ("/v1/search", {"model": "minilm", "query": words(draw, 5)})),
    "client leaves a stream": (3, lambda draw: chat_call(draw, stream=True, max_tokens=200)),
    "client leaves at once": (2, lambda draw: completion(draw, 380, max_tokens=100)),
    "broken": (4, broken),
    "no JSON": (1, chat_call),
}
VARYING = "id", "created", "created_at", "completed_at", "seed", "usage"


def fixed(value: Any) -> Any:
    """Return an answer without identifiers, times, seeds and counts of guesses, which differ from call to call."""
    if isinstance(value, dict):
        return {name: fixed(x) for name, x in value.items() if name not in VARYING and not name.endswith("duration")}
    return [fixed(x) for x in value] if isinstance(value, list) else value


def streamed(events: list[dict[str, Any]]) -> list[str]:
    """Return the texts of streamed choices, or of ollama's message. Where their pieces end may differ."""
    joined = ["", ""]
    for event in events:
        for choice in event.get("choices", [{"index": 0, **event}]):
            content = choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content")
            joined[choice["index"]] += content or ""
    return joined


def text_of(kind: str, answer: str) -> str:
    """Return the part of an answer that must be the same each time."""
    if "streamed" in kind or kind == "ollama":
        events = [json.loads(line.removeprefix("data: ")) for line in answer.splitlines() if "{" in line]
        return json.dumps(streamed(events))
    found = fixed(json.loads(answer))
    if kind in ("embeddings", "ranking", "search"):  # the same to the last digits alone: batches differ
        found = json.loads(json.dumps(found), parse_float=lambda x: round(float(x), 3))
    return json.dumps(found)


class Clients:
    """Clients that send requests of all kinds, and their results."""

    def __init__(self, url: str, distinct: int):
        self.url, self.distinct = url, distinct
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self._answers: dict[tuple[str, int], str] = {}
        self._draw = random.Random(0)

    async def ask(self, end: float) -> None:
        """Send one request after another."""
        names, weights = [*KINDS], [often for often, _ in KINDS.values()]
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as client:
            while time.monotonic() < end:
                (kind,) = self._draw.choices(names, weights)
                number = self._draw.randrange(self.distinct)
                path, body = KINDS[kind][1](random.Random(f"{kind} {number}"))
                try:
                    await self._send(client, kind, number, path, body)
                except (httpx.HTTPError, ValueError) as error:
                    self.errors.append(f"{kind} {number}: {error!r}")
                self.counts[kind] += 1

    async def _send(self, client: httpx.AsyncClient, kind: str, number: int, path: str, body: dict[str, Any]) -> None:
        if kind == "client leaves a stream":
            async with client.stream("POST", path, json=body) as response:
                async for _ in response.aiter_lines():
                    if self._draw.random() < 0.2:
                        return
        elif kind == "client leaves at once":
            try:
                await client.post(path, json=body, timeout=self._draw.choice((0.01, 0.05, 0.2)))
            except httpx.TimeoutException:
                return
        elif kind == "no JSON":
            headers = {"Content-Type": "application/json"}
            response = await client.post(path, content=json.dumps(body)[:-9], headers=headers)
            self._expect(kind, number, 400 <= response.status_code < 500, response.text)
        else:
            response = await client.post(path, json=body)
            refused = 400 <= response.status_code < 500
            self._expect(kind, number, refused if kind == "broken" else response.status_code == 200, response.text)
            if response.status_code == 200:
                text = hashlib.sha256(text_of(kind, response.text).encode()).hexdigest()
                first = self._answers.setdefault((kind, number), text)
                self._expect(kind, number, first == text, f"another answer: {response.text}")

    def _expect(self, kind: str, number: int, holds: bool, text: str) -> None:
        if not holds:
            self.errors.append(f"{kind} {number}: {text[:300]}")


async def sampled(process: int, every: float, began: float, samples: list[list[float]]) -> None:
    """Append the seconds, resident bytes, threads and open files of a process, until cancelled."""
    while True:
        folder = Path(f"/proc/{process}")
        pages = int((folder / "statm").read_text().split()[1])
        counts = [len(os.listdir(folder / name)) for name in ("task", "fd")]
        samples.append([round(time.monotonic() - began, 1), pages * os.sysconf("SC_PAGE_SIZE"), *counts])
        print(f"{samples[-1][0]:.0f} s, {samples[-1][1] / MIB:.1f} MiB, {counts}", flush=True)
        await asyncio.sleep(every)


async def load(options: argparse.Namespace, url: str, process: int) -> tuple[Clients, list[list[float]]]:
    """Run the clients. Return them and the samples of the process."""
    began, samples = time.monotonic(), []
    clients = Clients(url, options.distinct)
    sampling = asyncio.create_task(sampled(process, options.every, began, samples))
    await asyncio.gather(*(clients.ask(began + 60 * options.minutes) for _ in range(options.clients)))
    sampling.cancel()
    return clients, samples


def parts_of(samples: list[list[float]]) -> list[list[list[float]]]:
    """Return the samples of the first, the middle and the last third of the time."""
    third = samples[-1][0] / 3
    return [[each for each in samples if min(2, int(each[0] / third)) == number] for number in range(3)]


def rows_of(samples: list[list[float]]) -> list[list[str]]:
    """Return a row for each third of the time."""
    rows = []
    for name, part in zip(("first third", "middle third", "last third"), parts_of(samples), strict=True):
        memory = [each[1] / MIB for each in part]
        counts = [f"{min(values):g} to {max(values):g}" for values in ([each[n] for each in part] for n in (2, 3))]
        rows.append([name, f"{statistics.median(memory):.1f} ({min(memory):.1f} to {max(memory):.1f})", *counts])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--distinct", type=int, default=40, help="requests of each kind")
    parser.add_argument("--every", type=float, default=15.0, help="seconds between two readings of the memory")
    parser.add_argument("--write", type=Path, help="a data file of docs/results/data")
    parser.add_argument("--picture", type=Path, help="file of the figure")
    options = parser.parse_args()
    print(machine(), flush=True)
    url = free_url()
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "keifu", "serve", *MODELS, "--port", url.rpartition(":")[2], "--cache", "64M"]
        command += ["--no-access-log", "--cache-folder", folder, "--cache-size", "40M", "--search", "docs/guides"]
        process, _ = start(command, url, "/ready")
        try:
            clients, samples = asyncio.run(load(options, url, process.pid))
            pending = httpx.get(url + "/ready").json()["pending"]
        finally:
            process.terminate()
            process.wait(120)
    total = sum(clients.counts.values())
    print(f"{total:,} requests {dict(clients.counts)}; pending {pending}; {len(clients.errors)} errors", flush=True)
    rows = rows_of(samples)
    columns = ["time", "resident memory, MiB: median (lowest to highest)", "threads", "open files"]
    values = {"requests": dict(clients.counts), "errors": len(clients.errors), "samples": samples}
    publish(options.write, SECTION, typed("mixed_load.py", vars(options), usual(parser)), columns, rows, values)
    if options.picture:
        with chart(options.picture, legend=None) as axes:
            axes.plot([each[0] / 60 for each in samples], [each[1] / MIB for each in samples])
            axes.set(xlabel="minutes", ylabel="resident memory (MiB)", ylim=(0, None), title=f"{total:,} requests")
    _, middle, last = (statistics.median(each[1] for each in part) for part in parts_of(samples))
    growth = [f"The memory grows by {last / middle - 1:.1%}."] if last > (1 + GROWTH) * middle else []
    sys.exit("\n".join(clients.errors[:10] + growth) or None)


if __name__ == "__main__":
    main()
