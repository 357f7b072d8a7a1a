"""Pictures of the pages in docs/parts, all made by one command.

python benchmarks/parts.py [--out docs/pictures] [--only NAME ...]
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from keifu.data.tokenizers.train import train_tokenizer
from keifu.inference.images import samplers
from keifu.inference.text import logits_processors
from keifu.layers.activations import activation
from keifu.layers.attention.axial import Grid
from keifu.layers.attention.masks import DocumentMask
from keifu.layers.attention.positions import Rotary, sinusoids
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.training.optim.lr_schedules import ratio
from keifu.training.optim.muon import orthogonalize

ROOT = Path(__file__).parent.parent


def panels(count: int, height: float = 3.2) -> Iterator[Axes]:
    """Yield this many axes side by side in a new figure."""
    _, found = plt.subplots(1, count, figsize=(4 * count, height), layout="constrained", squeeze=False)
    return iter(found[0])


def activations() -> None:
    """Draw six activations, and their derivatives."""
    values, slopes = panels(2)
    for name in ("sigmoid", "tanh", "relu", "gelu", "silu", "quick_gelu"):
        x = torch.linspace(-4, 4, 401, requires_grad=True)
        y = activation(name)(x)
        y.sum().backward()
        assert x.grad is not None
        values.plot(x.detach(), y.detach(), label=name)
        slopes.plot(x.detach(), x.grad, label=name)
    values.set(title="activation", ylim=(-1.2, 3))
    slopes.set(title="derivative")
    slopes.legend(fontsize=7)


def attention() -> None:
    """Draw four masks of sixteen tokens. White positions can be attended to."""
    documents = torch.tensor([[0] * 6 + [1] * 10])
    place = torch.arange(16)
    causal = place[:, None] >= place
    masks = {
        "causal": causal,
        "window of 4": causal & (place[:, None] - place < 4),
        "two documents": DocumentMask(documents).visible(16, None)[0, 0],
        "4 words, then a grid by rows": Grid(prefix=4, height=3, width=4).visible("row"),
    }
    for axes, (name, mask) in zip(panels(4), masks.items(), strict=True):
        axes.imshow(mask, cmap="gray")
        axes.set(title=name, xlabel="key", ylabel="query")


def positions() -> None:
    """Draw the sinusoids as an image, and the rotary dot product over distance."""
    table, product = panels(2)
    table.imshow(sinusoids(torch.arange(64), 64), aspect="auto", cmap="coolwarm")
    table.set(title="sinusoids", xlabel="dimension", ylabel="position")
    torch.manual_seed(0)
    places = torch.arange(256)
    for theta in (100.0, 10_000.0, 500_000.0):
        turned = Rotary(64, theta)(places).apply(torch.ones(1, 256, 1, 64))[0, :, 0]
        product.plot(places, turned @ turned[0] / 64, label=f"base {theta:,.0f}")
    product.set(title="rotary: q · k over distance, q = k = 1", xlabel="distance")
    product.legend(fontsize=8)


def tokenizers() -> None:
    """Draw bytes per token of the lineage's pages over the vocabulary size, for two kinds of tokenizer in two
    languages."""
    axes = next(panels(1))
    pages = sorted((ROOT / "docs/lineage").glob("*.md"))
    for language, japanese in (("English", False), ("Japanese", True)):
        texts = [path.read_text(encoding="utf-8") for path in pages if path.name.endswith(".ja.md") == japanese]
        size = sum(len(text.encode()) for text in texts)
        for kind, style in (("bpe", "-"), ("unigram", "--")):
            sizes = (1600, 2000, 2400, 3200, 4000)
            found = [train_tokenizer(kind, texts, each) for each in sizes]
            lengths = [sum(map(len, each.encode_batch(texts))) for each in found]
            axes.plot(sizes, [size / each for each in lengths], style, marker="o", label=f"{language}, {kind}")
    axes.set(xlabel="vocabulary", ylabel="bytes per token", title="on the text it was learned from")
    axes.legend(fontsize=8)


def sampling() -> None:
    """Draw the distribution that each filter leaves of the same logits."""
    logits = torch.tensor([[3.0, 2.4, 2.0, 1.2, 0.6, 0.0, -1.0, -2.0]])
    one = torch.ones(1)
    kept = {
        "the model's own": logits,
        "temperature 0.5": logits_processors.temperature(logits, 0.5 * one),
        "top-k 3": logits_processors.top_k(logits, torch.tensor([3])),
        "top-p 0.9": logits_processors.top_p(logits, 0.9 * one),
        "min-p 0.2": logits_processors.min_p(logits, 0.2 * one),
    }
    for axes, (name, each) in zip(panels(5, 2.4), kept.items(), strict=True):
        axes.bar(range(8), each.softmax(-1)[0])
        axes.set(title=name, ylim=(0, 0.75), xlabel="token")


def optimizers() -> None:
    """Draw learning rate schedules, and the effect of Muon's five steps on singular values."""
    rates, values = panels(2)
    for name, settings in {
        "cosine to a tenth": ("cosine", 0.1, 0),
        "linear to 0": ("linear", 0.0, 0),
        "inverse_sqrt": ("inverse_sqrt", 0.0, 0),
        "hold, then inverse_sqrt": ("inverse_sqrt", 0.0, 150),
    }.items():
        schedule, final, hold = settings
        rates.plot([ratio(schedule, step, 1000, 50, final, hold) for step in range(1000)], label=name)
    rates.set(title="learning rate, warm-up of 50 steps", xlabel="step", ylabel="share of the highest")
    rates.legend(fontsize=7)
    torch.manual_seed(0)
    gradient = torch.randn(1, 64, 64) @ torch.diag(torch.logspace(-2, 0, 64))
    for steps in (0, 1, 3, 5):
        found = orthogonalize(gradient, (3.4445, -4.7750, 2.0315), steps, 1e-7)
        values.plot(torch.linalg.svdvals(found.float())[0], label=f"{steps} steps")
    values.set(title="Muon: singular values", xlabel="number", yscale="log")
    values.legend(fontsize=8)


