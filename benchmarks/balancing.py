"""Mixtures of experts at equal active parameters and tokens: dense, 8 experts, 32 fine ones with a shared one.

python benchmarks/balancing.py [--steps 250] [--seeds 0 1 2] [--only NAME ...] [--out DIR] [--write JSON]
    [--picture PNG]
python benchmarks/balancing.py --speed [--rounds 3] [--write JSON]

All models have two LLaMA blocks of width 32 and differ in the feed-forward network. The dense one has 144 hidden units.
"8 experts" (Mixtral) has experts of 72, of which a token uses two. "32 fine experts" (DeepSeekMoE) has experts of 16,
of which a token uses eight, and a shared one of 16 that every token uses. So each token uses 144 hidden units. Each
mixture is trained without balancing, with the loss of Switch Transformers, and with the corrections of DeepSeek-V3 and
its sigmoid router. All read the same windows of 128 characters in the same order; seeds change weights and order.
"Busiest expert" is the share of held-out characters that use the busiest expert, averaged over the layers: 25% if all
experts have the same load.

--speed times training and decoding of the same architectures, here and with width 512, in alternating rounds, and also
of a dense model with about as many parameters as the mixtures. All run in PyTorch in float32, without the native step,
which has no mixtures. Each figure is the median of the rounds; in brackets the lowest and the highest.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from _charts import chart
from _results import saved, write_table
from _rounds import interleaved, machine, spread
from _training import learned, ours, validation
from torch import nn

from keifu.data.text.packed import PackedText
from keifu.inference.text.generate import generate_batch
from keifu.inference.text.sampling_params import SamplingParams
from keifu.layers.feedforward import GatedFeedForward
from keifu.layers.mixture import (
    GroupedSigmoidRouter,
    MixtureOfExperts,
    SoftmaxRouter,
    idle_parameters,
    recorded_routing,
)
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama
from keifu.recipes.language.pretraining import Text, TextTask, prepare_text
from keifu.training.objectives.language_modeling import causal_language_modeling
from keifu.training.objectives.layer_losses import with_balancing
from keifu.training.settings import Settings

CONTEXT, HEAD = 128, 16
EIGHT, FINE = "8 experts", "32 fine experts"
NONE, LOSS, BIAS = "no balancing", "loss", "bias"
WAYS = ["dense", *(f"{kind}, {how}" for kind in (EIGHT, FINE) for how in (NONE, LOSS, BIAS))]
BALANCING = 0.01  # weight of the balancing loss, as in Switch Transformers
SPEED, SECTION = "Speed of mixtures of experts", "Mixtures of experts"
LARGE = "dense, all parameters"


def feedforward(way: str, dim: int, layer: int = 0) -> nn.Module:
    """Return the feed-forward network of a block. Each token uses 4.5 · dim hidden units."""
    hidden = 9 * dim // 2
    network = partial(GatedFeedForward, dim, activation=nn.SiLU())
    if way.startswith("dense"):
        return network(4 * hidden if way == LARGE else hidden)
    n_experts, k, size = (8, 2, hidden // 2) if way.startswith(EIGHT) else (32, 8, hidden // 9)
    router = (GroupedSigmoidRouter if way.endswith(BIAS) else SoftmaxRouter)(dim, n_experts, k)
    experts = [network(size) for _ in range(n_experts)]
    return MixtureOfExperts(router, experts, network(size) if n_experts == 32 else None)


def build(way: str, dim: int, layers: int, vocab_size: int) -> DecoderLM:
    """Build a model with LLaMA's initialisation."""
    config = llama.Config(
        vocab_size=vocab_size, context_length=2 * CONTEXT, dim=dim, n_layers=layers, n_heads=dim // HEAD, tied=True
    )
    return llama.assemble(config, lambda layer: llama.attention(config), partial(feedforward, way, dim))


@torch.no_grad()
def busiest(model: DecoderLM, data: PackedText) -> float:
    """Return the share of held-out tokens that use the busiest expert, averaged over the layers; 0 without experts."""
    loads: list[torch.Tensor] = []
    for batch in data.validation():
        with recorded_routing(model.eval()) as found:
            model.hidden(batch["tokens"][:, :-1])
        new = [routing.load for routing in found]
        loads = [old + one for old, one in zip(loads, new, strict=True)] if loads else new
    if not loads:
        return 0.0
    k = found[0].experts.shape[1]
    return statistics.mean(float(load.max() * k / load.sum()) for load in loads)


