"""Pixel diffusion: settings of an image request, sampling of images in one call or step by step, and picture strips of
noise being added or removed.

A seed belongs to an image. With the same settings and seed the image is the same alone or in a batch, up to rounding of
matrix multiplications over several images. Its noise comes from `torch.Generator().manual_seed(seed)` on the CPU, in
the order of the calls, for any device. diffusers' generators give the same noise. Axes: batch, channels, height,
width.
"""

import hashlib
import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from keifu.data.images.io import to_bytes, to_signed
from keifu.errors import UserError, unknown
from keifu.inference.images.denoiser import label_denoiser
from keifu.inference.images.image_to_image import InputImage, KeptRegion, add_initial_noise, run_inpainting
from keifu.inference.images.samplers import ConfiguredSampler, SamplerStep, Watch, configure_sampler, last_x, sampler
from keifu.inference.images.tiled_vae import NO_TILES
from keifu.layers.diffusion.image_model import ImageModel
from keifu.layers.diffusion.noise_schedule import Noise, Spacing
from keifu.layers.diffusion.sampling_schedule import Schedule
from keifu.layers.unet.prepacked_conv import prepack
from keifu.ranges import Count, PositiveShare, Seed, Share, check

Bytes: TypeAlias = UInt8[Tensor, "batch colours rows columns"]


