"""GAN (Goodfellow et al., 2014) and DCGAN (Radford et al., 2015): a generator and a discriminator against each other.

Papers: "Generative Adversarial Nets"; fully connected networks, minibatch gradient descent, the discriminator and the
generator by turns. "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks"; Adam
at 2e-4 with β₁ 0.5, batches of 128, weights with deviation 0.02. Here both networks are updated at the same time, from
the gradients of one pass, and batches have 64 pictures. `--model.network mlp` is the GAN of 2014, and `--rate-shares
discriminator 0.1` lets the generator learn ten times as fast as the discriminator.
Command: keifu train gan --data mnist
Cost: 8 minutes on one core; the default model has 0.9 M parameters.
Expected: see docs/results.md, "A generator against a discriminator", for networks of a quarter of the width.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from keifu.data.images import augmentation, dataset, splits
from keifu.data.images.grid import grid
from keifu.devices import choose
from keifu.errors import UserError, shell
from keifu.inference.images.pixel_diffusion import ImageRequest
from keifu.inference.images.single_pass import GeneratorPipeline
from keifu.models.classic import gan
from keifu.ranges import BelowOne, Count, check
from keifu.recipes.images.image_runs import ImageTask, drawn_batches, picture_facts
from keifu.recipes.training_options import TrainingOptions
from keifu.training.job import Job, Jobs, parameters
from keifu.training.objectives.adversarial import adversarial_loss
from keifu.training.settings import Settings


@dataclass(frozen=True)
class Recipe:
    """Options of the run."""

    data: str = "mnist"
    """A catalogue name (mnist, fashion-mnist, emoji), a folder of pictures, or .tar shards."""
    model: gan.Config = gan.Config()
    """Both networks. Pictures are read with its size and channels."""
    flip: bool = False
    """Mirror every second picture."""
    held_out: BelowOne = 0.05
    """Share of the pictures for validation, and as many for testing."""
    samples: Count = 25
    """Pictures of a sample, of the same noise each time."""
    training: TrainingOptions = Settings(
        steps=3000, batch_size=64, learning_rate=2e-4, betas=(0.5, 0.999), schedule="constant", weight_decay=0.0,
        clip=0.0, precision="float32", evaluate_every=250, sample_every=250, save_every=500,
    )  # fmt: skip
    """Settings of the training. Batch normalisation sees the rows of a micro-batch; unset, that is the whole batch."""

    def __post_init__(self) -> None:
        check(self)
        if self.training.batch_size < 2 and self.model.norm == "batch":
            raise UserError(
                "Batch normalisation needs 2 pictures in a step: raise batch_size, or give --model.norm none."
            )


def prepare(recipe: Recipe) -> ImageTask:
    """Read the pictures, hold some out, and build the networks."""
    pictures = dataset.read_images(recipe.data, recipe.model.size, 1 if recipe.model.channels == 1 else 3)
    parts = splits.split(pictures, recipe.held_out)
    torch.manual_seed(recipe.training.seed)
    model = gan.build(recipe.model).to(choose())
    model.check_size(*pictures.shape)
    flipped = augmentation.Augmentation(flip=recipe.flip)
    data = drawn_batches(parts, recipe.training.batch_size, recipe.training.seed, flipped)
    return ImageTask(model, parts, data, adversarial_loss)


def sampler(model: gan.GAN, count: int) -> Callable[[int], bytes]:
    """Return a function that draws a square of pictures from the same noise at each call."""
    pipeline = GeneratorPipeline(model)
    request, seeds = pipeline.resolved(ImageRequest(seed=0)), range(count)

    def sample(step: int) -> bytes:
        return grid(pipeline.draw(request, seeds), about={"keifu": f"step {step}, seeds 0 to {count - 1}"})

    return sample


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu draw reads."""
    task = prepare(recipe)
    print(task.parts.train.sentence(), task.parts.sentence(), flush=True)
    settings = replace(recipe.training, micro_batch=recipe.training.micro_batch or recipe.training.batch_size)
    summary = yield Job(
        model=task.model, objective=task.objective, data=task.data, settings=settings,
        facts=picture_facts(
            recipe, task.parts.train, ("data", "flip"), {"model": asdict(recipe.model)},
            title=f"A GAN learns to draw “{Path(recipe.data).stem}”",
            about={
                "paper": "Radford, Metz and Chintala, Unsupervised Representation Learning with DCGANs (2015)",
                "parameters of the generator": parameters(task.model.generator),
                "parameters of the discriminator": parameters(task.model.discriminator),
            },
            held_out={"share": recipe.held_out},
        ),
        sample=sampler(task.model, recipe.samples),
    )  # fmt: skip
    print(f"The networks are in {summary.directory}: keifu draw {shell(summary.directory)} -o picture.png")
