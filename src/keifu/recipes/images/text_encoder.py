"""CLIP text encoder that conditions a diffusion model: loaded, or trained first in a folder of the run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from keifu import checkpoints
from keifu.data.images.dataset import ImageDataset
from keifu.data.images.splits import ImageSplit
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.evaluation.images.retrieval import two_towers
from keifu.generation.images.latent_diffusion import text_tokens
from keifu.models.clip import clip
from keifu.models.clip import text as clip_text
from keifu.recipes.images import clip as clip_recipe
from keifu.recipes.images.image_runs import CLIP, TextToImageOptions, of_both
from keifu.recipes.runs import Budget, Settings, is_resuming

Tokens = tuple[torch.Tensor, torch.Tensor | None]  # of training and validation captions


def two_towers_of(
    recipe: TextToImageOptions, parts: ImageSplit, out: Path, resume: bool
) -> tuple[clip.Clip, Tokenizer, Tokens]:
    """Load CLIP, or train it into a folder of the run. Return it with its tokenizer and the encoded captions."""
    directory = Path(recipe.clip) if recipe.clip else out / CLIP
    if not recipe.clip:
        _train(recipe, directory, is_resuming(directory, resume))
    model, tokenizer = checkpoints.load(recipe.clip or directory, torch.float32)
    two_towers(model)
    if tokenizer is None:
        raise UserError(f"{directory} has no tokenizer, and captions must be read: give a CLIP that has one.")
    clip_model: Any = model
    text_tokens(tokenizer, recipe.prompts, clip_model.config.context_length, recipe.truncate)
    tokens = caption_tokens(tokenizer, clip_model.config.context_length, parts, recipe.languages, recipe.truncate)
    return clip_model, tokenizer, tokens


def _train(recipe: TextToImageOptions, directory: Path, resume: bool) -> None:
    made = clip_recipe.Recipe(recipe.data, recipe.languages, truncate=recipe.truncate)
    chosen = replace(made.training, batch_size=recipe.clip_batch, precision=recipe.precision, seed=recipe.seed)
    task = clip_recipe.prepare(replace(made, training=chosen))
    limit: Any = task.model.config
    # reports texts that are too long before the training
    text_tokens(task.tokenizer, recipe.prompts, limit.context_length, recipe.truncate)
    budget = Budget(recipe.clip_steps, recipe.clip_minutes)

    def settings(steps: int) -> Settings:
        every = dict.fromkeys(("evaluate_every", "sample_every"), max(1, steps // 10))
        return replace(chosen, steps=steps, minutes=budget.limit, warmup=steps // 10, **every)

    fitted = budget.fit(directory, resume, task.model, task.objective, task.data, settings)
    clip_recipe.learn(replace(made, training=fitted), task, directory, resume)


def text_conditioned(model: clip.Clip) -> clip_text.TextTower:
    """Return the frozen text tower without its projection. A U-Net attends to the hidden state of every token."""
    tower = clip_text.TextTower(replace(model.config.text, projected=False))
    kept = {name: tensor for name, tensor in model.text.state_dict().items() if not name.startswith("projection")}
    tower.load_state_dict(kept)
    return tower.requires_grad_(False).eval()


def caption_tokens(
    tokenizer: Tokenizer, length: int, parts: ImageSplit, languages: tuple[str, ...], truncate: bool
) -> Tokens:
    """Encode the training and validation captions, padded as for drawing: [language, picture, length]; None without
    pictures."""

    def tokens(part: ImageDataset) -> torch.Tensor:
        return torch.stack([text_tokens(tokenizer, part.texts(language), length, truncate) for language in languages])

    return of_both(parts, tokens)
