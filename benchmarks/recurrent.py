"""Characters read by recurrent networks and by attention: held-out loss, and how far back a gradient reaches.

python benchmarks/recurrent.py [--steps 600] [--seeds 0 1 2] [--only NAME ...] [--out JSON] [--picture PNG]

The plain network, GRU, LSTM and LLaMA's blocks have two layers of width 128, and read the same characters of
presidents' speeches in rows of 128, each row from an empty state. All have AdamW, at rates that are not searched for:
0.01, 0.02 for the LSTM (0.004 and 0.01 were worse after 300 steps), and 0.004 for attention. Gradient: that of the last
state with respect to the embedding of the character 10 or 40 places before, as a share of the last character's, the
mean of 64 held-out rows. It is measured after the training; reach is the distance from which on it is below 1% before
the training. The LSTM's forget gates begin with a bias of 1. The file has the values of each seed.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from _charts import chart
from _results import of_seeds, print_rows, typed, usual, write_table
from _rounds import machine, spread
from _training import learned, validation
from torch import Tensor

from keifu.data.text.packed import PackedText
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama
from keifu.models.classic import lstm
from keifu.recipes.language.pretraining import VALIDATION_TOKENS, Text, prepare_text
from keifu.training.settings import Settings

SECTION = "Recurrent networks and attention"
DIM, LAYERS, ROW, ROWS = 128, 2, 128, 32
CELLS = {"plain network": "rnn", "GRU": "gru", "LSTM": "lstm"}
NAMES = [*CELLS, "attention"]
RATES = {"plain network": 1e-2, "GRU": 1e-2, "LSTM": 2e-2, "attention": 4e-3}
SMALL = 0.01  # share of the last character's gradient
DISTANCES = 10, 40


def build(name: str, vocab_size: int, seed: int) -> DecoderLM:
    """Build a model of two layers. The blocks with attention have about as many numbers as the LSTM."""
    torch.manual_seed(seed)
    if name == "attention":
        return llama.build(llama.Config(vocab_size, ROW, DIM, hidden_dim=192, n_layers=LAYERS, n_heads=4))
    return lstm.build(lstm.Config(vocab_size, ROW, DIM, LAYERS, CELLS[name], dropout=0.0))


def gradients(model: DecoderLM, tokens: Tensor, seed: int) -> Tensor:
    """Return the length of the gradient of a random sum of the last state by distance, as a share of the first,
    [ROW]."""
    vectors: list[Tensor] = []

    def keep(_: Any, inputs: Any, output: Tensor) -> Tensor:
        vectors.append(output.detach().requires_grad_())
        return vectors[-1]

    hook = model.embedding.register_forward_hook(keep)
    last = model.hidden(tokens)[:, -1]
    hook.remove()
    direction = torch.randn(last.shape, generator=torch.Generator().manual_seed(seed))
    lengths = torch.autograd.grad((last * direction).sum(), vectors)[0].norm(dim=-1).mean(0).flip(0)
    return lengths / lengths[0]


def reach(shares: Tensor) -> int:
    """Return the distance from which on the gradient stays small."""
    return int((shares >= SMALL).nonzero().max()) + 1


def draw(curves: dict[str, Tensor], path: Path) -> None:
    """Draw the gradient over the distance, a line for each model."""
    with chart(path, (7, 3.6), dpi=100) as axes:
        for name, shares in curves.items():
            axes.plot(shares.tolist(), label=name, lw=1.4)
        axes.axhline(SMALL, color="gray", lw=0.8, ls=":")
        axes.set(xlabel="characters back", ylabel="gradient, share of distance 0", yscale="log", ylim=(1e-7, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    task = prepare_text(Text("sotu", "characters", 65_536))
    print(f"{machine()}; {options.steps} steps of {ROWS} rows of {ROW} characters, seeds {options.seeds}\n")
    found: dict[str, list[list[float]]] = {}
    curves: dict[str, list[Tensor]] = {name: [] for name in options.only}
    parameters = {}
    for name in options.only:
        found[name] = [[], []]
        settings = Settings(
            steps=options.steps, batch_size=ROWS, learning_rate=RATES[name], warmup=30, final_ratio=0.0,
            weight_decay=0.01,
        )  # fmt: skip
        for seed in options.seeds:
            data = PackedText(task.shards, ROW, settings.growth, seed, VALIDATION_TOKENS)
            model = build(name, task.tokenizer.vocab_size, seed)
            parameters[name] = sum(parameter.numel() for parameter in model.parameters())
            tokens = torch.cat([batch["tokens"] for batch in data.validation()])[:64, :ROW]
            found[name][0].append(reach(gradients(model.eval(), tokens, seed)))
            seconds = learned(model, data, settings)
            found[name][1].append(validation(model, data))
            curves[name].append(gradients(model, tokens, seed))
            print(f"  {name}, seed {seed}: {[column[-1] for column in found[name]]}, {seconds:.0f} s", flush=True)
    rows, values = [], {"seeds": found, "gradient": {}}
    for name, (before, loss) in found.items():
        (cells,), _ = of_seeds({name: [loss]})
        span = f"{min(before)} to {max(before)}" if min(before) < max(before) else f"{before[0]}"
        shares = [spread([curve[distance].item() for curve in curves[name]], ".4f") for distance in DISTANCES]
        rows.append([name, f"{parameters[name]:,}", span, *shares, cells[1]])
        values["gradient"][name] = [[round(share, 9) for share in curve.tolist()] for curve in curves[name]]
    columns = ["", "parameters", "reach before", "gradient, 10 back", "gradient, 40 back", "nats per character"]
    print_rows([columns, *rows])
    if options.picture:
        draw({name: torch.stack(each).mean(0) for name, each in curves.items()}, options.picture)
    if options.out:
        write_table(options.out, SECTION, typed("recurrent.py", vars(options), usual(parser)), columns, rows, values)


if __name__ == "__main__":
    main()
