"""Loss by position and passkeys at four times the trained length, by scaling of rotary positions and with tuning.

python benchmarks/long_context.py [--seeds 0 1 2] [--steps 800] [--tuned 60] [--out JSON] [--picture PNG]

A LLaMA-like model with 2 layers is trained on windows of 128 tokens (in the first quarter of the steps of 32, in which
it learns to find the passkey; 300 steps of 128 do not suffice). Every second window is text with a passkey: a mark and
three digits at a random position, and the same again later, where the model must predict the digits (Mohtashami and
Jaggi, 2023). The digits are 30 tokens that the text does not have, ten for each of the three. When passkeys are
measured, the second is at the end of the window.

The same weights then read windows of 512 tokens, with unchanged rotary positions ("none"), with positions divided by 4
("interpolation", Chen et al., 2023), with a larger base ("NTK", theta · 4^(d / (d - 2))) and with YaRN (Peng et al.,
2023). Each is measured at once, and after --tuned steps of training on windows of 512 tokens ("none" too). The last row
is the trained model that sees only the last 128 tokens ("window"): its loss is that of the second half of windows of
128.

Loss: nats per token of held-out text without passkeys, by position. Passkeys: the share of windows in which all three
digits are right, each given the previous ones; a guess is right once in 1,000 times. The file has the values of each
seed; cells have the mean, and in brackets the lowest and the highest.
"""

import argparse
import copy
from functools import partial
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import torch
from _charts import bar_seeds, chart, plot_seeds
from _results import publish, saved
from _rounds import machine, spread
from _training import held_out_windows, plain_steps, windows_options
from torch import Tensor, nn

from keifu.data.text.packed import PackedText
from keifu.layers.attention.attention import Attention
from keifu.layers.attention.positions import RopeScaling, Rotary
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama
from keifu.recipes.language.pretraining import Text, TextTask, prepare_text

