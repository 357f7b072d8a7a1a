"""DALL-E 1 (Ramesh et al., 2021): autoregressive text-to-image: caption and picture are one sequence of tokens.

Paper: "Zero-Shot Text-to-Image Generation"; a discrete autoencoder (8,192 entries, 32 x 32 of them for 256 x 256
pixels, 3 million steps), then a decoder of 12 B parameters over 256 text and 1,024 picture tokens with row, column and
window attention; losses weighted 1/8 and 7/8, AdamW at 4.5e-4 with betas 0.9 and 0.96, weight decay 0.045, gradients
clipped at 4, 430,000 steps of 1,024 pairs, a moving average with 0.999; of 512 pictures the one is shown that CLIP
likes best. Here, in one command and in parts: the autoencoder (512 entries, 16 x 16 for 64 x 64), a CLIP of the same
captions (or --clip RUN), whose tokenizer reads the texts and which ranks pictures, and a small decoder. Left out: BPE
dropout.
Command: keifu train dalle --data emoji
Cost: 85 minutes of training by default, of which each part's are an option, and a few for samples; a part's steps are
fixed before it starts. What a stopped run lacks, --resume goes on with.
Expected: see docs/results.md, "Emoji from text: what latents, embeddings and tokens bought".
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keifu.data.images.batches import ImageBatches
from keifu.data.images.dataset import ImageSplit
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.devices import choose
from keifu.errors import UserError
from keifu.generation.images.autoregressive import AutoregressivePipeline, real_tokens
from keifu.generation.images.pixel_diffusion import ImageRequest
from keifu.layers.meta import on_meta
from keifu.models.dalle import dalle, discrete_vae
from keifu.recipes.images import common, text_encoder
from keifu.recipes.images import discrete_vae as _discrete_vae
from keifu.recipes.images.common import TextToImageTask, is_resuming, read_captioned
from keifu.training.loop import Summary, train
from keifu.training.objectives.autoencoders import ImageTokenBatches, TextImageLoss
from keifu.training.protocols import Data, Run
from keifu.training.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Recipe(_discrete_vae.DiscreteVAEOptions):
    """Options of the run."""

    dim: int = 256
    """Width of the decoder."""
    hidden_dim: int = 1024
    """Width of its feed-forward layers."""
    n_layers: int = 6
    """Its blocks."""
    n_heads: int = 4
    """Heads of each attention."""
    kernel: int = 11
    """The side of the local window of the last block's attention."""
    sparse: bool = True
    """Sparse attention by row, column or window; --no-sparse: full causal attention."""
    text_weight: float = TextImageLoss.text_weight
    """Weight of the text's loss; the image's has the rest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_weight > 1:
            raise UserError(f"text_weight is a share from 0 to 1, and it is {self.text_weight}.")


def prepare(recipe: Recipe, out: Path, resume: bool) -> TextToImageTask:
    """Trains CLIP and the autoencoder, or finds them again, and builds the decoder. What cannot be is said before
    anything is trained."""
    parts = read_captioned(recipe)
    vae = recipe.vae(parts.train.shape[0])
    with on_meta():
        planned = dalle.build(model_config(recipe, recipe.codebook_size, 1, vae))
        planned.vae.check_size(*parts.train.shape[1:])
    towers, tokenizer = text_encoder.two_towers_of(recipe, out, resume)
    length = towers.config.context_length
    tokens = text_encoder.caption_tokens(tokenizer, length, parts, recipe.languages, recipe.truncate)
    coder = _discrete_vae.discrete_vae_of(recipe, parts, out, resume)
    torch.manual_seed(recipe.seed)
    model = dalle.build(model_config(recipe, tokenizer.vocab_size, length, vae))
    model.vae.load_state_dict(coder.state_dict())
    model.vae.requires_grad_(False)
    model.to(choose())
    data = _data(recipe, parts, tokens, tokenizer, model)
    return TextToImageTask(
        model, AutoregressivePipeline(model, tokenizer), parts, data, TextImageLoss(recipe.text_weight)
    )


def model_config(recipe: Recipe, vocab_size: int, context_length: int, vae: discrete_vae.Config) -> dalle.Config:
    """The whole model's Config."""
    if recipe.dim % recipe.n_heads:
        raise UserError(f"dim {recipe.dim} does not part into {recipe.n_heads} heads: change one of the two.")
    return dalle.Config(
        vocab_size, context_length, recipe.dim, recipe.hidden_dim, recipe.n_layers, recipe.n_heads,
        kernel=recipe.kernel, sparse=recipe.sparse, vae=vae,
    )  # fmt: skip


def _data(
    recipe: Recipe, parts: ImageSplit, tokens: list[torch.Tensor | None], tokenizer: Tokenizer, model: dalle.Dalle
) -> Data:
    """Batches of captions and entries, computed here, once."""
    batches: Any = ImageBatches(parts.train, parts.validation, recipe.batch_size, recipe.seed, None, *tokens)
    codes = [
        _discrete_vae.encode_dataset(model.vae, part) if len(part) else None for part in (parts.train, parts.validation)
    ]
    assert codes[0] is not None
    return ImageTokenBatches(batches, codes[0], codes[1], lambda ids: real_tokens(ids, tokenizer.eos_id))


def settings(recipe: Recipe, steps: int) -> Settings:
    """The training loop's settings for so many steps of the decoder: the paper's betas, decay and clipping."""
    return common.image_settings(recipe, steps, recipe.budget, weight_decay=0.045, betas=(0.9, 0.96), clip=4.0)


def run(recipe: Recipe, out: Path, resume: bool) -> Summary:
    """Trains all parts into `out`, which keifu draw reads afterwards."""
    task = prepare(recipe, out, resume)
    resume, request = is_resuming(out, resume), ImageRequest(seed=recipe.seed, text=recipe.prompts[0])
    steps = common.steps_for(recipe.budget, out, resume, task.model, task.objective, task.data, settings(recipe, 1000))
    common.show(out, {"Autoencoder": _discrete_vae.FOLDER, "CLIP": text_encoder.FOLDER})
    summary = train(
        task.model, task.objective, task.data, settings(recipe, steps), describe(recipe, task, out, resume),
        sample=task.sampler(recipe, request), save=task.save,
    )  # fmt: skip
    ranked = recipe.clip or out / text_encoder.FOLDER
    print(f'The model is in {out}: keifu draw {out} "{recipe.prompts[0]}" --best-of 16 --clip {ranked} -o picture.png')
    return summary


def describe(recipe: Recipe, task: TextToImageTask, out: Path, resume: bool) -> Run:
    """The run for the training loop: what decides its result beside the settings, and what its report says."""
    decoder = nn.ModuleList(part for name, part in task.model.named_children() if name != "vae")
    return common.describe_run(
        recipe, out, resume, task.parts.train, ("data", "languages", "truncate", "text_weight"),
        {"model": asdict(task.model.config)}, title=f"DALL-E learns to draw “{Path(recipe.data).stem}” from text",
        paper="Ramesh et al., Zero-Shot Text-to-Image Generation (2021)",
        **common.parameters_of({"autoencoder": task.model.vae, "decoder": decoder}),
    )  # fmt: skip
