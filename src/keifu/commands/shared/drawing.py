"""Work of `keifu draw` and `keifu draw --again`: loading the model and its LoRAs, drawing by a record, reranking, PNG
files, and the comparison of an image with its repetition.

`--lora PATH[:SCALE]` adds LoRAs, each identified by its digest. Reranking keeps the images of a text to which a CLIP
gives the highest scores (as in DALL-E).
"""

import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from keifu.checkpoints.hf.native_config import check_kinds
from keifu.checkpoints.loading import DTYPES, load as load_model, planned
from keifu.checkpoints.lora.diffusion import FILE, apply_lora
from keifu.checkpoints.plan import LoadPlan, check_tokenizer
from keifu.commands.shared.drawing_options import Options
from keifu.data.images import grid
from keifu.data.images.io import open_image, to_image
from keifu.data.progress import counting
from keifu.devices import choose, device_choice, has_bfloat16
from keifu.errors import UserError, require_known, unknown
from keifu.evaluation.images.text_to_image import best, cosines
from keifu.files import sha256, write_atomic
from keifu.inference.embeddings.clip import two_towers
from keifu.inference.images.image_to_image import InputImage, read_input_image
from keifu.inference.images.pipeline import ImagePipeline, image_pipeline
from keifu.inference.images.pixel_diffusion import ImageRequest, denoising_strip, noising_strip
from keifu.inference.images.png_metadata import ImageRecord, LoraRecord, check_limits, read_record, versions
from keifu.inference.images.samplers import SAMPLERS, SamplerStep
from keifu.threads import on_threads

# options that --again accepts: paths and the device
OF_AGAIN = ("model", "out", "again", "init", "mask", "towards", "lora", "device")
LARGE = 20_000_000  # parameters: from here on matrix multiplications dominate, and rounding changes pictures little


def check_png(*paths: Path | None) -> None:
    """Raise `UserError` for an output path that does not end in .png."""
    for path in paths:
        if path is not None and path.suffix and path.suffix.lower() != ".png":
            raise UserError(f"{path} would be a PNG file, which keeps how it was drawn: name it {path.stem}.png.")


def usual_dtype(load_plan: LoadPlan) -> str | None:
    """Return the dtype of --precision, as records store it. By default bfloat16 for a large model if the processor
    multiplies it natively, else None (the stored dtype)."""
    names = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    large = has_bfloat16(choose()) and load_plan.parameters >= LARGE
    return names.get(device_choice().weights or "", "bf16" if large else None)


def load(load_plan: LoadPlan, dtype: str | None, loras: Sequence[LoraRecord] = ()) -> ImagePipeline:
    """Load the model with these LoRAs merged into its weights, on the chosen device, with its tokenizer if it reads
    text."""
    if dtype:
        require_known("number format of weights", dtype, DTYPES)
    model: Any = (replace(load_plan, dtype=DTYPES[dtype]) if dtype else load_plan).fill()
    for lora in loras:
        apply_lora(model, lora.place, lora.scale)

    def tokenizer() -> Any:
        loaded = load_plan.source.tokenizer()
        check_tokenizer(loaded, model.config.vocab_size)
        return loaded

    return image_pipeline(model.to(choose()), tokenizer)


def draw_images(model: ImagePipeline, record: ImageRecord, states: list[SamplerStep] | None = None) -> Tensor:
    """Draw the pictures of all the record's batches, with a progress bar. Append the first batch's steps to
    `states`."""
    batches, steps, done = record.seeds(), record.drawing.n_steps, 0
    with counting("Drawing", steps * len(batches), "steps") as advance:

        def watch(state: SamplerStep) -> None:
            nonlocal done
            done += 1
            advance(done)
            if states is not None and done <= steps:
                states.append(state)

        return torch.cat([model.draw(record.drawing, seeds, watch) for seeds in batches])


def png(pictures: Tensor, record: ImageRecord) -> bytes:
    """Return a PNG file with the record inside. If the record's index is None, the file is the sheet of all
    pictures."""
    return grid.png(grid.sheet(pictures) if record.number is None else to_image(pictures[0]), record.texts())


