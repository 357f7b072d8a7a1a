"""A stop that comes while a run validates, samples, is measured or learns a tokenizer: it ends at once, and resumes."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from keifu import cli
from keifu.data.tokenizers import train
from keifu.recipes.language import pretraining
from keifu.training import loop
from keifu.training.run import checkpoint, metrics, report
from keifu.training.signals import Interrupted
from keifu.training.trainer import Trainer

GPT = "train gpt --data text.txt --depth 1 --vocab-size 270 --context-length 16 --batch-size 4 --steps 120".split()  # noqa: SIM905


@pytest.fixture(autouse=True)
def _text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("a line of the text\n" * 2000)


def stop_and_wait() -> None:
    """Send Ctrl-C to this process, then go on for a minute unless it is obeyed."""
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(600):
        time.sleep(0.1)


def weights(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.safetensors")}


def validated(folder: str) -> list[float | int]:
    return [line["step"] for line in metrics.read(Path(folder)) if "validation_loss" in line]


@pytest.mark.parametrize("at", [0, 50])
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


def test_a_stop_in_a_sample_ends_it(monkeypatch) -> None:
    monkeypatch.setattr(pretraining, "generate", lambda *_, **__: stop_and_wait())
    with pytest.raises(Interrupted, match="Stopped after step 0; the state is saved"):
        cli.parse([*GPT, "--out", "run"])()
    assert checkpoint.steps(Path("run")) == [0]


def test_a_stop_while_the_run_is_measured_ends_it(monkeypatch) -> None:
    monkeypatch.setattr(loop, "set_up", lambda *_: stop_and_wait())
    with pytest.raises(KeyboardInterrupt, match="Stopped before a state was saved"):
        cli.parse([*GPT, "--out", "run"])()


def test_a_stop_while_a_tokenizer_is_learned_ends_it(monkeypatch) -> None:
    """The library does not look for signals, so that Ctrl-C waited for its end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests of torch.distributed may have left another one
    done = threading.Event()
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        train._left_by_a_stop(lambda: done.wait(60))
    done.set()


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

    assert report.rising(lines(8.0, 4.0, 3.0)) == report.rising(lines(8.0, 3.0, 3.01)) == report.rising([]) == []
    [sentence] = report.rising(lines(8.0, 3.0, 4.0))
    assert "rose from 3 (step 10) to 4 (step 20) while the training loss fell" in sentence and "by heart" in sentence
    [sentence] = report.rising(lines(8.3, 8.6, 12.3))
    assert "It never fell, so the held-out data are probably of another kind" in sentence
