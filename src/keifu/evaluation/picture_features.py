"""Pictures as rows of numbers by which sets of them are compared: Inception's, or those of a random network.

It knows no data set and no model that draws. Axes: picture, channels (1 or 3), height, width, dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from keifu.data.images import signed
from keifu.data.progress import counting
from keifu.evaluation.inception import inception

WIDTHS = (3, 32, 64, 96, 128)
SEED = 0
PAPERS, OWN = ("FID", "KID"), ("Fréchet distance", "kernel distance")


@dataclass(frozen=True)
class Extractor:
    """What makes features, with its name, and what the two distances are called by them.

    Figures by different ones cannot be compared.
    """

    name: str
    network: Callable[[Tensor], Tensor]
    titles: tuple[str, str]

    @torch.inference_mode()
    def __call__(
        self, pictures: UInt8[Tensor, "picture channels height width"], batch_size: int = 64
    ) -> Float[Tensor, "picture dim"]:
        """The features of each picture, float32; grey ones are given as colour."""
        found = []
        with counting("Looking at pictures", len(pictures), "pictures") as advance:
            for first in range(0, len(pictures), batch_size):
                part = pictures[first : first + batch_size]
                found.append(self.network(signed(part.expand(-1, 3, -1, -1))))
                advance(first + len(part))
        return torch.cat(found)


class RandomFeatures(nn.Module):
    """Four stages of fixed random 3 x 3 convolutions; features are the means of each over the whole picture.

    Nothing is learned: what is compared is how often edges, colours and their combinations come, at four scales, and
    not what is drawn. Weights as of He et al. (2015), from seed 0.
    """

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(SEED)
        self.kernels = [
            torch.randn(after, before, 3, 3, generator=generator) * (2 / (9 * before)) ** 0.5
            for before, after in pairwise(WIDTHS)
        ]
        self.biases = [0.2 * torch.randn(after, generator=generator) for after in WIDTHS[1:]]
        self.dim = sum(WIDTHS[1:])

    def forward(self, x: Float[Tensor, "picture 3 height width"]) -> Float[Tensor, "picture dim"]:
        """The features of pictures whose numbers go from -1 to 1."""
        means = []
        for kernel, bias in zip(self.kernels, self.biases, strict=True):
            x = F.conv2d(F.pad(x, (1, 1, 1, 1), "replicate"), kernel, bias).relu()
            means.append(x.mean((2, 3)))
            x = F.avg_pool2d(x, 2) if min(x.shape[2:]) > 1 else x
        return torch.cat(means, 1)


def extractor() -> Extractor:
    """Inception's features where its weights are at hand, else those of the random network."""
    network = inception()
    if network is not None:
        return Extractor("Inception-v3 (2015), 2048 features", network, PAPERS)
    network = RandomFeatures()
    return Extractor(f"random convolutions, seed {SEED}, {network.dim} features", network, OWN)
