"""unCLIP (Ramesh et al., 2022; DALL-E 2): pictures drawn from a text by way of CLIP's embedding of a picture.

Paper: "Hierarchical Text-Conditional Image Generation with CLIP Latents"; a prior of about 1 B parameters that predicts
the embedding itself, a decoder of 3.5 B with 10% of the embeddings and 50% of the texts left out, upsamplers of 700 M
and 300 M on crops, cosine schedules. Here all three at once, in one network each, on a CLIP of the same captions that
is trained first (or --clip RUN) and then frozen; the last step's upsampler is the other steps'.
Command: keifu train unclip --data emoji
Cost: 85 minutes of training by default, 18 of them for CLIP, and a few for samples; the steps are fixed before it
starts. What a stopped run lacks, --resume goes on with.
Expected: see docs/results.md.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from keifu import checkpoints
from keifu.data.grid import grid
from keifu.data.picture_batches import PictureBatches
from keifu.data.pictures import Pictures, Split, read_pictures, split
from keifu.data.tokenizers import Tokenizer
from keifu.devices import choose
from keifu.errors import UserError
from keifu.generation.by_embedding import EmbeddingPainter
from keifu.generation.pictures import Drawing
from keifu.generation.text_to_picture import text_tokens
from keifu.layers.noise_targets import Weighting
from keifu.models import clip, unclip
from keifu.recipes import _text_encoder
from keifu.recipes import clip as clip_recipe
from keifu.recipes._language import whom_to_thank
from keifu.recipes._options import Logging
from keifu.recipes._prompts import COLUMNS, PROMPTS, check_prompts
from keifu.recipes._stages import going_on, show, steps_for
from keifu.recipes._unclip_model import configured, embedded
from keifu.training.diffusion import WithDraws
from keifu.training.embedding_diffusion import (
    DecoderLoss,
    PriorLoss,
    UnclipLoss,
    UpsamplerLoss,
    WithEmbeddings,
    moments,
    real_tokens,
)
from keifu.training.loop import Summary, train
from keifu.training.protocols import Data, Run
from keifu.training.settings import Precision, Settings

STEPS = 25  # of a sample's pictures


@dataclass(frozen=True)
class Recipe(Logging):
    """Options of the run."""

    data: str = "emoji"
    """A catalogue name (emoji), a folder with metadata.jsonl (file_name, text, text_ja, ...), or .tar shards."""
    languages: tuple[str, ...] = ("en", "ja")
    """Codes of the captions to learn; each time one is drawn for a picture. und: of a set in one language."""
    truncate: bool = False
    """Keep the beginning of a caption that is longer than the text tower takes; without it that is an error."""
    clip: str | None = None
    """A CLIP (a run, a folder, a hub id) to draw by the embeddings of; without it one is trained first."""
    size: int = 64
    """The side of finished pictures in pixels."""
    small: int = 32
    """The side of what the decoder draws; where it is --size, nothing is enlarged."""
    crop: int = 32
    """The side of the squares on which the upsampler learns."""
    prior_layers: int = 4
    """Blocks of the prior."""
    prior_heads: int = 4
    """Heads of each."""
    head_dim: int = 48
    """Numbers of a head of the prior, which is as wide as all its heads."""
    widths: tuple[int, ...] = (32, 64, 128)
    """Channels of the decoder's levels, the finest first; each but the last halves the sides."""
    attention: tuple[int, ...] = (1, 2)
    """Levels of the decoder that look at the embedding, the text and each other, 0 the finest."""
    residual_blocks: int = 1
    """A level of the decoder, on the way down."""
    context_dim: int = 128
    """Numbers of each token that the decoder looks at."""
    upsampler_widths: tuple[int, ...] = (32, 64)
    """Channels of the upsampler's levels."""
    target: Literal["noise", "picture"] = "noise"
    """What decoder and upsampler predict; the prior predicts the embedding."""
    weighting: Weighting = "simple"
    """How much each noise level counts in the decoder's loss."""
    noise_steps: int = 1000
    """Noise levels, the paper's T."""
    prior_dropout: float = UnclipLoss.prior_dropout
    """The share of texts that the prior is not told, which guidance needs."""
    text_dropout: float = UnclipLoss.text_dropout
    """The share of texts that the decoder is not told."""
    image_dropout: float = UnclipLoss.image_dropout
    """The share of embeddings that it is not told."""
    minutes: float = 67.0
    """Train for so long: the steps are fixed by the pace before the start."""
    steps: int | None = None
    """Updates of the weights, in place of the minutes."""
    clip_minutes: float = 18.0
    """The same for CLIP."""
    clip_steps: int | None = None
    """Updates of CLIP's."""
    batch_size: int = 32
    """Pictures in a step."""
    clip_batch: int = 256
    """Pairs in a step of CLIP."""
    learning_rate: float = 1e-3
    """AdamW's highest rate."""
    ema: float = 0.999
    """Decay of the moving average that is measured, drawn with and saved."""
    prompts: tuple[str, ...] = PROMPTS
    """What the samples show."""
    guidance: float = 3.0
    """How far the samples are led from a prediction without text and embedding through that with them."""
    precision: Precision = "auto"
    """Of products; auto: bfloat16 where the hardware has it."""
    keep: int = 2
    """Saved states that are kept, a twentieth of the run apart, or 1,000 steps."""
    seed: int = 0
    """Of the weights, the order of the pictures, their noise and the samples."""

    def __post_init__(self) -> None:
        for name in ("prior_dropout", "text_dropout", "image_dropout"):
            if not 0 <= vars(self)[name] < 1:
                raise UserError(f"{name} is a share from 0 up to below 1, and it is {vars(self)[name]}.")
        check_prompts(self.prompts)
        if not self.crop <= self.size or not self.small <= self.size:
            raise UserError(f"--small {self.small} and --crop {self.crop} must fit into --size {self.size}.")


