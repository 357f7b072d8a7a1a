"""LLaMA (Touvron et al., 2023) from scratch: the paper's 7B settings, every one of them an option, on any text.

Paper: "LLaMA: Open and Efficient Foundation Language Models", section 2: AdamW (0.9, 0.95), weight decay 0.1, clipping
at 1.0, a cosine to a tenth, 2,000 steps of warm-up, 4 M tokens a step.
Command: keifu train llama --model.dim 256 --model.hidden-dim 704 --model.n-layers 4 --model.n-heads 4
Cost: the default is the published size, for a cluster. For a laptop use `keifu train gpt`, which chooses for you.
Expected: the paper's figure 1: 7B passes 1.8 nats a token after about 0.5 T tokens of its mixture; no run of that size
was made here. A small one: docs/results.md, "LLaMA's three changes".
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from keifu.models import llama
from keifu.recipes.language.pretraining import Text, prepare_text, pretrain
from keifu.training.settings import Settings

PUBLISHED = Settings(
    steps=250_000, batch_size=2048, learning_rate=3e-4, warmup=2000, weight_decay=0.1, betas=(0.9, 0.95), clip=1.0,
    final_ratio=0.1, evaluate_every=1000, sample_every=5000, save_every=1000,
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Options of the run."""

    text: Annotated[Text, tyro.conf.arg(name="")] = Text(tokenizer="sentencepiece-32k")
    """Text to learn from; the default tokenizer is a SentencePiece BPE of 32,000 tokens with bytes, like LLaMA's."""
    model: llama.Config = llama.Config()
    """The vocabulary is the tokenizer's, whatever is given here."""
    training: Annotated[Settings, tyro.conf.arg(name="")] = PUBLISHED
    """How to learn it."""
    prompt: str = "The"
    """Beginning of the samples."""


def run(recipe: Recipe, out: Path, resume: bool) -> None:
    """Train into `out`, which keifu.load, keifu generate and transformers read afterwards."""
    task = prepare_text(recipe.text, out)
    pretrain("llama", task, llama.build, recipe.model, recipe.training, out, resume, recipe.prompt)
