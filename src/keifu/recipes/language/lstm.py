"""A recurrent language model (Hochreiter and Schmidhuber, 1997) from scratch, on any text: LSTM, GRU or plain.

Paper: "Long Short-Term Memory". The language model, with dropout between its layers, is the one of Zaremba et al.
(2014); its sizes for the Penn Treebank are 650 and 1,500 numbers in each of two layers. Those were trained by gradient
descent at a rate of 1 on rows of 35 words, with the state of the row before. Here AdamW learns rows of 128 characters,
each from an empty state. `--model.cell` gru or rnn is the same model with the LSTM's successor or predecessor.
Command: keifu train lstm --data sotu
Cost: 8 minutes on one core; the default model has 0.9 M parameters.
Expected: see docs/results.md, "Recurrent networks and attention", for half the width in 600 steps.
"""

from dataclasses import dataclass

from keifu.models.classic import lstm
from keifu.ranges import Count
from keifu.recipes.language import pretraining
from keifu.training.job import Jobs
from keifu.training.settings import Settings


@dataclass(frozen=True)
class Recipe:
    """Options of the run."""

    text: pretraining.TextArgument = pretraining.Text("sotu", "characters", 65_536)
    """Text to learn from; the default tokens are its characters."""
    model: lstm.Config = lstm.Config(dim=256, dropout=0.0)
    """The vocabulary is the tokenizer's, whatever is given here."""
    row_length: Count = 128
    """Tokens of a row of the training; gradients reach no further back. The context length is for writing."""
    training: pretraining.TrainingOptions = Settings(
        steps=2000, batch_size=32, learning_rate=1e-2, warmup=50, final_ratio=0.0, weight_decay=0.01, clip=1.0,
        evaluate_every=200, sample_every=500, save_every=500,
    )  # fmt: skip
    """Settings of the training."""
    prompt: str = ""
    """Beginning of the samples; empty: a new line."""


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu.load and keifu generate read."""
    task = pretraining.prepare_text(recipe.text)
    yield pretraining.pretraining_job(
        "lstm",
        task,
        lstm.build,
        recipe.model,
        recipe.training,
        prompt=recipe.prompt,
        objective=pretraining.TextObjective(row=recipe.row_length),
    )
