"""A character-level language model: nanoGPT's example for a CPU, with keifu's own training settings.

The same text, characters, depth, heads, width and context as nanoGPT's example (Karpathy, 2022; its README, "I only
have a macbook": 4 layers, 4 heads, width 128, context 64, 2,000 steps of 12 rows), but LLaMA's block, Muon, and more
rows a step. `--recipe-of nanogpt` trains GPT-2's block with nanoGPT's own settings instead.
Command: keifu train characters --data input.txt
Cost: under a minute on 2 cores.
Expected: on tiny Shakespeare, nanoGPT's loss of 1.88 nats per character is passed within half a minute:
docs/results.md, "Characters: nanoGPT's example for a CPU".
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import tyro

from keifu.data.text.held_out import SplitRule
from keifu.errors import require_known
from keifu.models import gpt2, llama
from keifu.ranges import BelowOne, Count, Seed
from keifu.recipes.language.pretraining import Text, TextOptions, prepare_text, pretraining_job
from keifu.recipes.options import Logging
from keifu.training.job import Jobs
from keifu.training.settings import Settings

# name -> builder of the model, its config, training settings
WAYS: dict[str, tuple[Any, Any, Settings]] = {
    "keifu": (
        llama.build,
        llama.Config(context_length=64, dim=128, hidden_dim=320, n_layers=4, n_heads=4, norm_eps=1e-5, tied=False),
        Settings(
            steps=400, batch_size=48, optimizer="muon", learning_rate=2e-2, matrix_rate=0.03, warmup=5,
            final_ratio=0.0, weight_decay=0.01, evaluate_every=50,
        ),
    ),
    "nanogpt": (
        gpt2.build,
        gpt2.Config(context_length=64, dim=128, hidden_dim=512, n_layers=4, n_heads=4, dropout=0.0, bias=False),
        Settings(
            steps=2000, batch_size=12, learning_rate=1e-3, warmup=100, betas=(0.9, 0.99), final_ratio=0.1,
            precision="float32", evaluate_every=250,
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe(TextOptions, Logging):
    """Options of the run."""

    data: str = "sotu"
    """A text file; nanoGPT's example uses tiny Shakespeare, 1.1 million characters."""
    recipe_of: Literal["keifu", "nanogpt"] = "keifu"
    """Source of the model and settings."""
    steps: Count | None = None
    """Updates of the weights; unset: 400 for keifu, 2,000 for nanogpt."""
    seed: Seed = 0
    """Random seed of the weights and the order of the data."""
    held_out: BelowOne = field(default=0.1, kw_only=True)
    """Share of the text that is kept for validation: its last part, as in nanoGPT."""
    split: tyro.conf.Suppress[SplitRule] = field(default="end", kw_only=True)


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, with validation on the whole held-out part."""
    require_known("recipe", recipe.recipe_of, WAYS)
    build, config, settings = WAYS[recipe.recipe_of]
    steps = recipe.steps or settings.steps
    settings = replace(settings, steps=steps, warmup=min(settings.warmup, steps), seed=recipe.seed, **recipe.logging())
    task = prepare_text(Text(recipe.data, "characters", 65_536, **recipe.reading()))
    yield pretraining_job("characters", task, build, config, settings)
