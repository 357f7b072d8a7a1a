"""`keifu draw`: images from a diffusion model or DALL-E, by text or label. It also reproduces an image from its
record."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import tyro

from keifu.commands.shared import drawing, flags
from keifu.commands.shared.drawing import check_png, draw_images, load, output_paths, png, select_lora, usual_dtype
from keifu.errors import UserError, unknown
from keifu.files import write_atomic
from keifu.ranges import Count, Finite, Natural, PositiveShare, Seed, Share, SmallCount
from keifu.threads import on_threads

if TYPE_CHECKING:
    from torch import Tensor

    from keifu.generation.images.pipeline import ImagePipeline
    from keifu.generation.images.pixel_diffusion import ImageRequest
    from keifu.generation.images.png_metadata import ImageRecord
    from keifu.generation.images.samplers import SamplerStep

# options that --again accepts: paths and the device
OF_AGAIN = ("model", "out", "again", "init", "mask", "towards", "lora", "device")


@dataclass(frozen=True)
class Options(flags.OnDevice):
    """Draw pictures with a model that was trained to remove noise, by a text if the model reads text.

    Each file contains its settings; `keifu draw --again FILE` draws it once more, bit for bit.

    Samplers: ddpm is the original chain, random, all of the model's steps; ddim needs 50 and is random only with --eta;
    euler, heun (two evaluations a step) and lms follow the same path as plainer solvers; plms is Stable Diffusion's
    first sampler; dpm++-2m and unipc need 10 to 25 steps; euler-ancestral and dpm++-2m-sde add fresh noise at each
    step.
    """

    model: Annotated[
        tyro.conf.Positional[str | None],
        tyro.conf.arg(metavar="MODEL", help="A run, a diffusers directory or hub id, or a catalogue name."),
    ] = None
    text: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[TEXT]", help="Text to draw.")] = None
    out: Annotated[Path | None, tyro.conf.arg(aliases=("-o",), metavar="PATH")] = None
    """The PNG file; of several pictures it is a sheet of all, beside PATH-1.png, PATH-2.png and so on. Unset:
    picture-SEED.png."""
    sampler: str | None = None
    """Sampler that removes the noise. Unset: ddim, for a text dpm++-2m (unCLIP: ddim)."""
    steps: Count | None = None
    """Steps from noise to picture; unset, as many as are usual with the sampler."""
    seed: Seed | None = None
    """The same seed gives the same picture; of several, each has a seed one higher. Unset: a fresh one."""
    count: SmallCount = 1
    """Number of pictures."""
    label: str | None = None
    """The class to draw, by name or number."""
    guidance: Finite | None = None
    """How far towards the text or the label: 1 is what the model says, more is nearer to it and less varied. Unset:
    7.5 for a text (unCLIP: 8), 1 for a label."""
    negative: str = ""
    """Text that guidance leads away from, for models that read. Unset: none."""
    truncate: bool = False
    """Leave out the end of a text that is longer than the model reads."""
    guidance_rescale: Share = 0.0
    """Share of the contrast added by guidance that is removed, up to 1."""
    size: str | None = None
    """Pixels of a side, or WIDTHxHEIGHT; unset, those that the model was trained with."""
    init: Annotated[Path | None, tyro.conf.arg(metavar="PICTURE")] = None
    """A picture to begin with, instead of noise alone; its size is the drawing's unless --size says another. A model
    that draws by way of an embedding (unCLIP) varies it: what it shows is kept, its pixels are not."""
    strength: PositiveShare | None = None
    """Share of the steps that --init is drawn anew with, up to 1. Unset: 0.8, with a mask 1."""
    mask: Annotated[Path | None, tyro.conf.arg(metavar="PICTURE")] = None
    """Mask whose white parts of --init are drawn anew; the other pixels are kept."""
    lora: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="PATH[:SCALE]")] = ()
    """A LoRA for the network or its text's encoder, a .safetensors file or a run of keifu train lora-image, and how
    strongly it acts (1); several times for several."""
    tile: Natural | None = None
    """Side in pixels of the tiles in which latents are decoded, which bounds memory; 0 for none. Unset: 512 for
    pictures of more than 1024 x 1024 pixels."""
    towards: Annotated[str | None, tyro.conf.arg(metavar="PICTURE|TEXT")] = None
    """Picture or text that a series of --count pictures ends with; it starts from --init or from the text (unCLIP)."""
    prior_steps: Count | None = None
    """Steps in which such a model imagines the embedding. Unset: 25."""
    prior_guidance: Finite | None = None
    """Guidance of the embedding towards the text. Unset: 4."""
    candidates: Count = 1
    """Embeddings that it imagines, of which the one nearest to the text is drawn."""
    upsampling_steps: Count | None = None
    """Steps in which it enlarges its pictures. Unset: 7."""
    eta: Share = 0.0
    """ddim's share of fresh noise: 0 for none, 1 for ddpm's."""
    spacing: Literal["leading", "trailing", "linspace", "quadratic"] | None = None
    """Choice of the training's timesteps that are visited. Unset: the model's."""
    karras: bool = False
    """Noise levels that crowd where there is little noise."""
    batch_size: Count = 16
    """Most pictures that are drawn together."""
    best_of: Count | None = None
    """Number of pictures to draw; the --count of them that a CLIP finds nearest to the text are kept, best first."""
    clip: str | None = None
    """CLIP for --best-of: a run, a folder or a hub id."""
    strip: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Write the first picture's way too, as a sheet: into noise as the training has it, and below that out of noise as
    it was drawn, with what the network saw in it at each step."""
    again: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """A PNG file that keifu drew: draw it once more, with its settings, and say whether each bit is the same."""


