"""Cache of one sequence after 1,024 to 32,768 tokens: MHA, GQA, MQA, a window, latent attention and a hybrid.

python benchmarks/context.py [--lengths 1024 32768] [--seconds] [--out JSON] [--picture PNG]

All models have 8 layers of 16 heads of 64 numbers, in bfloat16. GQA (Ainslie et al., 2023) has 4 heads of keys and
values and MQA (Shazeer, 2019) has 1. The window has 1,024 tokens and the heads of GQA. Latent attention (DeepSeek-V2,
2024) stores 256 + 32 numbers for each token; the hybrid (Qwen3-Next, 2025) has GQA in layers 4 and 8, and a Gated
DeltaNet with a state in float32 in the others.

The engine reads a prompt. The figure is the size of the blocks that its scheduler then assigns to the sequence, in
bytes of the allocated tensors, and of the states of fixed size, two for each sequence. The prompt's keys and values are
not computed, because this does not change their size. --seconds: time the next tokens, with computation.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch
from _charts import chart
from _results import write_table
from _rounds import machine
from torch import Tensor

from keifu.inference.text.engine import Engine
from keifu.inference.text.runner import TorchRunner
from keifu.inference.text.sampling_params import SamplingParams
from keifu.models import llama
from keifu.models.hybrid import qwen3_next
from keifu.models.mixture import deepseek_v3
from keifu.native.model import Span

LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768)
SHAPE = {"vocab_size": 256, "context_length": 40_000, "dim": 1024, "hidden_dim": 2048, "n_layers": 8, "n_heads": 16}
LATENT = {"head_dim": 64, "rope_dim": 32, "value_dim": 64, "q_rank": None, "kv_rank": 256, "n_dense_layers": 8}
LINEAR = {"n_linear_key_heads": 16, "n_linear_value_heads": 16, "linear_key_dim": 64, "linear_value_dim": 64}
MODELS = {
    "MHA": lambda: llama.build(llama.Config(**SHAPE)),
    "GQA": lambda: llama.build(llama.Config(**SHAPE, n_kv_heads=4)),
    "MQA": lambda: llama.build(llama.Config(**SHAPE, n_kv_heads=1)),
    "window": lambda: llama.build(llama.Config(**SHAPE, n_kv_heads=4, sliding_window=1024)),
    "latent": lambda: deepseek_v3.build(deepseek_v3.Config(**SHAPE, **LATENT)),
    "hybrid": lambda: qwen3_next.build(
        qwen3_next.Config(**SHAPE, **LINEAR, n_kv_heads=4, head_dim=64, rope_dim=16, n_experts=None)
    ),
}
TIMED = 5  # tokens


class Allocating(TorchRunner):
    """Runner that computes nothing until `computes` is set, but otherwise behaves as if it did."""

    computes = False

    def run(self, batch: Sequence[Span]) -> Tensor:
        if self.computes:
            return super().run(batch)
        states = self._pool.states
        states.advance(batch, *states.begin(batch))
        return torch.zeros(sum(span.wanted for span in batch), self.vocab_size)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in the allocated tensors."""
        return sum(x.nbytes for x in (*self._pool.keys, *self._pool.values)) // self.n_blocks


def measure(model: torch.nn.Module, length: int, timed: int) -> tuple[int, list[float]]:
    """Return the bytes that the engine keeps for a sequence of `length` tokens, and the seconds of the next `timed`
    ones."""
    runner = Allocating(model, n_blocks=-(-(length + TIMED + 1) // 16))
    engine = Engine(model, None, runner)
    engine.add(engine.request([1] * length, SamplingParams(max_tokens=TIMED + 1, temperature=0)))
    while not engine.step():
        pass
    blocks = engine.scheduler.blocks
    used = (blocks.n_blocks - blocks.free) * runner.block_bytes + runner.state_bytes
    runner.computes, seconds = True, []
    for _ in range(timed):
        began = perf_counter()
        engine.step()
        seconds.append(perf_counter() - began)
    return used, seconds


def draw(found: dict[str, dict[str, int]], path: Path) -> None:
    with chart(path, (8, 4.5), legend=10) as axes:
        for name, sizes in found.items():
            axes.plot([int(length) for length in sizes], [size / 2**20 for size in sizes.values()], "o-", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(ticks := [*map(int, found["MHA"])], [f"{tick:,}" for tick in ticks])
        axes.set_yticks(ticks := [4**power * 2 for power in range(6)], [f"{tick:,}" for tick in ticks])
        axes.set(xlabel="tokens of the sequence", ylabel="MiB that the engine keeps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--seconds", action="store_true", help="time the next tokens, too")
    parser.add_argument("--out", type=Path, help="a data file of docs/results/data")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    print(f"{machine()}\n\n| MiB | {' | '.join(f'{length:,}' for length in options.lengths)} |")
    print("|---|" + "---:|" * len(options.lengths), flush=True)
    rows, found = list[list[str]](), dict[str, dict[str, int]]()
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model = build().to(torch.bfloat16).eval()
        measured = {length: measure(model, length, TIMED if options.seconds else 0) for length in options.lengths}
        found[name] = {str(length): used for length, (used, _) in measured.items()}
        rows.append([name, *(f"{used / 2**20:,.1f}" for used, _ in measured.values())])
        print(f"| {' | '.join(rows[-1])} |", flush=True)
        if options.seconds:
            times = ", ".join(f"{statistics.median(seconds):.4f}" for _, seconds in measured.values())
            print(f"  seconds a token: {times}", flush=True)
    if options.out:
        columns = ["MiB after so many tokens", *(f"{length:,}" for length in options.lengths)]
        write_table(options.out, "Memory of a long context", "python benchmarks/context.py", columns, rows, found)
    if options.picture:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
