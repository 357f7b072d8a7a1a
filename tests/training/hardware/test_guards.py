"""Promise 4: what is not finite, too large or not writable is said, by name and amount, and nothing is lost."""

import ctypes
import errno
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from training_toys import Sequences, Toy, objective, run, settings, toy, weights

from keifu import memory
from keifu.errors import UserError
from keifu.processes import Processes, use
from keifu.training.hardware import cost, failures
from keifu.training.loop import train
from keifu.training.run import checkpoint, metrics


class Exploding(nn.Module):
    """Gives NaN, infinity or a gradient of infinity from a step on, as a function of how often it was called."""

    def __init__(self, inner: nn.Module, kind: str, model: Toy, calls: int = 16):
        super().__init__()
        self.inner, self.kind, self.calls = inner, kind, calls
        self.model = [model]  # in a list, so that it is no part of this module

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.model[0].calls <= self.calls or not self.training:
            return y
        if self.kind == "gradient":
            return y + (y - y.detach()).abs().sqrt()  # its derivative at 0 is infinite
        return y * float(self.kind)


def exploding(kind: str) -> Toy:
    model = toy()
    model.layers[1] = Exploding(model.layers[1], kind, model)
    return model


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nan", r"output of layers.1 \(Exploding\) is the first that holds \d+ NaN of \d+ values"),
        ("inf", r"output of layers.1 \(Exploding\) is the first that holds \d+ infinite of \d+ values"),
        ("gradient", r"gradient that reaches layers.1.inner \(Linear\) is the first that holds"),
    ],
)
def test_what_is_not_finite_stops_the_run_and_names_the_layer(tmp_path: Path, kind: str, said: str) -> None:
    model = exploding(kind)
    with pytest.raises(failures.NotFinite, match=said) as error:
        train(model, objective, Sequences(), settings(micro_batch=4), run(tmp_path))
    step = checkpoint.steps(tmp_path)[-1]
    assert f"Stopped after step {step}, whose state is saved" in str(error.value)
    assert "To go on: the same call of keifu.train" in str(error.value)
    assert 0 < step < 12 and all(tensor.isfinite().all() for tensor in weights(model).values())
    saved = checkpoint.latest(tmp_path)[0].tensors
    assert all(torch.equal(saved[f"model.{name}"], tensor) for name, tensor in weights(model).items())


def test_a_loss_that_is_not_finite_by_itself_is_called_so() -> None:
    model, batch = toy(), Sequences().batch(0)
    text = failures.first_not_finite(model, lambda: objective(model, batch).total * float("inf"))
    assert text.startswith("the loss is the first number that is not finite")


def test_a_weight_that_is_not_finite_is_named_first() -> None:
    model, batch = toy(), Sequences().batch(0)
    model.norm.weight.data[3] = float("nan")
    text = failures.first_not_finite(model, lambda: objective(model, batch).total)
    assert text == "norm.weight itself holds 1 NaN of 8 values"


def test_a_sound_step_is_not_accused() -> None:
    model, batch = toy(), Sequences().batch(0)
    assert failures.first_not_finite(model, lambda: objective(model, batch).total) == failures.NOT_AGAIN


MESSAGES = [
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
        "2.15 GB more were asked for",
    ),
    (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
            "tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
        ),
        "4 TB more were asked for",
    ),
    (MemoryError("Unable to allocate 3.5 MiB for an array"), "3.67 MB more were asked for"),
    (MemoryError(), "not enough memory; lower micro_batch"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "lower micro_batch"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "lower micro_batch"),
    (RuntimeError("GET was unable to find an engine to execute this computation"), "lower micro_batch"),
]


def test_a_number_of_another_process_is_named_by_it(tmp_path: Path) -> None:
    class Two(Processes):
        world_size = 2

        def gather(self, text: str) -> list[str]:
            return [text, "the rows of the other one" if text == failures.NOT_AGAIN else text]

    calls = iter(range(100))

    def once(model: nn.Module, batch: dict):
        found = objective(model, batch)
        return found._replace(total=found.total * float("nan")) if next(calls) == 7 else found

    with use(Two()), pytest.raises(failures.NotFinite, match="In the next step the rows of the other one"):
        train(toy(), once, Sequences(), settings(), run(tmp_path))


def test_the_state_of_a_split_model_is_not_said_to_be_saved(tmp_path: Path) -> None:
    class Split(Processes):
        is_replicated = False

    with use(Split()), pytest.raises(failures.NotFinite, match=r"Stopped after step \d+, whose state is not saved"):
        train(exploding("nan"), objective, Sequences(), settings(micro_batch=4, save_every=0), run(tmp_path))


