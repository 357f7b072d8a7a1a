"""Two processes of one thread compared with one of two threads: equal losses, speed of each mesh, bytes exchanged.

python benchmarks/scaling_out.py --picture docs/pictures/pathways.png --json docs/results/data/scaling_out.json

A small LLaMA is trained in float32 on the example texts; each run has the same seed. Two pods are compared, bit for
bit, with one process of one thread that adds up two micro-batches. Bytes per step are those of the loopback network
during a run minus those of a run with fewer steps; they include packet headers and other programs' data. They are
compared with the formulas (see `formulas`), summed over all processes.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
TASK = ["gpt", "--depth", "2", "--data", str(ROOT / "examples/data/my-texts"), "--tokenizer", "characters",
        "--batch-size", "16", "--context-length", "128", "--precision", "float32", "--matrix-rate", "0.01"]  # fmt: skip
RUNS = {
    "one process, two threads": (2, []),
    "one process, one thread, two micro-batches": (1, ["--micro-batch", "8"]),
    "two pods": (1, ["--processes", "2"]),
    "sharded over two (FSDP)": (1, ["--mesh.shard", "2"]),
    "tensor parallel over two": (1, ["--mesh.tensor", "2"]),
}
PODS, ALONE = "two pods", "one process, one thread, two micro-batches"


def sent() -> int:
    """Return bytes that the loopback network has carried so far."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def train(name: str, folder: Path, steps: int) -> tuple[list[dict[str, Any]], int]:
    """Train a run. Return its lines of metrics, and the bytes sent over the loopback network."""
    threads, words = RUNS[name]
    before, out, world = sent(), folder / f"{name}-{steps}", 1 if name.startswith("one process") else 2
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT / "src")}
    with socket.socket() as free:  # as in torchrun, whose processes have separate sessions
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    own = [environment | shared | {"RANK": str(rank)} for rank in range(world)] if world > 1 else [environment]
    line = [sys.executable, "-m", "keifu", "train", *TASK, *words, "--steps", str(steps), "--out", str(out)]
    silent = subprocess.DEVNULL
    ranks = [subprocess.Popen(line, env=each, stderr=silent, stdout=silent) for each in own]
    if any([rank.wait() for rank in ranks]):
        raise SystemExit(f"{name} failed.")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], sent() - before


def formulas(tensors: dict[str, Any]) -> dict[str, float]:
    """Return the megabytes that a step exchanges on each mesh of two processes, computed from the model's tensors.

    Each process sends the other one half of what is gathered, or all of what is summed; gloo's reduce-scatter needs as
    much. Pods sum the gradients. FSDP gathers the weights of the blocks for each pass and the others once, and sums
    gradients. Tensor parallelism gathers a block's hidden states four times and sums them four times, in both passes
    together. They are also gathered after the blocks, and before them in the backward pass; the embedding's output is
    summed, and the gradient of the head's input. In both, Muon gathers the weights, gradients and momenta of its
    matrices.
    """
    sizes = {name: 4 * tensor.numel() / 1e6 for name, tensor in tensors.items()}
    blocks = {name: size for name, size in sizes.items() if ".layers." in name}
    total, muon = sum(sizes.values()), 3 * sum(size for name, size in blocks.items() if tensors[name].dim() == 2)
    hidden = 4 * 16 * 128 * tensors["model.norm.weight"].numel() / 1e6
    depth = len({name.split(".")[2] for name in blocks})
    return {
        "two pods": 2 * total,
        "sharded over two (FSDP)": total + sum(blocks.values()) + 2 * total + muon,
        "tensor parallel over two": hidden * (depth * (4 + 4 * 2) + 2 + 2 * 2) + muon,
    }


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the losses of two pods over those of one process."""

    from _charts import chart

    with chart(path, (7, 4), legend=None) as axes:
        for name, style in ((ALONE, {"linewidth": 5, "alpha": 0.35}), (PODS, {"linewidth": 1.2, "color": "black"})):
            axes.plot(
                [line["step"] for line in found[name]], [line["loss"] for line in found[name]], label=name, **style
            )
        axes.set(xlabel="step", ylabel="loss, nats per token", title="Two pods and one process: the same bits")
        axes.legend(frameon=False)


def main() -> None:
    """Train all runs, print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, found, table = Path(place), {}, {}
        print(f"{'run':44} {'tokens/s':>9} {'ratio':>6} {'MB a step':>10} {'last loss':>18}")
        for name in RUNS:
            lines, many = train(name, folder, options.steps)
            few = train(name, folder, 10)[1] if not name.startswith("one process") else 0
            found[name] = lines
            rates = sorted(line["tokens_per_second"] for line in lines[1:])
            rate = rates[len(rates) // 2]
            first = first if name != next(iter(RUNS)) else rate  # noqa: F821
            carried = (many - few) / (options.steps - 10) / 1e6 if few else 0.0
            table[name] = {"tokens_per_second": rate, "ratio": rate / first, "megabytes_a_step": carried,
                           "last_loss": lines[-1]["loss"]}  # fmt: skip
            print(f"{name:44} {rate:9,.0f} {rate / first:6.2f} {carried:10.2f} {lines[-1]['loss']:18.15f}", flush=True)
        weights = {name: load_file(folder / f"{name}-{options.steps}" / "model.safetensors") for name in (PODS, ALONE)}
        count = sum(tensor.numel() for tensor in weights[PODS].values())
        same = all(tensor.equal(weights[ALONE][name]) for name, tensor in weights[PODS].items())
        exchanged = formulas(weights[PODS])
        for name, megabytes in exchanged.items():
            print(f"{name}: {megabytes:.2f} MB a step by the formula, {table[name]['megabytes_a_step']:.2f} carried.")
            table[name]["formula_megabytes"] = megabytes
        table |= {"parameters": count, "same_bits": same}
        said = "the same bits" if same else "DIFFERENT"
        print(f"Weights of two pods and of one process with two micro-batches: {said}.")
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    if options.picture:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
