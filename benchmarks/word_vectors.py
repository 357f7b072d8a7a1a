"""Word vectors by skip-gram and by counting: analogies.

python benchmarks/word_vectors.py [--steps 1000] [--seeds 0 1 2] [--out JSON]

The text is the catalogue's mixture `english`, of which the 8,000 most frequent words have vectors. A
question is a pair of pairs of the same kind, such as man : woman = king : ?; the answer is the word nearest to woman
- man + king by cosine, without those three. Questions with a word outside the vocabulary are left out; their number
is in the table. Counting: a row of positive pointwise mutual information (PPMI) per word, of the same thinned pairs,
all of them at distances up to 5. "Nearest to c" answers with the word nearest to king alone. Counts draw nothing but
the thinning.
"""

import argparse
from dataclasses import asdict, replace
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from _results import of_seeds, print_rows, typed, usual, write_table
from _rounds import machine
from _training import learned
from torch import Tensor
from torch.nn.functional import normalize

from keifu.data.text.documents import documents
from keifu.data.text.skip_grams import SkipGrams, count_words, word_ids, word_tokenizer
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.models.classic import word2vec
from keifu.recipes.language.word2vec import Recipe
from keifu.training.objectives.word_vectors import negative_sampling

SECTION, VOCABULARY = "Word vectors", 8000
KINDS = {
    "capitals": "france paris germany berlin italy rome spain madrid japan tokyo china beijing russia moscow "
    "greece athens egypt cairo england london austria vienna poland warsaw hungary budapest portugal "
    "lisbon ireland dublin cuba havana",
    "gender": "man woman king queen he she his her boy girl father mother son daughter brother sister husband "
    "wife uncle aunt actor actress prince princess men women himself herself",
    "plurals": "city cities book books word words year years child children country countries house houses car "
    "cars dog dogs cat cats hand hands tree trees war wars law laws river rivers song songs",
    "past": "go went see saw take took give gave come came know knew think thought write wrote find found "
    "make made get got say said begin began run ran eat ate leave left",
}  # fmt: skip
Question = tuple[int, int, int, int]


def questions(tokenizer: Tokenizer) -> dict[str, list[Question]]:
    """Return the questions of each kind whose words are known."""
    found = {}
    for kind, text in KINDS.items():
        ids = [tokenizer.backend.token_to_id(word) for word in text.split()]
        pairs = [pair for pair in zip(ids[::2], ids[1::2], strict=True) if None not in pair]
        found[kind] = [(*first, *second) for first, second in permutations(pairs, 2)]
    return found


def right(vectors: Tensor, asked: list[Question], alone: bool = False) -> float:
    """Return the share of right answers in percent."""
    unit, (a, b, c, d) = normalize(vectors, dim=-1), torch.tensor(asked).T
    cosines = (unit[c] if alone else unit[b] - unit[a] + unit[c]) @ unit.T
    for word in (a, b, c) if not alone else (c,):
        cosines[torch.arange(len(asked)), word] = -9.0
    return 100 * (cosines.argmax(-1) == d).float().mean().item()


def ppmi(pairs: SkipGrams, vocab_size: int) -> Tensor:
    """Return the positive pointwise mutual information of all pairs of neighbours."""
    ids, keys = pairs.training.astype(np.int64), []
    for distance in range(1, pairs.window + 1):
        keys += [ids[:-distance] * vocab_size + ids[distance:], ids[distance:] * vocab_size + ids[:-distance]]
    counts = np.bincount(np.concatenate(keys), minlength=vocab_size**2).reshape(vocab_size, vocab_size)
    table = torch.from_numpy(counts).float()
    expected = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / table.sum()
    return (table / expected.clamp(min=1e-9)).log().clamp(min=0).nan_to_num(0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    print(f"{machine()}; {options.steps} steps, seeds {options.seeds}\n")
    found: dict[str, list[list[float]]] = {}
    recipe = Recipe()
    words, counts = count_words(documents(recipe.data), VOCABULARY, recipe.min_count)
    ids, tokenizer = word_ids(documents(recipe.data), words), word_tokenizer(words)
    asked = questions(tokenizer)
    for seed in options.seeds:
        settings = replace(recipe.training, steps=options.steps, seed=seed)
        rules, rows_a_step = asdict(recipe.neighbours), settings.batch_size
        pairs = SkipGrams(ids, counts, **rules, batch_size=rows_a_step, seed=seed, held_out=recipe.held_out)
        torch.manual_seed(seed)
        model = word2vec.build(word2vec.Config(tokenizer.vocab_size, recipe.dim))
        learned(model, pairs, settings, objective=negative_sampling)
        vectors = model.embedding.weight.detach()
        results = {"skip-gram": [right(vectors, each) for each in asked.values()]}
        results["nearest to c, skip-gram"] = [right(vectors, each, True) for each in asked.values()]
        results["PPMI rows"] = [right(ppmi(pairs, tokenizer.vocab_size), each) for each in asked.values()]
        for name, shares in results.items():
            for column, share in zip(found.setdefault(name, [[] for _ in asked]), shares, strict=True):
                column.append(share)
        print(
            f"  seed {seed}: { {name: [round(share, 1) for share in each] for name, each in results.items()} }",
            flush=True,
        )
    rows, values = of_seeds(found, ".1f")
    columns = ["% right", *(f"{kind} ({len(each)})" for kind, each in asked.items())]
    print_rows([columns, *rows])
    if options.out:
        write_table(options.out, SECTION, typed("word_vectors.py", vars(options), usual(parser)), columns, rows, values)


if __name__ == "__main__":
    main()
