"""The base class of models that generate images."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from jaxtyping import Float, Num
from torch import Tensor, nn

from keifu.layers.diffusion.noise_schedule import Noise

Pictures = Float[Tensor, "batch colours rows columns"]
Latents = Float[Tensor, "sampled channels height width"]
# of the networks
Sample = Float[Tensor, "batch channels height width"]
Predicted = Float[Tensor, "batch out_channels height width"]
Time = Num[Tensor, "*batch"]  # timesteps: one for all samples, or one for each


class ImageModel(nn.Module):
    """Base class of models that generate images. `config` has the sizes; `check_size` raises UserError for other image
    sizes.

    draws: the kind of prediction. It determines the generation pipeline, and the methods and config fields that the
    pipeline uses.

    - pixels: `model(x, timestep [batch], label [batch] | None)` returns the target of `noise` for each row, with twice
      the channels for a learned variance. With an autoencoder, `coder`, x are its latents. config: size (height and
      width, or one number for both; None if unknown), channels, n_classes (0 without classes), null_class (whether the
      label n_classes means no condition), classes (names).
    - latents: `model(x, timestep, projected)` returns the target of `noise`. `project(encode_text(tokens))` is computed
      once for all steps. Without an autoencoder, `coder`, the latents are the pictures. config: size, channels (of
      latents), factor (pixels per latent, along a side), colours, masked (whether a mask and the masked image are
      additional input channels), context_length.
    - embeddings: `predict_embedding(x, timestep, caption)` is the prior, `prior.restored` reverses its normalisation,
      `encode_image` embeds pictures, `model(x, timestep, embed(image, caption))` is the decoder, and `enlarge` is
      super-resolution. config: size, small_size (before super-resolution), pixels (preprocessing; None without an image
      encoder), prior_noise, decoder_noise, upsampling_noise (None without), colours, embedding_dim, context_length,
      prior (None without).
    - tokens: `prefill(tokens, real)` returns the logits of a picture's first token and the state, `decode(codes, place,
      state)` the logits after a grid position, and `to_pictures(codes)` the pictures. config: grid, size, colours,
      context_length.
    - jumps: `model(x, time, span, label [batch] | None)` returns the mean velocity of x from time - span to time.
      config: size, channels, n_classes, null_class, classes.
    - once: `generator(noise [batch, latent_dim])` returns the pictures. config: size, channels, latent_dim.
    """

    draws: ClassVar[Literal["pixels", "latents", "embeddings", "tokens", "jumps", "once"]]
    config: Any
    check_size: Callable[..., None]

    @property
    def noise(self) -> Noise:
        """The noise schedule and prediction target of the training."""
        return self.config.noise

    def noise_of(self, size: tuple[int, int]) -> Noise:
        """Return the noise schedule for pictures of this height and width in pixels."""
        return self.noise

    @property
    def coder(self) -> Any:
        """The autoencoder in whose latents the model works; None if x is the picture."""
        return None

    @property
    def factor(self) -> int:
        """Pixels per number of x, along a side."""
        return 1

    @property
    def colours(self) -> int:
        """Channels of the pictures."""
        return self.config.channels

    def to_latents(self, pictures: Pictures, noise: Tensor | None = None) -> Latents:
        """Convert pictures with values from -1 to 1 to x without noise. An autoencoder's latents are scaled; they
        are samples from standard normal `noise` (for one picture, one sample per row of `noise`), or the means without
        it."""
        if self.coder is None:
            return pictures if noise is None else pictures.expand_as(noise)
        encoded = self.coder.encode(pictures)
        return self.coder.config.scale * (encoded.mean if noise is None else encoded.sample(noise))

    def to_pictures(self, latents: Latents) -> Pictures:
        """Convert x to pictures, about from -1 to 1."""
        return latents if self.coder is None else self.coder.decode(latents / self.coder.config.scale)
