"""A provoked spike of the loss, with and without PaLM's recovery: going back and leaving batches out.

python benchmarks/spike.py [--steps 700] [--at 350] [--bad 12] [--rate 0.1] [--picture PNG] [--out FOLDER]

A small PaLM is trained with its paper's optimizer, at a rate and without clipping so that a few batches can harm it.
Some batches in the middle are random tokens. Three runs have the same weights and batches: without the rule; with the
rule (section 5.1); and without the bad batches, for reference. The table has the highest loss of a step, the number of
steps with a loss above that before the spike, and the final held-out loss, in nats per token. The run with the rule
repeats some steps, which its last column counts. With the defaults a run takes about 2 minutes on 2 cores.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from _charts import chart
from _rounds import machine

from keifu.data.text.packed import PackedText
from keifu.models import palm
from keifu.recipes.language.pretraining import Text, TextTask, prepare_text
from keifu.training.loop import train
from keifu.training.objectives.language_modeling import causal_language_modeling
from keifu.training.optim.loss_spikes import SpikeSettings
from keifu.training.protocols import Batch, Run
from keifu.training.run import metrics
from keifu.training.settings import Settings

RULES = {"as they come": SpikeSettings(), "with the rule": SpikeSettings(rise=0.25), "no bad batches": SpikeSettings()}


@dataclass(frozen=True)
class Spoiled:
    """Batches of a text, some of which are replaced by random tokens."""

    data: PackedText
    bad: range
    vocab_size: int

    @property
    def fingerprint(self) -> str:
        return f"{self.data.fingerprint}-spoiled{self.bad.start}-{self.bad.stop}"

    def batch(self, step: int) -> Batch:
        batch = self.data.batch(step)
        if step not in self.bad:
            return batch
        generator = torch.Generator().manual_seed(step)
        return {"tokens": torch.randint(self.vocab_size, batch["tokens"].shape, generator=generator)}

    def validation(self) -> Iterator[Batch]:
        return self.data.validation()


def run(name: str, task: TextTask, options: argparse.Namespace, out: Path) -> list[dict[str, float]]:
    """Train. Return all lines of metrics.jsonl, one for each step."""
    size, dim = task.tokenizer.vocab_size, options.dim
    config = palm.Config(
        vocab_size=size, context_length=options.context, dim=dim, hidden_dim=4 * dim, n_layers=options.layers,
        n_heads=dim // 64, head_dim=64,
    )  # fmt: skip
    settings = Settings(
        steps=options.steps, batch_size=options.rows, optimizer="adafactor", learning_rate=options.rate, clip=0.0,
        schedule="constant", weight_decay=1.0, spikes=RULES[name], log_every=1, evaluate_every=0, save_every=0,
        seed=options.seed,
    )  # fmt: skip
    torch.manual_seed(options.seed)
    model = palm.build(config)
    data = PackedText(task.shards, options.context, options.rows, options.seed, 50_000)
    bad = range(options.at, options.at + (options.bad if name != "no bad batches" else 0))
    train(
        model,
        causal_language_modeling,
        Spoiled(data, bad, size),
        settings,
        Run(out / name.replace(" ", "-"), about={"title": name}),
    )
    return metrics.read(out / name.replace(" ", "-"))


def row(name: str, lines: list[dict[str, float]], at: int) -> str:
    """Return a row of the table."""
    steps = [line for line in lines if "loss" in line]
    standing = [line for line in metrics.last_metrics(lines) if "loss" in line]
    before = sum(line["loss"] for line in standing[at - 20 : at]) / 20
    worst = max(line["loss"] for line in steps if line["step"] > at)
    above = sum(line["loss"] > 1.05 * before for line in standing[at:])
    events = [line for line in lines if "rewound_from" in line]
    told = "; ".join(f"from {e['rewound_from']} to {e['step']}" for e in events) or "none"
    final = next(line["validation_loss"] for line in reversed(lines) if "validation_loss" in line)
    return f"| {name} | {worst:.2f} | {above} | {final:.3f} | {told} | {len(steps)} |"


def draw(runs: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    """Draw the loss of each step. Steps that the rule undid are dotted."""
    with chart(options.picture, (9, 4.5)) as axes:
        axes.axvspan(options.at, options.at + options.bad, color="grey", alpha=0.3, label="random batches")
        for number, (name, lines) in enumerate(runs.items()):
            standing = metrics.last_metrics(lines)
            kept = {id(line) for line in standing}
            undone = [line for line in lines if "loss" in line and id(line) not in kept]
            parts = [(standing, "-", name), (undone, ":", f"{name}: undone")]
            for points, style, label in parts:
                pairs = [(line["step"], line["loss"]) for line in points if "loss" in line]
                if pairs:
                    axes.plot(*zip(*pairs, strict=True), style, color=f"C{number}", label=label, linewidth=1)
        axes.set(xlabel="step", ylabel="loss of a step, nats per token", xlim=(max(0, options.at - 150), options.steps))
        shown = [line["loss"] for lines in runs.values() for line in lines if "loss" in line and line["step"] > 50]
        axes.set_ylim(0.9 * min(shown), 1.05 * max(shown))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--at", type=int, default=350, help="the first bad batch, counted from 0")
    parser.add_argument("--bad", type=int, default=12, help="bad batches")
    parser.add_argument("--rate", type=float, default=0.1, help="of Adafactor; PaLM's is 0.01")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--dim", type=int, default=192, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--data", default="english")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--out", type=Path, help="keep the runs, with their reports, in this folder")
    options = parser.parse_args()
    task = prepare_text(Text(options.data, vocab_size=options.vocab_size))
    with tempfile.TemporaryDirectory() as directory:
        runs = {name: run(name, task, options, options.out or Path(directory)) for name in RULES}
    tokens = options.rows * options.context
    print(f"{machine()}; {options.steps} steps of {tokens:,} tokens, {options.bad} bad batches from {options.at} on\n")
    print(
        "| | highest loss after | steps above | held-out loss | rewound | steps made |\n|---|---:|---:|---:|---|---:|"
    )
    for name, lines in runs.items():
        print(row(name, lines, options.at))
    if options.picture:
        draw(runs, options)


if __name__ == "__main__":
    main()
