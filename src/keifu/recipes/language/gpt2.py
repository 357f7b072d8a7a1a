"""GPT-2 (Radford et al., 2019) from scratch: the smallest published size and tokenizer, on any text.

Paper: "Language Models are Unsupervised Multitask Learners". It gives a batch of 512 rows of 1,024 tokens and no rate;
the rate, decay and schedule here are those that GPT-3 (Brown et al., 2020, table 2.1) prints for the same size.
Command: keifu train gpt2 --data english --model.n-layers 4 --model.dim 256 --model.n-heads 4 --model.hidden-dim 1024
Cost: the default is the published size, for a cluster; the sizes in the command above, about 3 hours on 2 cores.
Expected: at the published size on WebText, about 3.1 nats a token, by the paper; no run of that size was made
here. A small one: docs/results.md, "LLaMA's three changes".
"""

from dataclasses import dataclass

from keifu.models import gpt2
from keifu.recipes.language import pretraining
from keifu.training.job import Jobs


@dataclass(frozen=True)
class Recipe(pretraining.PublishedOptions):
    """Options of the run."""

    text: pretraining.TextArgument = pretraining.Text(tokenizer="gpt2-bpe")
    """Text to learn from; the default tokenizer is GPT-2's own."""
    model: gpt2.Config = gpt2.Config(dropout=0.0)
    """The vocabulary is the tokenizer's, whatever is given here."""
    training: pretraining.TrainingOptions = pretraining.published(steps=600_000, batch_size=512, learning_rate=6e-4)
    """Settings of the training."""


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu.load, keifu generate and transformers read."""
    task = pretraining.prepare_text(recipe.text)
    yield pretraining.pretraining_job("gpt2", task, gpt2.build, recipe.model, recipe.training, prompt=recipe.prompt)
