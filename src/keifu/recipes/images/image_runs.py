"""Shared code of the image recipes: options and settings, and jobs of runs that train several models one after
another, each as a stage.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from keifu import checkpoints
from keifu.checkpoints.loading import load_model
from keifu.data.images import batches, dataset, io, splits
from keifu.data.images.grid import grid
from keifu.errors import UserError
from keifu.inference.images.pipeline import TextToImagePipeline
from keifu.inference.images.pixel_diffusion import ImageRequest
from keifu.ranges import BelowOne, Count, NotNegative, Positive, Seed, check
from keifu.recipes.options import Logging, value_or
from keifu.training.job import Budget, Job, JobStage, PlannedSettings, RunFacts, parameters
from keifu.training.objectives.diffusion import add_draws
from keifu.training.protocols import Data
from keifu.training.settings import Precision, Settings

SHOWN, BATCH = 12, 64  # pictures of a sample, and pictures that are encoded at once
PROMPTS = (
    "red heart", "cat face", "green book", "full moon face", "blue apple", "red cat face",
    "赤いハート", "ネコの顔", "緑の本", "ヒマワリ", "青いリンゴ", "緑のハート",
)  # fmt: skip
COLUMNS = 6  # pictures in a row
# other models of a run, each in a folder of its own
AUTOENCODER, DISCRETE = JobStage("autoencoder", "Autoencoder"), JobStage("dvae", "Autoencoder")
CLIP = JobStage("clip", "CLIP")


@dataclass(frozen=True, kw_only=True)
class TextToImageOptions(Logging):
    """Options of the recipes that learn to draw from captions, on a CLIP of the same captions."""

    data: str = field(default="emoji", kw_only=False)
    """A catalogue name (emoji), a folder with metadata.jsonl (file_name, text, text_ja, ...), or .tar shards."""
    languages: tuple[str, ...] = field(default=("en", "ja"), kw_only=False)
    """Codes of the captions' languages; each step samples one for a picture. und: captions of one, unnamed language."""
    truncate: bool = False
    """Keep the beginning of a caption that is longer than CLIP takes; without it that is an error."""
    size: Count = 64
    """The side of the finished pictures in pixels."""
    clip: str | None = None
    """A CLIP (a run, a folder, a hub id); unset: one is trained first on the same pictures and captions."""
    clip_minutes: Positive = 2.0
    """Time limit of CLIP's training: the number of steps follows from the speed of the machine."""
    clip_steps: Count | None = None
    """Updates of CLIP's weights, instead of its minutes."""
    clip_batch: Count = 256
    """Pairs in a step of CLIP."""
    minutes: Positive = field(default=4.5, kw_only=True)
    """Time limit of the training of the model itself."""
    steps: Count | None = None
    """Updates of its weights, instead of the minutes."""
    batch_size: Count = 32
    """Pictures in a step of it."""
    learning_rate: NotNegative | None = 1e-3
    """Highest learning rate of AdamW for it."""
    ema: BelowOne = 0.999
    """Decay of the moving average of its weights, which is evaluated, sampled from and saved."""
    prompts: tuple[str, ...] = PROMPTS
    """Prompts of the samples."""
    precision: Precision = "auto"
    """Precision of matrix products; auto: bfloat16 if the hardware supports it."""
    keep: Count = 2
    """Saved states that are kept, a twentieth of the run apart, or 1,000 steps."""
    seed: Seed = 0
    """Random seed of the weights, the order of the pictures, their noise and the samples."""

    def __post_init__(self) -> None:
        check(self)
        if not self.prompts:
            raise UserError("There is no prompt for the samples: give at least one.")

    @property
    def budget(self) -> Budget:
        """Budget of the main model."""
        return Budget(self.steps, self.minutes)


@dataclass(frozen=True, eq=False)
class ImageTask:
    """Task that is ready to train: the whole model, the pictures in three parts, their batches and the loss."""

    model: Any
    parts: splits.ImageSplit
    data: Data
    objective: Any


@dataclass(frozen=True, eq=False)
class TextToImageTask(ImageTask):
    """Task of a model that draws from texts, with its drawing pipeline."""

    painter: TextToImagePipeline

    def job(
        self, recipe: TextToImageOptions, request: ImageRequest, *, title: str, paper: str, option_names: Sequence[str],
        parts: Mapping[str, nn.Module | None], before: Callable[[], object] = lambda: None, **different: Any,
    ) -> Job:  # fmt: skip
        """Return the training of the main model, after the others.

        request: settings for drawing the prompts, with the same seeds in each sample. title: name of the model. named:
        options of the recipe that affect the result, in addition to data and settings. parts: networks whose parameters
        are counted. before: called before a sample is drawn or the model is saved. different: see `image_settings`.
        """
        counts = {f"parameters of the {name}": parameters(part) for name, part in parts.items() if part is not None}
        request = self.painter.resolved(replace(request, truncate=recipe.truncate))
        seeds = [recipe.seed + number for number in range(len(recipe.prompts))]

        def sample(step: int) -> bytes:
            before()
            way = f"sampler {request.sampler}, guidance {request.guidance:g}, seeds from {seeds[0]}"
            pictures = self.painter.draw(request, seeds, texts=recipe.prompts)
            return grid(pictures, recipe.prompts, COLUMNS, about={"keifu": f"step {step}, {way}"})

        def save(directory: Path) -> None:
            before()
            checkpoints.save(self.model, self.painter.tokenizer, directory)

        facts = picture_facts(
            recipe, self.parts.train, ("data", "languages", "truncate", *option_names),
            {"model": asdict(self.model.config)},
            title=f"{title} learns to draw “{Path(recipe.data).stem}” from text", about={"paper": paper, **counts},
            held_out={"whole_families": self.parts.whole_families},
        )  # fmt: skip
        return Job(
            model=self.model, objective=self.objective, data=self.data, tokenizer=self.painter.tokenizer, facts=facts,
            settings=PlannedSettings(recipe.budget, partial(image_settings, recipe, **different)), sample=sample,
            save=save,
        )  # fmt: skip


