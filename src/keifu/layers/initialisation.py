"""How weights are drawn before training; knows the kinds of layers, no model."""

from torch import nn


def normal_(model: nn.Module, std: float = 0.02) -> None:
    """All matrices and embeddings from N(0, std²), all biases 0; norms stay 1 and 0 (GPT-1, section 4.1)."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def scale_residual_(model: nn.Module, n_layers: int) -> None:
    """Divides what writes to the residual stream by √(2 · n_layers), its number of writers (GPT-2, section 2.3)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith((".attention.out", ".feedforward.down")):
            module.weight.data.div_((2 * n_layers) ** 0.5)
