"""LLaDA (Nie et al., 2025) from scratch: text by masked diffusion, on LLaMA's blocks without the causal mask.

Paper: "Large Language Diffusion Models", section 2.2 and appendix B: AdamW, weight decay 0.1, a warm-up of 2,000 steps
to 4e-4, then a constant rate that is lowered twice near the end; batches of 1,280 rows of 4,096 tokens, of which 1% are
shorter, 2.3 T tokens. Here all rows have the same length, and the rate decreases as a cosine to a tenth.
Command: keifu train llada --model.dim 256 --model.hidden-dim 704 --model.n-layers 4 --model.n-heads 4
--model.context-length 128 --batch-size 32 --steps 3000 --warmup 100 --data english
Cost: the default is the published size, for a cluster; the command above is for a laptop.
Expected: the loss is an upper bound of the nats a token; benchmarks/masked_diffusion.py has it next to LLaMA's.
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

    model: llada.Config = llada.Config()
    """Sizes of the model. The vocabulary is the tokenizer's and the mask, whatever is given here."""
    training: pretraining.TrainingOptions = pretraining.published(steps=440_000, batch_size=1280, learning_rate=4e-4)
    """Settings of the training."""


def build(config: llada.Config) -> llada.MaskedDiffusionLM:
    """Build a model whose mask comes after the tokens of a tokenizer."""
    return llada.build(replace(config, vocab_size=config.vocab_size + 1, mask_token=config.vocab_size))


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu.load and keifu generate read."""
    task = pretraining.prepare_text(recipe.text)
    made: Any = build
    yield pretraining.pretraining_job(
        "llada", task, made, replace(recipe.model, mask_token=0), recipe.training, prompt=recipe.prompt,
        row=recipe.model.context_length - 1, objective=masked_diffusion, change=add_masking_rates,
    )  # fmt: skip
