"""The CLIP whose text tower a model that draws listens to: one that is there, or one that is trained as a part of the
run; knows no model that draws.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from keifu import checkpoints
from keifu.data.images.dataset import ImageDataset, ImageSplit
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.evaluation.images.retrieval import preprocessing, two_towers
from keifu.generation.images.latent_diffusion import text_tokens
from keifu.models.clip import clip
from keifu.models.clip import text as clip_text
from keifu.recipes.images import clip as recipe
from keifu.recipes.images.common import is_resuming, minutes_of, steps_for
from keifu.training.objectives.contrastive import contrastive_loss
from keifu.training.settings import Precision

FOLDER = "clip"  # inside the run's


@dataclass(frozen=True)
class TextEncoderOptions:
    """What is asked of it: a model that is there (`given`), or data, languages and a budget (see `steps_for`).

    prompts: texts that it must be able to read.
    """

    given: str | None
    data: str
    languages: tuple[str, ...]
    truncate: bool
    budget: tuple[int | None, float]
    batch_size: int
    precision: Precision
    seed: int
    prompts: tuple[str, ...] = ()


def two_towers_of(wanted: TextEncoderOptions, out: Path, resume: bool) -> tuple[clip.Clip, Tokenizer]:
    """The CLIP and its tokenizer, trained into a folder of the run where none is given."""
    place = Path(wanted.given) if wanted.given else out / FOLDER
    if not wanted.given:
        _train(wanted, place, is_resuming(place, resume))
    model, tokenizer = checkpoints.load(wanted.given or place, torch.float32)
    two_towers(model)
    if tokenizer is None:
        raise UserError(f"{place} has no tokenizer, and captions must be read: give a CLIP that has one.")
    found: Any = model
    text_tokens(tokenizer, wanted.prompts, found.config.context_length)
    return found, tokenizer


def _train(wanted: TextEncoderOptions, place: Path, resume: bool) -> None:
    made = recipe.Recipe(wanted.data, wanted.languages, truncate=wanted.truncate)
    chosen = replace(made.training, batch_size=wanted.batch_size, precision=wanted.precision, seed=wanted.seed)
    made = replace(made, training=chosen)
    task = recipe.prepare(made)
    limit: Any = task.model.config
    text_tokens(task.tokenizer, wanted.prompts, limit.context_length)  # what is too long is said before the training
    objective = contrastive_loss(preprocessing(task.model).normalised)
    steps = steps_for(wanted.budget, place, resume, task.model, objective, task.data, chosen)
    often = max(1, steps // 10)
    minutes = minutes_of(wanted.budget)
    chosen = replace(chosen, steps=steps, minutes=minutes, warmup=steps // 10, evaluate_every=often, sample_every=often)
    recipe.run(replace(made, training=chosen), place, resume)


def text_conditioned(model: clip.Clip) -> clip_text.TextTower:
    """The text tower without its projection, frozen: every token's hidden state is what a U-Net looks at."""
    tower = clip_text.TextTower(replace(model.config.text, projected=False))
    kept = {name: tensor for name, tensor in model.text.state_dict().items() if not name.startswith("projection")}
    tower.load_state_dict(kept)
    return tower.requires_grad_(False).eval()


def caption_tokens(
    tokenizer: Tokenizer, length: int, parts: ImageSplit, languages: tuple[str, ...], truncate: bool
) -> list[torch.Tensor | None]:
    """The captions for training and for validation as ids, padded as they are when a model draws: [language, picture,
    length]; None where there is no picture."""

    def tokens(part: ImageDataset) -> torch.Tensor | None:
        texts = [part.texts(language) for language in languages]
        return torch.stack([text_tokens(tokenizer, each, length, truncate) for each in texts]) if len(part) else None

    return [tokens(parts.train), tokens(parts.validation)]
