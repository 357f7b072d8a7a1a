"""LLaMA (Touvron et al., 2023) from scratch, on any text: a small one, or the paper's 7B.

Paper: "LLaMA: Open and Efficient Foundation Language Models", section 2: AdamW (0.9, 0.95), weight decay 0.1, clipping
at 1.0, a cosine to a tenth, 2,000 steps of warm-up, 4 M tokens per step.
The default is a model of 5 M parameters with Muon; `--recipe-of paper` has the settings above, with LLaMA's kind of
tokenizer, a SentencePiece BPE of 32,000 tokens with bytes.
Command: keifu train llama --data english
Cost: printed before it starts; the default, a few minutes on 2 cores. The published size is for a cluster.
Expected: the paper's figure 1: 7B passes 1.8 nats per token after about 0.5 T tokens of its mixture; no run of that
size was made here. A small one: docs/results.md, "LLaMA's three changes".
"""

from dataclasses import dataclass

from keifu.models import llama
from keifu.recipes.language import pretraining
from keifu.training.job import Jobs


@dataclass(frozen=True)
class Recipe(pretraining.PublishedOptions):
    """Options of the run."""

    model: llama.Config = llama.Config(**pretraining.SMALL, hidden_dim=704)
    """The vocabulary is the tokenizer's, whatever is given here."""


PUBLISHED = Recipe(
    recipe_of="paper", text=pretraining.Text(tokenizer="sentencepiece-32k"), model=llama.Config(),
    training=pretraining.published(steps=250_000, batch_size=2048, learning_rate=3e-4),
)  # fmt: skip


def check_before_start(recipe: Recipe) -> None:
    """Raise UserError for a run that needs too much memory, or more than a day without --yes."""
    pretraining.check_language_plan(llama.build, recipe.model, recipe.text, recipe.training, recipe.yes)


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu.load, keifu generate and transformers read."""
    task = pretraining.prepare_text(recipe.text)
    yield pretraining.pretraining_job("llama", task, llama.build, recipe.model, recipe.training, prompt=recipe.prompt)