BEGIN, TRAINED, FACTOR = 32, 128, 4  # tokens of a window at first and later; the longest has FACTOR times the latter
LONG = FACTOR * TRAINED
VOCAB, DIGITS = 512, 10  # tokens of the text, after which come the mark and the digits
MARK, KEY = VOCAB, 3  # and number of digits of a passkey
HEAD_DIM, THETA = 32, 10_000.0
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB + 1 + KEY * DIGITS,
    "context_length": LONG,
    "dim": 96,
    "hidden_dim": 256,
    "n_layers": 2,
}
Found = dict[str, list[float]]
METHODS: dict[str, tuple[float, RopeScaling | None]] = {
    "none": (THETA, None),
    "interpolation": (THETA, RopeScaling("linear", FACTOR, TRAINED)),
    "NTK": (THETA * FACTOR ** (HEAD_DIM / (HEAD_DIM - 2)), None),
    "YaRN": (THETA, RopeScaling("yarn", FACTOR, TRAINED)),
}
STEP = 16  # positions that are averaged to one number of the file
LENGTHS = (TRAINED, 2 * TRAINED, LONG)
PARTS = {f"{a} to {b - 1}": (a, b) for a, b in ((TRAINED // 2, TRAINED), (TRAINED, 2 * TRAINED), (2 * TRAINED, LONG))}


def found_in(losses: Tensor, shares: list[float]) -> dict[str, list[float]]:
    """Return the mean losses of each 16 positions of a long window, and the share of right passkeys for each window
    length."""
    means = [round(float(each.mean()), 4) for each in losses.split(STEP)]
    return {"loss": means, "passkeys": [round(share, 4) for share in shares]}


def with_passkeys(text: Tensor, random: torch.Generator, at_end: bool = True) -> tuple[Tensor, Tensor]:
    """Put a passkey into each row at a random position, and again at the end or at a random later position. Return the
    rows, and the positions of the second one's digits [rows, KEY]."""
    rows, length = text.shape
    keys = MARK + 1 + torch.randint(DIGITS, (rows, KEY), generator=random) + DIGITS * torch.arange(KEY)
    marked = torch.cat([torch.full((rows, 1), MARK), keys], 1)
    filler = length - 2 * marked.shape[1]
    begins, ends = torch.randint(filler + 1, (2, rows), generator=random).sort(0).values
    ends = torch.full_like(ends, filler) if at_end else ends
    made = [
        torch.cat([row[:first], key, row[first:last], key, row[last:filler]])
        for row, key, first, last in zip(text, marked, begins.tolist(), ends.tolist(), strict=True)
    ]
    return torch.stack(made), ends[:, None] + KEY + 2 + torch.arange(KEY)


def rotate(model: DecoderLM, method: str) -> DecoderLM:
    """Return a copy of the model with other rotary positions."""
    changed = copy.deepcopy(model)
    theta, scaling = METHODS[method]
    for module in changed.modules():
        if isinstance(module, Attention):
            module.rotary = Rotary(HEAD_DIM, theta, scaling)
    return changed


def train(model: DecoderLM, task: TextTask, length: int, steps: int, tokens: int, rate: float, seed: int) -> None:
    """Train on windows of `length` tokens, every second with a passkey. The loss is the mean of all tokens plus the
    mean of the repeated passkeys' digits."""
    rows = tokens // length
    data = PackedText(task.shards, length - 1, rows, seed)
    random = torch.Generator().manual_seed(seed)

    def loss_of(step: int) -> Tensor:
        text = data.batch(step)["tokens"].long()
        asked, places = with_passkeys(text[::2], random, at_end=False)
        batch = torch.cat([asked, text[1::2]])
        losses = nn.functional.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:], reduction="none")
        return losses.mean() + losses[: len(asked)].gather(1, places - 1).mean()

    plain_steps(model, loss_of, steps, rate, warmup=max(20, steps // 20))


@torch.no_grad()
def measure(model: DecoderLM, held_out: Tensor) -> Found:
    """Return the loss by position and the share of right passkeys in windows of each length."""
    losses = torch.zeros(LONG - 1)
    for part in held_out.split(16):
        losses += nn.functional.cross_entropy(model(part[:, :-1]).mT, part[:, 1:], reduction="none").sum(0)
    shares = []
    for length in LENGTHS:
        rows, _ = with_passkeys(held_out[:, :length], torch.Generator().manual_seed(length))
        right = sum(
            (model(part[:, :-1])[:, -KEY:].argmax(-1) == part[:, -KEY:]).all(1).sum().item() for part in rows.split(16)
        )
        shares.append(right / len(rows))
    return found_in(losses / len(held_out), shares)


@torch.no_grad()
def measure_window(model: DecoderLM, held_out: Tensor) -> Found:
    """Return the figures of `measure` for attention over only the last 128 tokens, on windows cut from the text."""
    rows = held_out.unfold(1, TRAINED + 1, TRAINED // 2).flatten(0, 1)
    losses = torch.cat([
        nn.functional.cross_entropy(model(part[:, :-1]).mT, part[:, 1:], reduction="none") for part in rows.split(64)
    ]).mean(0)  # fmt: skip
    by_position = torch.full((LONG - 1,), float(losses[TRAINED // 2 :].mean()))
    by_position[:TRAINED] = losses
    shares = []
    for length in LENGTHS:
        found = with_passkeys(held_out[:, :length], torch.Generator().manual_seed(length))[0][:, -TRAINED:]
        logits = torch.cat([model(part[:, :-1])[:, -KEY:] for part in found.split(64)])
        shares.append((logits.argmax(-1) == found[:, -KEY:]).all(1).float().mean().item())
    return found_in(by_position, shares)


def run(seed: int, task: TextTask, held_out: Tensor, options: argparse.Namespace) -> dict[str, Found]:
    """Train a model, and measure it with each scaling, before and after tuning."""
    torch.manual_seed(seed)
    model = llama.build(llama.Config(**SIZES, n_heads=3, head_dim=HEAD_DIM, rope_theta=THETA))
    began = perf_counter()
    train(model, task, BEGIN, options.steps // 4, options.tokens, options.rate, 200 + seed)
    train(model, task, TRAINED, options.steps - options.steps // 4, options.tokens, options.rate, seed)
    print(f"  seed {seed}: trained in {perf_counter() - began:.0f} s", flush=True)
    found = {}
    for method in METHODS:
        found[method] = measure(rotate(model, method), held_out)
    for method in METHODS:
        tuned = rotate(model, method)
        train(tuned, task, LONG, options.tuned, options.tokens, options.rate / 4, 100 + seed)
        found[f"{method}, tuned"] = measure(tuned, held_out)
    found["window"] = measure_window(model, held_out)
    for name, each in found.items():
        print(f"  seed {seed}, {name}: {cells([each])}", flush=True)
    print(f"  seed {seed}: {perf_counter() - began:.0f} s", flush=True)
    return found


def cells(seeds: list[Found]) -> list[str]:
    """Return the cells of a row: losses of the parts of a window, and passkeys."""
    losses = [[mean(each["loss"][a // STEP : b // STEP]) for each in seeds] for a, b in PARTS.values()]
    shares = zip(*(each["passkeys"] for each in seeds), strict=True)
    return [*map(spread, losses), *(spread([100 * share for share in each], ".1f") for each in shares)]


def draw(found: dict[str, list[Found]], tuned: int, path: Path) -> None:
    """Draw the loss by position before and after tuning, and the share of right passkeys in windows of 512 tokens."""
    with chart(path, (13, 4.2), 3, legend=None) as panels:
        for axes, after in zip(panels, ("", ", tuned"), strict=False):
            for method in METHODS:
                curves = torch.tensor([each["loss"] for each in found[method + after]])
                places = torch.arange(curves.shape[1]) * STEP + STEP // 2
                plot_seeds(axes, places, curves, method)
            axes.axvline(TRAINED, color="grey", linestyle=":")
            axes.set(xlabel="position in the window", ylabel="held-out loss, nats per token")
            axes.set_title(f"after {tuned} steps at {LONG} tokens" if after else "the trained weights", fontsize=10)
            axes.legend(fontsize=8)
        names = [*METHODS, "window"]
        for shift, after, label in ((-0.2, "", "the trained weights"), (0.2, ", tuned", f"after {tuned} steps")):
            own = [method + after for method in METHODS] + ([] if after else ["window"])
            shares = 100 * torch.tensor([[each["passkeys"][-1] for each in found[name]] for name in own])
            bar_seeds(panels[2], shift, shares.T, label)
        panels[2].set_xticks(range(len(names)), names, fontsize=8)
        panels[2].set(ylabel=f"right passkeys in {LONG} tokens, %", ylim=(0, 102))
        panels[2].legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    windows_options(parser, 800, 100, LONG)
    parser.add_argument("--tuned", type=int, default=60, help="steps of tuning")
    options = parser.parse_args()
    task = prepare_text(Text(options.data, vocab_size=VOCAB))
    held_out = held_out_windows(task.shards, LONG, options.held_out)
    print(f"{machine()}; {options.steps} steps of {options.tokens:,} tokens, {options.tuned} of tuning", flush=True)
    seeds = [saved(options.keep, str(seed), partial(run, seed, task, held_out, options)) for seed in options.seeds]
    found = {name: [each[name] for each in seeds] for name in seeds[0]}
    columns = ["", *(f"loss, {part}" for part in PARTS), *(f"passkeys in {length}, %" for length in LENGTHS)]
    rows = [[name, *cells(each)] for name, each in found.items()]
    command = f"python benchmarks/long_context.py --steps {options.steps} --tuned {options.tuned}"
    publish(options.out, "Positions beyond the trained length", command, columns, rows, found)
    if options.picture:
        draw(found, options.tuned, options.picture)


if __name__ == "__main__":
    main()
