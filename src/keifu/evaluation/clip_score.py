"""How well pictures fit what was asked for, by a CLIP that looks at both; knows no model that draws.

Axes: picture, channels, height, width; there are as many texts as pictures.
"""

from collections.abc import Sequence

from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from keifu.data.tokenizers import Tokenizer
from keifu.errors import UserError
from keifu.evaluation.shared_space import embed_pictures, embed_texts

Bytes = UInt8[Tensor, "picture channels height width"]


def cosines(
    towers: nn.Module, tokenizer: Tokenizer, pictures: Bytes, texts: Sequence[str]
) -> Float[Tensor, "picture texts"]:
    """The cosine of each picture's point and each text's in CLIP's space."""
    if len(pictures) != len(texts):
        raise UserError(f"{len(pictures)} pictures need as many texts, and {len(texts)} were given.")
    seen = embed_pictures(towers, map(image, pictures))
    return seen @ embed_texts(towers, tokenizer, texts, cut=True).T


def image(picture: UInt8[Tensor, "channels height width"]) -> Image.Image:
    """One picture for what prepares it for a model."""
    shown = picture.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(shown[..., 0] if shown.shape[2] == 1 else shown)


def clip_scores(found: Float[Tensor, "picture texts"]) -> tuple[Float[Tensor, " picture"], Float[Tensor, " picture"]]:
    """CLIPScore without its factor of 2.5, in hundredths (Hessel et al., 2021, section 3): 100 · max(cosine, 0) of each
    picture with its own text, and the mean of the same with all other texts, which is what shuffled captions have."""
    scores, count = 100 * found.clamp(min=0), len(found)
    own = scores.diagonal()
    return own, (scores.sum(1) - own) / max(1, count - 1)


def best(found: Float[Tensor, "picture texts"], count: int) -> list[int]:
    """The pictures that fit the first text best, the best one first (DALL-E's reranking; Ramesh et al., 2021)."""
    return found[:, 0].argsort(descending=True, stable=True)[:count].tolist()
