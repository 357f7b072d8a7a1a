"""Time of a decoding step of a mixture of experts, compared with dense models of as many active and as many total
weights.

python benchmarks/experts.py [--weights f32 bf16 int8 int4] [--streams 1 8 32] [--rounds 9] [--steps 32] [--json FILE]

The mixture has 8 experts in each layer, of which a token uses 2; the dense models have feed-forward networks of 2 and
of 8 times an expert's hidden dimension, and everything else the same. Weights are random.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from _results import write_timing
from _rounds import interleaved, machine

from keifu.layers.mixture import idle_parameters
from keifu.models import llama
from keifu.models.mixture import mixtral
from keifu.native.model import NativeLM, Span, pack

SECTION = "Decoding a mixture of experts"
COLUMNS = ("weights, streams", "mixture, ms per step", "ratio to as many active weights", "ratio to as many weights")
SIZE: dict[str, Any] = {
    "vocab_size": 8192, "context_length": 512, "dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 2,
    "norm_eps": 1e-5,
}  # fmt: skip
EXPERT, EXPERTS, CHOSEN = 1536, 8, 2
MIXTURE, ACTIVE, TOTAL = "mixture", "as many active", "as many in all"


def build() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_experts": EXPERTS, "n_experts_per_token": CHOSEN, "hidden_dim": EXPERT}
    return {
        MIXTURE: mixtral.build(mixtral.Config(**SIZE, **sizes)).eval(),
        ACTIVE: llama.build(llama.Config(**SIZE, hidden_dim=CHOSEN * EXPERT)).eval(),
        TOTAL: llama.build(llama.Config(**SIZE, hidden_dim=EXPERTS * EXPERT)).eval(),
    }


class Decoding:
    """Greedy decoding of several streams, each of which begins with a different token."""

    def __init__(self, packed: NativeLM, streams: int, steps: int):
        self.streams, self.steps = streams, steps
        self.runner = packed.runner(streams * self.blocks)

    @property
    def blocks(self) -> int:
        return -(-self.steps // 32)

    def __call__(self) -> None:
        tables = [list(range(s * self.blocks, (s + 1) * self.blocks)) for s in range(self.streams)]
        tokens = list(range(1, self.streams + 1))
        for step in range(self.steps):
            spans = [Span(s, [token], step, tables[s]) for s, token in enumerate(tokens)]
            tokens = self.runner.run(spans).argmax(-1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", nargs="+", default=["f32", "bf16", "int8", "int4"])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--json", type=Path, help="The data file of the results whose table is replaced.")
    options = parser.parse_args()
    models = build()
    counts = {name: sum(each.numel() for each in model.parameters()) for name, model in models.items()}
    active = counts[MIXTURE] - idle_parameters(models[MIXTURE])
    print(f"{machine()}; load {os.getloadavg()[0]:.1f}; {active:,} of {counts[MIXTURE]:,} weights active, {counts}\n")
    tasks: dict[str, Any] = {}
    for weights in options.weights:
        packed = {name: pack(model, weights) for name, model in models.items()}
        for streams in options.streams:
            contenders = {name: Decoding(each, streams, options.steps) for name, each in packed.items()}
            seconds = interleaved(contenders, options.rounds)
            tasks[f"{weights}, {streams}"] = {"amount": options.steps, "seconds": seconds}
    values = {
        "load": os.getloadavg()[0], "active": active, "parameters": counts, "tasks": tasks, "in": "ms", "a row": "task",
        "against": {MIXTURE: [ACTIVE, TOTAL]}, "shown": [MIXTURE],
    }  # fmt: skip
    command = f"python benchmarks/experts.py --rounds {options.rounds} --json {options.json}"
    write_timing(options.json, SECTION, command, COLUMNS, values)


if __name__ == "__main__":
    main()
