"""N-grams of characters: held-out loss by length, with smoothing and without, and text that they write.

python benchmarks/ngrams.py [--orders 1 2 3 4 5 6 8 10] [--out JSON] [--picture PNG]

The text is presidents' speeches, 12 million characters, of which a twentieth is held out; the loss is of 100,000
held-out characters in rows of 128, each from an empty context, as in benchmarks/recurrent.py. "Add 1" adds one to each
count of an n-gram; "unseen" is the share of held-out characters whose n-gram does not occur in the training text, to
which counts alone give a probability of 0. Nothing is drawn at random.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from _charts import chart
from _results import print_rows, typed, usual, write_table
from _rounds import machine

from keifu.data.text.packed import PackedText
from keifu.models.classic import ngram
from keifu.recipes.language.ngram import held_out_loss
from keifu.recipes.language.pretraining import VALIDATION_TOKENS, Text, prepare_text

SECTION, ROW = "N-grams", 128


def add_one(tokens: np.ndarray, rows: np.ndarray, order: int, vocab_size: int) -> tuple[float, float]:
    """Return the loss of counts plus one, and the share of unseen n-grams. Short contexts have a token of their own."""
    padded = np.pad(rows, ((0, 0), (order, 0)), constant_values=vocab_size)
    keys = [_keys(each, order, vocab_size + 1) for each in (np.asarray(tokens, dtype=np.int64), padded)]
    grams, counts = np.unique(keys[0], return_counts=True)
    contexts, totals = np.unique(keys[0] // (vocab_size + 1), return_counts=True)
    wanted = keys[1][:, 2:].flatten()  # the first token of a row is not predicted
    seen, before = _look(grams, counts, wanted), _look(contexts, totals, wanted // (vocab_size + 1))
    return -float(np.log((seen + 1) / (before + vocab_size)).mean()), float((seen == 0).mean())


def _keys(tokens: np.ndarray, order: int, base: int) -> np.ndarray:
    """Return a number for the n-gram that ends at each token."""
    length = tokens.shape[-1] - order + 1
    return sum(tokens[..., i : i + length] * base ** (order - 1 - i) for i in range(order))  # pyright: ignore


def _look(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 8, 10])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    task = prepare_text(Text("sotu", "characters", 65_536))
    data = PackedText(task.shards, ROW, 1, 0, VALIDATION_TOKENS)
    print(f"{machine()}; {len(task.shards.tokens):,} characters, {task.tokenizer.vocab_size} different ones\n")
    rows: list[list[str]] = []
    losses: dict[int, list[float]] = {}
    for order in options.orders:
        model = ngram.count(task.shards.tokens, ngram.Config(task.tokenizer.vocab_size, order=order)).eval()
        plain, unseen = math.nan, math.nan
        if (task.tokenizer.vocab_size + 1) ** order < 2**63:
            plain, unseen = add_one(
                task.shards.tokens, data.held_out.astype(np.int64), order, task.tokenizer.vocab_size
            )
        losses[order] = [held_out_loss(model, data), plain, unseen]
        smooth = [f"{losses[order][0]:.3f}", f"{math.exp(losses[order][0]):.2f}"]
        without = ["", ""] if math.isnan(plain) else [f"{unseen:.1%}", f"{plain:.3f}"]
        rows.append([f"{order}", f"{model.config.n_grams[-1]:,}", *without, *smooth])
        print(f"  {rows[-1]}", flush=True)
    columns = ["characters of an n-gram", "different ones", "unseen", "add 1", "Kneser-Ney", "perplexity"]
    print_rows([columns, *rows])
    if options.picture:
        draw(losses, options.picture)
    if options.out:
        values = {
            str(order): [None if math.isnan(value) else round(value, 5) for value in each]
            for order, each in losses.items()
        }
        write_table(options.out, SECTION, typed("ngrams.py", vars(options), usual(parser)), columns, rows, values)


def draw(losses: dict[int, list[float]], path: Path) -> None:
    """Draw the loss over the length of the n-grams."""
    with chart(path, (6, 3.4), dpi=100) as axes:
        for index, label in enumerate(("Kneser-Ney", "add 1")):
            axes.plot([*losses], [each[index] for each in losses.values()], "o-", label=label, ms=4)
        axes.set(xlabel="characters of an n-gram", ylabel="nats per held-out character")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
