"""Gain of PaLM's layer and its optimizer: time, memory of the cache, and loss at equal tokens.

python benchmarks/palm.py [--part speed|learning] [--picture PNG] [--json FILE]

The pictures of both parts are PNG-speed.png and PNG-learning.png.

Speed: a training step of parallel and of serial layers of the same sizes (also of parallel layers whose first matrices
are joined, the paper's reason for them), and decoding one token after 512 to 8,192 others with one head of keys and
values, with a quarter of the heads and with all. Only keys and values of these tokens are used, so they are random.
Contenders alternate; ratios are taken in each round.

Learning: models of PaLM's parts that see the same windows in the same order, with the same seed for weights: serial or
parallel, one head of keys and values or all. A single head saves weights, so there is also a model with a feed-forward
network wider by as many. Then PaLM's optimizer is compared with AdamW, each at several rates, on PaLM's layer:
Adafactor without factoring, with a rate that is constant for 1/25 of the run and then decreases with the root of the
step, weight decay by the square of the rate, and a constant batch size; AdamW with a cosine to a tenth. Losses are of
held-out text, in nats per token. On 2 cores the first part takes about 5 minutes, the second about 25; --steps, --dim
and --layers reduce this.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from _charts import chart
from _results import typed, write_timing
from _rounds import interleaved, machine
from _training import CPU, learned, ours, validation
from torch import Tensor, nn

from keifu.data.text.packed import PackedText
from keifu.layers.linear import JoinedLinear
from keifu.layers.transformer.blocks import Parallel, PreNorm
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import palm
from keifu.recipes.language.pretraining import Text, TextTask, prepare_text
from keifu.training.hardware.precision import resolve_dtype
from keifu.training.objectives.language_modeling import causal_language_modeling
from keifu.training.settings import Settings

SECTION, STEPS, TOKENS = "PaLM's layer: speed", "PaLM's layer: training steps", 16  # tokens decoded in a round


class Serial(PreNorm):
    """Attention, then feed-forward, each with a norm."""

    def __init__(self, block: Parallel):
        second = nn.LayerNorm(block.norm.normalized_shape, block.norm.eps, bias=False)
        super().__init__(block.attention, block.feedforward, (block.norm, second))


class Joined(nn.Module):
    """Parallel block with one joined matrix for the inputs of attention and feed-forward."""

    def __init__(self, block: Parallel):
        super().__init__()
        qkv, gate_up = block.attention.qkv, block.feedforward.gate_up
        self.widths = qkv.out_features, gate_up.out_features
        self.first = JoinedLinear(qkv.in_features, (*qkv.parts, *gate_up.parts), bias=False)
        self.first.weight.data.copy_(torch.cat([qkv.weight, gate_up.weight]))
        block.attention.qkv = block.feedforward.gate_up = nn.Identity()
        self.attention, self.feedforward, self.norm = block.attention, block.feedforward, block.norm

    def forward(self, x: Tensor, **context: object) -> Tensor:
        qkv, gate_up = self.first(self.norm(x)).split(self.widths, -1)
        return x + self.attention(qkv, **context) + self.feedforward(gate_up)


BLOCKS: dict[str, Callable[[Parallel], nn.Module]] = {
    "serial": Serial,
    "parallel": lambda block: block,
    "parallel, one first product": Joined,
}


def built(config: palm.Config, kind: str = "parallel", seed: int = 0) -> DecoderLM:
    """Build PaLM, or the same with other blocks, from the same weights."""
    torch.manual_seed(seed)
    model = palm.build(config)
    model.blocks = nn.ModuleList(BLOCKS[kind](block) for block in model.blocks)
    return model


def config_of(options: argparse.Namespace, dim: int, layers: int, vocab_size: int, **changes: Any) -> palm.Config:
    heads = dim // 64
    sizes: dict[str, Any] = {"dim": dim, "hidden_dim": 4 * dim, "n_layers": layers, "n_heads": heads, "head_dim": 64}
    return palm.Config(vocab_size=vocab_size, context_length=options.context, **(sizes | changes))


def steps_timed(options: argparse.Namespace) -> dict[str, Any]:
    """Return the task of training steps, in the fastest dtype of this machine."""
    config = config_of(options, options.wide, options.deep, 8192)
    rows = torch.randint(8192, (options.rows, options.context + 1))
    dtype, contenders = resolve_dtype("auto", CPU), {}
    for kind in BLOCKS:
        contenders[kind] = ours(
            built(config, kind), causal_language_modeling, lambda step: {"tokens": rows}, dtype, False, []
        )
    size = sum(p.numel() for p in built(config).parameters()) / 1e6
    print(f"A training step: {size:.0f} M parameters, {options.rows} rows of {options.context} tokens, {dtype}")
    return {"amount": rows[:, 1:].numel(), "seconds": interleaved(contenders, options.rounds)}


def stepping(model: DecoderLM, length: int, batch: int) -> tuple[Callable[[], None], float]:
    """Return a function that decodes some tokens after `length` others, and the megabytes of the cache."""
    state = model.new_state(batch, length + TOKENS)
    for held in (*state.keys, *state.values):
        held.normal_()
    state.lengths = [length] * batch
    token = torch.zeros(batch, 1, dtype=torch.int64)

    def work() -> None:
        state.lengths = [length] * batch
        for _ in range(TOKENS):
            model.logits(model.hidden(token, state)[:, -1]).float()

    return work, batch * (length + TOKENS) * state.token_bytes / 1e6


@torch.inference_mode()
def decoded(length: int, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the task of decoding a token after `length` others: seconds and megabytes by kind of attention."""
    heads, dtype = options.wide // 64, resolve_dtype("auto", CPU)
    kinds = {f"{heads} heads": heads, f"{max(1, heads // 4)} heads": max(1, heads // 4), "1 head": 1}
    work, megabytes = {}, {}
    for name, kv in kinds.items():
        model = built(config_of(options, options.wide, options.deep, 8192, n_kv_heads=kv)).eval().to(dtype)
        work[name], megabytes[name] = stepping(model, length, batch)
    more = {name: [f"{held:.1f} MB"] for name, held in megabytes.items()}
    return {"amount": batch * TOKENS, "seconds": interleaved(work, options.rounds), "more": more}


def speed(options: argparse.Namespace, picture: Path | None) -> None:
    """Measure training steps and decoding, print and write both tables."""
    command = typed("palm.py", vars(options), options.defaults)
    task = steps_timed(options)
    values = {"tasks": {"steps": task}, "against": dict.fromkeys(BLOCKS, ["serial"])}
    write_timing(options.json, STEPS, command, ["", "tokens/s", "ratio to serial"], values)
    found = {batch: {length: decoded(length, batch, options) for length in options.lengths}
             for batch in options.batches}  # fmt: skip
    tasks = {f"{batch}, {length:,}": task for batch, lengths in found.items() for length, task in lengths.items()}
    every, *fewer = next(iter(tasks.values()))["seconds"]
    values = {"tasks": tasks, "a row": "task", "against": dict.fromkeys(fewer, [every])}
    columns = [
        "sequences, tokens before",
        f"{every}: tokens/s; cache",
        *(f"{each}: tokens/s; ratio; cache" for each in fewer),
    ]
    write_timing(options.json, SECTION, command, columns, values)
    if picture:
        draw_speed(found, picture)


def draw_speed(found: dict[int, dict[int, dict[str, Any]]], path: Path) -> None:
    """Draw milliseconds a step by the tokens before it, a panel for each number of rows, and the caches of the last."""
    with chart(path, (4.2 * len(found) + 4.2, 4), len(found) + 1, legend=None) as panels:
        for axes, (rows, lengths) in zip(panels, found.items(), strict=False):
            taken = {length: {name: 1000 / TOKENS * statistics.median(each) for name, each in task["seconds"].items()}
                     for length, task in lengths.items()}  # fmt: skip
            curves(axes, taken)
            axes.set(title=f"{rows} rows at once" if rows > 1 else "one row", ylabel="ms per step", ylim=(0, None))
        last = [*found.values()][-1]
        curves(
            panels[-1],
            {
                length: {name: float(each.split()[0]) for name, (each,) in task["more"].items()}
                for length, task in last.items()
            },
        )
        panels[-1].set(title=f"cache of {[*found][-1]} rows", ylabel="MB", yscale="log")
        panels[0].legend(title="of keys and values", fontsize=8)


def curves(axes: plt.Axes, values: dict[int, dict[str, float]]) -> None:
    for name in next(iter(values.values())):
        axes.plot([*values], [one[name] for one in values.values()], marker="o", label=name)
    axes.set(xlabel="tokens before", xscale="log", xticks=[*values], xticklabels=[f"{each:,}" for each in values])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


@dataclass(frozen=True)
class Way:
    """Line of the table: a model and its training settings."""

    name: str
    build: Callable[[int], DecoderLM]
    settings: Settings


def layers(options: argparse.Namespace, usual: Settings) -> list[Way]:
    """Return PaLM's layer, and versions with one of its two changes undone, and with both undone."""
    config = partial(config_of, options, options.dim, options.layers)
    heads = options.dim // 64
    wider = 4 * options.dim + round(2 * (heads - 1) * 64 / 3)  # three matrices, wider by the weights saved in two
    one, many, wide = {}, {"n_kv_heads": heads}, {"hidden_dim": wider}
    kinds = {
        "parallel, 1 head of keys and values": ("parallel", one),
        "serial, 1 head": ("serial", one),
        f"parallel, {heads} heads": ("parallel", many),
        f"serial, {heads} heads": ("serial", many),
        "parallel, 1 head, wider feed-forward": ("parallel", wide),
    }
    return [Way(n, lambda v, k=k, c=c: built(config(v, **c), k, options.seed), usual) for n, (k, c) in kinds.items()]


def optimizers(options: argparse.Namespace, usual: Settings) -> list[Way]:
    """Return PaLM's optimizer and AdamW with PaLM's layer."""
    config = partial(config_of, options, options.dim, options.layers)
    held = max(1, round(10_000 / 255_000 * options.steps))
    palms = replace(usual, optimizer="adafactor", schedule="inverse_sqrt", hold=held, warmup=0, weight_decay=1.0)
    rates = [(f"Adafactor, {rate:g}", replace(palms, learning_rate=rate)) for rate in options.adafactor]
    rates += [(f"AdamW, {rate:g}", replace(usual, learning_rate=rate)) for rate in options.adamw]
    return [Way(name, lambda v: built(config(v), seed=options.seed), settings) for name, settings in rates]


def learn(way: Way, task: TextTask, options: argparse.Namespace) -> tuple[str, dict[int, float]]:
    """Train. Return the line of the table and the held-out loss by step."""
    model = way.build(task.tokenizer.vocab_size)
    data = PackedText(task.shards, options.context, options.rows, options.seed, options.held_out)
    losses: dict[int, float] = {}
    every = max(1, options.steps // 10)

    def between(step: int) -> None:
        if step % every == 0 or step == options.steps:
            losses[step] = validation(model, data)

    seconds = learned(model, data, way.settings, between)
    size, loss = sum(p.numel() for p in model.parameters()), losses[options.steps]
    figures = f"{size:,} | {loss:.3f} | {task.shards.bits_per_byte(loss):.3f} | {1000 * seconds / options.steps:.0f}"
    return f"| {way.name} | {figures} |", losses


def learning(options: argparse.Namespace, picture: Path | None) -> None:
    task = prepare_text(Text(options.data, vocab_size=options.vocab_size))
    usual = Settings(
        steps=options.steps, batch_size=options.rows, learning_rate=options.rate, warmup=options.steps // 10,
        final_ratio=0.1, seed=options.seed,
    )  # fmt: skip
    tokens = options.rows * options.context
    print(f"\nLearning {options.data}: {options.steps} steps of {tokens:,} tokens, seed {options.seed}")
    found: list[dict[str, dict[int, float]]] = []
    for ways in (layers(options, usual), optimizers(options, usual)):
        print("\n| | parameters | held-out loss | bits per byte | ms per step |\n|---|---:|---:|---:|---:|", flush=True)
        found.append({})
        for way in ways:
            line, found[-1][way.name] = learn(way, task, options)
            print(line, flush=True)
    if picture:
        draw_learning(found, tokens, picture)


def draw_learning(found: list[dict[str, dict[int, float]]], tokens: int, path: Path) -> None:
    """Draw held-out loss by tokens, a panel for each table."""
    with chart(path, (12, 4.5), 2, legend=None, sharey=True) as panels:
        for axes, losses, title in zip(panels, found, ("the layer", "the optimizer"), strict=True):
            for name, points in losses.items():
                axes.plot([step * tokens / 1e6 for step in points], [*points.values()], marker=".", label=name)
            axes.set(title=title, xlabel="million tokens")
            axes.legend(fontsize=8)
        panels[0].set_ylabel("held-out loss, nats per token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("speed", "learning"), help="one of the two; both when it is left out")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="rows that are decoded at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--wide", type=int, default=512, help="width of the timed models, a multiple of 64")
    parser.add_argument("--deep", type=int, default=6, help="layers of the timed models")
    parser.add_argument("--steps", type=int, default=500, help="of each model that learns")
    parser.add_argument("--rows", type=int, default=16, help="in a step")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--dim", type=int, default=256, help="width of the models that learn, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rate", type=float, default=2e-3, help="AdamW's, where layers are compared")
    parser.add_argument("--adafactor", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2], help="rates to compare")
    parser.add_argument("--adamw", type=float, nargs="+", default=[1e-3, 4e-3], help="rates to compare, beside --rate")
    parser.add_argument("--data", default="english")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--held-out", type=int, default=50_000, help="tokens of the held-out loss")
    parser.add_argument("--seed", type=int, default=0)
    defaults = vars(parser.parse_args([]))
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", type=Path, help="The data file of the results whose tables of speed are replaced.")
    options = parser.parse_args()
    options.defaults = defaults
    print(f"{machine()}\n")
    for part, work in {"speed": speed, "learning": learning}.items():
        if options.part in (None, part):
            path = options.picture
            work(options, path.with_stem(f"{path.stem}-{part}") if path and not options.part else path)


if __name__ == "__main__":
    main()
