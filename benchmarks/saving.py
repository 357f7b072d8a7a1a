"""Cost of saving a state: seconds that training waits for it, and how much longer the next steps take.

python benchmarks/saving.py --json docs/results/data/saving.json

A LLaMA of 17 M parameters learns random tokens in two settings: on two processes of one thread that share it (FSDP),
whose states are written by a thread while training continues; and on one process of two threads, which waits until its
state is on disk. A state is saved every ten steps; the next steps are the three after it.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from keifu.distributed.group import join
from keifu.distributed.mesh import Mesh
from keifu.models import llama
from keifu.training.loop import train
from keifu.training.objectives.language_modeling import causal_language_modeling
from keifu.training.protocols import Batch, Run
from keifu.training.settings import Settings

CONFIG = llama.Config(4096, 128, 384, 1024, 8, 6)
EVERY, BESIDE, ROWS = 10, 3, 16
KINDS = {"two processes that share the model": 2, "one process": 1}


@dataclass(frozen=True)
class RandomTokens:
    """Rows of random tokens."""

    fingerprint: str = "random tokens"

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        return {"tokens": torch.randint(4096, (ROWS, 129), generator=generator)}

    def validation(self) -> Iterable[Batch]:
        return []


def learn(folder: Path, steps: int) -> None:
    """Train a run as one of its processes."""
    torch.manual_seed(0)
    settings = Settings(steps=steps, batch_size=ROWS, micro_batch=ROWS, precision="bfloat16", log_every=1, keep=10,
                        evaluate_every=0, save_every=EVERY, warmup=1)  # fmt: skip
    with join(Mesh(shard=2)) if "RANK" in os.environ else nullcontext():
        train(llama.build(CONFIG).train(), causal_language_modeling, RandomTokens(), settings, Run(folder))


def measure(folder: Path, world: int, steps: int) -> dict[str, float]:
    """Return medians over the saves of a run: seconds of a step, its delay by a save, and the additional seconds of the
    next steps; and the bytes of a state."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": str(2 // world)}
    group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    each = [shared | group | {"RANK": str(rank)} for rank in range(world)] if world > 1 else [shared]
    words = [sys.executable, __file__, "--steps", str(steps), "--run", str(folder)]
    silent = subprocess.DEVNULL
    if any([rank.wait() for rank in [subprocess.Popen(words, env=own, stdout=silent, stderr=silent) for own in each]]):
        raise SystemExit(f"The run of {world} processes failed.")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [ROWS * 128 / line["tokens_per_second"] for line in lines if "loss" in line]
    rounds = [seconds[at : at + EVERY] for at in range(EVERY, len(seconds) - EVERY + 1, EVERY)]  # each after a save
    step = median(each for every in rounds for each in every[BESIDE:])
    states = sorted((folder / "state").glob("step-*.json"))
    held = [json.loads(state.read_text())["lasted"].get("state") for state in states]  # by the previous save
    files = [file for file in (folder / "state").rglob("*.safetensors") if states[0].stem in str(file)]
    return {"step": step, "held_up": median(found for found in held if found is not None),
            "longer": median(sum(every[:BESIDE]) - BESIDE * step for every in rounds),
            "bytes": sum(file.stat().st_size for file in files)}  # fmt: skip


def main() -> None:
    """Time the runs and print the table, or train as one of their processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", type=Path, help="Of a process of a run: its folder.")
    options = parser.parse_args()
    if options.run:
        return learn(options.run, options.steps)
    table = {}
    print(f"{'a save of':36} {'a step':>9} {'held up':>9} {'steps beside':>13} {'state':>8}")
    for name, world in KINDS.items():
        with tempfile.TemporaryDirectory() as place:
            table[name] = found = measure(Path(place), world, options.steps)
        print(f"{name:36} {found['step']:7.3f} s {found['held_up']:7.3f} s {found['longer']:+11.3f} s "
              f"{found['bytes'] / 1e6:5.0f} MB", flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
