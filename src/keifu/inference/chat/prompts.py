"""Pictures in the prompt of a vision-language model (LLaVA; Liu et al., 2023).

A chat template writes one token for a picture. It is repeated for each of the picture's embeddings, which the runner
inserts there. The hashes of key-value blocks use the picture's content, not that token.

Axes: images, channels, rows and columns of pixels; patches = tokens of a picture, dim.
"""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import count
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from keifu.data.images.preprocessing import Preprocessing, TiledPreprocessing
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError

MOST_IMAGES = 16  # maximum in one conversation
Messages = Sequence[Mapping[str, Any]]


@runtime_checkable
class SeeingModel(Protocol):
    """Interface of a vision-language model. Its `config` has `pixels`, `image_token` and `image_tokens`; with tiles
    also `picture_text(rows, columns)`."""

    config: Any

    def encode_images(self, pixels: Tensor) -> Tensor: ...


class ImagePrompt(NamedTuple):
    """Ids of a prompt, with one token for each tile of its pictures; and the pictures."""

    tokens: Sequence[int]
    images: Sequence[Image.Image]


def sees(config: Any) -> bool:
    """Return whether models with this Config read pictures. None is the Config of a text model."""
    return config is not None and isinstance(vars(config).get("image_token"), int)


def refuse_pictures(config: Any, pictures: Sequence[Any]) -> None:
    """Raise `UserError` if there are pictures and the model reads none. Call it before they are opened: an error in a
    picture is of no use then."""
    if pictures and not sees(config):
        raise UserError("This model reads text alone, and sees no pictures: choose one that sees, such as a LLaVA.")


def render(tokenizer: Tokenizer, messages: Messages, config: Any, **variables: Any) -> list[int] | ImagePrompt:
    """Encode a conversation by the chat template. A message may have pictures in `images`; they come before its text.

    Raises `UserError` for pictures if the model does not read any.
    """
    images = [image for message in messages for image in message.get("images", ())]
    if not sees(config):
        refuse_pictures(config, images)
        return tokenizer.render_chat(messages, **variables)
    tokens = tokenizer.render_chat([in_parts(message) for message in messages], **variables)
    ready = preprocessing(config)
    if isinstance(ready, TiledPreprocessing):
        remaining_images, marked, tokens = iter(images[:MOST_IMAGES]), tokens, []
        for token in marked:
            image = next(remaining_images, None) if token == config.image_token else None
            tiles = None if image is None else config.picture_text(*ready.grid(image))
            tokens += [token] if tiles is None else tokenizer.encode(tiles, allow_special=True)
    return ImagePrompt(tokens, images)


def preprocessing(config: Any) -> Preprocessing | TiledPreprocessing:
    """Return the preprocessing of pictures for models with this Config."""
    fields = vars(config.pixels)
    return TiledPreprocessing(**fields) if "tile" in fields else Preprocessing(**fields)


def in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose content is a list of parts, as templates of such models expect."""
    pictures = [{"type": "image"} for _ in message.get("images", ())]
    text = {"type": "text", "text": message.get("content") or ""}
    return {name: value for name, value in message.items() if name != "images"} | {"content": [*pictures, text]}


class InsertedImages:
    """Pictures among the tokens of a prompt, preprocessed to bytes.

    tokens: ids of the prompt, with a picture's token for each of its embeddings.
    """

    def __init__(self, prompt: ImagePrompt, config: Any):
        marks = sum(token == config.image_token for token in prompt.tokens)
        if len(prompt.images) > MOST_IMAGES:
            raise UserError(f"{len(prompt.images)} pictures were given, but a prompt takes at most {MOST_IMAGES}.")
        length = len(prompt.tokens) + marks * (config.image_tokens - 1)
        if length > config.context_length:  # checked before pictures take memory
            raise UserError(f"The prompt has {length} tokens, but the context is {config.context_length}: shorten it.")
        self._preprocessing = preprocessing(config)
        self._pixels = [tile for image in prompt.images for tile in self._preprocessing.tiles(image)]
        if marks != len(self._pixels):
            raise UserError(f"The prompt has places for {marks} pictures, and {len(self._pixels)} were given.")
        self._embeddings: Tensor | None = None
        self.tokens, self._identity, number = list[int](), list[int](), count()
        for token in prompt.tokens:
            marked = token == config.image_token
            times = config.image_tokens if marked else 1
            self.tokens += [token] * times
            self._identity += [_identity(self._pixels[next(number)]) if marked else token] * times
        self._places = [index for index, token in enumerate(self.tokens) if token == config.image_token]

    def identity(self, tokens: Sequence[int], start: int = 0) -> Sequence[int]:
        """Return the tokens for hashing key-value blocks, correct from index `start` on. A picture's tokens are
        replaced by a number of its content. Text after the prompt is returned without a copy."""
        if start >= len(self._identity):
            return tokens
        return [*self._identity, *answer] if (answer := tokens[len(self._identity) :]) else self._identity

    def between(self, model: Any, start: int, stop: int) -> tuple[list[int], Float[Tensor, "count dim"] | None]:
        """Return the indices, counted from `start`, of picture tokens between `start` and `stop`, and their embeddings.

        The embeddings are computed at the first call.
        """
        rows = [row for row, position in enumerate(self._places) if start <= position < stop]
        if not rows:
            return [], None
        if self._embeddings is None:
            self._embeddings = self._encode(model)
        return [self._places[row] - start for row in rows], self._embeddings[rows[0] : rows[-1] + 1]

    def _encode(self, model: Any) -> Float[Tensor, "tokens dim"]:
        """Return the embeddings of all pictures. Each is computed alone, so it does not depend on the others."""
        like: Tensor = next(model.parameters())
        ready = (self._preprocessing.normalised(pixels[None].to(like.device)) for pixels in self._pixels)
        return torch.cat([model.encode_images(pixels.to(like.dtype))[0] for pixels in ready])


def _identity(pixels: UInt8[Tensor, "channels rows columns"]) -> int:
    """Return a negative number that identifies a picture's content. Ids of tokens are not negative."""
    digest = blake2b(pixels.numpy().tobytes(), digest_size=8).digest()
    return -1 - (int.from_bytes(digest, "big") >> 1)


def insert_images(prompt: ImagePrompt, model: nn.Module) -> InsertedImages:
    """Return the pictures of a prompt among its tokens. Raises `UserError` if the model does not read pictures."""
    config: Any = model.config
    if not sees(config) or not isinstance(model, SeeingModel):
        raise UserError(f"A {type(model).__name__} sees no pictures: choose a model that sees, such as a LLaVA.")
    return InsertedImages(prompt, config)
