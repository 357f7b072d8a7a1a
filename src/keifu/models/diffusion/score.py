"""Score network (Song and Ermon, 2019, "Generative Modeling by Estimating Gradients of the Data Distribution") for
points: a direction towards more probable points, at every place and every level of noise.

New was what the network learns: not a density, whose integral must be 1, but the gradient of its logarithm, the score,
which no constant changes. Data lie on thin sets where that gradient does not exist, so noise of many levels is added,
and one network learns the scores of all of them. Label and level are inputs, so the score of a class, the score of all
points and their difference (classifier-free guidance, Ho and Salimans, 2022) come from the same weights.

Axes: batch, dim = numbers of a point.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from keifu.ranges import Count, Positive, check

FREQUENCIES = 4  # of the sines and cosines of a level's logarithm
ENLARGED = 4  # factor of x in the first layer: the score changes over distances far below 1


@dataclass(frozen=True)
class Config:
    """Sizes of a network. The defaults are for points of a plane in two classes."""

    dim: Count = 2  # numbers of a point
    n_classes: int = 2  # classes of the points; the label n_classes means none
    hidden_dim: Count = 128  # width of the hidden layers
    n_layers: Count = 3  # hidden layers
    sigma_min: Positive = 0.01  # deviation of the least noise
    sigma_max: Positive = 160.0  # deviation of the most noise, that of DDPM's last timestep

    def __post_init__(self) -> None:
        check(self)


class ScoreNetwork(nn.Module):
    """Multi-layer network of a noisy point, its level of noise, and its class."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        widths = [config.dim + 1 + 2 * FREQUENCIES, *[config.hidden_dim] * config.n_layers]
        self.first = nn.Linear(widths[0], widths[1])
        self.label = nn.Embedding(config.n_classes + 1, widths[1])
        self.hidden = nn.ModuleList([nn.Linear(a, b) for a, b in zip(widths[1:-1], widths[2:], strict=True)])
        self.last = nn.Linear(widths[-1], config.dim)

    def forward(
        self, x: Float[Tensor, "batch dim"], sigma: Num[Tensor, " batch"], label: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch dim"]:
        """Return the score of points with noise of deviation sigma: x = point + sigma · noise. label: None for none.

        Inside, x is divided by √(1 + sigma²), so that its size hardly depends on the level: that is DDPM's x. Then it
        is enlarged.
        """
        if label is None:
            label = torch.full((len(x),), self.config.n_classes, device=x.device)
        sigma = sigma.to(x)[:, None]
        level = sigma.log() / 4
        waves = level * 2 ** torch.arange(FREQUENCIES, device=x.device).to(x)
        inputs = torch.cat([ENLARGED * x / (1 + sigma**2).sqrt(), level, waves.sin(), waves.cos()], 1)
        state = nn.functional.silu(self.first(inputs) + self.label(label))
        for layer in self.hidden:
            state = nn.functional.silu(layer(state))
        return -self.last(state) / sigma  # the last layer's output is the predicted noise


def build(config: Config) -> ScoreNetwork:
    """Build a network with PyTorch's initialisation of linear layers."""
    return ScoreNetwork(config)


SIZES = {"score-points": Config()}
WEIGHT_NAMES = {  # there is no published format
    "first": "first", "label": "label", "hidden.*": "hidden.*", "last": "last",
}  # fmt: skip
WRITES_TEXT = False
