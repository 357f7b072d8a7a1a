"""A small model with dropout and numbered layers, its data, and a run of it: what the tests of training share."""

import shutil
import sys
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch._dynamo  # optimizers import it when they are made, which takes seconds: here it is done once
from torch import Tensor, nn

from keifu.layers.dropout import Dropout
from keifu.layers.linear import JoinedLinear
from keifu.training.loop import train
from keifu.training.protocols import Batch, LossOutput, Run
from keifu.training.run import checkpoint, report
from keifu.training.settings import Settings


class Toy(nn.Module):
    """Two hidden layers, one of them joined, between an embedding and a head."""

    def __init__(self, dropout: float = 0.2):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([JoinedLinear(8, (6, 10)), nn.Linear(16, 8)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11)
        self.dropout = Dropout(dropout)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        x = self.embedding(tokens)
        x = x + self.layers[1](self.dropout(self.layers[0](x).tanh()))
        return self.head(self.norm(x))


class Sequences:
    """Counting modulo 11 from a random start, with a few errors."""

    fingerprint = "counting"

    def __init__(self, rows: int = 6, length: int = 5):
        self.rows, self.length = rows, length

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        start = torch.randint(11, (self.rows, 1), generator=generator)
        noise = (torch.rand(self.rows, self.length + 1, generator=generator) < 0.1).long()
        return {"tokens": (start + torch.arange(self.length + 1) + noise) % 11}

    def validation(self) -> Iterable[Batch]:
        return [self.batch(10**6)]


def objective(model: nn.Module, batch: Batch) -> LossOutput:
    """Return next-token cross-entropy, and how many were right."""
    tokens = batch["tokens"]
    logits, targets = model(tokens[:, :-1]), tokens[:, 1:]
    total = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return LossOutput(total, targets.numel(), {"accuracy": (logits.argmax(-1) == targets).sum()})


def toy(seed: int = 0, dropout: float = 0.2) -> Toy:
    torch.manual_seed(seed)
    return Toy(dropout)


def settings(**changed) -> Settings:
    standard = dict(steps=12, batch_size=6, micro_batch=6, learning_rate=1e-2, warmup=3, precision="float32")
    return Settings(**standard | dict(log_every=2, evaluate_every=4, save_every=3) | changed)


def run(directory: Path, **changed) -> Run:
    return Run(directory, about={"title": "A toy"}, bytes_per_unit=1.5, **changed)


def trained(directory: Path) -> Path:
    """Train a run of 12 steps in a directory."""
    train(toy(), objective, Sequences(), settings(), run(directory))
    return directory


@cache
def _whole() -> TemporaryDirectory[str]:
    folder = TemporaryDirectory(prefix="keifu-run-")
    trained(Path(folder.name))
    return folder


def finished(directory: Path) -> Path:
    """Copy such a run, which each process of the tests trains once, into a directory."""
    shutil.copytree(_whole().name, directory, dirs_exist_ok=True)
    return directory


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return its parameters; buffers count calls that a test need not repeat."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Slow(Sequences):
    """Takes its time, so that there is time to be killed in, and from step 30 on waits while a file is there."""

    def __init__(self, waits: Path):
        super().__init__()
        self.waits = waits

    def batch(self, step: int) -> Batch:
        time.sleep(0.01)
        while 30 <= step < 40 and self.waits.exists():
            time.sleep(0.02)
        return super().batch(step)


def train_slowly(directory: Path, optimizer: str, said: Path) -> None:
    """Train a run of 40 steps for a separate process, resumed if there is a state. Write its standard error to `said`.
    The run waits while there is a file of the folder's name with `.waits`."""
    torch.set_num_threads(1)
    report.draw_curves = lambda *_: "></svg>"  # which takes longer than the steps
    with said.open("a") as sys.stderr:
        out = run(directory, resume=bool(checkpoint.steps(directory)))
        data = Slow(directory.with_suffix(".waits"))
        train(toy(), objective, data, settings(steps=40, micro_batch=4, optimizer=optimizer), out)