@pytest.mark.parametrize("when", [7, 8])  # in a step, and in the validation after it
@pytest.mark.parametrize(("error", "said"), MESSAGES)
def test_out_of_memory_says_how_much_and_what_to_turn(tmp_path: Path, error: Exception, said: str, when: int) -> None:
    calls = iter(range(100))

    def hungry(model: nn.Module, batch: dict):
        if next(calls) > when:
            raise error
        return objective(model, batch)

    with pytest.raises(failures.OutOfMemory, match=said) as caught:
        train(toy(), hungry, Sequences(), settings(), run(tmp_path))
    step = checkpoint.steps(tmp_path)[-1]
    assert f"Stopped after step {step}, whose state is saved" in str(caught.value) and step > 0
    assert "lower micro_batch" in str(caught.value)


def test_the_real_allocator_is_understood() -> None:
    with (
        pytest.raises(failures.OutOfMemory, match="TB more were asked for; lower micro_batch"),
        failures.explain_out_of_memory(),
    ):
        torch.empty(2**50, dtype=torch.uint8)


def test_another_error_is_left_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="shapes"), failures.explain_out_of_memory():
        raise RuntimeError("shapes do not fit")


def test_what_cannot_fit_is_said_before_the_start(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cost, "available_memory", lambda device: 5000)
    with pytest.raises(UserError, match=r"does not fit: one row .* needs about [\d.]+ kB .* 5 kB are free; lower"):
        train(toy(), objective, Sequences(), settings(), run(tmp_path))


def full(monkeypatch, until: list[bool]) -> None:
    """Simulate a full disk while `until` is empty: nothing can be synced."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if not until:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("os.fsync", fsync)


def test_a_full_disk_stops_no_run_and_the_last_state_stays(tmp_path: Path, monkeypatch, capsys) -> None:
    room = [True]
    full(monkeypatch, room)

    class Filling(Sequences):
        def batch(self, step: int):
            if step in (5, 8):
                room.clear() if step == 5 else room.append(True)
            return super().batch(step)

    summary = train(toy(), objective, Filling(), settings(), run(tmp_path))
    assert summary.steps == 12 and checkpoint.steps(tmp_path) == [9, 12]
    assert "The state of step 6 was not saved: The disk is full" in capsys.readouterr().err


def test_an_error_of_the_data_is_raised_after_the_state_is_saved(tmp_path: Path) -> None:
    class Broken(Sequences):
        def batch(self, step: int):
            if step == 8:
                raise RuntimeError("the shard is gone")
            return super().batch(step)

    with pytest.raises(RuntimeError, match="the shard is gone") as caught:
        train(toy(), objective, Broken(), settings(), run(tmp_path))
    assert checkpoint.steps(tmp_path)[-1] == 8
    assert "To go on: the same call of keifu.train" in caught.value.__notes__[0]


def test_a_full_disk_at_the_end_keeps_the_state_before(tmp_path: Path, monkeypatch) -> None:
    room = [True]
    full(monkeypatch, room)

    class Filling(Sequences):
        def batch(self, step: int):
            if step == 11:
                room.clear()
            return super().batch(step)

    with pytest.raises(UserError, match="The disk is full: .*step-00000012.safetensors was not written"):
        train(toy(), objective, Filling(), settings(), run(tmp_path))
    assert checkpoint.latest(tmp_path)[0].step == 9
    assert not list((tmp_path / "state").glob(".*"))
    room.append(True)
    assert train(toy(), objective, Sequences(), settings(), run(tmp_path, resume=True)).steps == 12


def test_a_full_disk_told_by_safetensors_is_the_same(tmp_path: Path, monkeypatch) -> None:
    def save_file(tensors: dict, path: Path, metadata: dict) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", save_file)
    with pytest.raises(UserError, match="The disk is full: .*step-00000001.safetensors was not written"):
        checkpoint.save(tmp_path, 1, checkpoint.model_tensors(toy()), {}, lambda step: None)


def test_lines_wait_while_the_disk_is_full(tmp_path: Path) -> None:
    with closing(metrics.RunMetrics(tmp_path, [], 0)) as lines:
        lines.write(1, {"loss": 3.0})
        real = lines.file

        class Full:
            def tell(self) -> int:
                return real.tell()

            def write(self, content: bytes) -> int:
                real.write(content[:5])
                raise OSError(errno.ENOSPC, "No space left on device")

            def truncate(self, size: int) -> None:
                real.truncate(size)

        lines.file = Full()
        lines.write(2, {"loss": 2.0})
        lines.file = real
        assert [line["step"] for line in metrics.read(tmp_path)] == [1]
        lines.write(3, {"loss": 1.0})
    assert [(line["step"], line["loss"]) for line in metrics.read(tmp_path)] == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_only_the_first_process_writes_lines_in_a_folder_that_was_taken_away(tmp_path: Path) -> None:
    class Second(Processes):
        rank = 1

    with use(Second()), closing(metrics.RunMetrics(tmp_path / "run", [], 0)) as lines:
        lines.write(1, {"loss": 3.0})
    assert not lines.path.exists()


def test_divergence_is_said_once_and_only_when_the_loss_is_far_above() -> None:
    watch = failures.Divergence()
    assert [watch.watch(3.0 + 0.1 * (i % 3)) for i in range(20)] == [None] * 20
    warning = watch.watch(9.0)
    assert warning and "The loss is 9, far above its running mean of 3.09" in warning
    assert watch.watch(10.0) is None
    assert watch.watch(3.1) is None
    assert watch.watch(9.0) is not None


def test_a_falling_loss_and_the_first_readings_raise_no_alarm() -> None:
    watch = failures.Divergence()
    assert [watch.watch(10 * 0.9**i) for i in range(60)] == [None] * 60
    assert [failures.Divergence().watch(1e6)] == [None]


def test_memory_is_read_within_the_limits_of_the_container(tmp_path: Path) -> None:
    assert memory.container(tmp_path) == []
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert memory.container(tmp_path) == []
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 200\n")
    assert memory.container(tmp_path) == [500]
    old = tmp_path / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("400")
    (old / "memory.usage_in_bytes").write_text("900")
    assert memory.container(tmp_path) == [500, 0]
    (own := tmp_path / "own").write_text("3:cpu:/\n0::/jobs/7\n")  # a job's group, which is not the first one
    (job := tmp_path / "jobs/7").mkdir(parents=True)
    (job / "memory.max").write_text("300\n")
    (job / "memory.current").write_text("100\n")
    assert memory.container(tmp_path, own) == [200, 500, 0]
    assert 0 < memory.available_memory(torch.device("cpu")) < 2**50


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /proc/self/statm")
def test_memory_is_read_within_the_limit_of_the_process() -> None:
    """As `ulimit -v` sets it: an allocation beyond it fails, however much memory the machine has."""
    code = """
