"""VQ-VAE (van den Oord et al., 2017): an autoencoder whose latents are codes, whole numbers of a learned codebook.

Paper: "Neural Discrete Representation Learning"; CIFAR-10: 8 x 8 codes for 32 x 32 pixels, 512 codes of 64 numbers,
commitment 0.25, Adam at 2e-4, batches of 128, 250,000 steps. The codes follow their gradient, or moving averages of the
vectors that they replace (appendix A.1), which is the default here, and unused codes are moved to random vectors of the
batch (Dhariwal et al., 2020). The networks are VQGAN's, smaller. VQGAN's discriminator and perceptual loss, and a prior
that draws codes, are not part of this recipe.
Command: keifu train vq --data emoji
Cost: some 10 minutes on one core; the default model has 1.0 M parameters.
Expected: see docs/results.md, "Codes in use", for smaller networks and digits.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from keifu import checkpoints
from keifu.data.images import augmentation, dataset, splits
from keifu.devices import choose
from keifu.errors import UserError
from keifu.models.diffusion import vq_vae
from keifu.processes import current
from keifu.ranges import BelowOne, NotNegative, check
from keifu.recipes.images.image_runs import ImageTask, before_and_after, drawn_batches, picture_facts
from keifu.recipes.training_options import TrainingOptions
from keifu.training.job import Job, Jobs, parameters
from keifu.training.objectives.autoencoders import VQLoss
from keifu.training.settings import Settings


@dataclass(frozen=True)
class Recipe:
    """Options of the run."""

    data: str = "emoji"
    """A catalogue name (emoji, mnist, fashion-mnist), a folder of pictures, or .tar shards."""
    model: vq_vae.Config = vq_vae.Config(
        size=32, latent_channels=16, widths=(32, 64, 64), n_residual_blocks=1, codebook_size=512, norm_groups=16,
        scale=1.0,
    )  # fmt: skip
    """The network. Pictures are read with its size and channels."""
    codebook: Literal["average", "gradient"] = "average"
    """How codes learn: as moving averages of the vectors that they replace, or by the gradient of their distance."""
    decay: BelowOne = 0.99
    """Decay of the moving averages."""
    least_usage: NotNegative = 0.1
    """Vectors per step, on a moving average, below which a code of --codebook average is moved to a random vector of
    the batch; 0: none is moved."""
    commitment: NotNegative = 0.25
    """Weight of the distance that keeps the encoder's vectors near their codes."""
    flip: bool = False
    """Mirror every second picture."""
    held_out: BelowOne = 0.05
    """Share of the pictures for validation, and as many for testing."""
    training: TrainingOptions = Settings(
        steps=2000, batch_size=16, learning_rate=1e-3, warmup=50, final_ratio=0.0, weight_decay=0.0, betas=(0.9, 0.99),
        evaluate_every=200, sample_every=200, save_every=500,
    )  # fmt: skip
    """Settings of the training."""

    def __post_init__(self) -> None:
        check(self)


def prepare(recipe: Recipe) -> ImageTask:
    """Read the pictures, hold some out, and build the network."""
    size = recipe.model.size
    if not isinstance(size, int):
        raise UserError("model.size has two sides, and pictures are read as squares: give one number.")
    pictures = dataset.read_images(recipe.data, size, 1 if recipe.model.channels == 1 else 3)
    parts = splits.split(pictures, recipe.held_out)
    torch.manual_seed(recipe.training.seed)
    model = vq_vae.build(recipe.model)
    if recipe.codebook == "average":
        model.codebook = vq_vae.AveragedCodebook(model.codebook.weight, recipe.decay, recipe.least_usage)
    flipped = augmentation.Augmentation(flip=recipe.flip)
    data = drawn_batches(parts, recipe.training.batch_size, recipe.training.seed, flipped)
    return ImageTask(model.to(choose()), parts, data, VQLoss(recipe.commitment))


def save(model: vq_vae.VQVAE, directory: Path) -> None:
    """Write the model as a VQModel of diffusers, without the averages of the training."""
    plain = vq_vae.build(model.config)
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name != "codebook.usage"})
    checkpoints.save(plain, None, directory)


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu.load and diffusers' VQModel read."""
    if recipe.codebook == "average" and current().world_size > 1:
        raise UserError("Moving averages of codes need one process: give --codebook gradient instead.")
    task = prepare(recipe)
    print(task.parts.train.sentence(), task.parts.sentence(), flush=True)
    settings = recipe.training
    if recipe.codebook == "average":  # an average is updated once in a step
        settings = replace(settings, micro_batch=settings.micro_batch or settings.batch_size)
    yield Job(
        model=task.model, objective=task.objective, data=task.data, settings=settings,
        facts=picture_facts(
            recipe, task.parts.train, ("data", "flip", "codebook", "decay", "least_usage", "commitment"),
            {"model": asdict(recipe.model)}, title=f"A VQ-VAE learns codes for “{Path(recipe.data).stem}”",
            about={
                "parameters": parameters(task.model),
                "paper": "van den Oord, Vinyals and Kavukcuoglu, Neural Discrete Representation Learning (2017)",
            },
            held_out={"share": recipe.held_out},
        ),
        sample=before_and_after(task.model, task.parts), save=partial(save, task.model),
    )  # fmt: skip