class SeededNoise:
    """Standard normal noise in the shape of x. Each row has a separate generator."""

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def __call__(self, x: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
        """Return noise for each row of x, in its dtype and on its device."""
        rows = [torch.randn(x.shape[1:], generator=random, dtype=x.dtype, device="cpu") for random in self.generators]
        return torch.stack(rows).to(x.device)


BY_TOKEN, AT_ONCE, BY_JUMPS = "token by token", "in one pass", "by jumps"  # ways to draw without a sampler
STRENGTH = 0.8
OF_EMBEDDINGS = ("prior_steps", "prior_guidance", "candidates", "upsampling_steps", "towards")


@dataclass(frozen=True)
class ImageRequest:
    """Settings of an image.

    Attributes:
        sampler: a name in `SAMPLERS`, or `BY_TOKEN` for an autoregressive model, `AT_ONCE` for a generator,
            `BY_JUMPS` for a flow map.
        steps: number of steps; None for the sampler's default.
        seed: the same seed gives the same image; None chooses one at random.
        label: number of the class to condition on; None for unconditional sampling.
        guidance: scale of classifier-free guidance; 1 is the conditional prediction.
        guidance_rescale: share of the contrast added by guidance that is removed (Lin et al., 2023: 0.7).
        size: height and width in pixels; None for the model's training size.
        spacing, karras: of the sampling schedule, see `sampling_schedule.py`. eta: DDIM's share of fresh noise.
        text, negative: the prompt and the negative prompt of a text-to-image model.
        truncate: whether a text that is too long for the model is truncated.
        init: the input image of image-to-image and inpainting; None starts from noise alone.
        strength: share of the steps that are run, the last ones; None for `STRENGTH`, or 1 with a mask.
        mask: white where the image is generated anew; None for the whole image.
        tile: side in pixels of the tiles for decoding a large image; 0 for none; None for 512 if the image has more
            than 1024 x 1024 pixels.
        prior_steps, prior_guidance: those of unCLIP's prior; `steps` and `guidance` are its decoder's.
        candidates: number of embeddings that the prior samples; the one nearest to the text is used.
        upsampling_steps: those of unCLIP's super-resolution; None for the default.
        towards: a text or image to which unCLIP interpolates from `text` or `init`, in `count` images.
    """

    sampler: str = "ddim"
    steps: Count | None = None
    seed: Seed | None = None
    label: int | None = None
    guidance: float = 1.0
    guidance_rescale: Share | int = 0.0
    size: tuple[int, int] | None = None
    spacing: Spacing | None = None
    karras: bool = False
    eta: Share | int = 0.0
    text: str | None = None
    negative: str = ""
    truncate: bool = False
    init: InputImage | None = None
    strength: PositiveShare | int | None = None
    mask: InputImage | None = None
    tile: int | None = None
    prior_steps: Count | None = None
    prior_guidance: float | None = None
    candidates: Count = 1
    upsampling_steps: Count | None = None
    towards: InputImage | str | None = None
    count: int = 1

    def __post_init__(self) -> None:
        if self.init is None and (self.mask or self.strength is not None):
            setting_name = "A mask" if self.mask else "A strength"
            raise UserError(f"{setting_name} is for a picture to begin with, and there is none: give one (--init).")
        check(self)
        if self.sampler not in (BY_TOKEN, AT_ONCE, BY_JUMPS):
            sampler(self.sampler)

    def configure_sampler(self, noise: Noise) -> ConfiguredSampler:
        """Return the sampler with these settings for a model's noise schedule."""
        return configure_sampler(noise, self.sampler, self.steps, self.spacing, self.karras, self.eta)

    def completed(self, noise: Noise, size: tuple[int, int]) -> "ImageRequest":
        """Return the request with this size, and with defaults for steps, seed, spacing and strength."""
        steps = len(self.configure_sampler(noise).schedule.steps)
        seed = secrets.randbits(32) if self.seed is None else self.seed
        default_strength = None if self.init is None else 1.0 if self.mask else STRENGTH
        complete = replace(self, strength=self.strength or default_strength, steps=steps, size=size, seed=seed)
        complete.schedule(complete.configure_sampler(noise).schedule)
        self._check_mask(size)
        return complete if noise.flows else replace(complete, spacing=self.spacing or noise.spacing)

    def check_no_embedding(self) -> None:
        """Raise `UserError` if an option is set that only unCLIP has."""
        if options := [name for name in OF_EMBEDDINGS if vars(self)[name] not in (None, 1)]:
            option = f"--{options[0].replace('_', '-')}"
            raise UserError(f"{option} is for a model that draws by way of an embedding (unCLIP): leave it out.")

    def sides(self) -> tuple[int, int] | None:
        """Return the requested height and width, or those of the input image; None if both are missing."""
        return self.size or (self.init.size() if self.init else None)

    def schedule(self, full: Schedule) -> Schedule:
        """Return the last steps of a sampler's schedule, the share `strength` of them, rounded down. Raises `UserError`
        if none is left."""
        if self.strength is None:
            return full
        steps = len(full.steps)
        n_steps = int(steps * self.strength)
        if not n_steps:
            least = -(-1e3 // steps) / 1e3
            raise UserError(f"Strength {self.strength:g} leaves none of {steps} steps: take {least:g} or more.")
        return full._replace(steps=full.steps[steps - n_steps :])

    @property
    def n_steps(self) -> int:
        """Number of steps that are run, by `strength`."""
        return int((self.steps or 0) * (1 if self.strength is None else self.strength))

    @property
    def from_noise(self) -> bool:
        """Whether the picture, or its masked part, starts from pure noise."""
        return self.init is None or (self.mask is not None and self.strength == 1)

    def anew(self) -> Bool[Tensor, "1 height width"] | None:
        """Return the mask of the pixels to generate, once the size is known; None without a mask."""
        assert self.size is not None
        return None if self.mask is None else self.mask.white(self.size)

    def paste(self, pictures: Bytes) -> Bytes:
        """Copy the input image's pixels into the images outside the mask, because decoded latents are not exact."""
        if self.init is None or self.mask is None:
            return pictures
        size = int(pictures.shape[2]), int(pictures.shape[3])
        return torch.where(self.mask.white(size), pictures, to_bytes(self.init.pixels(size, pictures.shape[1])))

    def _check_mask(self, size: tuple[int, int]) -> None:
        """Raise `UserError` for a mask of another size than the picture's, or without white pixels."""
        if self.init is None or self.mask is None:
            return
        (height, width), (high, wide) = self.init.size(), self.mask.size()
        if (height, width) != (high, wide):
            raise UserError(
                f"The mask {self.mask.place} has {wide} x {high} pixels, and the picture {width} x {height} (width x "
                "height): they must have the same size."
            )
        if not bool(self.mask.white(size).any()):
            raise UserError(f"The mask {self.mask.place} has no white, so nothing would be drawn anew.")


def changed_settings(request: ImageRequest, heeded: Collection[str]) -> list[str]:
    """Return the names of settings that are not the default, except for those in `heeded`."""
    default = ImageRequest()
    names = [field.name for field in fields(ImageRequest) if field.name not in heeded]
    return [name for name in names if vars(request)[name] != vars(default)[name]]


def require_diffusion_model(model: nn.Module) -> ImageModel:
    """Return the model if it is a diffusion model, else raise `UserError`."""
    if not isinstance(model, ImageModel) or model.draws != "pixels":
        raise UserError(f"A {type(model).__name__} draws no pictures: choose a model that was trained to remove noise.")
    return model


def trained_size(model: ImageModel) -> tuple[int, int]:
    """Return height and width of the pictures that the model was trained on."""
    size = model.config.size
    if size is None:
        raise UserError("The model does not say how large its pictures are: give their size.")
    return (size, size) if isinstance(size, int) else size


def class_number(config: Any, name: str) -> int:
    """Return the number of a class by its name or number. Raises `UserError` for an unknown one."""
    for number, names in enumerate(config.classes):  # ImageNet has several names for a class
        if name in (names, *names.split(", ")):
            return number
    if name.isdigit():
        return int(name)
    if not config.n_classes:
        raise UserError(f"The model learned no classes, so it has no {name!r}: train it with --classes.")
    raise unknown("class of this model", name, config.classes or [str(n) for n in range(config.n_classes)])


def check_label(model: ImageModel, label: int | None, guidance: float) -> None:
    """Raise `UserError` for a label or guidance that the model does not support."""
    classes, none = model.config.n_classes, model.config.null_class
    if label is not None and not classes:
        raise UserError("This model draws no classes, and it was given a label: leave it out.")
    if label is not None and not 0 <= label < classes:
        raise UserError(f"The label is {label}, but this model's classes are 0 to {classes - 1}.")
    if label is None and classes and not none:
        raise UserError(f"This model draws one of {classes} classes: give a label.")
    if guidance != 1 and label is None:
        raise UserError(f"Guidance ({guidance:g}) leads towards a label, and there is none: give one.")
    if guidance != 1 and not none:
        raise UserError("This model was trained with labels alone, and guidance needs what it draws without one.")


class Pipeline:
    """Base class of image pipelines.

    usual_guidance, usual_sampler: the defaults. pixels: whether steps are images, not latents.
    """

    usual_guidance = 1.0
    usual_sampler = "ddim"
    pixels = True

    def __init__(self, model: Any):
        self.model = model

    @property
    def noise(self) -> Noise:
        """Noise schedule of the model."""
        return self.model.noise

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    def fingerprint(self, more_text: str = "") -> str:
        """Return the SHA-256 of every tensor's name, dtype, shape and bytes, of the config, and of `more_text`.

        Models with equal fingerprints generate the same images.
        """
        digest = hashlib.sha256((repr(self.model.config) + more_text).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"|{name} {tensor.dtype} {tuple(tensor.shape)}|".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
        return digest.hexdigest()


class PixelPipeline(Pipeline):
    """Pipeline of a pixel diffusion model. Raises `UserError` for any other model."""

    def __init__(self, model: nn.Module):
        super().__init__(require_diffusion_model(model))
        self.pixels = self.model.coder is None

    def label(self, name: str) -> int:
        """Return the number of a class by its name or number. Raises `UserError` for an unknown one."""
        return class_number(self.model.config, name)

    def resolved(self, request: ImageRequest) -> ImageRequest:
        """Return the request with all defaults, checked against the model."""
        if request.text is not None or request.negative:
            text = request.text or request.negative
            raise UserError(f"This model reads no text, so {text!r} means nothing to it: leave it out (see --label).")
        if request.tile is not None:
            raise UserError(NO_TILES)
        size = request.sides() or trained_size(self.model)
        check_label(self.model, request.label, request.guidance)
        self.model.check_size(self.model.colours, *size)
        request.check_no_embedding()
        return request.completed(self.model.noise_of(size), size)

    @torch.inference_mode()
    def drawing(self, request: ImageRequest, seeds: Sequence[int]) -> Iterator[SamplerStep]:
        """Yield x and the predicted images after each step, with a row for each seed, on the model's device.

        The convolutions' weights are prepacked first, which takes about as long as a step.
        """
        model, device, factor = self.model, self.device, self.model.factor
        size = request.size or trained_size(model)
        sampler = request.configure_sampler(model.noise_of(size))
        shape = len(seeds), model.config.channels, *(side // factor for side in size)
        label = None if request.label is None else torch.full((len(seeds),), request.label, device=device)
        network = label_denoiser(prepack(model), label, request.guidance, request.guidance_rescale)
        random, schedule = SeededNoise(seeds), request.schedule(sampler.schedule)
        noise = random(torch.empty(shape, dtype=torch.float32, device=device))
        x, region = noise * schedule.initial_sigma, None
        if request.init is not None:
            picture = request.init.pixels(size, model.colours).to(device)
            picture, anew = model.to_latents(picture[None]).expand_as(noise), request.anew()
            if anew is not None:
                region = KeptRegion(picture, noise, anew[:, ::factor, ::factor].to(device))
            x = x if request.from_noise else add_initial_noise(picture, noise, schedule)
        yield from run_inpainting(sampler, network, x, schedule, random, region)

    @torch.inference_mode()
    def draw(self, request: ImageRequest, seeds: Sequence[int], watch: Watch = lambda state: None) -> Bytes:
        """Draw an image for each seed. Return uint8 on the CPU. `watch` is called with the state after each step.

        Raises `UserError` for an image with NaN or infinity, for example from damaged weights.
        """
        pictures = to_pixels(self.model.to_pictures(last_x(self.drawing(request, seeds), watch)))
        return pictures if self.pixels else request.paste(pictures)


def to_pixels(x: Float[Tensor, "batch channels height width"]) -> UInt8[Tensor, "batch channels height width"]:
    """Convert numbers from -1 to 1 to bytes. Raises `UserError` for NaN or infinity."""
    if not bool(x.isfinite().all()):
        raise UserError("The picture has numbers that are not finite: its weights are damaged, or need float32.")
    return to_bytes(x).cpu()


class Strip(NamedTuple):
    """Pictures with captions, for a sheet of one row or two."""

    pictures: UInt8[Tensor, "picture channels height width"]
    captions: list[str]
    columns: int


def noising_strip(picture: UInt8[Tensor, "channels height width"], noise: Noise, count: int) -> Strip:
    """Return a picture at evenly spaced timesteps, from 0 to the last, with growing amounts of the same noise."""
    clean = to_signed(picture)[None].expand(count, -1, -1, -1)
    added = SeededNoise([0])(clean[:1]).expand_as(clean)
    timestep = torch.linspace(0, noise.steps - 1, count, dtype=torch.float32, device="cpu").round().long()
    alpha, sigma = noise.levels(timestep, clean)
    noisy = torch.cat([clean[:1], (alpha * clean + sigma * added)[1:]])
    return Strip(to_bytes(noisy), ["picture", *(f"t = {t}" for t in timestep[1:].tolist())], count)


def denoising_strip(states: Sequence[SamplerStep]) -> Strip:
    """Return the denoising of the first picture at evenly spaced steps: x in the upper row, the predicted picture below
    it."""
    indices = torch.linspace(0, len(states) - 1, min(8, len(states)), dtype=torch.float32, device="cpu")
    steps = indices.round().long().tolist()
    shown_states = [states[step].x[0] for step in steps] + [states[step].picture[0] for step in steps]
    captions = [f"{name}, step {step + 1}" for name in ("x", "seen") for step in steps]
    return Strip(to_bytes(torch.stack(shown_states)).cpu(), captions, len(steps))
