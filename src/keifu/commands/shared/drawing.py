"""Shared by `keifu draw` and `keifu draw --again`: loading the model and its LoRAs, drawing by a record, reranking, and
PNG files.

`--lora PATH[:SCALE]` adds LoRAs, each identified by its digest. Reranking keeps the images of a text to which a CLIP
gives the highest scores (as in DALL-E).
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keifu.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from keifu.checkpoints.plan import LoadPlan
    from keifu.generation.images.pipeline import ImagePipeline
    from keifu.generation.images.png_metadata import ImageRecord, LoraRecord
    from keifu.generation.images.samplers import SamplerStep


LARGE = 20_000_000  # parameters: from here on matrix multiplications dominate, and rounding changes pictures little


def check_png(*paths: Path | None) -> None:
    """Raise `UserError` for an output path that does not end in .png."""
    for path in paths:
        if path is not None and path.suffix and path.suffix.lower() != ".png":
            raise UserError(f"{path} would be a PNG file, which keeps how it was drawn: name it {path.stem}.png.")


def usual_dtype(load_plan: "LoadPlan") -> str | None:
    """Return the dtype of --precision, as records store it. By default bfloat16 for a large model if the processor
    multiplies it natively, else None (the stored dtype)."""
    from keifu.devices import choose, chosen, has_bfloat16

    names = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    large = has_bfloat16(choose()) and load_plan.parameters >= LARGE
    return names.get(chosen().weights or "", "bf16" if large else None)


def load(load_plan: "LoadPlan", dtype: str | None, loras: "Sequence[LoraRecord]" = ()) -> "ImagePipeline":
    """Load the model with these LoRAs merged into its weights, on the chosen device, with its tokenizer if it reads
    text."""
    from keifu.checkpoints.loading import DTYPES
    from keifu.checkpoints.lora.diffusion import apply_lora
    from keifu.checkpoints.plan import check_tokenizer
    from keifu.devices import choose
    from keifu.generation.images.pipeline import image_pipeline

    model: Any = (replace(load_plan, dtype=DTYPES[dtype]) if dtype else load_plan).fill()
    for lora in loras:
        apply_lora(model, lora.place, lora.scale)

    def tokenizer() -> Any:
        loaded = load_plan.source.tokenizer()
        check_tokenizer(loaded, model.config.vocab_size)
        return loaded

    return image_pipeline(model.to(choose()), tokenizer)


def draw_images(model: "ImagePipeline", record: "ImageRecord", states: "list[SamplerStep] | None" = None) -> "Tensor":
    """Draw the pictures of all the record's batches, with a progress bar. Append the first batch's steps to
    `states`."""
    import torch

    from keifu.data.progress import counting

    batches, steps, done = record.seeds(), record.drawing.taken, 0
    with counting("Drawing", steps * len(batches), "steps") as advance:

        def watch(state: "SamplerStep") -> None:
            nonlocal done
            done += 1
            advance(done)
            if states is not None and done <= steps:
                states.append(state)

        return torch.cat([model.draw(record.drawing, seeds, watch) for seeds in batches])


def png(pictures: "Tensor", record: "ImageRecord") -> bytes:
    """Return a PNG file with the record inside. If the record's index is None, the file is the sheet of all
    pictures."""
    from keifu.data.images.grid import png, sheet
    from keifu.data.images.io import to_image

    return png(sheet(pictures) if record.number is None else to_image(pictures[0]), record.texts())


def select_lora(words: str) -> "LoraRecord":
    """Parse `PATH` or `PATH:SCALE`. The path is a LoRA file or its folder. Raises `UserError` for a missing file."""
    from keifu.checkpoints.lora.diffusion import FILE
    from keifu.files import sha256
    from keifu.generation.images.png_metadata import LoraRecord

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


def output_paths(loras: "Sequence[LoraRecord]", paths: Sequence[str]) -> "tuple[LoraRecord, ...]":
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
    from keifu.checkpoints.loading import planned
    from keifu.evaluation.images.retrieval import two_towers

    two_towers(planned(clip).model)


def best_of(pictures: "Tensor", text: str, clip: str, count: int) -> list[int]:
    """Return the indices of the `count` pictures that fit the text best, the best one first."""
    import torch

    from keifu.checkpoints import load
    from keifu.evaluation.images.text_to_image import best, cosines

    towers, tokenizer = load(clip, torch.float32)
    if tokenizer is None:
        raise UserError(f"{clip} has no tokenizer, and the text must be read: give a CLIP that has one.")
    return best(cosines(towers, tokenizer, pictures, [text] * len(pictures)), count)