def select_lora(words: str) -> LoraRecord:
    """Parse `PATH` or `PATH:SCALE`. The path is a LoRA file or its folder. Raises `UserError` for a missing file."""
    path, scale = words, 1.0
    if ":" in words and not Path(words).exists():
        before, _, number = words.rpartition(":")
        with suppress(ValueError):
            path, scale = before or words, float(number)
    if Path(path).is_dir():
        path = str(Path(path) / FILE)
    if not Path(path).is_file():
        raise UserError(f"There is no LoRA {path}: give a .safetensors file, and after a colon how strongly it acts.")
    return LoraRecord(str(Path(path).resolve()), sha256(Path(path)), scale)


def output_paths(loras: Sequence[LoraRecord], paths: Sequence[str]) -> tuple[LoraRecord, ...]:
    """Return the LoRAs with their present paths: those in `paths` if a file has moved. Raises `UserError` if a file has
    changed."""
    here = {lora.digest: lora.place for lora in map(select_lora, paths)}
    if strange := here.keys() - {lora.digest for lora in loras}:
        raise UserError(f"The picture was drawn without the LoRA {here[strange.pop()]}: leave it out.")
    records = []
    for lora in loras:
        where = here.get(lora.digest, lora.place)
        if not Path(where).is_file() or select_lora(where).digest != lora.digest:
            raise UserError(f"The LoRA {lora.place} is not there, or is another one now: name its place (--lora).")
        records.append(replace(lora, place=where))
    return tuple(records)


def check(count: int, best_of: int | None, clip: str | None, text: str | None) -> None:
    """Raise `UserError` for options of reranking that contradict each other, or a model that is not a CLIP, before
    anything is drawn."""
    if best_of is None:
        if clip:
            raise UserError("--clip ranks pictures for --best-of, which was not given: add it, or leave --clip out.")
        return
    if clip is None:
        raise UserError("--best-of needs a CLIP that ranks the pictures: name one with --clip.")
    if text is None:
        raise UserError("--best-of ranks pictures by the text that they were drawn from, and there is none.")
    if best_of < count:
        raise UserError(f"The best of {best_of} pictures cannot be {count}: raise --best-of, or lower --count.")
    two_towers(planned(clip).model)


def best_of(pictures: Tensor, text: str, clip: str, count: int) -> list[int]:
    """Return the indices of the `count` pictures that fit the text best, the best one first."""
    towers, tokenizer = load_model(clip, torch.float32)
    if tokenizer is None:
        raise UserError(f"{clip} has no tokenizer, and the text must be read: give a CLIP that has one.")
    return best(cosines(towers, tokenizer, pictures, [text] * len(pictures)), count)


def draw(options: Options) -> None:
    """Draw the pictures, write the files and print their names."""
    check_png(options.out, options.strip)
    if options.again:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Image size")  # the record already limits the size of pictures
            return again(options.again, options)
    if options.model is None:
        raise UserError("There is no model: name one (keifu draw MODEL), or a picture with --again.")
    if options.sampler not in (None, *SAMPLERS):
        raise unknown("sampler", options.sampler, SAMPLERS)
    check(options.count, options.best_of, options.clip, options.text)
    record, model = _prepare(options, options.model)
    if options.strip and not model.pixels:
        raise UserError("--strip shows each step as a picture, and this model's steps are latents: leave it out.")
    states: list[SamplerStep] = []
    pictures = draw_images(model, record, states if options.strip else None)
    out = options.out or Path(f"picture-{record.drawing.seed}.png")
    kept_indices = range(record.count)
    if options.best_of and options.clip:
        kept_indices = best_of(pictures, options.text or "", options.clip, options.count)
        record = replace(record, kept=tuple(kept_indices))
    for path, index in _files(out, len(kept_indices)):
        image = pictures[list(kept_indices)] if index is None else pictures[kept_indices[index]][None]
        write_atomic(path, png(image, replace(record, number=None if index is None else kept_indices[index])))
        print(path)
    if options.strip:
        write_atomic(options.strip, _strip(model, pictures[0], states))
        print(options.strip)