def read_captioned(
    recipe: TextToImageOptions, channels: Literal[1, 3] | None = None, whole_families: bool = True
) -> splits.ImageSplit:
    """Read the pictures at the recipe's size, split them, and print their number."""
    pictures = dataset.read_images(recipe.data, recipe.size, channels)
    parts = splits.split(pictures, whole_families=whole_families)
    print(parts.train.sentence(), parts.sentence(), flush=True)
    return parts


def drawn_batches(parts: splits.ImageSplit, batch_size: int, seed: int, *arguments: Any, **keywords: Any) -> Data:
    """Return batches of the pictures with the random draws of diffusion. Further arguments are those of
    `ImageBatches`."""
    pictures: Any = batches.ImageBatches(parts.train, parts.validation, batch_size, seed, *arguments, **keywords)
    return add_draws(pictures, seed)


Made = TypeVar("Made")


def of_both(parts: splits.ImageSplit, make: Callable[[dataset.ImageDataset], Made]) -> tuple[Made, Made | None]:
    """Apply `make` to the training pictures, and to the validation pictures if there are any."""
    return make(parts.train), make(parts.validation) if len(parts.validation) else None


def image_settings(recipe: Any, steps: int, **different: Any) -> Settings:
    """Return settings: AdamW with warm-up over a twentieth of the steps, cosine to 0, and 20 validations.

    A sample takes as long as several steps, so at least 50 steps are between two. different: fields of `Settings` with
    other values.
    """
    often = max(1, steps // 20)
    default = {
        "warmup": steps // 20, "final_ratio": 0.0, "weight_decay": 0.01, "betas": (0.9, 0.99), "evaluate_every": often,
        "sample_every": max(50, 2 * often), "save_every": min(often, 1000),
    }  # fmt: skip
    options = {
        "batch_size": recipe.batch_size, "learning_rate": value_or(recipe.learning_rate, Settings.learning_rate),
        "ema": recipe.ema, "precision": recipe.precision, "keep": recipe.keep, "seed": recipe.seed,
    }  # fmt: skip
    logging = recipe.logging() | {"minutes": recipe.budget.limit}
    return Settings(steps=steps, **options, **logging, **default | different)


def picture_facts(
    recipe: Any, pictures: dataset.ImageDataset, option_names: Sequence[str], options: Mapping[str, Any], *, title: str,
    about: Mapping[str, Any], held_out: Mapping[str, Any] = {},
) -> RunFacts:  # fmt: skip
    """Return the facts of a run on pictures.

    option_names: options of the recipe that affect the result, in addition to the settings. options: further values
    that affect it, such as the model's Config. held_out: how the pictures were split, if not by default.
    """
    return RunFacts(
        title=title,
        about={**about, "held_out": {**splits.WHOLE_FAMILIES, **held_out}},
        data={"source": recipe.data, "pictures": len(pictures), "fingerprint": pictures.fingerprint},
        options={**options, **{name: vars(recipe)[name] for name in option_names}},
        unit="pictures",
    )


def part_settings(recipe: Any, steps: int, **different: Any) -> Settings:
    """Return the settings of a model that is trained before the main one: warm-up over a twentieth of the steps, and
    validations, samples and checkpoints a tenth of them apart. different: fields of `Settings` with other values."""
    every = dict.fromkeys(("evaluate_every", "sample_every", "save_every"), max(1, steps // 10))
    return Settings(steps=steps, warmup=steps // 20, seed=recipe.seed, precision=recipe.precision, **every, **different)


def part_facts(parts: splits.ImageSplit, model: Any, options: Mapping[str, Any], title: str, paper: str) -> RunFacts:
    """Return the facts of a model that is trained on pictures alone before the main one. options: values that affect
    the result, in addition to the model's Config and the settings."""
    return RunFacts(
        title=title,
        about={"parameters": parameters(model), "paper": paper},
        data={"source": parts.train.source, "fingerprint": parts.train.fingerprint},
        options={"model": vars(model.config), **options},
        unit="pictures",
    )


def load_frozen(directory: Path) -> Any:
    """Return the model of a folder, frozen."""
    return load_model(directory, torch.float32).requires_grad_(False).eval()


@torch.no_grad()
def encode_pictures(model: nn.Module, encode: Callable[[Tensor], Tensor], pictures: dataset.ImageDataset) -> Tensor:
    """Encode pictures by a network, in batches."""
    device = next(model.parameters()).device
    return torch.cat([encode(pixels.to(device)).cpu() for pixels in pictures.batches(BATCH)])


def before_and_after(model: nn.Module, parts: splits.ImageSplit) -> Callable[[int], bytes]:
    """Return a function that draws held-out pictures, if there are any, above their reconstructions."""
    part = parts.validation if len(parts.validation) else parts.train
    some = part.take(slice(0, SHOWN))

    def sample(step: int) -> bytes:
        with torch.inference_mode():
            again = io.to_bytes(model(io.to_signed(some.to(next(model.parameters()).device)))).cpu()
        return grid(torch.cat([some, again]), columns=len(some), about={"keifu": f"step {step}"})

    return sample