def exact_network(noise: Noise, deviation: float = 0.6) -> Callable[[Tensor, Tensor], Tensor]:
    """Return an exact predictor of the noise for pictures that are ±1 with equal probability, with a given standard
    deviation.

    Between integer timesteps, which some samplers use, ln(σ / α) is interpolated.
    """
    table = ((1 - noise.alpha_bar) / noise.alpha_bar).log() / 2

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        below = timestep.double().floor().long()
        share = timestep.double() - below
        ratio = torch.lerp(table[below], table[(below + 1).clamp(max=len(table) - 1)], share).exp().view(-1, 1, 1, 1)
        left = 1 / (1 + ratio**2)
        variance = left * deviation**2 + 1 - left
        mean = torch.tanh(left.sqrt() * x / variance)  # of ±1, given x
        picture = mean + left.sqrt() * deviation**2 / variance * (x - left.sqrt() * mean)
        return (x - left.sqrt() * picture) / (1 - left).sqrt()

    return network


def diffusion_samplers() -> None:
    """Draw the distance of each sampler's result from 400 steps of Heun, over its evaluations."""
    axes = next(panels(1, 3.6))
    noise = Noise(clip=None)
    torch.manual_seed(0)
    start = torch.randn(4000, 1, 1, 1, dtype=torch.float64)

    def end(name: str, steps: int) -> Tensor:
        ours = samplers.configure_sampler(noise, name, steps, "trailing")
        *_, last = ours.run(ours.denoiser(exact_network(noise)), start, ours.schedule, torch.randn_like)
        return last.x

    exact = end("heun", 400)
    for name, cost in {"ddim": 1, "heun": 2, "plms": 1, "dpm++-2m": 1, "unipc": 1}.items():
        counts = [5, 8, 12, 20, 35, 50]
        errors = [float((end(name, steps) - exact).abs().mean()) for steps in counts]
        axes.plot([cost * steps for steps in counts], errors, marker="o", label=name)
    axes.set(
        xscale="log", yscale="log", xlabel="evaluations of the network", ylabel="mean distance from 400 steps of Heun"
    )
    axes.legend(fontsize=8)


def quantisation() -> None:
    """Draw the error of rounding normal numbers to 8, 6, 5 and 4 bits, by the size of the groups that share a scale."""
    axes = next(panels(1))
    torch.manual_seed(0)
    weights = torch.randn(256, 4096)
    weights[:, ::512] *= 8  # a few large ones, as in trained weights
    groups = [16, 32, 64, 128, 256, 1024, 4096]
    for bits in (8, 6, 5, 4):
        errors = []
        for group in groups:
            blocks = weights.view(-1, group)
            scale = blocks.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            errors.append(float(((blocks / scale).round() * scale - blocks).square().mean().sqrt()))
        axes.plot(groups, errors, marker="o", label=f"{bits} bits")
    axes.set(xscale="log", yscale="log", xlabel="numbers that share a scale", ylabel="root mean square error")
    axes.set_xticks(groups, map(str, groups))
    axes.minorticks_off()
    axes.legend(fontsize=8)


PICTURES = {
    each.__name__: each
    for each in (
        activations, attention, positions, tokenizers, sampling, optimizers, diffusion_samplers, quantisation,
    )
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/pictures")
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=[*PICTURES])
    options = parser.parse_args()
    for name in options.only:
        PICTURES[name]()
        path = options.out / f"part-{name.replace('_', '-')}.png"
        plt.savefig(path, dpi=90)
        plt.close("all")
        print(path)


if __name__ == "__main__":
    main()
