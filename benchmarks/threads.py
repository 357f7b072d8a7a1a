"""Waiting policies of threads: rates of training and decoding on a quiet machine, and next to busy programs.

python benchmarks/threads.py [--busy 0 1] [--rounds 3] [--seconds 0.7] [--workloads "small GPT" translator ...]

Each setting is a separate process, since OpenMP reads its variables once. It runs every workload in each round, after
an uncounted second, while all others are idle. "keifu" sets no variable and follows the load. The cores used by other
programs are measured too (Linux).
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _rounds import machine
from _training import ours

from keifu.inference.text.generate import generate_batch
from keifu.inference.text.sampling_params import SamplingParams
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import gpt2, llama, transformer
from keifu.models.diffusion import ddpm
from keifu.threads import follow_load
from keifu.training.objectives.diffusion import DiffusionLoss, draw_noise
from keifu.training.objectives.language_modeling import causal_language_modeling, translation

FOLLOWS = "keifu"
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
    FOLLOWS: {},
}
WARM = 1.0  # uncounted seconds
BUSY = "while True: pass"
Work = tuple[Callable[[], object], int]  # function, and the number of units that a call computes


def language_model(config: gpt2.Config, rows: int, length: int) -> Work:
    """Return a training step of a GPT on random tokens, and its number of tokens."""
    batch = {"tokens": torch.randint(config.vocab_size, (rows, length + 1))}
    return ours(
        gpt2.build(config).train(), causal_language_modeling, lambda step: batch, torch.float32, False, []
    ), rows * length


def small_gpt() -> Work:
    sizes = gpt2.Config(vocab_size=65, context_length=128, dim=128, hidden_dim=512, n_layers=4, n_heads=4, dropout=0.0)
    return language_model(sizes, 4, 128)


def gpt2_124m() -> Work:
    return language_model(gpt2.Config(dropout=0.0), 1, 32)


def translator() -> Work:
    """Return a training step of a Transformer on 32 pairs of 16 and 16 tokens, and its number of target tokens."""
    config = transformer.Config(vocab_size=4096, dim=128, hidden_dim=512, n_layers=2, n_heads=4)
    mask = torch.ones(32, 17, dtype=torch.bool)
    source, target = torch.randint(4, 4096, (32, 16)), torch.randint(4, 4096, (32, 17))
    batch = {"source": source, "source_mask": mask[:, 1:], "target": target, "target_mask": mask}
    model = transformer.build(config).train()
    return ours(model, translation, lambda step: batch, torch.float32, False, []), 32 * 16


def decoding() -> Work:
    """Return a function that decodes 16 greedy tokens of a small LLaMA, one at a time, and 16."""
    config = llama.Config(
        vocab_size=8192, context_length=64, dim=256, hidden_dim=704, n_layers=6, n_heads=4, n_kv_heads=4
    )
    model: DecoderLM = llama.build(config).eval()
    prompts, greedy = torch.randint(8192, (1, 16)).tolist(), SamplingParams(max_tokens=16, temperature=0)
    return lambda: generate_batch(model, None, prompts, greedy), 16


def unet() -> Work:
    """Return a training step of a small U-Net on 4 pictures of 16 x 16 pixels, and the number of pictures."""
    config = ddpm.Config(size=16, dim=32, multipliers=(1, 2), n_residual_blocks=1, dropout=0.0)
    batch = {"pictures": torch.randn(4, 3, 16, 16).clamp(-1, 1), "draws": draw_noise(0, 0, 4)}
    model = ddpm.build(config).train()
    return ours(model, DiffusionLoss(config.noise), lambda step: batch, torch.float32, False, []), 4


WORKLOADS: dict[str, tuple[Callable[[], Work], str]] = {
    "small GPT": (small_gpt, "tokens"),
    "translator": (translator, "tokens"),
    "GPT-2 124M": (gpt2_124m, "tokens"),
    "decoding": (decoding, "tokens"),
    "U-Net": (unet, "pictures"),
}


def serve(names: list[str], follow: bool) -> None:
    """Serve one setting: read a workload and seconds from each line, and print the rate."""
    if follow:
        follow_load()
    torch.manual_seed(0)
    works = {name: WORKLOADS[name][0]() for name in names}
    for work, _ in works.values():
        work()
    print(machine(), flush=True)
    for line in sys.stdin:
        name, seconds = line.strip().rsplit(" ", 1)
        rate(works[name], WARM)
        print(rate(works[name], float(seconds)), flush=True)


def rate(work: Work, seconds: float) -> float:
    """Return units per second, over at least `seconds` and at least one call."""
    run, units = work
    start, done = time.perf_counter(), 0
    while not done or time.perf_counter() - start < seconds:
        run()
        done += units
    return done / (time.perf_counter() - start)


def used() -> float:
    """Return the seconds that all cores of the machine were used so far."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def spent(process: subprocess.Popen[str]) -> float:
    """Return the seconds of cores that a process has used so far."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def started(setting: str, names: list[str]) -> subprocess.Popen[str]:
    """Start the process of a setting, without thread variables of the caller."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "MKL_"))}
    command = [sys.executable, __file__, "--serve", setting, "--workloads", *names]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=kept | SETTINGS[setting]
    )


