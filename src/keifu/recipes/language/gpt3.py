"""GPT-3 (Brown et al., 2020) from scratch: GPT-2 with banded attention in every second layer, on any text.

Paper: "Language Models are Few-Shot Learners", section 2 and appendix B. `--recipe-of paper` trains with its settings:
Adam with β 0.9 and 0.95 and ε 1e-8, clipping at 1, decay 0.1, and a rate with 375 M tokens of warm-up, a cosine to a
tenth over 260 B of 300 B tokens, then constant; the batch grows evenly from 32 k tokens to 0.5 M over the first 4 B. A
shorter run has the same shares, in tokens, not steps. The default is for minutes on a processor: Muon, and rates that
fall to 0. GPT-3 Small: --steps 600000 --batch-size 244 --tokenizer gpt2-bpe --model.context-length 2048 --model.dim 768
--model.hidden-dim 3072 --model.n-layers 12 --model.n-heads 12 --model.band 256; the rates of the seven larger sizes are
3, 2.5, 2, 1.6, 1.2, 1 and 0.6e-4 (table 2.1), and their batches 0.5, 0.5, 1, 1, 2, 2 and 3.2 M tokens.
Command: keifu train gpt3 --recipe-of paper --data english
Cost: printed before it starts; the default, a model of 5 M parameters and 2.5 M tokens, a few minutes on 2 cores.
Expected: no figure was made for this recipe; docs/results.md, "Banded attention", has the cost of its attention.
"""

from dataclasses import dataclass

from keifu.models import gpt3
from keifu.recipes.language.pretraining import PretrainingOptions, prepare_text, pretraining_job
from keifu.training.job import Jobs
from keifu.training.settings import Settings

TOKENS, WARMUP, DECAY, RAMP = 300e9, 0.375e9, 260e9, 4e9  # as in the paper; the ramp is 4 to 12 B tokens, by size
FIRST = 32 / 500  # initial share of the batch size


@dataclass(frozen=True)
class Recipe(PretrainingOptions):
    """Options of the run."""

    model: gpt3.Config = gpt3.Config(context_length=256, dim=256, hidden_dim=1024, n_layers=4, n_heads=4, band=64)
    """The vocabulary is the tokenizer's, whatever is given here."""


def paper_settings(recipe: Recipe) -> Settings:
    """Return the settings of appendix B. Its numbers of tokens are converted to shares of the run's tokens."""
    first = max(1, round(FIRST * recipe.batch_size))
    over = max(1, round(RAMP / TOKENS * recipe.steps * recipe.batch_size))
    return recipe.settings(
        batch_ramp=(first, over) if first < recipe.batch_size else None, rate_by="rows",
        warmup=recipe.share(WARMUP / TOKENS), decay_steps=max(1, recipe.share(DECAY / TOKENS)), final_ratio=0.1,
        learning_rate=6e-4, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8, clip=1.0,
    )  # fmt: skip


WAYS = {"keifu": PretrainingOptions.own_settings, "paper": paper_settings}


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu.load and keifu generate read."""
    settings = WAYS[recipe.recipe_of](recipe)
    task = prepare_text(recipe.text)
    yield pretraining_job("gpt3", task, gpt3.build, recipe.model, settings, prompt=recipe.prompt)
