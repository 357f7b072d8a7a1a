"""Seconds until nanoGPT's loss on its example for a CPU, for one change after another, and for nanoGPT.

python benchmarks/characters.py input.txt [--target 1.886] [--nanogpt FOLDER] [--only LAST] [--picture PNG]

The text is tiny Shakespeare (1,115,394 characters), its last tenth held out. Every line of the table keeps the changes
of the lines above it. The time is that of the training steps alone. The target is checked every 25 steps on 25,600
evenly spaced held-out characters; the final loss is that of the whole held-out text, in nats per character. `--nanogpt`
names a clone of nanoGPT, whose train.py is run with its README's settings for a laptop, with 2,000 steps.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _charts import chart
from _rounds import machine

from keifu.data.text.packed import PackedText
from keifu.memory import keep_freed
from keifu.models import gpt2, llama
from keifu.recipes.language.characters import WAYS
from keifu.recipes.language.pretraining import Text, prepare_text
from keifu.training.objectives.language_modeling import causal_language_modeling
from keifu.training.settings import Settings
from keifu.training.trainer import Trainer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Way:
    """One line of the table."""

    name: str
    build: Any
    config: Any
    settings: Settings


def ladder() -> list[Way]:
    """Return the settings of each line, from nanoGPT's to keifu's, with one change in each line."""
    _, nano, nano_settings = WAYS["nanogpt"]
    build, ours, settings = WAYS["keifu"]
    adamw = replace(nano_settings, batch_size=settings.batch_size, learning_rate=3e-3, warmup=20)
    return [
        Way("nanoGPT's model and settings", gpt2.build, nano, nano_settings),
        Way("48 rows a step, rate 3e-3", gpt2.build, nano, adamw),
        Way("LLaMA's block", llama.build, ours, adamw),
        Way("Muon for hidden matrices", build, ours, replace(settings, steps=2000, precision="float32")),
        Way("bfloat16 products where there are any", build, ours, replace(settings, steps=2000)),
        Way("rates that fall to 0 in 400 steps", build, ours, settings),
        Way("the same in 150 steps", build, ours, replace(settings, steps=150)),
    ]


Curve = list[tuple[float, float]]  # seconds, loss


def measure(way: Way, source: str, target: float) -> tuple[str, Curve]:
    """Train with one setting. Return its line (steps and seconds to the target, final loss) and its curve."""
    task = prepare_text(Text(source, "characters", 65_536, held_out=0.1, split="end"))
    config = replace(way.config, vocab_size=task.tokenizer.vocab_size)
    torch.manual_seed(0)
    model = way.build(config).train()
    settings = way.settings
    trainer = Trainer(model, causal_language_modeling, settings)
    data = PackedText(task.shards, config.context_length, settings.batch_size)
    judge = PackedText(task.shards, config.context_length, 256, validation_tokens=25_600)
    whole = PackedText(task.shards, config.context_length, 256)
    seconds, reached, step = 0.0, "not reached", 0
    curve: Curve = []
    for step in range(settings.steps):
        start = time.perf_counter()
        gradient = trainer.gradient(step, data.batch(step))
        assert gradient
        trainer.update(gradient)
        seconds += time.perf_counter() - start
        if (step + 1) % 25 == 0:
            loss = trainer.validation(judge.validation())["loss"]
            curve.append((seconds, loss))
            if loss <= target and reached == "not reached":
                reached = f"{step + 1} steps, {seconds:.1f} s"
                if settings.steps == 2000:  # later lines need no further steps
                    break
    loss = trainer.validation(whole.validation())["loss"]
    return f"| {way.name} | {reached} | {loss:.3f} after {step + 1} steps, {seconds:.1f} s |", curve


def draw(curves: dict[str, Curve], target: float, path: Path) -> None:
    """Draw loss over seconds, with a line for each setting."""
    with chart(path) as axes:
        for name, curve in curves.items():
            axes.plot(*zip(*curve, strict=True), label=name)
        axes.axhline(target, color="grey", linestyle=":", label=f"nanoGPT's loss, {target}")
        axes.set(
            xlabel="seconds of training", ylabel="held-out loss, nats per character", ylim=(None, 2.6), xlim=(0, None)
        )


def nanogpt(folder: Path, source: Path) -> str:
    """Run nanoGPT's train.py with the settings of its README for a laptop. Its time includes evaluations."""
    data = folder / "data" / "shakespeare_char"
    shutil.copy(source, data / "input.txt")
    subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, capture_output=True)
    flags = (
        "--device=cpu --compile=False --eval_iters=20 --log_interval=100 --block_size=64 --batch_size=12 --n_layer=4"
    )
    more = "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 --eval_interval=1000"
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *flags.split(), *more.split()]
    start = time.perf_counter()
    printed = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    seconds = time.perf_counter() - start
    loss = re.findall(r"val loss ([\d.]+)", printed)[-1]
    return f"| nanoGPT's train.py | {seconds:.1f} s | {loss} after 2000 steps (its estimate: 20 random batches) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--target", type=float, default=1.886)
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--only", type=int, default=0, help="the last so many lines of the ladder")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    print(f"{machine()}; target {options.target}\n\n| | to the target | end |\n|---|---|---|", flush=True)
    if options.nanogpt:
        print(nanogpt(options.nanogpt, options.text), flush=True)
    curves: dict[str, Curve] = {}
    for way in ladder()[-options.only :]:
        with keep_freed(CPU):  # as in keifu's loop
            line, curves[way.name] = measure(way, str(options.text), options.target)
        print(line, flush=True)
    if options.picture:
        draw(curves, options.target, options.picture)


if __name__ == "__main__":
    main()
