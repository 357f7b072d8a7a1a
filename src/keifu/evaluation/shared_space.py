"""Pictures and texts as points of one sphere, where a picture lies near what is said of it; knows no model.

Axes: pictures, texts, labels, embedding.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from keifu.data.lengths import Rows
from keifu.data.preprocessing import Preprocessing
from keifu.data.tokenizers import Tokenizer
from keifu.errors import UserError
from keifu.evaluation.encoding import Advance, Mask, Tokens, encoded, in_passes

BATCH = 64  # pictures in a pass


@runtime_checkable
class TwoTowers(Protocol):
    """What a model with a tower for pictures and one for texts offers. Its `config` has `pixels`, what a picture
    becomes before its tower sees it, and `context_length`; similarities are multiplied by exp(logit_scale)."""

    config: Any
    logit_scale: Any

    def encode_image(self, pixels: Tensor) -> Tensor: ...

    def encode_text(self, tokens: Tokens, mask: Mask = None) -> Tensor: ...


def two_towers(model: nn.Module) -> TwoTowers:
    """The same model, known to have both towers; any other is a `UserError`."""
    if not isinstance(model, TwoTowers):
        raise UserError(f"A {type(model).__name__} does not see pictures and texts in one space: choose a CLIP.")
    return model


def preprocessing(model: nn.Module) -> Preprocessing:
    """What a picture becomes before the model sees it."""
    return Preprocessing(**vars(two_towers(model).config.pixels))


def embed_texts(
    model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int = 256, cut: bool = False
) -> Float[Tensor, "texts embedding"]:
    """A point for each text, float32. An empty text, and one longer than the model takes, are `UserError`s, the latter
    with both lengths; `cut` keeps the beginning of such a text."""
    rows = encoded(tokenizer, texts, two_towers(model).config.context_length, cut).rows
    return embed_rows(model, rows, padding(tokenizer), batch_size)


def padding(tokenizer: Tokenizer) -> int:
    """What fills a text up after its end: no token sees what comes after it, so any id that is no higher does."""
    return next(each for each in (tokenizer.pad_id, tokenizer.eos_id, 0) if each is not None)


def embed_rows(
    model: nn.Module, rows: Rows, pad_id: int, batch_size: int = 256, advance: Advance | None = None
) -> Float[Tensor, "texts embedding"]:
    """The points of texts whose ids, start and end among them, are `rows`; `advance` is told how many are done."""
    towers = two_towers(model)

    def work(tokens: Tokens, mask: Mask) -> Float[Tensor, "batch dim"]:
        return F.normalize(towers.encode_text(tokens).float(), dim=-1)

    return in_passes(model, work, rows, pad_id, batch_size, advance)


def embed_pictures(
    model: nn.Module, images: Iterable[Image.Image], batch_size: int = BATCH, advance: Advance | None = None
) -> Float[Tensor, "pictures embedding"]:
    """A point for each picture, float32; of so many pictures at a time only the points are kept."""
    ready = preprocessing(model)
    left = iter(images)
    groups = iter(lambda: list(islice(left, batch_size)), [])
    made = (torch.stack([ready.cut(image) for image in some]) for some in groups)
    return embed_bytes(model, made, advance)


def embed_bytes(
    model: nn.Module, batches: Iterable[UInt8[Tensor, "batch channels rows columns"]], advance: Advance | None = None
) -> Float[Tensor, "pictures embedding"]:
    """The points of pictures that have the model's size already, batch by batch, the model in evaluation mode."""
    towers, ready, like = two_towers(model), preprocessing(model), next(model.parameters())
    training, points, done = model.training, list[Tensor](), 0
    model.eval()
    try:
        with torch.no_grad():
            for pixels in batches:
                seen = towers.encode_image(ready.normalised(pixels.to(like.device)).to(like.dtype))
                points.append(F.normalize(seen.float(), dim=-1))
                done += len(pixels)
                if advance:
                    advance(done)
    finally:
        model.train(training)
    if not points:
        raise UserError("There is no picture: give at least one.")
    return torch.cat(points)


def label_points(
    model: nn.Module, tokenizer: Tokenizer, labels: Sequence[str], templates: Sequence[str]
) -> Float[Tensor, "labels embedding"]:
    """A point for each label: the mean of those of the templates with the label in the place of {} (CLIP, section
    3.1.4). A template without {} is a `UserError`."""
    for template in templates:
        if "{}" not in template:
            raise UserError(f"The template {template!r} has no {{}} for the label, as 'a photo of a {{}}' has.")
    texts = [template.replace("{}", label) for label in labels for template in templates]
    points = embed_texts(model, tokenizer, texts).unflatten(0, (len(labels), len(templates)))
    return F.normalize(points.mean(1), dim=-1)


def label_shares(
    model: nn.Module, pictures: Float[Tensor, "pictures embedding"], labels: Float[Tensor, "labels embedding"]
) -> Float[Tensor, "pictures labels"]:
    """The probability of each label for each picture: the softmax of the similarities, multiplied as in training."""
    scale = two_towers(model).logit_scale.detach().float().exp()
    return (scale * pictures @ labels.T).softmax(-1)
