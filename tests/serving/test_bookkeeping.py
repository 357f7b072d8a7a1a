"""Counts of the service: room for requests, guesses, limits of other clients, and runs that began again."""

import asyncio
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import create_autospec

import httpx
import pytest
from serving_toys import WAIT, running, until

sys.path.insert(0, str(Path(__file__).parent.parent))

from simulated_device import simulated

import keifu
from keifu.inference.text.engine import Engine
from keifu.inference.text.request import Request
from keifu.inference.text.sampling_params import SamplingParams
from keifu.serving import worker
from keifu.serving.app import Access
from keifu.serving.errors import ApiError
from keifu.serving.metrics import Metrics
from keifu.serving.models import describe
from keifu.serving.openai.generation import Answer
from keifu.serving.protocols import ollama
from keifu.serving.worker import Limits, Worker


def test_there_is_room_for_what_is_written_and_what_waits() -> None:
    busy = cast(Any, SimpleNamespace(limits=Limits(slots=2, queue=3), pending=1, name="x", _mean_seconds=1.0))
    Worker.check_room(busy, 4)
    for count, status in ((5, 429), (6, 400)):
        with pytest.raises(ApiError) as refused:
            Worker.check_room(busy, count)
        assert refused.value.status == status
    for seconds, wait in ((0.1, 1), (12.4, 12), (400.0, 60)):
        busy._mean_seconds = seconds
        with pytest.raises(ApiError) as refused:
            Worker.check_room(busy, 5)
        assert refused.value.retry == wait


def test_what_waits_what_runs_and_what_of_the_cache_is_used_are_shown() -> None:
    engine = create_autospec(Engine, instance=True, counts=(2, 1))
    engine.scheduler = SimpleNamespace(blocks=SimpleNamespace(free=3, n_blocks=4))
    Worker._count(cast(Any, SimpleNamespace(metrics=(metrics := Metrics()), name="x")), engine)
    for line in ('keifu_waiting{model="x"} 2.0', 'keifu_running{model="x"} 1.0', 'cache_used_ratio{model="x"} 0.25'):
        assert line in metrics.text().decode()


def test_guesses_that_did_not_come_are_those_beyond_the_accepted() -> None:
    requests = [SimpleNamespace(cached=3, accepted=4, guessed=6), SimpleNamespace(cached=9, accepted=1, guessed=2)]
    answer = cast(Any, SimpleNamespace(requests=requests, choices=2, prompt_tokens=5, completion_tokens=7, replies=[]))
    usage = cast(Any, Answer.usage).fget(answer)
    details = usage["completion_tokens_details"]
    assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (5, 3)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3} and usage["total_tokens"] == 12


@pytest.mark.parametrize(("kind", "times"), [("base", 2), ("translator", 2), ("encoder", 1)])
def test_a_model_that_writes_is_counted_twice(folder: Path, kind: str, times: int) -> None:
    """For PyTorch, and packed for native code."""
    parameters = keifu.load(str(folder / kind))[0].parameters()
    assert describe(str(folder / kind)).size == times * 4 * sum(each.numel() for each in parameters)


def test_a_model_that_writes_is_counted_once_on_a_gpu(folder: Path) -> None:
    with simulated():
        about, parameters = describe(str(folder / "base")), keifu.load(str(folder / "base"))[0].parameters()
        assert about.size == about.weight_bytes == sum(each.nbytes for each in parameters)


@pytest.mark.parametrize(("given", "expected"), [(-2, None), (-1, None), (0, 0), (5, 5), (None, None)])
def test_a_negative_number_of_ollama_is_no_limit(given: int | None, expected: int | None) -> None:
    turns = [ollama.OllamaMessage(role="user", content="Who?")]
    fields = ollama.OllamaChat(messages=turns, options={"num_predict": given}).settings()
    assert fields.get("max_tokens") == expected


def test_an_answer_that_nobody_reads_is_taken_out_of_the_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aborted, abort = [], Worker._abort
    monkeypatch.setattr(Worker, "_abort", lambda own, job: [aborted.append(job), abort(own, job)])
    with running([str(folder / "base")], Limits(), Access()) as served:
        own = served.models.worker("base")
        about = served.models.descriptions["base"]
        request = Request([5, 6, 7], SamplingParams(max_tokens=300), about.tokenizer, about.config.vocab_size, 512)

        async def leave() -> None:
            pieces = own.generate([request])
            await asyncio.wait_for(anext(pieces), WAIT)
            await pieces.aclose()

        asyncio.run(leave())
        until(lambda: bool(aborted))
        assert aborted[0].requests == [request] and own.pending == 0


def test_the_time_of_an_answer_is_that_of_all_its_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jump = [0.0]
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + jump[0]))
    with running([str(folder / "base")], Limits(), Access()) as served:
        about = served.models.descriptions["base"]
        request = Request([5, 6, 7], SamplingParams(max_tokens=300), about.tokenizer, about.config.vocab_size, 512)

        async def read() -> None:
            async for _ in served.models.worker("base").generate([request]):
                jump[0] = 700.0

        with pytest.raises(TimeoutError):
            asyncio.run(read())


def test_a_run_that_began_again_is_read_from_its_start(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    with running([str(folder / "clip")], Limits(), Access(runs=tmp_path)) as served:
        for start, count in ((0, 2), (12, 1), (24, 0), (99, 2)):
            found = httpx.get(f"{served.url}/v1/runs/again?start={start}").json()
            assert (len(found["lines"]), found["next"]) == (count, 24), start
        refused = httpx.get(f"{served.url}/v1/models/{'a' * 9000}")
        assert refused.status_code == 404 and len(refused.content) < 1000, "a long name is not sent back"


def test_the_bytes_of_a_model_are_counted_while_it_is_loaded(folder: Path) -> None:
    """Loaded, unloaded and loaded again: the metric is its size, 0 and its size."""

    def shown(served: Any) -> float:
        text = httpx.get(f"{served.url}/metrics").text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("keifu_loaded_bytes{"))

    with running([str(folder / "base")], Limits(), Access()) as served:
        name, seen = next(iter(served.models.descriptions)), []
        for action in ("load", "unload", "load"):
            assert served.post(f"/v1/models/{action}", {"model": name}).status_code == 200
            seen.append(shown(served))
        assert seen == [served.models._sizes[name], 0.0, served.models._sizes[name]] and seen[0] > 10_000
