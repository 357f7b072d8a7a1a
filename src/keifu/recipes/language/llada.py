"""LLaDA (Nie et al., 2025) from scratch: text by masked diffusion, on LLaMA's blocks without the causal mask.

Paper: "Large Language Diffusion Models", section 2.2 and appendix B: AdamW, weight decay 0.1, a warm-up of 2,000 steps
to 4e-4, then a constant rate that is lowered twice near the end; batches of 1,280 rows of 4,096 tokens, of which 1% are
shorter, 2.3 T tokens. Here all rows have the same length, and the rate decreases as a cosine to a tenth.
The default is a model of 5 M parameters with Muon; `--recipe-of paper` has the settings above.
Command: keifu train llada --data english
Cost: printed before it starts; the default, a few minutes on 2 cores. The published size is for a cluster.
Expected: the loss is an upper bound of the nats per token; benchmarks/masked_diffusion.py has it next to LLaMA's.
"""

from dataclasses import dataclass, replace
from typing import Any

from keifu.models.diffusion import llada
from keifu.recipes.language import pretraining
from keifu.training.job import Jobs
from keifu.training.objectives.diffusion import add_masking_rates
from keifu.training.objectives.language_modeling import masked_diffusion


@dataclass(frozen=True)
class Recipe(pretraining.PublishedOptions):
    """Options of the run."""

    model: llada.Config = llada.Config(**pretraining.SMALL, hidden_dim=704)
    """Sizes of the model. The vocabulary is the tokenizer's and the mask, whatever is given here."""


PUBLISHED = Recipe(
    recipe_of="paper", model=llada.Config(),
    training=pretraining.published(steps=440_000, batch_size=1280, learning_rate=4e-4),
)  # fmt: skip


def build(config: llada.Config) -> llada.MaskedDiffusionLM:
    """Build a model whose mask comes after the tokens of a tokenizer."""
    return llada.build(replace(config, vocab_size=config.vocab_size + 1, mask_token=config.vocab_size))


def check_before_start(recipe: Recipe) -> None:
    """Raise UserError for a run that needs too much memory, or more than a day without --yes."""
    pretraining.check_language_plan(
        build, replace(recipe.model, mask_token=0), recipe.text, recipe.training, recipe.yes
    )


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu.load and keifu generate read."""
    build_model: Any = build
    task = pretraining.prepare_text(recipe.text)
    yield pretraining.pretraining_job(
        "llada", task, build_model, replace(recipe.model, mask_token=0), recipe.training, prompt=recipe.prompt,
        objective=pretraining.TextObjective(
            loss=masked_diffusion, row=recipe.model.context_length - 1, change=add_masking_rates
        ),
    )  # fmt: skip
