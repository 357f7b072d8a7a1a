"""The diffusion Transformer (Peebles and Xie, 2022) with flow matching (Lipman et al., 2022; Liu et al., 2022).

Papers: "Scalable Diffusion Models with Transformers": DiT-XL/2, 675 M parameters, in latents, the noise as target, Adam
at 1e-4, 7 M steps of 256 pictures; "Scaling Rectified Flow Transformers" (Esser et al., 2024): the flow as target, with
logit-normal times. Here: a Transformer of 2.5 M parameters over patches of 4 x 4 pixels, or of latents (--autoencoder),
the flow as target; --schedule linear --target noise is DiT's objective.
Command: keifu train dit --data mnist --classes
Cost: printed before it starts; the default is as many steps as fit in 9 minutes on the machine.
Expected: see docs/results.md, "Few steps by a flow".
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from keifu.errors import UserError
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.models.diffusion import autoencoder_kl, dit
from keifu.ranges import Count
from keifu.recipes.images import ddpm
from keifu.recipes.images.image_runs import ImageTask, image_settings
from keifu.recipes.starting import keeps_best, load_start
from keifu.training.job import Jobs

USUAL: dict[str, Any] = {
    "dropout": 0.0, "schedule": "flow", "batch_size": 32, "learning_rate": 1e-3, "ema": 0.999, "minutes": 9.0,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe(ddpm.PictureOptions):
    """Options of the run."""

    autoencoder: str | None = None
    """Autoencoder whose latents the model learns (the folder autoencoder of a latent-diffusion run, or one of
    diffusers'). Unset: the model learns pixels."""
    patch_size: Count | None = None
    """Side of a patch, in pixels or latents. Unset: 4 pixels or 2 latents."""
    n_layers: Count = 6
    """Transformer blocks."""
    n_heads: Count = 4
    """Heads of each attention."""
    head_dim: Count = 32
    """Numbers in a head; the width is the heads times it."""

    def resolved(self) -> "Recipe":
        """Return the recipe with defaults for unset options."""
        if self.autoencoder and (self.flip or self.dequantise):
            raise UserError("Latents are made once, of the pictures as they are: leave out --flip and --dequantise.")
        target = "flow" if self.schedule in (None, "flow") else "noise"
        shape = {"flip": False, "patch_size": 2} if self.autoencoder else {"patch_size": 4}
        return self.filled(USUAL | {"target": target} | shape)


def prepare(recipe: Recipe) -> ImageTask:
    """Read the pictures and build the model, in the latents of an autoencoder if there is one."""
    coder: Any = None
    if recipe.autoencoder:
        coder, _ = load_start(recipe.autoencoder, autoencoder_kl.Config, "--autoencoder")

    def build(channels: int, classes: tuple[str, ...]) -> dit.DiT:
        model = dit.build(model_config(recipe, coder.config if coder else None, channels, classes))
        model.autoencoder = coder
        return model

    return ddpm.prepare_task(recipe, dit.Config, build)


def model_config(
    recipe: Recipe, coder: autoencoder_kl.Config | None, channels: int, classes: tuple[str, ...]
) -> dit.Config:
    """Return the model's Config for pictures with this number of channels."""
    full: dict[str, Any] = vars(recipe)
    if coder is not None and coder.channels != channels:
        raise UserError(f"The autoencoder has pictures of {coder.channels} channels, not {channels}: set --channels.")
    factor, in_channels = (1, channels) if coder is None else (coder.factor, coder.latent_channels)
    shared_fields = {name: full[name] for name in ("patch_size", "n_layers", "n_heads", "head_dim", "dropout")}
    transformer = dit.TransformerConfig(
        full["size"] // factor, channels=in_channels, out_channels=None, n_classes=len(classes), **shared_fields
    )
    clip = 1.0 if coder is None else None
    noise = Noise(full["schedule"], recipe.noise_steps, target=full["target"], clip=clip)
    return dit.Config(transformer, coder and replace(coder, size=full["size"]), classes, noise)


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu draw reads; diffusers reads its folders."""
    recipe = recipe.resolved()
    settings = partial(image_settings, recipe, micro_batch=recipe.micro_batch, **keeps_best(recipe.start_from))
    paper = "Peebles and Xie, Scalable Diffusion Models with Transformers (2022)"
    job = ddpm.job_of(recipe, prepare(recipe), settings, ("autoencoder",), "A diffusion Transformer", paper)
    ddpm.show_folder((yield job))
