"""LoRA for a text-to-image diffusion model (Hu et al., 2021): a style or an object, learned from a few pictures.

Paper: "LoRA: Low-Rank Adaptation of Large Language Models". The model is frozen. Low-rank adapters for the four
matrices of each attention of its U-Net (self-attention and cross-attention) are trained with the noise and the target
of the model's training. --targets names other layers (convolutions too), --text-rank adds the text encoder. The result
is pytorch_lora_weights.safetensors, for diffusers, or with --style kohya for kohya's tools.
Command: keifu train lora-image --model runs/latent-diffusion --data openmoji --limit 50
Cost: printed before it starts, measured on the machine.
Expected: the validation loss falls, and the samples show each text without the LoRA and with it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from keifu import checkpoints
from keifu.checkpoints.lora import diffusion, peft
from keifu.data.images import dataset, splits
from keifu.data.images.grid import grid
from keifu.errors import UserError, shell
from keifu.inference.images.latent_diffusion import GUIDANCE, LatentDiffusionPipeline
from keifu.inference.images.pipeline import image_pipeline
from keifu.inference.images.pixel_diffusion import ImageRequest
from keifu.layers.diffusion.noise_schedule import Weighting
from keifu.layers.lora import LoraSettings, Target, attach
from keifu.processes import current
from keifu.ranges import BelowOne, Count, Finite, Natural, NotNegative, Seed, check
from keifu.recipes.images.clip import caption_tokens
from keifu.recipes.images.image_runs import TextToImageTask, picture_facts
from keifu.recipes.images.latent_diffusion import task_of
from keifu.recipes.options import Logging
from keifu.training.job import Job, Jobs
from keifu.training.settings import Precision, Settings

STEPS = 20  # DPM-Solver++ steps of a sample
SHOWN = 6  # number of texts in a sample


@dataclass(frozen=True)
class Recipe(Logging):
    """Options of the run."""

    model: str = "runs/latent-diffusion"
    """The model to adapt: a run of keifu train latent-diffusion, a pipeline's directory, a single file or a hub id."""
    data: str = "openmoji"
    """A catalogue name (openmoji), a folder with metadata.jsonl (file_name, text), a folder of pictures, or .tar."""
    limit: Count | None = None
    """Most pictures to train on, at even distances in the data."""
    languages: tuple[str, ...] = ()
    """Codes of the captions' languages; unset: the first that there is."""
    words: str = ""
    """Trigger words, put before every caption; the whole caption of pictures without one."""
    truncate: bool = False
    """Keep the beginning of a caption that is longer than the model takes; without it that is an error."""
    size: Count | None = None
    """The side of the squares in pixels; unset: what the model was trained with."""
    rank: Count = 8
    """Rank of the adapters of the U-Net."""
    alpha: Finite | None = None
    """The adapters' product is multiplied with alpha / rank; unset: as much as the rank."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Ends of the names of the U-Net's layers in diffusers, such as proj_in, ff.net.2 or conv1."""
    text_rank: Natural = 0
    """Rank of the adapters of the text encoder; 0: none."""
    text_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
    """Ends of the names of the text encoder's layers."""
    dora: bool = False
    """Learn the length of each row apart from its direction (Liu et al., 2024)."""
    style: Literal["peft", "diffusers", "kohya"] = "peft"
    """The spelling of the file: today's of diffusers, its older one, or that of kohya's tools."""
    weighting: Weighting = "simple"
    """How much each noise level counts in the loss."""
    caption_dropout: BelowOne = 0.0
    """Share of the captions that are dropped, for classifier-free guidance."""
    steps: Count = 500
    """Updates of the adapters."""
    batch_size: Count = 4
    """Pictures in a step."""
    learning_rate: NotNegative = 1e-4
    """Learning rate of AdamW, constant after a short warm-up."""
    prompts: tuple[str, ...] = ()
    """Prompts of the samples; unset: captions of held-out pictures."""
    guidance: Finite = GUIDANCE
    """Scale of the classifier-free guidance of the samples."""
    precision: Precision = "auto"
    """Precision of matrix products; auto: bfloat16 if the hardware supports it."""
    seed: Seed = 0
    """Random seed of the adapters, the order of the pictures, their noise and the samples."""

    def __post_init__(self) -> None:
        check(self)
        if self.dora and self.style == "diffusers":
            raise UserError("The older spelling of diffusers has no word for DoRA's lengths: --style peft or kohya.")


@dataclass(frozen=True, eq=False)
class LoraImageTask(TextToImageTask):
    """Task that is ready to train: a model with adapters. prompts: those of the samples."""

    prompts: tuple[str, ...]


def prepare(recipe: Recipe) -> LoraImageTask:
    """Load the model, encode the pictures and their captions, and add the adapters."""
    painter = open_pipeline(recipe.model)
    model: Any = painter.model
    parts = with_words(recipe, read(recipe, painter))
    languages = tuple(parts.train.captions)
    tokens = caption_tokens(painter.tokenizer, model.config.context_length, parts, languages, recipe.truncate)
    task = task_of(recipe, painter, parts, tokens)
    adapters = add_adapters(recipe, model)
    torch.manual_seed(recipe.seed)
    attach(model, adapters)
    sample_pictures = (parts.validation if len(parts.validation) else parts.train).distinct()
    spread = np.linspace(0, len(sample_pictures) - 1, min(SHOWN, len(sample_pictures))).astype(int)
    prompts = recipe.prompts or tuple(sample_pictures.subset(spread).texts())
    return LoraImageTask(**vars(task), prompts=prompts)


