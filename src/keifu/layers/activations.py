"""Activation functions by name. Each acts elementwise."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from keifu.errors import UserError, require_known

Activation = Callable[[Tensor], Tensor]

STEP_HAS_NO_GRADIENT = (
    "A network of step units cannot learn by gradient: the step's derivative is zero everywhere, so no error reaches "
    "the weights before it; choose another activation, such as sigmoid or relu, or train one step neuron by the "
    "perceptron rule (keifu train perceptron)."
)


class HardStep(torch.autograd.Function):
    """1 if x ≥ 0, else 0. A backward pass through it is an error, not a silent zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise UserError(STEP_HAS_NO_GRADIENT)


def step(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return 1 if x ≥ 0, else 0: the threshold unit of McCulloch and Pitts (1943) and Rosenblatt (1958).

    Raises UserError, with the reason, if a gradient is computed.
    """
    return HardStep.apply(x)


def identity(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return x itself: a linear unit."""
    return x


def gelu_tanh(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return GELU approximated by tanh (Hendrycks and Gimpel, 2016): GPT-1, GPT-2. If compiled, σ(2u) replaces the
    equal (1 + tanh u) / 2: torch.compile's code computes it three times as fast."""
    if torch.compiler.is_compiling():
        wide = x.float()
        return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return x · σ(1.702 x): the approximation of GELU that OpenAI's CLIP was trained with (Hendrycks and Gimpel,
    2016)."""
    if torch.is_grad_enabled():
        return x * torch.sigmoid(1.702 * x)
    return x.mul(1.702).sigmoid_().mul_(x)  # the same bits without three copies of a network's widest tensor


def relu2(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return max(x, 0)² (Primer: So et al., 2021); nanochat."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Activation] = {
    "step": step,
    "identity": identity,
    "sigmoid": torch.sigmoid,  # Rumelhart, Hinton and Williams (1986)
    "tanh": torch.tanh,
    "ramp": F.relu,
    "relu": F.relu,  # Nair and Hinton (2010)
    "relu2": relu2,
    "leaky_relu": F.leaky_relu,  # slope 0.01 below zero: Maas et al. (2013)
    "elu": F.elu,  # Clevert et al. (2015)
    "softplus": F.softplus,  # Dugas et al. (2000)
    "gelu": F.gelu,  # x · Φ(x) with the exact normal distribution: Hendrycks and Gimpel (2016); BERT
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "silu": F.silu,  # Elfwing et al. (2017); LLaMA
    "swish": F.silu,  # Ramachandran et al.'s name of the same function (2017)
    "mish": F.mish,  # Misra (2019)
}


def activation(name: str) -> Activation:
    """Return the activation function of that name. Raises UserError with the nearest name for an unknown one."""
    require_known("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]