import resource, torch
from keifu.memory import address_space, available_memory
assert address_space() == []
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**28, -1))
print(available_memory(torch.device("cpu")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert 0 < int(done.stdout) <= 2**28, done.stderr


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_machine", lambda: 4000)
    monkeypatch.setattr(memory, "container", lambda: [])
    assert memory.available_memory(torch.device("cpu")) == 4000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.available_memory(torch.device("cpu")) == 1000


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # pytest makes a folder by os.getuid
    """Remove the functions that Windows lacks. Simulate its own call, which reports 8 GiB of 16 as available."""

    def status(pointer) -> int:
        pointer._obj.total, pointer._obj.available = 2**34, 2**33
        return int(pointer._obj.length == 64)  # of the structure that Windows fills

    kernel = SimpleNamespace(GlobalMemoryStatusEx=status)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    for name in ("sysconf", "sysconf_names", "sync", "uname", "getuid", "fork", "sched_getaffinity", "getloadavg"):
        monkeypatch.delattr(os, name, raising=False)
    for name in ("SIGHUP", "SIGUSR1", "SIGALRM", "SIGKILL"):
        monkeypatch.delattr(signal, name, raising=False)
    for name in ("resource", "fcntl", "termios", "pwd", "readline"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("PROC", "GROUPS"):
        monkeypatch.setattr(memory, name, Path("nothing-of-the-kind"))


def test_memory_is_known_where_there_is_no_sysconf(windows: None) -> None:
    assert memory.available_memory(torch.device("cpu")) == 2**33


def test_a_run_needs_nothing_that_windows_lacks(windows: None, tmp_path: Path) -> None:
    for resume in (False, True):
        train(toy(), objective, Sequences(), settings(steps=4), run(tmp_path, resume=resume))
    assert (tmp_path / "report.html").is_file()
