"""MeanFlow (Geng et al., 2025): pictures in one step, by a network of the mean velocity between two times.

Paper: "Mean Flows for One-step Generative Modeling"; DiT-XL/2 in latents of ImageNet, Adam at 1e-4, a quarter of the
pictures with two different times, whose logits are normal with mean -0.4, loss divided by itself. Here: a Transformer
of 1.9 M parameters over patches of 4 x 4 pixels, AdamW at 1e-3, and no guidance in the target. --moving 0 is flow
matching, the baseline: it knows the velocity alone and needs many steps.
Command: keifu train mean-flow --data mnist --classes
Cost: 10 minutes on two cores.
Expected: no table of results exists for this recipe yet; the samples show how readable one step is.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from keifu.data.images import augmentation, dataset, splits
from keifu.data.images.grid import grid
from keifu.devices import choose
from keifu.errors import UserError, shell
from keifu.inference.images.flow_map import FlowMapPipeline
from keifu.inference.images.pixel_diffusion import ImageRequest
from keifu.models.diffusion import mean_flow
from keifu.ranges import BelowOne, Count, NotNegative, Share, check
from keifu.recipes.images.image_runs import ImageTask, drawn_batches, picture_facts
from keifu.recipes.training_options import TrainingOptions
from keifu.training.job import Job, Jobs, parameters
from keifu.training.objectives.mean_flow import MeanFlowLoss
from keifu.training.settings import Settings

COLUMNS, DRAWN = 10, 20  # pictures in a row of a sample, and in a sample


@dataclass(frozen=True)
class Recipe:
    """Options of the run."""

    data: str = "mnist"
    """A catalogue name (mnist, fashion-mnist, emoji), a folder of pictures, a folder per class, or .tar shards."""
    size: Count = 28
    """The side of the squares in pixels."""
    patch_size: Count = 4
    """Side of a patch in pixels."""
    n_layers: Count = 6
    """Transformer blocks."""
    n_heads: Count = 4
    """Heads of each attention."""
    head_dim: Count = 32
    """Numbers in a head; the width is the heads times it."""
    classes: bool = False
    """Condition the model on the class of a picture."""
    moving: Share | int = 0.25
    """Share of the pictures with two different times; 0 is flow matching."""
    power: NotNegative = 1.0
    """Exponent of the squared error by which the loss is divided; 0 is the plain squared error."""
    jumps: Count = 1
    """Steps from noise to a picture of a sample."""
    flip: bool = False
    """Mirror every second picture."""
    held_out: BelowOne = 0.05
    """Share of the pictures for validation, and as many for testing."""
    training: TrainingOptions = Settings(
        steps=3000, batch_size=32, learning_rate=1e-3, warmup=150, betas=(0.9, 0.95), weight_decay=0.0, ema=0.999,
        precision="float32", evaluate_every=500, sample_every=500, save_every=500,
    )  # fmt: skip
    """Settings of the training."""

    def __post_init__(self) -> None:
        check(self)
        _ = self.config(1, ())  # raises its error early

    def config(self, channels: int, classes: tuple[str, ...]) -> mean_flow.Config:
        """Return the model's Config for pictures with this number of channels and these classes."""
        return mean_flow.Config(
            self.size, self.patch_size, channels, self.n_heads, self.head_dim, self.n_layers, len(classes), classes
        )


def prepare(recipe: Recipe) -> ImageTask:
    """Read the pictures, hold some out, and build the network."""
    pictures = dataset.read_images(recipe.data, recipe.size)
    if recipe.classes and not pictures.classes:
        raise UserError(f"--classes needs labels, and the pictures of {recipe.data} have none: sort them into folders.")
    parts = splits.split(pictures, recipe.held_out)
    torch.manual_seed(recipe.training.seed)
    config = recipe.config(pictures.shape[0], tuple(pictures.classes) if recipe.classes else ())
    flipped = augmentation.Augmentation(flip=recipe.flip)
    data = drawn_batches(parts, recipe.training.batch_size, recipe.training.seed, flipped)
    return ImageTask(mean_flow.build(config).to(choose()), parts, data, MeanFlowLoss(recipe.moving, recipe.power))


def sampler(model: mean_flow.MeanFlow, jumps: int) -> Callable[[int], bytes]:
    """Return a function that draws a sample from the same noise at each call; with classes, a column for each of the
    first ones."""
    pipeline = FlowMapPipeline(model)
    columns = min(COLUMNS, model.config.n_classes) or COLUMNS
    labels = range(columns) if model.config.n_classes else [None]
    seeds = range(DRAWN // len(labels))

    def sample(step: int) -> bytes:
        requests = [pipeline.resolved(ImageRequest(seed=0, steps=jumps, label=label)) for label in labels]
        pictures = torch.stack([pipeline.draw(request, seeds) for request in requests], 1).flatten(0, 1)
        about = {"keifu": f"step {step}, jumps {jumps}, seeds 0 to {seeds[-1]}"}
        return grid(pictures, columns=columns, about=about)

    return sample


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu draw reads."""
    task = prepare(recipe)
    print(task.parts.train.sentence(), task.parts.sentence(), flush=True)
    summary = yield Job(
        model=task.model, objective=task.objective, data=task.data, settings=recipe.training,
        facts=picture_facts(
            recipe, task.parts.train, ("data", "flip", "moving", "power"), {"model": asdict(task.model.config)},
            title=f"MeanFlow learns to draw “{Path(recipe.data).stem}”",
            about={
                "paper": "Geng, Deng, Bai, Kolter and He, Mean Flows for One-step Generative Modeling (2025)",
                "parameters": parameters(task.model),
            },
            held_out={"share": recipe.held_out},
        ),
        sample=sampler(task.model, recipe.jumps),
    )  # fmt: skip
    print(f"The network is in {summary.directory}: keifu draw {shell(summary.directory)} -o picture.png")
