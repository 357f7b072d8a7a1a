"""Banded attention compared with dense: time and memory of a layer by text length, in prefill and cached decoding.

python benchmarks/banded.py [--lengths 512 1024 2048 4096 8192] [--band 256] [--dim 768] [--heads 12] [--picture PNG]
    [--json FILE]

The layer is GPT-3 Small's attention with its projections (12 heads of 64; every second layer of GPT-3 is banded). Dense
attention runs twice: torch's fused version, which never stores the matrix of scores, and the explicit version of 2020.
Prefill reads the whole text; decoding reads one token after that many cached ones. Memory is the peak of a separate
process minus its memory before the pass (from Linux), and the allocated bytes of the cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _results import typed, write_timing
from _rounds import interleaved, machine
from torch import Tensor

from keifu.layers.attention.attention import Attention
from keifu.layers.attention.kv_cache import KVState
from keifu.layers.attention.masks import CausalMask

SECTION = "Banded attention"
KINDS = ("dense, written out", "dense", "banded")
CACHED = {kind: f"a cached token, {kind}" for kind in KINDS[1:]}
STEPS = 32  # decoded tokens in a round


def layer(kind: str, options: argparse.Namespace) -> Attention:
    """Return an attention layer, with the same weights for each kind."""
    torch.manual_seed(0)
    return Attention(options.dim, options.heads, window=options.band if kind == "banded" else None).eval()


def written_out(attention: Attention, x: Tensor) -> Tensor:
    """Compute dense attention with an explicit matrix of scores."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.n_heads, -1)).permute(2, 0, 3, 1, 4)
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf)
    return attention.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def prefill(kind: str, length: int, options: argparse.Namespace) -> Callable[[], Tensor]:
    """Return a function that passes a whole sequence through the layer."""
    attention, x = layer(kind, options), torch.randn(1, length, options.dim)
    if kind == "dense, written out":
        return lambda: written_out(attention, x)
    return lambda: attention(x, CausalMask(0, length))


def decoding(kind: str, length: int, options: argparse.Namespace) -> tuple[Callable[[], None], int]:
    """Return a function that decodes tokens after `length` others, and the bytes of the cache."""
    attention = layer(kind, options)
    heads = attention.n_kv_heads, attention.head_dim
    state = KVState([heads], 1, length + STEPS, torch.empty(0))
    x = torch.randn(1, 1, options.dim)

    def step(tokens: Tensor) -> None:
        state.positions(tokens.shape[1])
        attention(tokens, cache=state.layer(0))
        state.advance()

    def steps() -> None:
        state.lengths = [length]
        for _ in range(STEPS):
            step(x)

    step(torch.randn(1, length, options.dim))
    return steps, (length + STEPS) * state.token_bytes


def peak(kind: str, length: int, options: argparse.Namespace) -> float:
    """Return the peak memory of a pass in MB, measured in a separate process."""
    own = [sys.executable, __file__, "--child", kind, "--lengths", str(length)]
    sizes = [f"--{name}={vars(options)[name]}" for name in ("band", "dim", "heads")]
    given_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory leaves the process at once
    done = subprocess.run([*own, *sizes], capture_output=True, text=True, check=True, env=given_back)
    return json.loads(done.stdout)


def child(options: argparse.Namespace) -> None:
    """Print the peak memory that one pass adds, in MB."""
    work = prefill(options.child, options.lengths[0], options)
    prefill(options.child, 2 * options.band, options)()  # loads what a first call needs
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = held("VmRSS")
    work()
    print(json.dumps(held("VmHWM") - before))


def held(name: str) -> float:
    """Return the memory of the process in MB: now (VmRSS) or at its peak (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def measured(length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the task of a length: seconds of a prefill and of a cached token, and MB at the peak and of the cache."""
    passes = {kind: prefill(kind, length, options) for kind in KINDS if kind != KINDS[0] or length <= options.square}
    seconds = interleaved(passes, options.rounds)
    caches = {kind: decoding(kind, length, options) for kind in KINDS[1:]}
    cached = interleaved({kind: steps for kind, (steps, _) in caches.items()}, options.rounds)
    seconds |= {CACHED[kind]: [round(each / STEPS, 7) for each in found] for kind, found in cached.items()}
    held = {kind: [f"{peak(kind, length, options):,.0f}"] for kind in passes}
    held |= {CACHED[kind]: [f"{nbytes / 1e6:.1f}"] for kind, (_, nbytes) in caches.items()}
    return {"amount": 1, "seconds": seconds, "more": held}


def draw(tasks: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """Draw four pictures with a line for each kind over the length."""
    from _charts import chart  # after the memory has been measured

    titles = ("prefill, ms", "prefill, MB at the peak", "a token, ms", "cache, MB")
    with chart(options.picture, (15, 3.7), 4, legend=None) as grid:
        for number, (axes, title) in enumerate(zip(grid, titles, strict=True)):
            for colour, kind in zip(("tab:grey", "tab:blue", "tab:orange"), KINDS, strict=True):
                name = CACHED.get(kind, "") if number > 1 else kind
                drawn = {length: task for length, task in tasks.items() if name in task["seconds"]}
                if number % 2:
                    heights = [float(task["more"][name][0].replace(",", "")) for task in drawn.values()]
                else:
                    heights = [1000 * statistics.median(task["seconds"][name]) for task in drawn.values()]
                label = kind if kind != "banded" else f"band {options.band}"
                axes.plot(
                    [int(each.replace(",", "")) for each in drawn], heights, marker="o", color=colour, label=label
                )
            axes.set(xscale="log", yscale="log", xlabel="tokens", title=title)
            axes.set_xticks(options.lengths, [*tasks], fontsize=8)
            axes.minorticks_off()
        grid[0].legend(fontsize=8)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    for name, value in {"band": 256, "dim": 768, "heads": 12, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--square", type=int, default=8192, help="the longest text whose square of scores is written out"
    )
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", type=Path, help="The data file of the results whose table is replaced.")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options)
    print(f"{machine()}; one layer, dim {options.dim}, {options.heads} heads, band {options.band}, float32")
    tasks = {f"{length:,}": measured(length, options) for length in options.lengths}
    against = {KINDS[0]: ["banded"], "dense": ["banded"], CACHED["dense"]: [CACHED["banded"]]}
    values = {"tasks": tasks, "a row": "task", "in": "ms", "against": against}
    columns = (
        "tokens", "written out: ms; ratio to banded; MB at the peak", "dense", "banded: ms; MB",
        "a cached token, dense: ms; ratio; MB of the cache", "banded: ms; MB",
    )  # fmt: skip
    command = typed("banded.py", vars(options), {"rounds": 0, "picture": None})
    write_timing(options.json, SECTION, command, columns, values)
    if options.picture:
        draw(tasks, options)


if __name__ == "__main__":
    main()
