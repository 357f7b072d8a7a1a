"""`--lora PATH[:SCALE]`: LoRAs that change a model before it draws, each known by its digest; knows no model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from keifu.errors import UserError

if TYPE_CHECKING:
    from keifu.generation.picture_record import Lora


def chosen(words: str) -> "Lora":
    """What `PATH` or `PATH:SCALE` says, a file or a folder that holds one; where none is there is a `UserError`."""
    from keifu.checkpoints.picture_lora import FILE
    from keifu.generation.originals import digest_of
    from keifu.generation.picture_record import Lora

    place, _, told = words.rpartition(":")
    scale = _number(told)
    if not place or scale is None or Path(words).exists():
        place, scale = words, 1.0
    if Path(place).is_dir():
        place = str(Path(place) / FILE)
    if not Path(place).is_file():
        raise UserError(f"There is no LoRA {place}: give a .safetensors file, and after a colon how strongly it acts.")
    return Lora(str(Path(place).resolve()), digest_of(Path(place)), scale)


def _number(words: str) -> float | None:
    try:
        return float(words)
    except ValueError:
        return None


def placed(loras: "Sequence[Lora]", places: Sequence[str]) -> "tuple[Lora, ...]":
    """LoRAs where they are now, if they are still the same; `places` are files that may have moved."""
    here = {each.digest: each.place for each in map(chosen, places)}
    if strange := here.keys() - {lora.digest for lora in loras}:
        raise UserError(f"The picture was drawn without the LoRA {here[strange.pop()]}: leave it out.")
    found = []
    for lora in loras:
        where = here.get(lora.digest, lora.place)
        if not Path(where).is_file() or chosen(where).digest != lora.digest:
            raise UserError(f"The LoRA {lora.place} is not there, or is another one now: name its place (--lora).")
        found.append(replace(lora, place=where))
    return tuple(found)