def _prepare(options: Options, name: str) -> tuple[ImageRecord, ImagePipeline]:
    """Return the record of the drawing, with every setting resolved, and the model."""
    loras = tuple(map(select_lora, options.lora))
    load_plan = planned(name)
    dtype = usual_dtype(load_plan)
    model = load(load_plan, dtype, loras)
    settings = {field.name: vars(options)[field.name] for field in fields(ImageRequest)}
    settings["label"] = None if options.label is None else model.label(options.label)
    settings["sampler"] = options.sampler or ("ddim" if options.eta else model.usual_sampler)
    settings["guidance"] = model.usual_guidance if options.guidance is None else options.guidance
    settings |= {name: read_input_image(path) for name in ("init", "mask") if (path := vars(options)[name])}
    if options.towards is not None and options.best_of:
        raise UserError("--best-of chooses among pictures of one text, and --towards makes a series: leave one out.")
    if options.towards is not None and options.init:
        settings["towards"] = read_input_image(options.towards)
    request = model.resolved(ImageRequest(**{**settings, "size": _size(options.size)}))
    model_name = str(Path(name).resolve()) if Path(name).exists() else name
    count = options.best_of or options.count
    number, size = 0 if count == 1 else None, min(options.batch_size, count)
    record = ImageRecord(
        model_name, model.fingerprint(), request, count, size, number, dtype, choose().type, loras=loras
    )
    return record, model


def _size(argument: str | None) -> tuple[int, int] | None:
    """Parse `64` or `64x48` (width first). Return (height, width)."""
    if argument is None:
        return None
    sides = argument.lower().split("x")
    if len(sides) > 2 or not all(re.fullmatch("[0-9]{1,9}", side) and int(side) for side in sides):
        raise UserError(f"--size is {argument!r}, which must be pixels of a side (64) or WIDTHxHEIGHT (64x48).")
    return int(sides[-1]), int(sides[0])


def _files(out: Path, count: int) -> list[tuple[Path, int | None]]:
    """Return the path and index of each picture. If there are several, the sheet of all comes first, with None."""
    if count == 1:
        return [(out, 0)]
    return [(out, None), *((out.with_stem(f"{out.stem}-{number + 1}"), number) for number in range(count))]


def _strip(model: ImagePipeline, picture: Tensor, states: Sequence[SamplerStep]) -> bytes:
    out = denoising_strip(states)
    into = noising_strip(picture, cast(Any, model).noise, out.columns)
    return grid.grid(torch.cat([into.pictures, out.pictures]), [*into.captions, *out.captions], out.columns)


def again(path: Path, options: Options) -> None:
    """Repeat a drawing from its record. Print whether it differs, and the likely reason. The options give new paths of
    the model, the LoRAs and the pictures that it used (init, mask, towards), if they have moved."""
    changed_options = [name for name, value in vars(options).items() if value != vars(Options())[name]]
    if superfluous := [f"--{name.replace('_', '-')}" for name in changed_options if name not in OF_AGAIN]:
        raise UserError(f"--again takes every setting from {path}: leave out {' and '.join(superfluous)}.")
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


def _input_images(drawing: ImageRequest, paths: Mapping[str, Path | None], path: Path) -> ImageRequest:
    """Return the settings with the present paths of the input pictures. Raises `UserError` if a file has changed."""
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


def _same_model(name: str, record: ImageRecord, path: Path) -> ImagePipeline:
    """Return the model that drew a picture. Raises `UserError` if the fingerprint of the model's weights differs."""
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
    old, new = (np.asarray(open_image(path)) for path in (before, after))
    if old.shape != new.shape:
        return f"it has {new.shape} numbers and not {old.shape}."
    differences = np.abs(old.astype(int) - new)
    said = f"{(differences > 0).sum():,} of {differences.size:,} numbers differ, by {differences.max()} of 255 at most."
    return said if differences.any() else ""


def _apply_changes(record: ImageRecord) -> str:
    """Return a sentence about the packages whose version changed since a picture was drawn."""
    now = versions()
    changed = [f"{name} {old} → {now.get(name)}" for name, old in record.versions.items() if now.get(name) != old]
    return f"Since then: {', '.join(changed)}." if changed else "The versions are the same; is it another processor?"
