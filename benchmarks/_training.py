"""Training steps as contenders: of keifu, and of any other model. Each records its losses."""

import time
from collections.abc import Callable
from typing import Any

import torch

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
