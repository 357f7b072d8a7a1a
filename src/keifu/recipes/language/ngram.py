"""An n-gram model (Shannon, 1948; Kneser and Ney, 1995): a language model that counts, on any text.

Paper: "A Mathematical Theory of Communication", section 3, for the counts; Chen and Goodman (1998), "An Empirical Study
of Smoothing Techniques for Language Modeling", for the smoothing: interpolated, with three discounts that the counts
determine. There is nothing to train, and the result is the same on every machine. It is the baseline of every neural
language model.
Command: keifu train ngram --data sotu --order 6
Cost: a minute on one core for 12 million characters.
Expected: see docs/results.md, "N-grams".
"""

from dataclasses import dataclass
from functools import partial
from math import exp, log
from pathlib import Path

import torch

from keifu import checkpoints
from keifu.data.text.packed import PackedText
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.text.generate import generate
from keifu.inference.text.likelihood import score
from keifu.models.classic import ngram
from keifu.ranges import Count
from keifu.recipes.language.pretraining import SAMPLE_TOKENS, VALIDATION_TOKENS, Text, TextArgument, prepare_text
from keifu.training.job import Computation, Jobs
from keifu.training.run.report import write_page

ROW = 256  # held-out tokens that are scored after one another, from an empty context


@dataclass(frozen=True)
class Recipe:
    """Options of the run."""

    text: TextArgument = Text("sotu", "characters", 65_536)
    """Text to count; the default tokens are its characters."""
    order: Count = 6
    """Tokens of the longest n-grams: the last one is predicted from the others."""
    prompt: str = ""
    """Beginning of the sample; empty: a new line, or the first token of a text without one."""


def jobs(recipe: Recipe) -> Jobs:
    """Yield the counting, whose result keifu.load and keifu generate read."""
    yield Computation(partial(learn, recipe))


def learn(recipe: Recipe, out: Path) -> None:
    """Count the n-grams of the text, and save the model with its held-out loss and a sample."""
    task = prepare_text(recipe.text)
    prompt = recipe.prompt or line_break(task.tokenizer) or task.tokenizer.decode(task.shards.tokens[:1].tolist())
    _ = task.tokenizer.encode(prompt)  # raises its error early
    print(f"{task.shards.held_out()}\nCounting the n-grams of {len(task.shards.tokens):,} tokens ...", flush=True)
    model = ngram.count(task.shards.tokens, ngram.Config(task.tokenizer.vocab_size, order=recipe.order)).eval()
    checkpoints.save(model, task.tokenizer, out)
    row = min(ROW, len(task.shards.validation) - 1, len(task.shards.tokens) - 1)
    loss = held_out_loss(model, PackedText(task.shards, row, 1, 0, VALIDATION_TOKENS))
    bits = loss / log(2) / task.shards.bytes_per_token
    sample = prompt + generate(model, task.tokenizer, prompt, raw=True, max_tokens=SAMPLE_TOKENS, seed=0)
    sizes = ", ".join(f"{size:,}" for size in model.config.n_grams)
    loss_text = f"{loss:.3f} nats per token (perplexity {exp(loss):.2f}, {bits:.3f} bits per byte)"
    text = f"Different n-grams of 1 to {recipe.order} tokens: {sizes}.\nHeld-out loss: {loss_text}.\n{sample}"
    facts = {"text": recipe.text.data, "order": recipe.order, "held-out loss": loss, "bits per byte": bits}
    write_page(out, f"{recipe.order}-grams of {recipe.text.data}", text, facts, {})
    print(f"{text}\nThe model is in {out}.")


def line_break(tokenizer: Tokenizer) -> str:
    """Return a line break; nothing if the tokenizer was made from a text without one."""
    try:
        _ = tokenizer.encode("\n")
    except UserError:
        return ""
    return "\n"


def held_out_loss(model: ngram.NGramLM, data: PackedText) -> float:
    """Return the loss on held-out rows in nats per token. Each row begins without a context."""
    nats = [score(model, batch["tokens"]) for batch in data.validation()]
    return -float(torch.cat([row.flatten() for row in nats]).double().mean())