def open_pipeline(name: str) -> LatentDiffusionPipeline:
    """Return the pipeline of a latent diffusion model. Raises `UserError` for any other model."""
    model, tokenizer = checkpoints.load(name, torch.float32)
    pipeline = image_pipeline(model.eval(), lambda: tokenizer)
    if not isinstance(pipeline, LatentDiffusionPipeline) or pipeline.model.config.masked:
        raise UserError(f"{name} does not draw from a text alone by removing noise, and a LoRA here is for what does.")
    return pipeline


def read(recipe: Recipe, painter: LatentDiffusionPipeline) -> splits.ImageSplit:
    """Read the pictures at the model's size, and limit the training part."""
    model = painter.model
    sides = (recipe.size, recipe.size) if recipe.size else model.config.size
    if sides is None or sides[0] != sides[1]:
        raise UserError("The model does not name a square that it was trained with: give the pictures' --size.")
    model.check_size(*sides)
    pictures = dataset.read_images(recipe.data, sides[0], 3 if model.config.colours == 3 else 1)
    parts = splits.split(pictures)
    if not len(parts.train):  # a set that is held out whole, such as openmoji, is split here
        parts = splits.split(replace(pictures, parts=("",) * len(pictures)))
    if recipe.limit is not None:
        parts = replace(parts, train=parts.train.spread(recipe.limit))
    print(f"Learning from {len(parts.train):,} pictures of {recipe.data}; {len(parts.validation):,} are kept apart.")
    return parts


def with_words(recipe: Recipe, parts: splits.ImageSplit) -> splits.ImageSplit:
    """Return the parts with only the captions that are trained on, each after the trigger words."""

    def change(part: dataset.ImageDataset) -> dataset.ImageDataset:
        if not part.captions:
            if not recipe.words:
                raise UserError(f"The pictures of {recipe.data} have no captions: say what they show (--words).")
            return replace(part, captions={"und": (recipe.words,) * len(part)})
        languages = recipe.languages or tuple(part.captions)[:1]
        texts = {code: tuple(f"{recipe.words} {text}".strip() for text in part.texts(code)) for code in languages}
        return replace(part, captions=texts)

    return splits.ImageSplit(change(parts.train), change(parts.validation), change(parts.test))


def add_adapters(recipe: Recipe, model: nn.Module) -> dict[Target, LoraSettings]:
    """Add adapters to the model. Return the LoRA settings of each target."""
    matched = dict[Target, LoraSettings]()
    sides = {"unet": (recipe.rank, recipe.targets), "text_encoder": (recipe.text_rank, recipe.text_targets)}
    for part, (rank, targets) in sides.items():
        layer_of = {label: target for label, target in peft.layers(model).items() if label.partition(".")[0] == part}
        if rank:
            way = LoraSettings(rank, float(rank) if recipe.alpha is None else recipe.alpha, dora=recipe.dora)
            matched |= dict.fromkeys(peft.match_targets(layer_of, targets), way)
    return matched


def settings(recipe: Recipe) -> Settings:
    """Return the training settings."""
    often = max(1, recipe.steps // 10)
    return Settings(
        steps=recipe.steps, batch_size=recipe.batch_size, learning_rate=recipe.learning_rate, schedule="constant",
        warmup=min(50, recipe.steps // 10), weight_decay=0.01, betas=(0.9, 0.999), precision=recipe.precision,
        seed=recipe.seed, evaluate_every=often, sample_every=max(1, recipe.steps // 4), save_every=often,
        **recipe.logging(),
    )  # fmt: skip


def sampler(task: LoraImageTask, recipe: Recipe) -> Callable[[int], bytes]:
    """Return a function that draws the prompts with the same seeds at each call: in the upper row by the model, in the
    lower row with its LoRA."""
    request = ImageRequest(
        "dpm++-2m", STEPS, recipe.seed, size=task.parts.train.shape[1:], guidance=recipe.guidance, text=task.prompts[0],
        truncate=recipe.truncate,
    )  # fmt: skip
    request = task.painter.resolved(request)
    seeds = [recipe.seed + number for number in range(len(task.prompts))]
    before = open_pipeline(recipe.model).draw(request, seeds, texts=task.prompts)
    captions = [*task.prompts, *(f"{prompt} (LoRA)" for prompt in task.prompts)]

    def sample(step: int) -> bytes:
        pictures = task.painter.draw(request, seeds, texts=task.prompts)
        about = {
            "keifu": f"step {step}, sampler {request.sampler}, guidance {request.guidance:g}, seeds from {seeds[0]}"
        }
        return grid(torch.cat([before, pictures]), captions, len(seeds), about=about)

    return sample


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training of adapters, which keifu draw --lora and diffusers' load_lora_weights read."""
    task = prepare(recipe)
    option_names = (
        "model", "data", "languages", "words", "truncate", "rank", "alpha", "targets", "text_rank", "text_targets",
        "dora", "weighting", "caption_dropout",
    )  # fmt: skip
    facts = picture_facts(
        recipe, task.parts.train, option_names, {"size": task.parts.train.shape[1]},
        title=f"{Path(recipe.model).name} learns from “{Path(recipe.data).stem}” by a LoRA",
        about={"paper": "Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (2021)"},
    )  # fmt: skip
    summary = yield Job(
        model=task.model, objective=task.objective, data=task.data, settings=settings(recipe), facts=facts,
        sample=sampler(task, recipe) if current().is_replicated else None,  # a split model draws no samples
        save=lambda directory: diffusion.save_lora(task.model, directory / diffusion.FILE, recipe.style),
    )  # fmt: skip
    out = summary.directory
    print(f"The LoRA is in {out}: keifu draw {shell(recipe.model, task.prompts[0])} --lora {shell(out)} -o picture.png")
