"""The thread of a served model."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from torch import nn

pytest.importorskip("fastapi")

from serving_toys import WAIT, running, until

from keifu.checkpoints.loading import load_model
from keifu.inference.text.paged.folder import CacheFolder
from keifu.inference.text.request import Piece, Request
from keifu.inference.text.runner import TorchRunner
from keifu.inference.text.sampling_params import SamplingParams
from keifu.native import library
from keifu.serving import worker
from keifu.serving.app import Access
from keifu.serving.metrics import Metrics
from keifu.serving.worker import Limits, Worker


def test_pytorch_answers_while_the_native_step_is_compiled(
    folder: Path, opened: library.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, built = threading.Event(), library.prebuilt() or library.build()

    def slow_build() -> Path:
        compiled.wait()
        return built

    monkeypatch.setattr(library, "prebuilt", lambda: None)
    monkeypatch.setattr(library, "build", slow_build)
    monkeypatch.setattr(worker, "NATIVE_SECONDS", 0.1)
    library._loaded.cache_clear()
    ask = {"prompt": "abc", "max_tokens": 8, "temperature": 0}
    with running([str(folder / "base")], Limits(), Access()) as served:
        try:
            first = served.post("/v1/completions", ask).json()["choices"][0]["text"]
            assert isinstance(served.models.workers["base"]._engine.runner, TorchRunner)
        finally:
            compiled.set()
        until(library.is_open)
        second = served.post("/v1/completions", ask).json()["choices"][0]["text"]
        assert not isinstance(served.models.workers["base"]._engine.runner, TorchRunner)
    assert first == second


def test_a_server_that_starts_again_reads_what_the_first_one_stored(folder: Path, tmp_path: Path) -> None:
    ask = {"prompt": "A long document, " * 9, "max_tokens": 8, "temperature": 0}
    answers = []
    for kept in (None, tmp_path, tmp_path):
        limits = Limits(folder=kept and CacheFolder(kept, 2**30))
        with running([str(folder / "base")], limits, Access()) as served:
            until(library.is_open)
            answers.append(served.post("/v1/completions", ask).json())
        if limits.folder:
            limits.folder.flush()
    assert [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers] == [0, 0, 128]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1


def test_a_model_writes_while_another_is_loaded(folder: Path) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def at_once() -> tuple[nn.Module, Any]:
        return load_model(str(folder / "base")), None

    def slowly() -> tuple[nn.Module, Any]:
        begun.set()
        goes_on.wait()
        return at_once()

    async def write(worker: Worker) -> list[int]:
        request = Request([1, 2], SamplingParams(max_tokens=3), None, 512, 512)
        return [piece.token async for _, piece in worker.generate([request])]

    async def both() -> tuple[list[int], list[int]]:
        metrics = Metrics()
        slow, quick = Worker("slow", slowly, Limits(), metrics), Worker("quick", at_once, Limits(), metrics)
        waiting = asyncio.create_task(write(slow))
        try:
            await asyncio.to_thread(begun.wait, WAIT)
            found = await asyncio.wait_for(write(quick), WAIT)
        finally:
            goes_on.set()
        late = await waiting
        await asyncio.gather(slow.close(), quick.close())
        return found, late

    found, late = asyncio.run(both())
    assert len(found) == len(late) == 3


def test_a_client_that_leaves_as_a_piece_comes_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Python 3.11, `asyncio.wait_for` returned the piece and forgot that the client had left."""
    jobs: list[Any] = []
    monkeypatch.setattr(Worker, "_add", lambda self, job: jobs.append(job))

    async def leave() -> int:
        busy = Worker("busy", lambda: (nn.Identity(), None), Limits(), Metrics())
        asked = busy.generate([Request([1], SamplingParams(max_tokens=2), None, 9, 9)])

        async def read() -> None:
            async for _ in asked:
                pass

        reading = asyncio.ensure_future(read())
        while not jobs:
            await asyncio.sleep(0.01)
        jobs[0].out.put_nowait([(0, Piece(0, "a", 2))])
        reading.cancel()
        await asyncio.wait([reading], timeout=1)
        await busy.close()
        return busy.pending

    assert asyncio.run(leave()) == 0


def test_the_time_of_a_request_ends_though_its_pieces_wait_for_a_slow_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Any] = []
    monkeypatch.setattr(Worker, "_add", lambda self, job: jobs.append(job))

    async def read() -> int:
        slow, count = Worker("slow", lambda: (nn.Identity(), None), Limits(timeout=0.5), Metrics()), 0
        asked = slow.generate([Request([1], SamplingParams(max_tokens=2), None, 9, 9)])
        reading = asyncio.ensure_future(anext(asked))
        while not jobs:
            await asyncio.sleep(0.01)
        for _ in range(20):
            jobs[0].out.put_nowait([(0, Piece(0, "a", 2))])
        await reading
        with pytest.raises(TimeoutError):
            async for _ in asked:
                count += 1
                await asyncio.sleep(0.2)
        await slow.close()
        return count

    assert asyncio.run(read()) < 5
