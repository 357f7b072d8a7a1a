"""`keifu draw --again`: reproduces an image from its PNG metadata, and checks that every bit is the same."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from keifu.commands.shared.drawing import check_png, draw_images, load, output_paths, png
from keifu.errors import UserError
from keifu.files import write_atomic

if TYPE_CHECKING:
    from keifu.generation.images.pipeline import ImagePipeline
    from keifu.generation.images.pixel_diffusion import ImageRequest
    from keifu.generation.images.png_metadata import ImageRecord


def again(
    path: Path, out: Path | None, named: str | None, places: Mapping[str, Path | None], loras: Sequence[str] = ()
) -> None:
    """Draws a picture once more by its own record; that it differs is said, with the likely reason.

    named, places, loras: where the model, the pictures that it read (init, mask, towards) and its LoRAs are, if
    elsewhere now.
    """
    from keifu.generation.images.png_metadata import read_record

    record = read_record(path)
    drawing = _find_model(record.drawing, places, path)
    record = replace(record, drawing=drawing, loras=output_paths(record.loras, loras))
    model = _same_model(named or record.model, record, path)
    with _threads(record.threads):
        pictures = draw_images(model, record)
    check_png(out)
    out = out or path.with_stem(f"{path.stem}-again")
    if record.number is not None:
        pictures = pictures[record.number % record.batch_size :][:1]
    elif record.kept:
        pictures = pictures[list(record.kept)]
    write_atomic(out, png(pictures, record))
    print(out)
    if difference := _difference(path, out):
        raise UserError(f"{out} is not {path} bit for bit: {difference} {_apply_changes(record)}")
    print(f"{out} is {path}, bit for bit.", file=sys.stderr)


def _find_model(drawing: "ImageRequest", places: Mapping[str, Path | None], path: Path) -> "ImageRequest":
    """The settings with the pictures that the drawing read where they are now, if they are still the same."""
    from keifu.generation.images.image_to_image import InputImage, read_input_image

    for name, place in places.items():
        before = vars(drawing)[name]
        if not isinstance(before, InputImage):
            if place is not None:
                raise UserError(f"{path} was drawn without --{name} PICTURE: leave it out.")
            continue
        where = place or Path(before.place)
        if not where.is_file():
            raise UserError(f"{path} was drawn with --{name} {where}, which is not there: name its place (--{name}).")
        if (found := read_input_image(where)).digest != before.digest:
            raise UserError(
                f"{where} is not the picture that {path} was drawn with: its digest is {found.digest[:12]}, and it was "
                f"{before.digest[:12]}. Name the right one (--{name})."
            )
        drawing = replace(drawing, **{name: replace(before, place=str(where.resolve()))})
    return drawing


def _same_model(name: str, record: "ImageRecord", path: Path) -> "ImagePipeline":
    """The model that drew a picture; another one, by the fingerprint of its weights, is a `UserError`."""
    from keifu.checkpoints.loading import planned

    try:
        model = load(planned(name), record.dtype, record.loras)
    except UserError as error:
        raise UserError(f"{path} was drawn by {name}, which cannot be loaded; name its model. {error}") from None
    if (found := model.fingerprint()) != record.weights:
        raise UserError(
            f"{name} is not the model that drew {path}: the fingerprint of its weights is {found[:12]}, and it was "
            f"{record.weights[:12]}. Was it trained on, or replaced? Name the right one before --again."
        )
    return model


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads as once: how a product is split decides its last digits."""
    import torch

    own = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(own)


def _difference(before: Path, after: Path) -> str:
    """In how many numbers two pictures differ and how far; empty where they are the same."""
    import numpy as np
    from PIL import Image

    old, new = (np.asarray(Image.open(path)).astype(int) for path in (before, after))
    if old.shape != new.shape:
        return f"it has {new.shape} numbers and not {old.shape}."
    apart = np.abs(old - new)
    return (
        f"{(apart > 0).sum():,} of {apart.size:,} numbers differ, by {apart.max()} of 255 at most."
        if apart.any()
        else ""
    )


def _apply_changes(record: "ImageRecord") -> str:
    """What is not as it was when a picture was drawn."""
    from keifu.generation.images.png_metadata import versions

    now = versions()
    changed = [f"{name} {old} → {now.get(name)}" for name, old in record.versions.items() if now.get(name) != old]
    return f"Since then: {', '.join(changed)}." if changed else "The versions are the same; is it another processor?"
