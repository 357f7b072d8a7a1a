"""Shared code of the image recipes: options and settings, and runs that train several models one after another.

Each model of such a run has a directory inside the run's. A finished model is loaded, and an unfinished one is resumed,
so the whole run resumes bit for bit. One report shows all models.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from keifu import checkpoints
from keifu.checkpoints.loading import load_model
from keifu.data.images import augmentation, batches, dataset, io, splits
from keifu.data.images.grid import grid
from keifu.devices import choose
from keifu.errors import UserError
from keifu.files import write_atomic
from keifu.inference.images.pipeline import TextToImagePipeline
from keifu.inference.images.pixel_diffusion import ImageRequest
from keifu.ranges import BelowOne, Count, NotNegative, Positive, Seed, check
from keifu.recipes import runs
from keifu.recipes.runs import Data, Logging, Objective, Summary, is_resuming, train_run
from keifu.training.job import Budget, parameters
from keifu.training.objectives.diffusion import add_draws
from keifu.training.run import metrics
from keifu.training.run.report import CURVES
from keifu.training.run.run_directory import SAMPLES
from keifu.training.settings import Precision, Settings

SHOWN, BATCH = 12, 64  # pictures of a sample, and pictures that are encoded at once
PROMPTS = (
    "red heart", "cat face", "green book", "full moon face", "blue apple", "red cat face",
    "赤いハート", "ネコの顔", "緑の本", "ヒマワリ", "青いリンゴ", "緑のハート",
)  # fmt: skip
COLUMNS = 6  # pictures in a row
AUTOENCODER, DISCRETE, CLIP = "autoencoder", "dvae", "clip"  # folders of other models in the run's folder
PARTS = {AUTOENCODER: "Autoencoder", DISCRETE: "Autoencoder", CLIP: "CLIP"}


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

    def learn(
        self, recipe: TextToImageOptions, out: Path, resume: bool, request: ImageRequest, *, title: str, paper: str,
        named: Sequence[str], parts: Mapping[str, nn.Module | None], before: Callable[[], object] = lambda: None,
        **different: Any,
    ) -> Summary:  # fmt: skip
        """Train the main model after the others. The report shows the curves of all.

        request: settings for drawing the prompts, with the same seeds in each sample. title: name of the model. named:
        options of the recipe that affect the result, in addition to data and settings. parts: networks whose parameters
        are counted. before: called before a sample is drawn or the model is saved. different: see `image_settings`.
        """
        resume, training = is_resuming(out, resume), (self.model, self.objective, self.data)
        settings = runs.fit(recipe.budget, out, resume, *training, partial(image_settings, recipe, **different))
        show(out)
        counts = {f"parameters of the {name}": parameters(part) for name, part in parts.items() if part is not None}
        wanted = self.painter.resolved(replace(request, truncate=recipe.truncate))
        seeds = [recipe.seed + number for number in range(len(recipe.prompts))]
        named = ("data", "languages", "truncate", *named)
        options = {"model": asdict(self.model.config)}
        whole = self.parts.whole_families
        run: dict[str, Any] = counts | describe(recipe, self.parts.train, named, options, whole_families=whole)

        def sample(step: int) -> bytes:
            before()
            how = f"sampler {wanted.sampler}, guidance {wanted.guidance:g}, seeds from {seeds[0]}"
            drawn = self.painter.draw(wanted, seeds, texts=recipe.prompts)
            return grid(drawn, recipe.prompts, COLUMNS, about={"keifu": f"step {step}, {how}"})

        def save(directory: Path) -> None:
            before()
            checkpoints.save(self.model, self.painter.tokenizer, directory)

        return train_run(
            out, resume, *training, settings, sample=sample, save=save, paper=paper,
            title=f"{title} learns to draw “{Path(recipe.data).stem}” from text", **run,
        )  # fmt: skip


def read_captioned(
    recipe: TextToImageOptions, channels: Literal[1, 3] | None = None, whole_families: bool = True
) -> splits.ImageSplit:
    """Read the pictures at the recipe's size, split them, and print their number."""
    pictures = dataset.read_images(recipe.data, recipe.size, channels)
    parts = splits.split(pictures, whole_families=whole_families)
    print(parts.train.sentence(), parts.sentence(), flush=True)
    return parts


