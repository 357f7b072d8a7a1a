"""Embeddings of pictures and texts by a CLIP model, and the probability of each label for a picture.

Axes: pictures, texts, labels, embedding.
"""

from collections.abc import Iterable, Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from keifu.data.images.preprocessing import Preprocessing
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.embeddings.encoders import embed_rows, encode_texts, require_finite
from keifu.inference.text.model import TwoTowers, evaluation_mode

BATCH = 64  # pictures in a pass
Pictures = Float[Tensor, "pictures embedding"]
Texts = Float[Tensor, "texts embedding"]
Labels = Float[Tensor, "labels embedding"]


def two_towers(model: nn.Module) -> TwoTowers:
    """Return the model. Raises `UserError` if it does not have both towers."""
    if not isinstance(model, TwoTowers):
        raise UserError(f"A {type(model).__name__} does not see pictures and texts in one space: choose a CLIP.")
    return model


def preprocessing(model: nn.Module) -> Preprocessing:
    """Return the model's preprocessing of pictures."""
    return Preprocessing(**vars(two_towers(model).config.pixels))


def embed_texts(
    model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int = 256, cut: bool = False
) -> Texts:
    """Return the embedding of each text as float32. Raises `UserError` for an empty text, or one longer than the
    context, unless `cut` keeps its beginning."""
    rows = encode_texts(tokenizer, texts, two_towers(model).config.context_length, cut).rows
    return embed_rows(model, rows, padding(tokenizer), batch_size)


def padding(tokenizer: Tokenizer) -> int:
    """Return the padding id. Padding comes after the end token and no token attends to it, so any id up to the end
    token's is valid."""
    return next(token for token in (tokenizer.pad_id, tokenizer.eos_id, 0) if token is not None)


def embed_pictures(model: nn.Module, images: Iterable[Image.Image]) -> Pictures:
    """Return the embedding of each picture as float32. Pictures are read in batches, and only their embeddings are
    kept."""
    ready, remaining = preprocessing(model), iter(images)
    groups = iter(lambda: list(islice(remaining, BATCH)), [])
    return embed_bytes(model, (torch.stack([ready.cut(image) for image in some]) for some in groups))


def embed_bytes(model: nn.Module, batches: Iterable[UInt8[Tensor, "batch channels rows columns"]]) -> Pictures:
    """Return the embeddings of batches of images in the model's size. The model is in evaluation mode."""
    towers, ready, like = two_towers(model), preprocessing(model), next(model.parameters())
    points: list[Tensor] = []
    with evaluation_mode(model), torch.no_grad():
        for pixels in batches:
            features = towers.encode_image(ready.normalised(pixels.to(like.device)).to(like.dtype))
            points.append(F.normalize(features.float(), dim=-1))
    if not points:
        raise UserError("There is no picture: give at least one.")
    return require_finite(torch.cat(points), "pictures")


def label_points(model: nn.Module, tokenizer: Tokenizer, labels: Sequence[str], templates: Sequence[str]) -> Labels:
    """Return the embedding of each label: the mean over templates in which the label replaces {} (CLIP, section 3.1.4).
    Raises `UserError` for a template without {}."""
    for template in templates:
        if "{}" not in template:
            raise UserError(f"The template {template!r} has no {{}} for the label, as 'a photo of a {{}}' has.")
    texts = [template.replace("{}", label) for label in labels for template in templates]
    points = embed_texts(model, tokenizer, texts).unflatten(0, (len(labels), len(templates)))
    return F.normalize(points.mean(1), dim=-1)


def label_shares(model: nn.Module, pictures: Pictures, labels: Labels) -> Float[Tensor, "pictures labels"]:
    """Return the probability of each label for each picture: the softmax of the similarities, scaled as in training."""
    return (model.get_parameter("logit_scale").detach().float().exp() * pictures @ labels.T).softmax(-1)
