"""A recurrent encoder-decoder with additive attention, and without, as a translator (Bahdanau et al., 2014).

Paper: "Neural Machine Translation by Jointly Learning to Align and Translate". `--attention none` is the same network
with one vector for the whole source, as Cho et al. (2014) have it: the difference is the gain of attention.
`--recipe-of paper` trains with the settings of appendix B.2: Adadelta with ρ 0.95 and ε 1e-6, gradients clipped at 1,
batches of 80 pairs cut from 1,600 that were sorted by length. The default is for a budget of minutes on a processor,
with AdamW.
Command: keifu train seq2seq --data tatoeba-ja-en --attention additive
Cost: 9 minutes of training unless --minutes or --steps say otherwise; the first run learns its tokenizer before it.
Expected: BLEU and chrF by length of sentence: docs/results.md, "Translation with attention".
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from keifu.data.epochs import by_rows
from keifu.data.translation.batches import by_tokens
from keifu.models import seq2seq
from keifu.ranges import BelowOne, Count, NotNegative
from keifu.recipes.starting import scaled
from keifu.recipes.translation.translator_runs import (
    Training,
    TranslationOptions,
    own_settings,
    settings_of,
    translator_job,
)  # fmt: skip
from keifu.training.job import Jobs
from keifu.training.settings import Settings

CONTEXTS = {"additive": "attention", "none": "fixed"}


@dataclass(frozen=True)
class Recipe(TranslationOptions):
    """Options of the run."""

    attention: Literal["additive", "none"] = "additive"
    """additive, or none: the decoder has one vector for the whole source, whatever --model.context says."""
    recipe_of: Literal["keifu", "paper"] = "keifu"
    """Source of the training settings: keifu or the paper. The model is the same."""
    model: seq2seq.Config = seq2seq.Config(
        context_length=128, dim=512, embedding_dim=256, attention_dim=256, maxout_dim=256, dropout=0.0
    )
    """The vocabulary is the tokenizer's, whatever is given here. The paper's sizes: dim 1000, embedding-dim 620,
    attention-dim 1000, maxout-dim 500, dropout 0."""
    learning_rate: NotNegative | None = None
    """Highest learning rate of AdamW; the paper's Adadelta has 1. Default: 2e-3, and a tenth of it with --start-from.
    """
    label_smoothing: BelowOne = 0.1
    """Share of the probability that is spread over all tokens; the paper has none."""
    average: Count = 1
    """Number of last saved states whose mean is the resulting model, 2% of the run apart."""


def paper_settings(recipe: Recipe, steps: int) -> Settings:
    """Return the paper's settings (appendix B.2)."""
    return settings_of(
        recipe, steps, optimizer="adadelta", learning_rate=scaled(1.0, recipe.start_from), schedule="constant",
        weight_decay=0.0, clip=1.0,
    )  # fmt: skip


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu translate, keifu evaluate and keifu.load read."""
    if recipe.recipe_of == "paper":
        training = Training(partial(paper_settings, recipe), by_rows, 0.0, recipe.average)
    else:
        batching = partial(by_tokens, tokens=recipe.tokens_per_batch)
        settings = partial(own_settings, recipe, warmup=200)
        training = Training(settings, batching, recipe.label_smoothing, recipe.average)
    config = replace(recipe.model, context=CONTEXTS[recipe.attention])
    yield translator_job("seq2seq", recipe, seq2seq.build, config, training)
