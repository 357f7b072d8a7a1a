"""GPT-2 (Radford et al., 2019) from scratch, on any text: a small one, or the smallest published size.

Paper: "Language Models are Unsupervised Multitask Learners". It gives a batch of 512 rows of 1,024 tokens and no rate;
the rate, decay and schedule here are those that GPT-3 (Brown et al., 2020, table 2.1) prints for the same size.
The default is a model of 4 M parameters with Muon; `--recipe-of paper` has the published size, tokenizer and settings.
Command: keifu train gpt2 --data english
Cost: printed before it starts; the default, a few minutes on 2 cores. The published size is for a cluster.
Expected: at the published size on WebText, about 3.1 nats per token, by the paper; no run of that size was made
here. A small one: docs/results.md, "LLaMA's three changes".
"""

from dataclasses import dataclass

from keifu.models import gpt2
from keifu.recipes.language import pretraining
from keifu.training.job import Jobs


@dataclass(frozen=True)
class Recipe(pretraining.PublishedOptions):
    """Options of the run."""

    model: gpt2.Config = gpt2.Config(**pretraining.SMALL, hidden_dim=1024, dropout=0.0)
    """The vocabulary is the tokenizer's, whatever is given here."""


PUBLISHED = Recipe(
    recipe_of="paper", text=pretraining.Text(tokenizer="gpt2-bpe"), model=gpt2.Config(dropout=0.0),
    training=pretraining.published(steps=600_000, batch_size=512, learning_rate=6e-4),
)  # fmt: skip


def check_before_start(recipe: Recipe) -> None:
    """Raise UserError for a run that needs too much memory, or more than a day without --yes."""
    pretraining.check_language_plan(gpt2.build, recipe.model, recipe.text, recipe.training, recipe.yes)


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu.load, keifu generate and transformers read."""
    task = pretraining.prepare_text(recipe.text)
    yield pretraining.pretraining_job("gpt2", task, gpt2.build, recipe.model, recipe.training, prompt=recipe.prompt)