def run(options: Options) -> None:
    """Draw the pictures, write the files and print their names."""
    from keifu.generation.images.samplers import SAMPLERS

    check_png(options.out, options.strip)
    if options.again:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Image size")  # the record already limits the size of pictures
            again(options.again, options)
        return
    if options.model is None:
        raise UserError("There is no model: name one (keifu draw MODEL), or a picture with --again.")
    if options.sampler not in (None, *SAMPLERS):
        raise unknown("sampler", options.sampler, SAMPLERS)
    drawing.check(options.count, options.best_of, options.clip, options.text)
    record, model = _prepare(options, options.model)
    if options.strip and not model.pixels:
        raise UserError("--strip shows each step as a picture, and this model's steps are latents: leave it out.")
    states: list[SamplerStep] = []
    pictures = draw_images(model, record, states if options.strip else None)
    out = options.out or Path(f"picture-{record.drawing.seed}.png")
    kept = range(record.count)
    if options.best_of and options.clip:
        kept = drawing.best_of(pictures, options.text or "", options.clip, options.count)
        record = replace(record, kept=tuple(kept))
    for path, index in _files(out, len(kept)):
        chosen = pictures[list(kept)] if index is None else pictures[kept[index]][None]
        write_atomic(path, png(chosen, replace(record, number=None if index is None else kept[index])))
        print(path)
    if options.strip:
        write_atomic(options.strip, _strip(model, pictures[0], states))
        print(options.strip)


def _prepare(options: Options, name: str) -> "tuple[ImageRecord, ImagePipeline]":
    """Return the record of the drawing, with every setting resolved, and the model."""
    from keifu.checkpoints.loading import planned
    from keifu.devices import choose
    from keifu.generation.images.image_to_image import read_input_image
    from keifu.generation.images.pixel_diffusion import ImageRequest
    from keifu.generation.images.png_metadata import ImageRecord

    loras = tuple(map(select_lora, options.lora))
    load_plan = planned(name)
    dtype = usual_dtype(load_plan)
    model = load(load_plan, dtype, loras)
    chosen = {field.name: vars(options)[field.name] for field in fields(ImageRequest)}
    chosen["label"] = None if options.label is None else model.label(options.label)
    chosen["sampler"] = options.sampler or ("ddim" if options.eta else model.usual_sampler)
    chosen["guidance"] = model.usual_guidance if options.guidance is None else options.guidance
    chosen |= {name: read_input_image(path) for name in ("init", "mask") if (path := vars(options)[name])}
    if options.towards is not None and options.best_of:
        raise UserError("--best-of chooses among pictures of one text, and --towards makes a series: leave one out.")
    if options.towards is not None and options.init:
        chosen["towards"] = read_input_image(options.towards)
    wanted = model.resolved(ImageRequest(**{**chosen, "size": _size(options.size)}))
    named = str(Path(name).resolve()) if Path(name).exists() else name
    count = options.best_of or options.count
    number, size = 0 if count == 1 else None, min(options.batch_size, count)
    record = ImageRecord(named, model.fingerprint(), wanted, count, size, number, dtype, choose().type, loras=loras)
    return record, model


def _size(given: str | None) -> tuple[int, int] | None:
    """Parse `64` or `64x48` (width first). Return (height, width)."""
    if given is None:
        return None
    sides = given.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and len(side) < 10 and int(side) for side in sides):
        raise UserError(f"--size is {given!r}, which must be pixels of a side (64) or WIDTHxHEIGHT (64x48).")
    return int(sides[-1]), int(sides[0])


def _files(out: Path, count: int) -> list[tuple[Path, int | None]]:
    """Return the path and index of each picture. If there are several, the sheet of all comes first, with None."""
    if count == 1:
        return [(out, 0)]
    numbered = [(out.with_stem(f"{out.stem}-{number + 1}"), number) for number in range(count)]
    return [(out, None), *numbered]


