"""What drawing and drawing once more have in common: the model by its name, the pictures of a record, their PNG files;
knows no model and no sampler."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keifu.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from keifu.checkpoints.source import Plan
    from keifu.generation.drawers import Drawer
    from keifu.generation.picture_record import Lora, Record
    from keifu.generation.samplers import Drawn


LARGE = 20_000_000  # parameters from which products are most of the time, and rounding them moves a picture little


def check_png(*paths: Path | None) -> None:
    """Refuses a name that promises another format than the PNG that is written."""
    for path in paths:
        if path is not None and path.suffix and path.suffix.lower() != ".png":
            raise UserError(f"{path} would be a PNG file, which keeps how it was drawn: name it {path.stem}.png.")


def usual_dtype(found: "Plan") -> str | None:
    """The type to compute in where none was asked for: bfloat16 for a large model where the processor multiplies it
    itself, else as the model is stored."""
    from keifu.devices import choose
    from keifu.training.precision import has_bfloat16

    large = has_bfloat16(choose()) and found.parameters >= LARGE
    return "bf16" if large else None


def load(found: "Plan", dtype: str | None, loras: "Sequence[Lora]" = ()) -> "Drawer":
    """The model that was opened with these LoRAs worked into it, and with its tokenizer where it reads."""
    from keifu.checkpoints.opening import DTYPES
    from keifu.checkpoints.picture_lora import apply_lora
    from keifu.checkpoints.source import check_tokenizer
    from keifu.generation.drawers import drawer

    model: Any = (found.held_in(DTYPES[dtype]) if dtype else found).fill()
    for lora in loras:
        apply_lora(model, lora.place, lora.scale)

    def tokenizer() -> Any:
        own = found.source.tokenizer()
        check_tokenizer(own, model.config.vocab_size)
        return own

    return drawer(model, tokenizer)


def drawn(model: "Drawer", record: "Record", states: "list[Drawn] | None" = None) -> "Tensor":
    """The pictures of all the record's batches, behind a progress bar; the first batch's states go where asked."""
    import torch

    from keifu.data.progress import counting

    batches, steps, done = record.seeds(), record.drawing.taken, 0
    with counting("Drawing", steps * len(batches), "steps") as advance:

        def watch(state: "Drawn") -> None:
            nonlocal done
            done += 1
            advance(done)
            if states is not None and done <= steps:
                states.append(state)

        return torch.cat([model.draw(record.drawing, seeds, watch) for seeds in batches])


def png(pictures: "Tensor", record: "Record") -> bytes:
    """A picture, or the sheet of all where the record is of none of them, with the record."""
    from keifu.data.grid import png, sheet

    return png(sheet(pictures) if record.number is None else image_of(pictures[0]), record.texts())


def image_of(picture: "Tensor") -> Any:
    """One picture of pillow's."""
    from PIL import Image

    kinds = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
    if len(picture) not in kinds:
        raise UserError(f"A picture of {len(picture)} channels cannot be written as PNG; the model draws no pictures.")
    return Image.fromarray(picture.permute(1, 2, 0).squeeze(-1).contiguous().numpy(), kinds[len(picture)])
