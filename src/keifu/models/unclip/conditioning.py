"""Conditioning of unCLIP's decoder (Ramesh et al., 2022, section 2.1): CLIP's image embedding is added to the timestep
embedding, and projected to tokens before those of the caption.

Axes: batch, length = tokens of a caption, embedding = numbers of CLIP's embeddings.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keifu.layers.linear import Linear
from keifu.models.hf import config as hf

Embedding = Float[Tensor, "batch embedding"]


@dataclass(frozen=True)
class Config:
    """The defaults are those of Karlo. n_tokens: number of tokens made from the image embedding. The sizes are in
    unclip.py, with the whole model."""

    n_tokens: int = 4
    embedding_dim: int = 768
    time_dim: int = 1280
    context_dim: int = 1536


class Conditions(nn.Module):
    """Projections of CLIP's embeddings and states for the decoder. none: the learned null image embedding, for
    classifier-free guidance."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, dim = config, config.embedding_dim
        self.none = nn.Parameter(torch.zeros(dim))
        self.image_time, self.caption_time = Linear(dim, config.time_dim), Linear(dim, config.time_dim)
        self.image_tokens = Linear(dim, config.n_tokens * config.context_dim)
        self.tokens, self.norm = Linear(dim, config.context_dim), nn.LayerNorm(config.context_dim)

    def forward(
        self, image: Embedding, caption: Embedding, tokens: Float[Tensor, "batch length embedding"]
    ) -> tuple[Float[Tensor, "batch time_dim"], Float[Tensor, "batch seen context_dim"]]:
        """Return the addition to the timestep embedding, and the context of attention, which has `n_tokens` tokens more
        than the caption.

        image, caption: CLIP's embeddings. tokens: CLIP's hidden states of the caption.
        """
        time = self.image_time(image) + self.caption_time(caption)
        of_image = self.image_tokens(image).unflatten(-1, (-1, self.config.n_tokens)).mT
        return time, torch.cat([of_image, self.norm(self.tokens(tokens))], 1)


def build(config: Config) -> Conditions:
    """Build the projections with PyTorch's default initialisation, and zeros for the null image embedding."""
    return Conditions(config)


WEIGHT_NAMES = {
    "none": "learned_classifier_free_guidance_embeddings",
    "image_time": "clip_image_embeddings_project_to_time_embeddings",
    "caption_time": "embedding_proj",
    "image_tokens": "clip_extra_context_tokens_proj",
    "tokens": "encoder_hidden_states_proj",
    "norm": "text_encoder_hidden_states_norm",
}
MODEL_TYPES = {"UnCLIPTextProjModel": "UnCLIPTextProjModel"}
KEIFU_TYPE = "keifu_unclip_conditions"
FILES = ("config.json", "diffusion_pytorch_model.safetensors")
WRITES_TEXT = False

FIELDS: hf.Fields = {
    "n_tokens": hf.Field("clip_extra_context_tokens", 4),
    "embedding_dim": hf.Field("clip_embeddings_dim", 768),
    "time_dim": "time_embed_dim",
    "context_dim": "cross_attention_dim",
}
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)