def drawn_batches(parts: splits.ImageSplit, batch_size: int, seed: int, *given: Any, **more: Any) -> Data:
    """Return batches of the pictures with the random draws of diffusion. Further arguments are those of
    `ImageBatches`."""
    pictures: Any = batches.ImageBatches(parts.train, parts.validation, batch_size, seed, *given, **more)
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
    usual = {"steps": steps, "minutes": recipe.budget.limit, "warmup": steps // 20, "final_ratio": 0.0}
    usual |= {"weight_decay": 0.01, "betas": (0.9, 0.99), "evaluate_every": often, "sample_every": max(50, 2 * often)}
    return Settings(**recipe.loop(**usual | {"save_every": min(often, 1000)} | different))


def describe(
    recipe: Any, pictures: dataset.ImageDataset, named: Sequence[str], options: Mapping[str, Any], **held_out: Any
) -> dict[str, Any]:
    """Return the facts that `train_run` records of a run on pictures.

    named: options of the recipe that affect the result, in addition to the settings. options: further values that
    affect it, such as the model's Config. held_out: how the pictures were split, if not by default.
    """
    facts = {"source": recipe.data, "pictures": len(pictures), "fingerprint": pictures.fingerprint}
    chosen = {**options, **{name: vars(recipe)[name] for name in named}}
    return {"facts": facts, "options": chosen, "unit": "pictures", "held_out": splits.WHOLE_FAMILIES | held_out}


def train_part(
    recipe: Any, directory: Path, resume: bool, build: Callable[[], Any], objective: Objective,
    parts: splits.ImageSplit, budget: Budget, *, title: str, paper: str, options: Mapping[str, Any], batch_size: int,
    of_steps: Callable[[Data, int], Data] = lambda data, steps: data, **different: Any,
) -> Any:  # fmt: skip
    """Train a model on pictures alone into a folder of the run, and freeze it.

    The recipe may flip every second picture. Validations, samples and checkpoints are a tenth of its steps apart.
    options: values that affect the result, in addition to the model's Config and the settings. of_steps: converts the
    data for a run of that many steps. different: fields of `Settings` with other values.
    """
    torch.manual_seed(recipe.seed)
    model = build().to(choose())
    model.check_size(*parts.train.shape[1:])
    resume = is_resuming(directory, resume)
    data = drawn_batches(parts, batch_size, recipe.seed, augmentation.Augmentation(flip=recipe.flip))

    def settings(steps: int) -> Settings:
        every = dict.fromkeys(("evaluate_every", "sample_every", "save_every"), max(1, steps // 10))
        usual = {"steps": steps, "warmup": steps // 20, "batch_size": batch_size, **every}
        return Settings(**usual, seed=recipe.seed, precision=recipe.precision, **different)

    chosen = runs.fit(budget, directory, resume, model, objective, of_steps(data, 1000), settings)
    train_run(
        directory, resume, model, objective, of_steps(data, chosen.steps), chosen, title=title,
        parameters=parameters(model), paper=paper, unit="pictures",
        facts={"source": parts.train.source, "fingerprint": parts.train.fingerprint},
        options={"model": vars(model.config), **options}, sample=before_and_after(model, parts),
    )  # fmt: skip
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


def show(out: Path) -> None:
    """Add the curves and the last pictures of finished models to the report of the next run."""
    charts = []
    for name, directory in ((name, out / folder) for folder, name in PARTS.items() if (out / folder).exists()):
        lines = metrics.last_metrics(metrics.read(directory))
        points = {
            label: [[float(line["step"]), float(line[field])] for line in lines if field in line]
            for label, field in (("training", "loss"), ("validation", "validation_loss"))
        }
        curves = [{"name": k, "points": v, "marked": k == "validation"} for k, v in points.items()]
        charts.append({"title": f"{name}: loss", "y_label": "loss", "curves": curves})
        if pictures := sorted((directory / SAMPLES).glob("*.png")):
            write_atomic(out / f"{directory.name}.png", pictures[-1].read_bytes())
    write_atomic(out / CURVES, json.dumps(charts) + "\n")