def ask(process: subprocess.Popen[str], line: str) -> str:
    """Send a line to a setting's process. Return its answer."""
    assert process.stdin and process.stdout
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


Rates = dict[tuple[str, str], list[float]]  # by workload and setting, one for each round


def measured(
    processes: dict[str, subprocess.Popen[str]], names: list[str], busy: int, options: argparse.Namespace
) -> tuple[Rates, float]:
    """Measure all rates next to this many busy programs, and the cores that other programs took."""
    beside = [subprocess.Popen([sys.executable, "-c", BUSY], text=True) for _ in range(busy)]
    rates: Rates = {(name, setting): [] for name in names for setting in processes}
    start, others = time.perf_counter(), used() - sum(map(spent, [*processes.values(), *beside]))
    try:
        for _ in range(options.rounds):
            for name, setting in rates:
                rates[name, setting].append(float(ask(processes[setting], f"{name} {options.seconds}")))
        others = used() - sum(map(spent, [*processes.values(), *beside])) - others
    finally:
        for process in beside:
            process.kill()
            process.wait()
    return rates, others / (time.perf_counter() - start)


def table(rates: Rates, names: list[str]) -> str:
    """Return medians as Markdown with a row for each setting; last, the ratios to the default and to the best fixed
    setting."""
    medians = {key: statistics.median(values) for key, values in rates.items()}
    units = [f"{name}, {WORKLOADS[name][1]}/s" for name in names]
    lines = ["| | " + " | ".join(units) + " |", "|---|" + "---:|" * len(names)]
    for setting in SETTINGS:
        lines.append(f"| {setting} | " + " | ".join(f"{medians[name, setting]:,.4g}" for name in names) + " |")
    fixed = {name: max(medians[name, setting] for setting in SETTINGS if setting != FOLLOWS) for name in names}
    for text, base in (("default", {name: medians[name, "default"] for name in names}), ("best fixed", fixed)):
        shares = (f"{medians[name, FOLLOWS] / base[name]:.2f}" for name in names)
        lines.append(f"| {FOLLOWS} ÷ {text} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.7)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--serve", choices=SETTINGS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.workloads, options.serve == FOLLOWS)
    processes = {setting: started(setting, options.workloads) for setting in SETTINGS}
    heads = [process.stdout.readline().strip() for process in processes.values() if process.stdout]
    print(f"{heads[0]}; {options.rounds} rounds of {options.seconds} s")
    for busy in options.busy:
        rates, others = measured(processes, options.workloads, busy, options)
        print(f"\nBeside {busy} busy programs; others took {others:.2f} cores\n\n{table(rates, options.workloads)}")
    for process in processes.values():
        process.kill()


if __name__ == "__main__":
    main()