@dataclass(frozen=True, eq=False)
class Task:
    """Everything made ready: the whole model, what reads its texts, the data and the loss."""

    model: unclip.Unclip
    painter: EmbeddingPainter
    tokenizer: Tokenizer
    parts: Split
    data: Data
    objective: UnclipLoss


def prepare(recipe: Recipe, out: Path, resume: bool) -> Task:
    """Trains CLIP, or finds it, and builds the model around it. What cannot be is said before anything is trained."""
    parts = split(read_pictures(recipe.data, recipe.size, 3))
    if not recipe.clip:
        _check_sizes(recipe)
    print(parts.train.sentence(), parts.sentence(), flush=True)
    wanted = _text_encoder.Wanted(
        recipe.clip, recipe.data, recipe.languages, recipe.truncate, (recipe.clip_steps, recipe.clip_minutes),
        recipe.clip_batch, recipe.precision, recipe.seed, recipe.prompts,
    )  # fmt: skip
    towers, tokenizer = _text_encoder.two_towers_of(wanted, out, resume)
    torch.manual_seed(recipe.seed)
    model = unclip.build(configured(recipe, towers.config))
    for part, tower in ((model.text, towers.text), (model.image, towers.image)):
        part.load_state_dict(tower.state_dict())
        part.requires_grad_(False)
    if model.config.last_upsampler is not None:
        model.last_upsampler.requires_grad_(False)  # it becomes what the other one is
        model.upsampler.check_size(6, recipe.crop, recipe.crop)
    model.check_size(recipe.small, recipe.small)
    model.to(choose())
    tables = [embedded(towers, part) if len(part) else None for part in _seen(recipe, towers, parts)]
    assert tables[0] is not None
    with torch.no_grad():
        for own, found in zip((model.prior.mean, model.prior.std), moments(tables[0]), strict=True):
            own.copy_(found)
    data, objective = _data(recipe, parts, tokenizer, model, tables), _objective(recipe, model, tokenizer)
    return Task(model, EmbeddingPainter(model, tokenizer), tokenizer, parts, data, objective)


def _check_sizes(recipe: Recipe) -> None:
    """Refuses networks that do not fit the pictures or the CLIP that will be trained."""
    made = clip_recipe.Recipe()
    planned = clip.Config(made.text, made.image, clip.Pixels(made.image.image_size, made.image.image_size))
    with torch.device("meta"):
        model = unclip.build(configured(recipe, planned))
    if model.config.last_upsampler is not None:
        model.upsampler.check_size(6, recipe.crop, recipe.crop)
    model.check_size(recipe.small, recipe.small)


def _seen(recipe: Recipe, towers: clip.Clip, parts: Split) -> tuple[Pictures, Pictures]:
    """The pictures of two parts in the size that CLIP sees."""
    seen = split(read_pictures(recipe.data, towers.config.pixels.crop, 3))
    assert (seen.train.names, seen.validation.names) == (parts.train.names, parts.validation.names)
    return seen.train, seen.validation


def _data(
    recipe: Recipe, parts: Split, tokenizer: Tokenizer, model: unclip.Unclip, tables: list[Tensor | None]
) -> Data:
    """Batches with captions and embeddings."""
    length = model.config.context_length
    tokens = _text_encoder.caption_tokens(tokenizer, length, parts, recipe.languages, recipe.truncate)
    batches: Any = PictureBatches(parts.train, parts.validation, recipe.batch_size, recipe.seed, None, *tokens)
    training, held = tables
    assert training is not None
    return WithEmbeddings(WithDraws(batches, recipe.seed), _end(tokenizer), training, held)


