"""In-context learning by size: random mappings of letters, by models trained here and by published ones.

python benchmarks/in_context.py [--layers 1 2 3] [--dim 64] [--steps 2500] [--models smollm2 gpt-en] [--write FILE]
    [--picture PNG]

Each question has a new random mapping of eight letters to eight others, so only the prompt contains it. The prompt has
examples, whose letters are drawn with replacement, and a letter; the answer is the likeliest of the eight others. The
models trained here are LLaMA-like and read only synthetic text, with a new mapping in each row; they differ in the
number of layers. A published model reads lines such as `b -> q`. The upper bound is also shown, since a letter may not
be among the examples. Intervals are Wilson's, 95%.
"""

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _charts import chart
from _results import publish, share_of, typed, usual
from _rounds import machine
from _training import learned

from keifu import checkpoints
from keifu.evaluation.intervals import wilson
from keifu.inference.text.likelihood import likelihoods
from keifu.models import llama
from keifu.training.protocols import Batch
from keifu.training.settings import Settings

FROM, TO = "abcdefgh", "qrstuvwx"
MOST = 32  # examples
Examples = list[tuple[str, str]]


def mapped(chance: random.Random, count: int) -> Examples:
    """Return letters drawn with replacement, and their images under one random mapping."""
    mapping = dict(zip(FROM, chance.sample(TO, len(TO)), strict=True))
    return [(letter, mapping[letter]) for letter in chance.choices(FROM, k=count)]


def knowable(count: int, questions: int = 20_000) -> float:
    """Return the accuracy of a guesser who remembers the examples and otherwise guesses among the remaining letters."""
    chance, right = random.Random(1), 0.0
    for _ in range(questions):
        *examples, (letter, _) = mapped(chance, count + 1)
        seen = {first for first, _ in examples}
        right += 1.0 if letter in seen else 1 / (len(TO) - len(seen))
    return right / questions


@dataclass(frozen=True)
class Mappings:
    """Rows of pairs of letters as tokens. Each row has a different mapping; the second letter of each pair is
    predicted."""

    rows: int
    seed: int

    def batch(self, step: int) -> Batch:
        chance = random.Random(f"{self.seed} {step}")
        texts = ["".join(a + b for a, b in mapped(chance, MOST + 1)) for _ in range(self.rows)]
        tokens = torch.tensor([[(FROM + TO).index(letter) for letter in text] for text in texts])
        return {"tokens": tokens, "mask": (torch.arange(tokens.shape[1]) % 2 == 1).expand_as(tokens)}


def trained(layers: int, options: argparse.Namespace) -> Any:
    """Train a model on mappings and return it."""
    torch.manual_seed(options.seed)
    config = llama.Config(
        vocab_size=len(FROM + TO), context_length=2 * MOST + 2, dim=options.dim, hidden_dim=3 * options.dim,
        n_layers=layers, n_heads=options.dim // 16,
    )  # fmt: skip
    settings = Settings(
        steps=options.steps, batch_size=64, optimizer="muon", learning_rate=3e-3, warmup=100, final_ratio=0.0
    )
    model = llama.build(config)
    learned(model, Mappings(64, options.seed), settings)  # pyright: ignore[reportArgumentType]
    return model


@torch.inference_mode()
def right_of_trained(model: Any, counts: list[int], questions: int) -> dict[int, int]:
    """Return the numbers of right answers by the number of examples, all from one pass over each row."""
    tokens = Mappings(questions, -1).batch(0)["tokens"]
    likeliest = model(tokens)[:, :, len(FROM) :].argmax(-1) + len(FROM)
    return {n: int((likeliest[:, 2 * n] == tokens[:, 2 * n + 1]).sum()) for n in counts}


def right_of_published(name: str, counts: list[int], questions: int) -> dict[int, int]:
    """Return the numbers of right answers by the number of examples. Each question is a separate prompt."""
    model, tokenizer = checkpoints.load(name)
    choices = [tuple(tokenizer.encode(f" {letter}")) for letter in TO]
    found = {}
    for n in counts:
        chance = random.Random(2)
        asked = [mapped(chance, n + 1) for _ in range(questions)]
        prompts = [tuple(tokenizer.encode(_text(each))) for each in asked]
        scores = likelihoods(model, [(prompt, choice) for prompt in prompts for choice in choices])
        totals = torch.tensor([each.total for each in scores]).view(questions, len(choices))
        answers = [TO[place] for place in totals.argmax(-1).tolist()]
        found[n] = sum(answer == each[-1][1] for answer, each in zip(answers, asked, strict=True))
    return found


def _text(examples: Examples) -> str:
    """Return the prompt: all pairs as lines, without the second letter of the last one."""
    *shown, (letter, _) = examples
    return "".join(f"{a} -> {b}\n" for a, b in shown) + f"{letter} ->"


def draw(found: dict[str, dict[int, tuple[float, float, float]]], counts: list[int], path: Path) -> None:
    """Draw accuracy over the number of examples, with intervals, and the upper bound."""
    with chart(path, (7, 4.5)) as axes:
        axes.plot(
            range(len(counts)), [knowable(n) for n in counts], color="grey", linestyle=":", label="what can be known"
        )
        for name, points in found.items():
            shares, lows, highs = zip(*points.values(), strict=True)
            axes.plot(range(len(counts)), shares, marker="o", label=name)
            axes.fill_between(range(len(counts)), lows, highs, alpha=0.15)
        axes.axhline(1 / len(TO), color="grey", linewidth=0.8)
        axes.set_xticks(range(len(counts)), [str(n) for n in counts])
        axes.set(xlabel="examples in the prompt", ylabel="right answers", ylim=(0, 1.02))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="*", default=[1, 2, 3], help="a model is trained for each")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--models", nargs="*", default=["gpt-en", "smollm2"], help="published ones")
    parser.add_argument("--examples", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16, MOST])
    parser.add_argument("--questions", type=int, default=200, help="to a published model; ten times as many to others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="a data file of docs/results/data")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    counts = options.examples
    print(machine() + "\n")
    found, asked = dict[str, dict[int, int]](), dict[str, int]()
    for each in [*options.layers, *options.models]:
        began, own = time.monotonic(), isinstance(each, int)
        questions = options.questions * (10 if own else 1)
        name = f"{each} layer{'s' * (each > 1)}, trained here" if own else each
        found[name] = (
            right_of_trained(trained(each, options), counts, questions)
            if own
            else right_of_published(each, counts, questions)
        )
        asked[name] = questions
        print(f"{name}: {found[name]}, {time.monotonic() - began:.0f} s", flush=True)
    rows = [["what can be known", *(f"{knowable(n):.1%}" for n in counts)]]
    rows += [[name, *(share_of(k, asked[name]) for k in right.values())] for name, right in found.items()]
    columns = ["right answers after so many examples", *map(str, counts)]
    values = {"of": asked, "right": {name: [*right.values()] for name, right in found.items()}}
    command = typed("in_context.py", vars(options), usual(parser))
    publish(options.write, "In-context learning", command, columns, rows, values)
    if options.picture:
        shares = {
            name: {n: (k / asked[name], *wilson(k, asked[name])) for n, k in right.items()}
            for name, right in found.items()
        }
        draw(shares, counts, options.picture)


if __name__ == "__main__":
    main()
