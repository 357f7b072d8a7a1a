"""Word vectors by skip-gram with negative sampling (Mikolov et al., 2013), on any text.

Paper: "Distributed Representations of Words and Phrases and their Compositionality". It has 300 numbers per word, 5 to
20 negative words for small texts, and a window of 5; frequent words are thinned with a threshold of 1e-5, which is for
billions of words. Its program updates one pair at a time; here AdamW learns batches of pairs. Phrases are left out.
Command: keifu train word2vec --data english
Cost: 3 minutes on one core, and a minute before it for the words of the text.
Expected: see docs/results.md, "Word vectors", for a third of the pairs.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from keifu.data.text.documents import TextFileFormat, documents
from keifu.data.text.skip_grams import SkipGrams, count_words, word_ids, word_tokenizer
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.devices import choose
from keifu.models.classic import word2vec
from keifu.ranges import BelowOne, Count, Positive
from keifu.recipes.training_options import TrainingOptions
from keifu.training.job import Job, Jobs, RunFacts, parameters
from keifu.training.objectives.word_vectors import negative_sampling
from keifu.training.settings import Settings

NEAREST = 5


@dataclass(frozen=True, kw_only=True)
class NeighbourRules:
    """Rules by which pairs of neighbouring words are drawn."""

    window: Count = 5
    """Largest distance of a neighbour, in words."""
    negatives: Count = 5
    """Words that are drawn from noise for each pair."""
    sample: Positive = 1e-4
    """Frequency above which words are thinned."""


@dataclass(frozen=True)
class Recipe:
    """Options of the run."""

    data: str = "english"
    """A catalogue name (keifu data list), a file, or a folder of them."""
    text_field: str | None = None
    """The field, or column, that holds the text in .jsonl, .json, .csv, .tsv and .parquet files; unset: text."""
    encoding: str = "utf-8"
    """Encoding of text files without a byte order mark, such as cp932 (Shift-JIS), euc_jp or cp1252."""
    vocab_size: Count = 20_000
    """Most words of the vocabulary, the most frequent ones."""
    min_count: Count = 5
    """Fewest occurrences of a word in the vocabulary."""
    dim: Count = 100
    """Width of the vectors."""
    neighbours: NeighbourRules = field(default_factory=NeighbourRules)
    """Pairs that the vectors learn from."""
    held_out: BelowOne = 0.01
    """Share of the text that is kept for validation: its last part."""
    words: tuple[str, ...] = ("king", "water", "france", "good")
    """Words whose nearest words are the samples."""
    training: TrainingOptions = Settings(
        steps=3000, batch_size=4096, learning_rate=5e-3, warmup=100, final_ratio=0.0, weight_decay=0.0,
        precision="float32", evaluate_every=500, sample_every=1000, save_every=1000,
    )  # fmt: skip
    """Settings of the training."""


def prepare(recipe: Recipe) -> tuple[Tokenizer, SkipGrams, list[int]]:
    """Return the tokenizer of the words of a text, the pairs, and the counts of the words."""
    form = TextFileFormat(recipe.text_field, recipe.encoding)
    print(f"Counting the words of {recipe.data} ...", flush=True)
    words, counts = count_words(documents(recipe.data, form), recipe.vocab_size, recipe.min_count)
    ids: np.ndarray = word_ids(documents(recipe.data, form), words)
    print(f"{len(ids):,} words, {len(words):,} different ones.", flush=True)
    rows, seed = recipe.training.batch_size, recipe.training.seed
    pairs = SkipGrams(ids, counts, **asdict(recipe.neighbours), batch_size=rows, seed=seed, held_out=recipe.held_out)
    return word_tokenizer(words), pairs, counts


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu.load reads."""
    tokenizer, pairs, _ = prepare(recipe)
    torch.manual_seed(recipe.training.seed)
    model = word2vec.build(word2vec.Config(tokenizer.vocab_size, recipe.dim)).to(choose())
    counts = {"training words": len(pairs.training), "held-out words": len(pairs.held_out)}
    deciding: dict[str, Any] = {
        "model": asdict(model.config),
        "neighbours": asdict(recipe.neighbours),
        "min_count": recipe.min_count,
    }
    deciding["text"] = {"field": recipe.text_field, "encoding": recipe.encoding}
    yield Job(
        model=model, objective=negative_sampling, data=pairs, settings=recipe.training, tokenizer=tokenizer,
        sample=sampler(model, tokenizer, recipe.words),
        facts=RunFacts(
            title="word2vec", about={"parameters": parameters(model)}, data={"source": recipe.data, **counts},
            options=deciding, unit="pairs",
        ),
    )  # fmt: skip


def sampler(model: word2vec.Word2Vec, tokenizer: Tokenizer, words: tuple[str, ...]) -> Callable[[int], str]:
    """Return a function that lists the nearest words of each of these words."""
    ids = {word: tokenizer.backend.token_to_id(word.lower()) for word in words}

    def sample(step: int) -> str:
        lines = []
        for word, token in ids.items():
            if token is None:
                lines.append(f"{word}: not in the vocabulary")
                continue
            near, cosines = model.nearest(model.embedding.weight[token], NEAREST, (token,))
            pairs = zip(near.tolist(), cosines.tolist(), strict=True)
            lines.append(f"{word}: " + ", ".join(f"{tokenizer.backend.id_to_token(i)} {c:.2f}" for i, c in pairs))
        return "\n".join(lines)

    return sample
