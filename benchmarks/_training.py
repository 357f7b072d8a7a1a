"""Training steps as contenders: of keifu, and of any other model. Each records its losses."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from keifu.data.text.packed import PackedText
from keifu.data.text.token_shards import Shards
from keifu.training.objectives.language_modeling import causal_language_modeling
from keifu.training.protocols import Batch, Data, Objective
from keifu.training.settings import Settings
from keifu.training.trainer import Trainer

CPU = torch.device("cpu")
RATE, BETAS, CLIP = 6e-4, (0.9, 0.95), 1.0


def ours(
    model: torch.nn.Module,
    objective: Objective,
    batch: Callable[[int], Batch],
    dtype: torch.dtype,
    compile: bool,
    losses: list[float],
) -> Callable[[], None]:
    """Return a step of keifu's training loop, without the work between steps."""
    rows = len(next(iter(batch(0).values())))
    settings = Settings(steps=100_000, batch_size=rows, learning_rate=RATE, betas=BETAS, clip=CLIP, compile=compile)
    trainer = Trainer(model, objective, settings, dtype=dtype)

    def step() -> None:
        gradient = trainer.gradient(len(losses), batch(len(losses)))
        assert gradient
        trainer.update(gradient)
        losses.append(gradient.sums.means()["loss"])

    return step


def peer(
    model: torch.nn.Module,
    loss_of: Callable[[torch.nn.Module, Any], torch.Tensor],
    batch: Callable[[int], Any],
    dtype: torch.dtype,
    fused: bool,
    losses: list[float],
) -> Callable[[], None]:
    """Return the same step as a plain PyTorch loop, for a model of another library."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=fused)

    def step() -> None:
        rows = batch(len(losses))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())

    return step


def plain_steps(
    model: torch.nn.Module,
    loss: Callable[[int], torch.Tensor],
    steps: int,
    rate: float,
    warmup: int,
    weight_decay: float = 0.1,
) -> None:
    """Train by AdamW on the loss of each step. The rate rises linearly, and decreases to 0 over the last third."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=weight_decay, betas=(0.9, 0.95))
    for step in range(steps):
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / warmup, (steps - step) / (steps / 3))
        optimizer.step()
        optimizer.zero_grad()


def comparison_options(
    parser: argparse.ArgumentParser, steps: int, rows: int, length: int, data: str, vocab_size: int
) -> None:
    """Add the options of a comparison of small models that are trained with `comparison_settings`."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--rows", type=int, default=rows, help=f"of {length} tokens in a step")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--data", default=data)
    parser.add_argument("--vocab-size", type=int, default=vocab_size)
    parser.add_argument("--write", type=Path, help="a data file of docs/results/data")
    parser.add_argument("--picture", type=Path)


def comparison_settings(options: argparse.Namespace, seed: int) -> Settings:
    """Return AdamW with a warm-up of a tenth of the steps."""
    return Settings(
        steps=options.steps, batch_size=options.rows, learning_rate=options.rate, warmup=options.steps // 10,
        final_ratio=0.0, weight_decay=0.1, seed=seed,
    )  # fmt: skip


def windows_options(parser: argparse.ArgumentParser, steps: int, held_out: int, length: int) -> None:
    """Add the options of an experiment with windows of a text that `plain_steps` trains."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--tokens", type=int, default=1024, help="of a step")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--data", default="english")
    parser.add_argument("--held-out", type=int, default=held_out, help=f"windows of {length} tokens")
    parser.add_argument("--keep", type=Path, help="a folder for the values of each run, to go on later")
    parser.add_argument("--out", type=Path, help="a data file of docs/results/data")
    parser.add_argument("--picture", type=Path)


def held_out_windows(shards: Shards, length: int, count: int) -> torch.Tensor:
    """Return windows of the held-out text: [count, length]."""
    data = PackedText(shards, length - 1, 1, validation_tokens=count * length)
    return torch.cat([batch["tokens"].long() for batch in data.validation()])[:count]


def learned(
    model: torch.nn.Module,
    data: Data,
    settings: Settings,
    between: Callable[[int], None] = lambda step: None,
    objective: Objective = causal_language_modeling,
) -> float:
    """Train a causal model with keifu's loop, without the work between steps. Return the seconds.

    between: called with the number of finished steps; its time is not counted.
    """
    trainer = Trainer(model, objective, settings)
    seconds = 0.0
    for step in range(settings.steps):
        start = time.perf_counter()
        model.train()
        gradient = trainer.gradient(step, data.batch(step))
        assert gradient
        trainer.update(gradient)
        seconds += time.perf_counter() - start
        between(step + 1)
    model.eval()
    return seconds


@torch.no_grad()
def validation(model: torch.nn.Module, data: Data) -> float:
    """Return the loss of a causal model on the held-out part of the data, in nats per token, in float32."""
    total = weight = 0.0
    for batch in data.validation():
        outcome = causal_language_modeling(model.eval(), batch)
        total, weight = total + float(outcome.total), weight + float(outcome.weight)
    return total / weight
