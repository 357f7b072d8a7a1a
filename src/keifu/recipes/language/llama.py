"""LLaMA (Touvron et al., 2023) from scratch: the paper's 7B settings, every one of them an option, on any text.

Paper: "LLaMA: Open and Efficient Foundation Language Models", section 2: AdamW (0.9, 0.95), weight decay 0.1, clipping
at 1.0, a cosine to a tenth, 2,000 steps of warm-up, 4 M tokens a step.
Command: keifu train llama --model.dim 256 --model.hidden-dim 704 --model.n-layers 4 --model.n-heads 4
Cost: the default is the published size, for a cluster. For a laptop use `keifu train gpt`, which chooses for you.
Expected: the paper's figure 1: 7B passes 1.8 nats a token after about 0.5 T tokens of its mixture; no run of that size
was made here. A small one: docs/results.md, "LLaMA's three changes".
"""

from dataclasses import dataclass

from keifu.models import llama
from keifu.recipes.language import pretraining
from keifu.training.job import Jobs


@dataclass(frozen=True)
class Recipe(pretraining.PublishedOptions):
    """Options of the run."""

    text: pretraining.TextArgument = pretraining.Text(tokenizer="sentencepiece-32k")
    """Text to learn from; the default tokenizer is a SentencePiece BPE of 32,000 tokens with bytes, like LLaMA's."""
    model: llama.Config = llama.Config()
    """The vocabulary is the tokenizer's, whatever is given here."""
    training: pretraining.TrainingOptions = pretraining.published(steps=250_000, batch_size=2048, learning_rate=3e-4)
    """Settings of the training."""


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu.load, keifu generate and transformers read."""
    task = pretraining.prepare_text(recipe.text)
    yield pretraining.pretraining_job("llama", task, llama.build, recipe.model, recipe.training, prompt=recipe.prompt)
