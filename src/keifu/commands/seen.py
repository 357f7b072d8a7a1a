"""Pictures that are named where texts could stand, and points for both; knows no verb and no model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keifu.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def is_picture(text: str) -> bool:
    """Whether a text is the name of a picture's file, there or not, and not a sentence that ends like one."""
    from keifu.data.picture_sources import SUFFIXES

    return text.lower().endswith(SUFFIXES) and (Path(text).is_file() or not any(map(str.isspace, text)))


def pictures_among(path: Path) -> list[str] | None:
    """The pictures in a folder and in those below it, in order; None for what is no folder."""
    if not path.is_dir():
        return None
    found = [str(file) for file in sorted(path.rglob("*")) if file.is_file() and is_picture(str(file))]
    if not found:
        raise UserError(f"The folder {path} holds no picture.")
    return found


def points(model: Any, tokenizer: Any, inputs: Sequence[str], cut: bool, batch_size: int) -> "Tensor":
    """A point for each input, in order, whether it is a text or the name of a picture's file."""
    import torch

    from keifu.evaluation.shared_space import embed_pictures, embed_texts

    seen = torch.tensor([is_picture(each) for each in inputs])
    parts = []
    if seen.any():
        parts.append(embed_pictures(model, opened([each for each in inputs if is_picture(each)])))
    if not seen.all():
        texts = [each for each in inputs if not is_picture(each)]
        parts.append(embed_texts(model, tokenizer, texts, batch_size, cut))
    order = torch.cat([seen.nonzero(), (~seen).nonzero()]).flatten()
    found = torch.empty(len(inputs), parts[0].shape[1])
    found[order] = torch.cat([part.cpu() for part in parts])
    return found


def opened(files: Sequence[str]) -> Any:
    """The pictures in these files, one by one as they are asked for."""
    from keifu.data.picture_files import read_picture

    return (read_picture(Path(file)).image for file in files)
