"""A stop that comes while a run validates, samples, is measured or learns a tokenizer: it ends at once, and resumes."""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from training_toys import Sequences, objective, settings, toy

from keifu import cli
from keifu.data.text import token_shards
from keifu.data.tokenizers import bpe, train
from keifu.errors import UserError
from keifu.recipes.language import pretraining
from keifu.training import loop
from keifu.training.loop import train as train_run
from keifu.training.protocols import Batch, Run, StatelessBatches
from keifu.training.run import checkpoint, metrics, outcome
from keifu.training.signals import Interrupted
from keifu.training.trainer import Trainer

GPT = "train gpt --data text.txt --depth 1 --vocab-size 270 --context-length 16 --batch-size 4 --steps 120".split()  # noqa: SIM905


@pytest.fixture(autouse=True)
def _text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("a line of the text\n" * 2000)


def stop_and_wait(number: int = signal.SIGINT) -> None:
    """Send Ctrl-C or another signal to this process, then go on for a minute unless it is obeyed."""
    os.kill(os.getpid(), number)
    for _ in range(600):
        time.sleep(0.1)


def weights(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.safetensors")}


def validated(folder: str) -> list[float | int]:
    return [line["step"] for line in metrics.read(Path(folder)) if "validation_loss" in line]


@pytest.mark.parametrize("at", [pytest.param(0, marks=pytest.mark.slow), 50])
def test_a_stop_in_a_validation_ends_it_and_the_run_has_the_same_bits(at: int, monkeypatch) -> None:
    original = Trainer.validation

    def validation(self: Trainer, batches: Iterator) -> dict[str, float]:
        if self.state.step == at:
            stop_and_wait()
        return original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "validation", validation)
        with pytest.raises(Interrupted, match=f"Stopped after step {at}; the state is saved"):
            cli.parse([*GPT, "--out", "run"])()
    cli.parse(["train", "--resume", "run"])()
    cli.parse([*GPT, "--out", "whole"])()
    assert weights("run") == weights("whole") and validated("run") == validated("whole")


@pytest.mark.parametrize("large", [True, False])
def test_a_stop_in_a_sample_ends_it_and_says_how_much_is_written(large: bool, monkeypatch, capfd) -> None:
    monkeypatch.setattr(pretraining, "generate", lambda *_, **__: stop_and_wait())
    monkeypatch.setattr(loop, "LARGE", 10_000 if large else 1e9)
    with pytest.raises(Interrupted, match="Stopped after step 0; the state is saved"):
        cli.parse([*GPT, "--out", "run"])()
    assert checkpoint.steps(Path("run")) == [0]
    written = sum(Path("run", name).stat().st_size for name in ("model.safetensors", "state/step-00000000.safetensors"))
    said = re.search(r"([\d.]+) kB are being written: the state, and the model", capfd.readouterr().err)
    assert (said is not None) == large and (not said or float(said[1]) == pytest.approx(written / 1e3, rel=0.05))


class Answers(StatelessBatches, Sequences):
    """Data that the model writes, which takes long at one step."""

    def __init__(self, slow: int | None = None):
        super().__init__()
        self.slow = slow

    def batch(self, step: int) -> Batch:
        if step == self.slow:
            stop_and_wait()
        return super().batch(step)


