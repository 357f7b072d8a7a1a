"""Time of a decoding step of a mixture of experts, compared with dense models of as many active and as many total
weights.

python benchmarks/experts.py [--weights f32 bf16 int8 int4] [--streams 1 8 32] [--rounds 9] [--steps 32] [--json FILE]

The mixture has 8 experts in each layer, of which a token uses 2; the dense models have feed-forward networks of 2 and
of 8 times an expert's hidden dimension, and everything else the same. Weights are random.
"""

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from _results import write_table
from _rounds import interleaved, machine

from keifu.layers.mixture import idle_parameters
from keifu.models import llama
from keifu.models.mixture import mixtral
from keifu.native.model import NativeLM, Span, pack

SECTION = "Decoding a mixture of experts"
COLUMNS = ("", "streams", "mixture, ms a step", "relative to as many active weights", "relative to as many weights")
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


def ratios(seconds: dict[str, list[float]], base: str) -> str:
    found = [own / other for own, other in zip(seconds[MIXTURE], seconds[base], strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


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
    print(f"| {' | '.join(COLUMNS)} |\n|---|---:|---:|---:|---:|")
    rows: list[list[str]] = []
    values: dict[str, Any] = {"load": os.getloadavg()[0], "active": active, "parameters": counts}
    for weights in options.weights:
        packed = {name: pack(model, weights) for name, model in models.items()}
        for streams in options.streams:
            contenders = {name: Decoding(each, streams, options.steps) for name, each in packed.items()}
            seconds = interleaved(contenders, options.rounds)
            step = statistics.median(seconds[MIXTURE]) / options.steps
            rows.append([weights, f"{streams}", f"{1000 * step:.2f}", ratios(seconds, ACTIVE), ratios(seconds, TOTAL)])
            values[f"{weights}, {streams}"] = seconds
            print(f"| {' | '.join(rows[-1])} |", flush=True)
    if options.json:
        given = f"--rounds {options.rounds} --json {options.json}"
        write_table(options.json, SECTION, f"python benchmarks/experts.py {given}", COLUMNS, rows, values)


if __name__ == "__main__":
    main()
