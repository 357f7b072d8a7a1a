"""OLMo 2 (Ai2, 2024) from scratch: norms after the sublayers, QK-norm and z-loss, with the settings of the 7B.

Paper: "2 OLMo 2 Furious", section 3, and the configuration published with it: AdamW (0.9, 0.95), weight decay 0.1,
clipping at 1.0, z-loss 1e-5, 2,000 steps of warm-up, 4 M tokens a step. The paper's cosine is made for 5 T tokens and
stops at 3.9 T: `--decay-steps 1192093`. Here the cosine ends with the run, and embeddings decay too.
Command: keifu train olmo2 --model.dim 256 --model.hidden-dim 704 --model.n-layers 4 --model.n-heads 4
Cost: the default is the published size, for a cluster. For a laptop use `keifu train gpt`, which chooses for you.
Expected: no run of the published size was made here, and no figure was made for a small one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from keifu.models import olmo2
from keifu.ranges import NotNegative
from keifu.recipes.language.pretraining import Text, prepare_text, pretrain
from keifu.training.settings import Settings

PUBLISHED = Settings(
    steps=928_646, batch_size=1024, learning_rate=3e-4, warmup=2000, weight_decay=0.1, betas=(0.9, 0.95), clip=1.0,
    final_ratio=0.1, evaluate_every=1000, sample_every=5000, save_every=1000,
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Options of the run."""

    text: Annotated[Text, tyro.conf.arg(name="")] = Text()
    """Text to learn from; the default tokenizer is a byte-level BPE, like OLMo 2's, learned from the text."""
    model: olmo2.Config = olmo2.Config()
    """Sizes of the model. The vocabulary is the tokenizer's, whatever is given here."""
    training: Annotated[Settings, tyro.conf.arg(name="")] = PUBLISHED
    """Settings of the training."""
    prompt: str = "The"
    """Beginning of the samples."""
    z_loss: NotNegative = 1e-5
    """Factor of the z-loss, which keeps the logits near a sum of exponentials of 1."""


def run(recipe: Recipe, out: Path, resume: bool) -> None:
    """Train into `out`, which keifu.load, keifu generate and transformers read afterwards."""
    task = prepare_text(recipe.text, out)
    training, z_loss = recipe.training, recipe.z_loss
    pretrain("olmo2", task, olmo2.build, recipe.model, training, out, resume, recipe.prompt, z_loss=z_loss)