def _strip(model: "ImagePipeline", picture: "Tensor", states: "Sequence[SamplerStep]") -> bytes:
    import torch

    from keifu.data.images.grid import grid
    from keifu.generation.images.pixel_diffusion import denoising_strip, noising_strip

    out = denoising_strip(states)
    into = noising_strip(picture, cast(Any, model).noise, out.columns)
    return grid(torch.cat([into.pictures, out.pictures]), [*into.captions, *out.captions], out.columns)


def again(path: Path, options: Options) -> None:
    """Repeat a drawing from its record. Print whether it differs, and the likely reason. The options give new paths of
    the model, the LoRAs and the pictures that it used (init, mask, towards), if they have moved."""
    from keifu.checkpoints.hf.native_config import check_kinds
    from keifu.generation.images.png_metadata import check_limits, read_record

    given = [name for name, value in vars(options).items() if value != vars(Options())[name]]
    if more := [f"--{name.replace('_', '-')}" for name in given if name not in OF_AGAIN]:
        raise UserError(f"--again takes every setting from {path}: leave out {' and '.join(more)}.")
    record = read_record(path)
    check_kinds(record, f"The record of {path}")
    check_limits(record, path)
    paths = {"init": options.init, "mask": options.mask, "towards": options.towards and Path(options.towards)}
    drawing = _input_images(record.drawing, paths, path)
    record = replace(record, drawing=drawing, loras=output_paths(record.loras, options.lora))
    model = _same_model(options.model or record.model, record, path)
    with on_threads(record.threads):  # the split of a matrix multiplication decides its last digits
        pictures = draw_images(model, record)
    out = options.out or path.with_stem(f"{path.stem}-again")
    if record.number is not None:
        pictures = pictures[record.number % record.batch_size :][:1]
    elif record.kept:
        pictures = pictures[list(record.kept)]
    write_atomic(out, png(pictures, record))
    print(out)
    if difference := _difference(path, out):
        raise UserError(f"{out} is not {path} bit for bit: {difference} {_apply_changes(record)}")
    print(f"{out} is {path}, bit for bit.", file=sys.stderr)


def _input_images(drawing: "ImageRequest", paths: Mapping[str, Path | None], path: Path) -> "ImageRequest":
    """Return the settings with the present paths of the input pictures. Raises `UserError` if a file has changed."""
    from keifu.generation.images.image_to_image import InputImage, read_input_image

    for name, picture in paths.items():
        before = vars(drawing)[name]
        if not isinstance(before, InputImage):
            if picture is not None:
                raise UserError(f"{path} was drawn without --{name} PICTURE: leave it out.")
            continue
        where = picture or Path(before.place)
        if not where.is_file():
            raise UserError(f"{path} was drawn with --{name} {where}, which is not there: name its place (--{name}).")
        if (now := read_input_image(where)).digest != before.digest:
            raise UserError(
                f"{where} is not the picture that {path} was drawn with: its digest is {now.digest[:12]}, and it was "
                f"{before.digest[:12]}. Name the right one (--{name})."
            )
        drawing = replace(drawing, **{name: replace(before, place=str(where.resolve()))})
    return drawing


def _same_model(name: str, record: "ImageRecord", path: Path) -> "ImagePipeline":
    """Return the model that drew a picture. Raises `UserError` if the fingerprint of the model's weights differs."""
    from keifu.checkpoints.loading import planned

    try:
        model = load(planned(name), record.dtype, record.loras)
    except UserError as error:
        raise UserError(f"{path} was drawn by {name}, which cannot be loaded; name its model. {error}") from None
    if (now := model.fingerprint()) != record.weights:
        raise UserError(
            f"{name} is not the model that drew {path}: the fingerprint of its weights is {now[:12]}, and it was "
            f"{record.weights[:12]}. Was it trained on, or replaced? Name the right one before --again."
        )
    return model


def _difference(before: Path, after: Path) -> str:
    """Describe how many pixel values differ between two pictures, and by how much. Empty if none does."""
    import numpy as np
    from PIL import Image

    old, new = (np.asarray(Image.open(path)) for path in (before, after))
    if old.shape != new.shape:
        return f"it has {new.shape} numbers and not {old.shape}."
    apart = np.abs(old.astype(int) - new)
    said = f"{(apart > 0).sum():,} of {apart.size:,} numbers differ, by {apart.max()} of 255 at most."
    return said if apart.any() else ""


def _apply_changes(record: "ImageRecord") -> str:
    """Return a sentence about the packages whose version changed since a picture was drawn."""
    from keifu.generation.images.png_metadata import versions

    now = versions()
    changed = [f"{name} {old} → {now.get(name)}" for name, old in record.versions.items() if now.get(name) != old]
    return f"Since then: {', '.join(changed)}." if changed else "The versions are the same; is it another processor?"


parse = flags.parser(Options, run, "keifu draw")
