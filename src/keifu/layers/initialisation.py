"""Weight initialisation by kind of layer."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from keifu.layers.linear import JoinedLinear


def normal_(model: nn.Module, std: float = 0.02) -> None:
    """Draw all matrices and embeddings from N(0, std²), and set biases to 0. Norms are not changed (GPT-1, section
    4.1)."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def scale_residual_(blocks: Iterable[nn.Module]) -> None:
    """Divide the matrices whose outputs are added to the residual stream by √(2 · number of blocks) (GPT-2, section
    2.3). The attention and the feed-forward network of each block list these matrices as `residual_weights`."""
    listed: list[Any] = list(blocks)
    for block in listed:
        for weight in (*block.attention.residual_weights, *block.feedforward.residual_weights):
            weight.data.div_((2 * len(listed)) ** 0.5)


def xavier_(model: nn.Module, embedding_std: float) -> None:
    """Draw matrices and kernels from a uniform distribution with variance 2 / (inputs + outputs), each matrix of a
    joined layer separately; set biases to 0.

    (Glorot and Bengio, 2010.) Embeddings are drawn from N(0, embedding_std²).
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=embedding_std)
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            parts = module.parts if isinstance(module, JoinedLinear) else (len(module.weight),)
            for part in module.weight.data.split(list(parts)):
                nn.init.xavier_uniform_(part)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def zero_(model: nn.Module, *endings: str) -> None:
    """Set every weight and bias to 0 in modules whose names end so. A residual block that ends in such a module starts
    as the identity."""
    for name, module in model.named_modules():
        if name.endswith(endings):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)


def fan_in_(model: nn.Module) -> None:
    """Draw matrices from N(0, 1 / inputs), which keeps the variance of their inputs, and embeddings from N(0, 1)."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)


def truncated_normal_(model: nn.Module, std: float = 0.02) -> None:
    """Initialise like `normal_`, but without numbers beyond two standard deviations (as in BERT's released code, Devlin
    et al., 2018)."""
    normal_(model, std)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)


def multihead_(model: nn.Module) -> None:
    """Initialise attention like torch.nn.MultiheadAttention: q, k and v as one Glorot matrix, biases 0. Everything else
    keeps torch's initialisation."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith((".attention.qkv", ".attention.out")):
            if isinstance(module, JoinedLinear):
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
