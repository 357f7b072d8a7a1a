"""The Transformer (Vaswani et al., 2017) as a translator, trained only on sentence pairs.

Paper: "Attention Is All You Need". `--recipe-of paper` trains with its settings: Adam with β 0.9 and 0.98 and ε 1e-9, a
rate that increases for 4,000 steps and then decreases with the root of the step, label smoothing 0.1, the mean of the
last 5 saved states. The default is for a budget of minutes on a processor: Muon, and a rate that decreases to zero
within the budget.
Command: keifu train transformer --data tatoeba-ja-en
Cost: 9 minutes of training unless --minutes or --steps say otherwise; the first run learns its tokenizer before it.
Expected: BLEU and chrF on held-out pairs: docs/results.md, "Translation with the Transformer".
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from keifu.data.translation.batches import by_tokens
from keifu.models import transformer
from keifu.ranges import BelowOne, Count, NotNegative
from keifu.recipes.options import value_or
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

PAPER_WARMUP = 4000


@dataclass(frozen=True)
class Recipe(TranslationOptions):
    """Options of the run."""

    recipe_of: Literal["keifu", "paper"] = "keifu"
    """Source of the training settings: keifu or the paper. The model is the same."""
    model: transformer.Config = transformer.Config(
        context_length=128, dim=256, hidden_dim=1024, n_layers=3, n_heads=4, dropout=0.0
    )
    """The vocabulary is the tokenizer's, whatever is given here. The paper's base model: dim 512, hidden-dim 2048,
    n-layers 6, n-heads 8, dropout 0.1, which also pays off here once the pairs are seen more than a few times."""
    learning_rate: NotNegative | None = None
    """Highest learning rate of AdamW, for embeddings and gains; the paper's follows from dim. Default: 2e-3, and a
    tenth of it with --start-from."""
    matrix_rate: NotNegative | None = None
    """Highest learning rate of Muon, for hidden matrices. Default: 0.02, and a tenth of it with --start-from."""
    label_smoothing: BelowOne = 0.1
    """Share of the probability that is spread over all tokens."""
    average: Count | None = None
    """Number of last saved states whose mean is the resulting model, 2% of the run apart; unset: 1, the paper's 5."""


def keifu_settings(recipe: Recipe, steps: int) -> Settings:
    """Return keifu's settings for this number of steps."""
    matrix_rate = value_or(recipe.matrix_rate, scaled(0.02, recipe.start_from))
    return own_settings(recipe, steps, 400, optimizer="muon", matrix_rate=matrix_rate)


def paper_settings(recipe: Recipe, steps: int) -> Settings:
    """Return the paper's settings (5.3): the rate is d^-0.5 · min(step^-0.5, step · 4000^-1.5). A short run only has
    the rising part."""
    warmup = min(PAPER_WARMUP, steps)
    return settings_of(
        recipe, steps, warmup=warmup,
        learning_rate=scaled(recipe.model.dim**-0.5 * warmup * PAPER_WARMUP**-1.5, recipe.start_from),
        schedule="inverse_sqrt", weight_decay=0.0, betas=(0.9, 0.98), epsilon=1e-9, clip=0.0,
    )  # fmt: skip


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu translate, keifu evaluate, keifu.load and transformers read."""
    settings, average = {"keifu": (keifu_settings, 1), "paper": (paper_settings, 5)}[recipe.recipe_of]
    batching = partial(by_tokens, tokens=recipe.tokens_per_batch)
    training = Training(partial(settings, recipe), batching, recipe.label_smoothing, recipe.average or average)
    yield translator_job("transformer", recipe, transformer.build, recipe.model, training)
