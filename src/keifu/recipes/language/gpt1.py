"""GPT-1 (Radford et al., 2018) from scratch: generative pretraining of a decoder, on any text.

Paper: "Improving Language Understanding by Generative Pre-Training", section 4.1. `--recipe-of paper` trains with its
settings: 64 rows of 512 tokens, Adam with a rate of 2.5e-4, 2,000 steps of warm-up and a cosine to 0, decay 0.01 on
matrices, 100 passes over the text. The default is for a few minutes: Muon, 600 steps of 16 rows, a linear decrease.
The published size: --model.context-length 512 --model.dim 768 --model.hidden-dim 3072 --model.n-layers 12
--model.n-heads 12 --vocab-size 40478. Its books are no longer available. --tokenizer can name its tokenizer's files; a
trained one is byte-level BPE, which has an end-of-text token and can encode every character.
Command: keifu train gpt1 --data english
Cost: printed before it starts; the default, a model of 5 M parameters, a few minutes on 2 cores.
Expected: see docs/results.md, "Generative pretraining"; keifu train gpt1-finetune continues.
"""

from dataclasses import dataclass
from typing import Literal

from keifu.errors import UserError
from keifu.models import gpt1
from keifu.ranges import Count, NotNegative, Positive, Seed
from keifu.recipes.language.pretraining import (
    Text,
    TextArgument,
    check_language_plan,
    own_settings,
    prepare_text,
    pretraining_job,
    settings_of,
)
from keifu.recipes.options import Logging
from keifu.training.job import Jobs
from keifu.training.settings import Settings

PAPER_WARMUP = 2000
SMALL = gpt1.Config(context_length=256, dim=256, hidden_dim=1024, n_layers=4, n_heads=4, dropout=0.0)


@dataclass(frozen=True)
class Recipe(Logging):
    """Options of the run."""

    text: TextArgument = Text()
    """Text to learn from."""
    recipe_of: Literal["keifu", "paper"] = "keifu"
    """Source of the training settings: keifu or the paper. The model is the same."""
    model: gpt1.Config = SMALL
    """The vocabulary is the tokenizer's, whatever is given here. The paper has dropout 0.1, for 100 passes."""
    epochs: Positive | None = None
    """Passes over the text; unset: 600 steps, the paper's 100 passes."""
    steps: Count | None = None
    """Updates of the weights, instead of the epochs."""
    batch_size: Count | None = None
    """Rows in a step; unset: 16, the paper's 64."""
    micro_batch: Count | None = None
    """Rows computed at a time; unset: as many as fit in memory."""
    learning_rate: NotNegative | None = None
    """AdamW's highest rate; unset: 2e-3, for embeddings and gains alone, and the paper's 2.5e-4."""
    matrix_rate: NotNegative = 0.02
    """Muon's highest rate, for hidden matrices; the paper has no Muon."""
    seed: Seed = 0
    """Random seed of the weights, the order of the data, dropout and the samples."""
    prompt: str = "The"
    """Beginning of the samples."""
    yes: bool = False
    """Start although the run would take longer than a day."""

    def __post_init__(self) -> None:
        if self.epochs is not None and not self.epochs > 0:
            raise UserError(f"epochs must be above 0, not {self.epochs}.")


def paper_settings(recipe: Recipe, steps: int, batch_size: int) -> Settings:
    """Return the settings of section 4.1, with gradient clipping from the released code. A run shorter than the warm-up
    only has the rising part of its schedule."""
    return settings_of(
        recipe, steps, batch_size, warmup=min(PAPER_WARMUP, steps), schedule="cosine", final_ratio=0.0,
        learning_rate=2.5e-4, weight_decay=0.01, betas=(0.9, 0.999), clip=1.0,
    )  # fmt: skip


WAYS = {"keifu": (own_settings, 16), "paper": (paper_settings, 64)}  # settings, batch size
STEPS, PAPER_EPOCHS = 600, 100


def choose_settings(recipe: Recipe, training_tokens: int) -> Settings:
    """Return the settings for a text of this number of tokens."""
    how, rows = WAYS[recipe.recipe_of]
    batch_size = recipe.batch_size or rows
    epochs = recipe.epochs or (PAPER_EPOCHS if recipe.recipe_of == "paper" else None)
    steps = STEPS if epochs is None else round(epochs * training_tokens / (batch_size * recipe.model.context_length))
    return how(recipe, recipe.steps or max(1, steps), batch_size)


def check_before_start(recipe: Recipe) -> None:
    """Raise UserError for a run that needs too much memory, or more than a day without --yes."""
    settings = choose_settings(recipe, len(prepare_text(recipe.text).shards.tokens))
    check_language_plan(gpt1.build, recipe.model, recipe.text, settings, recipe.yes)


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu.load, keifu generate and transformers read."""
    task = prepare_text(recipe.text)
    settings = choose_settings(recipe, len(task.shards.tokens))
    yield pretraining_job("gpt1", task, gpt1.build, recipe.model, settings, prompt=recipe.prompt)
