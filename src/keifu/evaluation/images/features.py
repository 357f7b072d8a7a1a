"""Image features for FID and similar metrics: Inception-v3, or a random network.

The Inception-v3 of 2015 used for FID, up to its last mean of 2,048 numbers: Szegedy et al., "Rethinking the Inception
Architecture" (2016). TensorFlow's graph differs from torchvision's network in two ways: average pooling ignores the
padding, and the last block uses max pooling. No package contains the weights. They are read from a file that the user
provides: safetensors with the names of pytorch-fid's pt_inception-2015-12-05-6726825d.pth, which are torchvision's.

Axes: picture, channels (1 or 3), height, width, dim.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from keifu.data.images.io import to_signed
from keifu.data.progress import counting
from keifu.errors import UserError
from keifu.folders import cache

FILE = "inception-2015.safetensors"
SIDE, EPSILON = 299, 1e-3
BATCH = 64  # pictures in a pass
ROUNDS = {  # branches of each kind of block, each a chain of convolutions; "avg", "max" and "reduce" are poolings
    "stem": ("Conv2d_1a_3x3/2 Conv2d_2a_3x3/1 Conv2d_2b_3x3 reduce Conv2d_3b_1x1 Conv2d_4a_3x3/1 reduce",),
    "a": ("branch1x1", "branch5x5_1 branch5x5_2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3", "avg branch_pool"),
    "b": ("branch3x3/2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3/2", "reduce"),
    "c": ("branch1x1", "branch7x7_1 branch7x7_2 branch7x7_3",
          "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5", "avg branch_pool"),
    "d": ("branch3x3_1 branch3x3_2/2", "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4/2", "reduce"),
    "e": ("branch1x1", "branch3x3_1 branch3x3_2a", "branch3x3_1 branch3x3_2b",
          "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3b",
          "avg branch_pool"),
}  # fmt: skip
ROUNDS["f"] = (*ROUNDS["e"][:-1], "max branch_pool")
BLOCKS = {  # prefix of a block's weights, and its kind
    "": "stem", "Mixed_5b.": "a", "Mixed_5c.": "a", "Mixed_5d.": "a", "Mixed_6a.": "b", "Mixed_6b.": "c",
    "Mixed_6c.": "c", "Mixed_6d.": "c", "Mixed_6e.": "c", "Mixed_7a.": "d", "Mixed_7b.": "e", "Mixed_7c.": "f",
}  # fmt: skip
POOLS = {
    "avg": partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
    "max": partial(F.max_pool2d, kernel_size=3, stride=1, padding=1),
    "reduce": partial(F.max_pool2d, kernel_size=3, stride=2),
}


class Inception:
    """Inception network with each normalisation merged into the convolution before it.

    A convolution keeps the picture's size unless a stride follows its name: /1 and /2 use no padding.
    """

    def __init__(self, weights: dict[str, Tensor]):
        steps = [block + step for block, block_type in BLOCKS.items() for step in " ".join(ROUNDS[block_type]).split()]
        names = {step.partition("/")[0] for step in steps if step.rpartition(".")[2] not in POOLS}
        self.folded = {name: _fold_batch_norm(weights, name) for name in names}

    def __call__(self, x: Float[Tensor, "picture 3 height width"]) -> Float[Tensor, "picture 2048"]:
        """Return the features of pictures with values from -1 to 1. They are first resized to 299 x 299."""
        x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False)
        for block, block_type in BLOCKS.items():
            x = torch.cat([self._chain(x, branch, block) for branch in ROUNDS[block_type]], 1)
        return x.mean((2, 3))

    def _chain(self, x: Tensor, chain: str, prefix: str) -> Tensor:
        for step in chain.split():
            name, _, stride = step.partition("/")
            if name in POOLS:
                x = POOLS[name](x)
                continue
            kernel, bias = self.folded[prefix + name]
            edge = (0, 0) if stride else (kernel.shape[2] // 2, kernel.shape[3] // 2)
            x = F.conv2d(x, kernel, bias, int(stride or 1), edge).relu()
        return x


def _fold_batch_norm(weights: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    scale = weights[f"{name}.bn.weight"] / (weights[f"{name}.bn.running_var"] + EPSILON).sqrt()
    bias = weights[f"{name}.bn.bias"] - weights[f"{name}.bn.running_mean"] * scale
    return weights[f"{name}.conv.weight"] * scale[:, None, None, None], bias


def place() -> Path:
    """Return the path of the weights' file."""
    return cache() / FILE


def inception() -> Inception:
    """Load the network. Raises `UserError` for a file without the weights."""
    try:
        return Inception(load_file(place()))
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{place()} does not hold Inception's weights: {error} is missing or damaged.") from error


WIDTHS = (3, 32, 64, 96, 128)
SEED = 0
PAPERS, OWN = ("FID", "KID"), ("Fréchet distance", "kernel distance")


class Extractor(NamedTuple):
    """Feature extractor, with its name and the names of the two distances computed from it.

    Figures of different extractors cannot be compared.
    """

    name: str
    network: Callable[[Tensor], Tensor]
    titles: tuple[str, str]

    @torch.inference_mode()
    def __call__(self, pictures: UInt8[Tensor, "picture channels height width"]) -> Float[Tensor, "picture dim"]:
        """Return the features of each picture as float32. Grey pictures are converted to colour."""
        features = []
        with counting("Looking at pictures", len(pictures), "pictures") as advance:
            for part in pictures.split(BATCH):
                features.append(self.network(to_signed(part.expand(-1, 3, -1, -1))))
                advance(sum(map(len, features)))
        return torch.cat(features)


class RandomFeatures(nn.Module):
    """Four stages of fixed random 3 x 3 convolutions. Features are the means of each output over the whole picture.

    Nothing is trained: the features measure how often edges, colours and their combinations occur at four scales, not
    the content of the image. Weights as in He et al. (2015), from seed 0.
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
        """Return the features of pictures with values from -1 to 1."""
        means = []
        for kernel, bias in zip(self.kernels, self.biases, strict=True):
            x = F.conv2d(F.pad(x, (1, 1, 1, 1), "replicate"), kernel, bias).relu()
            means.append(x.mean((2, 3)))
            x = F.avg_pool2d(x, 2) if min(x.shape[2:]) > 1 else x
        return torch.cat(means, 1)


def extractor() -> Extractor:
    """Return the Inception extractor if its weights are available, otherwise the random network."""
    if place().is_file():
        return Extractor("Inception-v3 (2015), 2048 features", inception(), PAPERS)
    network = RandomFeatures()
    return Extractor(f"random convolutions, seed {SEED}, {network.dim} features", network, OWN)