def run(way: str, seed: int, task: TextTask, options: argparse.Namespace) -> tuple[float, float]:
    """Train a model. Return its validation loss in nats and the share of the busiest expert."""
    settings = Settings(
        steps=options.steps, batch_size=options.rows, learning_rate=options.rate, warmup=options.steps // 10,
        final_ratio=0.0, weight_decay=0.1, precision="float32", seed=seed,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = build(way, options.dim, options.layers, task.tokenizer.vocab_size)
    data = PackedText(task.shards, CONTEXT, options.rows, seed, options.held_out)
    balanced = with_balancing(causal_language_modeling, BALANCING)
    learned(model, data, settings, objective=balanced if way.endswith(LOSS) else causal_language_modeling)
    return round(validation(model, data), 4), round(busiest(model, data), 4)


def draw(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw loss and busiest expert: a point for each seed."""
    with chart(path, (9, 3.6), 2, legend=None, sharey=True) as panels:
        for number, way in enumerate(reversed(WAYS)):
            colour = "grey" if way == "dense" else ("tab:blue" if way.startswith(EIGHT) else "tab:orange")
            losses, shares = found[way]["loss"], found[way]["busiest"]
            panels[0].plot(losses, [number] * len(losses), "o", color=colour)
            if way != "dense":
                panels[1].plot([100 * share for share in shares], [number] * len(shares), "o", color=colour)
        panels[0].set(yticks=range(len(WAYS)), yticklabels=WAYS[::-1], xlabel="validation loss, nats per character")
        panels[1].set(xlabel="characters of the busiest expert, %", xlim=(0, 102))
        panels[1].axvline(25, color="grey", linestyle=":")


def compare(options: argparse.Namespace) -> None:
    """Train every model with every seed, print the table, and write it."""
    task = prepare_text(Text(options.data, tokenizer="characters"))
    columns = ["network, balanced by", "parameters", "of a token", "validation loss", "busiest expert, %"]
    print(f"| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}", flush=True)
    rows, found = list[list[str]](), dict[str, dict[str, list[float]]]()
    for way in options.only:
        name = f"{way}, seed {{}}, {options.steps} steps"
        pairs = [
            saved(options.out, name.format(seed), partial(run, way, seed, task, options)) for seed in options.seeds
        ]
        found[way] = {"loss": [loss for loss, _ in pairs], "busiest": [share for _, share in pairs]}
        model = build(way, options.dim, options.layers, task.tokenizer.vocab_size)
        size = sum(parameter.numel() for parameter in model.parameters())
        shares = spread([100 * share for share in found[way]["busiest"]], ".1f")
        active = f"{size - idle_parameters(model):,}"
        rows.append([way, f"{size:,}", active, spread(found[way]["loss"]), shares if way != "dense" else ""])
        print(f"| {' | '.join(rows[-1])} |", flush=True)
    if options.write:
        command = f"python benchmarks/balancing.py --steps {options.steps}"
        write_table(options.write, SECTION, command, columns, rows, found)
    if options.picture:
        draw(found, options.picture)


def decoder(model: DecoderLM, streams: int, tokens: int, vocab_size: int) -> Callable[[], object]:
    """Return a function that generates `tokens` tokens after short prompts."""
    prompts = torch.randint(vocab_size, (streams, 16), generator=torch.Generator().manual_seed(0)).tolist()
    return lambda: generate_batch(model.eval(), None, prompts, SamplingParams(temperature=0, max_tokens=tokens, seed=0))


def time_all(options: argparse.Namespace) -> None:
    """Time training and decoding of all architectures in turn, print the table, and write it."""
    task = prepare_text(Text(options.data, tokenizer="characters"))
    vocab_size = task.tokenizer.vocab_size
    kinds = {"dense": "dense", LARGE: LARGE, EIGHT: f"{EIGHT}, {LOSS}", FINE: f"{FINE}, {LOSS}"}
    columns = ["tokens per second", "training", "1 stream", "8 streams"]
    print(f"| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}", flush=True)
    rows, found = list[list[str]](), dict[str, dict[str, list[float]]]()
    for dim, layers, count, written in ((options.dim, options.layers, 16, 64), (512, 4, 4, 16)):
        models = {kind: build(way, dim, layers, vocab_size) for kind, way in kinds.items()}
        data, rates = PackedText(task.shards, CONTEXT, count), {kind: list[list[float]]() for kind in models}
        settings = causal_language_modeling, data.batch, torch.float32, False
        training = {kind: ours(model.train(), *settings, []) for kind, model in models.items()}
        works: list[tuple[int, Mapping[str, Callable[[], object]]]] = [(count * CONTEXT, training)]
        for streams in (1, 8):
            writing = {kind: decoder(model, streams, written, vocab_size) for kind, model in models.items()}
            works.append((streams * written, writing))
        for tokens, contenders in works:
            if contenders is training:
                _ = [model.train() for model in models.values()]
            for kind, seconds in interleaved(contenders, options.rounds).items():
                rates[kind].append([round(tokens / each, 1) for each in seconds])
        for kind, several in rates.items():
            name = f"width {dim}, {kind}"
            found[name] = dict(zip(columns[1:], several, strict=True))
            cells = [f"{statistics.median(each):,.0f} ({min(each):,.0f} to {max(each):,.0f})" for each in several]
            rows.append([name, *cells])
            print(f"| {' | '.join(rows[-1])} |", flush=True)
    if options.write:
        command = f"python benchmarks/balancing.py --speed --rounds {options.rounds}"
        write_table(options.write, SPEED, command, columns, rows, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rows", type=int, default=16, help="of 128 characters in a step")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--dim", type=int, default=32, help="width, a multiple of 32")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--data", default="shakespeare")
    parser.add_argument("--held-out", type=int, default=40_000, help="characters of the validation loss")
    parser.add_argument("--out", type=Path, help="folder of the results of single runs, which are not made again")
    parser.add_argument("--speed", action="store_true", help="time training and decoding instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="a data file of docs/results/data")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}\n", flush=True)
    (time_all if options.speed else compare)(options)


if __name__ == "__main__":
    main()