def _end(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_id is None:
        raise UserError("The tokenizer of this CLIP has no end of a text, at which CLIP reads a caption.")
    return tokenizer.eos_id


def _objective(recipe: Recipe, model: unclip.Unclip, tokenizer: Tokenizer) -> UnclipLoss:
    config, side = model.config, (recipe.small, recipe.small)
    tokens, noise = text_tokens(tokenizer, [""], config.context_length), config.upsampling_noise
    empty = tokens, real_tokens(tokens, _end(tokenizer))
    return UnclipLoss(
        PriorLoss(config.prior_noise), DecoderLoss(config.decoder_noise, recipe.weighting),
        None if noise is None else UpsamplerLoss(noise), side, recipe.crop, empty, recipe.prior_dropout,
        recipe.text_dropout, recipe.image_dropout,
    )  # fmt: skip


def settings(recipe: Recipe, steps: int) -> Settings:
    """The training loop's settings for so many steps."""
    often = max(1, steps // 20)
    return Settings(
        steps=steps, minutes=None if recipe.steps else recipe.minutes,
        warmup=steps // 20, batch_size=recipe.batch_size, learning_rate=recipe.learning_rate,
        final_ratio=0.0, weight_decay=0.01, betas=(0.9, 0.99), ema=recipe.ema, precision=recipe.precision,
        evaluate_every=often, sample_every=2 * often, save_every=min(often, 1000), keep=recipe.keep,
        seed=recipe.seed, **recipe.logging(),
    )  # fmt: skip


def completed(model: unclip.Unclip) -> unclip.Unclip:
    """The model with the upsampler that it has learned for the last step too."""
    if model.config.last_upsampler is not None:
        model.last_upsampler.load_state_dict(model.upsampler.state_dict())
    return model


def sampler(task: Task, recipe: Recipe) -> Callable[[int], bytes]:
    """Draws the prompts, the same seeds at each call."""
    wanted = Drawing("ddim", min(STEPS, recipe.noise_steps), recipe.seed, guidance=recipe.guidance,
                     prior_guidance=recipe.guidance, text=recipe.prompts[0])  # fmt: skip
    wanted = task.painter.resolved(wanted)
    seeds = [recipe.seed + number for number in range(len(recipe.prompts))]

    def sample(step: int) -> bytes:
        completed(task.model)
        about = {"keifu": f"step {step}, sampler ddim, guidance {wanted.guidance:g}, seeds from {seeds[0]}"}
        return grid(task.painter.draw_texts(wanted, seeds, recipe.prompts), recipe.prompts, COLUMNS, about=about)

    return sample


def run(recipe: Recipe, out: Path, resume: bool) -> Summary:
    """Trains all parts into `out`, which keifu draw and diffusers' unCLIP parts read afterwards."""
    task = prepare(recipe, out, resume)
    budget, resume = (recipe.steps, recipe.minutes), going_on(out, resume)
    steps = steps_for(budget, out, resume, task.model, task.objective, task.data, settings(recipe, 1000))
    if not recipe.clip:
        show(out, {"CLIP": _text_encoder.FOLDER})
    summary = train(
        task.model, task.objective, task.data, settings(recipe, steps), described(recipe, task, out, resume),
        sample=sampler(task, recipe),
        save=lambda directory: checkpoints.save(completed(task.model), task.tokenizer, directory),
    )  # fmt: skip
    print(f'The model is in {out}: keifu draw {out} "{recipe.prompts[0]}" --guidance {recipe.guidance:g}')
    return summary


def described(recipe: Recipe, task: Task, out: Path, resume: bool) -> Run:
    """The run for the training loop: what decides its result beside the settings, and what its report says."""
    told = ("data", "languages", "truncate", "crop", "weighting", "prior_dropout", "text_dropout", "image_dropout")
    facts = {"source": recipe.data, "fingerprint": task.parts.train.fingerprint} | whom_to_thank(recipe.data)
    counted = {f"parameters of the {name}": sum(p.numel() for p in part.parameters())
               for name, part in task.model.named_children() if name != "last_upsampler"}  # fmt: skip
    about = {
        "title": f"unCLIP learns to draw “{Path(recipe.data).stem}” from text",
        "paper": "Ramesh et al., Hierarchical Text-Conditional Image Generation with CLIP Latents (2022)",
        "data": [facts],
    }
    options = {"model": asdict(task.model.config)} | {name: vars(recipe)[name] for name in told}
    return Run(out, resume, options=options, about=about | counted, unit="pictures")