def test_a_stop_in_a_rollout_ends_it_and_the_run_has_the_same_bits() -> None:
    for folder, slow in (("run", 5), ("whole", None)):
        run, data = Run(Path(folder), about={"title": "toy"}), Answers(slow)
        if slow:
            with pytest.raises(Interrupted, match="Stopped after step 5; the state is saved"):
                train_run(toy(), objective, data, settings(), run, largest=Sequences().batch(0))
            run, data = replace(run, resume=True), Answers()
        train_run(toy(), objective, data, settings(), run, largest=Sequences().batch(0))
    states = [checkpoint.latest(Path(folder))[0] for folder in ("run", "whole")]
    assert states[0].step == states[1].step == 12
    assert all(torch.equal(tensor, states[1].tensors[name]) for name, tensor in states[0].tensors.items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_the_run_is_measured_ends_it(number: signal.Signals, monkeypatch, capsys) -> None:
    monkeypatch.setattr(loop, "set_up", lambda *_: stop_and_wait(number))
    with pytest.raises(SystemExit) as ended:
        cli.main([*GPT, "--out", "run"])
    assert ended.value.code == 128 + number and "Stopped before a state was saved" in capsys.readouterr().err


@pytest.fixture
def _ctrl_c(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ctrl-C half a second after the start of the test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests of torch.distributed may leave another
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    yield
    timer.cancel()
    signal.signal(signal.SIGINT, before)


def deaf(seconds: float = 3) -> None:
    """Work for some seconds without regard to Ctrl-C, as the library does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(KeyboardInterrupt):
            time.sleep(0.05)


class DeafBackend:
    """Backend of a tokenizer, whose calls take long and do not look for signals."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def encode_batch_fast(self, *_: Any, **__: Any) -> list[Any]:
        deaf()
        return []


@pytest.mark.usefixtures("_ctrl_c")
def test_a_stop_while_a_tokenizer_is_learned_ends_it() -> None:
    """The library does not look for signals, so that Ctrl-C waited for its end."""

    class Slow:
        def __iter__(self) -> Iterator[str]:
            yield "a text"
            deaf()

    with pytest.raises(KeyboardInterrupt):
        train.train_tokenizer("bpe", Slow(), 300)


@pytest.mark.usefixtures("_ctrl_c")
def test_a_stop_while_clips_tokenizer_is_learned_ends_it() -> None:
    def slow() -> Iterator[str]:
        yield "a text"
        deaf()

    with pytest.raises(KeyboardInterrupt):
        bpe.learn(slow(), 600)


@pytest.mark.usefixtures("_ctrl_c")
def test_a_stop_within_a_batch_of_tokenising_ends_it(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a line of the text\n" * 5000)
    tokenizer = train.train_tokenizer("characters", ["a line of the text\n"], 100)
    vars(tokenizer)["backend"] = DeafBackend(tokenizer.backend)
    with pytest.raises(KeyboardInterrupt):
        token_shards.prepare("text.txt", tokenizer)
    assert not [*(tmp_path / "cache" / "tokens").glob("*/index.json")]


def test_an_error_of_a_tokenizer_passes_through_the_thread() -> None:
    tokenizer = train.train_tokenizer("characters", ["ab"], 100)
    with pytest.raises(UserError, match="'z'"):
        tokenizer.encode("ab" * 50_000 + "z")


def test_the_estimate_comes_before_the_first_validation(monkeypatch, capfd) -> None:
    monkeypatch.setattr(Trainer, "validation", lambda *_: (print("VALIDATING", flush=True), {"loss": 1.0})[1])
    cli.parse([*GPT, "--steps", "1", "--out", "run"])()
    printed = "".join(capfd.readouterr())
    assert "validations and samples not included" in printed
    assert "validations and samples included" in printed


def test_a_validation_loss_that_rises_is_said_with_its_likely_cause() -> None:
    def lines(*losses: float) -> list[dict[str, float | int]]:
        shown = [{"step": 10 * n, "loss": 5.0 - n} for n in range(len(losses))]
        return [*shown, *({"step": 10 * n, "validation_loss": loss} for n, loss in enumerate(losses))]

    assert outcome.rising(lines(8.0, 4.0, 3.0)) == outcome.rising(lines(8.0, 3.0, 3.01)) == outcome.rising([]) == []
    [sentence] = outcome.rising(lines(8.0, 3.0, 4.0))
    assert "rose from 3 (step 10) to 4 (step 20) while the training loss fell" in sentence and "by heart" in sentence
    [sentence] = outcome.rising(lines(8.3, 8.6, 12.3))
    assert "It never fell, so the held-out data are probably of another kind" in sentence
