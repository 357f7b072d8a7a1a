"""Weight initialisation by kind of layer."""

from collections.abc import Iterable

from torch import Tensor, nn

from keifu.layers.linear import JoinedLinear


def normal_(model: nn.Module, std: float = 0.02) -> None:
    """Draw all matrices and embeddings from N(0, std²), set biases to 0; norms stay 1 and 0 (GPT-1, section 4.1)."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def scale_residual_(weights: Iterable[Tensor], n_layers: int) -> None:
    """Divide the weights of the residual projections by √(2 · n_layers) (GPT-2, section 2.3).

    weights: as `keifu.layers.transformer.blocks.residual_weights` returns them.
    """
    for weight in weights:
        weight.data.div_((2 * n_layers) ** 0.5)


def xavier_(model: nn.Module, embedding_std: float) -> None:
    """Initialise matrices and kernels as uniform with variance 2 / (inputs + outputs), each part of a joined one by
    itself; biases 0.

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
    """Zero for every weight and bias of the modules whose names end so: a block that ends in one begins as nothing."""
    for name, module in model.named_modules():
        if name.endswith(endings):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)


def fan_in_(model: nn.Module) -> None:
    """Initialise matrices from N(0, 1 / inputs), so that they keep the size of what they read, and embeddings from N(0,
    1)."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)


def truncated_normal_(model: nn.Module, std: float = 0.02) -> None:
    """Initialise as `normal_`, but with no number beyond two deviations (the code released with BERT, Devlin et al.,
    2018)."""
    normal_(model, std)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)


def multihead_(model: nn.Module) -> None:
    """Initialise attention as torch.nn.MultiheadAttention does: q, k and v as one Glorot matrix, the other one as any
    Linear layer, biases 0. What else there is stays as torch's layers are."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith((".attention.qkv", ".attention.out")):
            if isinstance(module, JoinedLinear):
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
