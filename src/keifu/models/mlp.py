"""The multi-layer network (Rumelhart, Hinton and Williams, 1986, "Learning representations by back-propagating
errors"): layers of units between input and output, all trained by the gradient of one error (backpropagation).

New: a smooth unit (in the paper, the sigmoid) replaces the step. So the chain rule propagates the error of the outputs
back through every layer, and the hidden units learn features. Two layers learn XOR, which one neuron cannot compute.

Axes: batch, dim = inputs, classes = outputs.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.activations import Activation, activation
from keifu.layers.dropout import Dropout
from keifu.models.hf import config as hf
from keifu.ranges import BELOW_ONE, check_value


@dataclass(frozen=True)
class Config:
    """Sizes and settings of a network.

    hidden_dims: the width of each hidden layer. output: the activation of the last layer. classes: names of the
    outputs; empty if they have none. dropout: share of hidden units dropped in a step.
    """

    dim: int = 2
    hidden_dims: tuple[int, ...] = (8,)
    n_outputs: int = 2
    activation: str = "sigmoid"
    output: str = "identity"
    dropout: float = 0.0
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        widths = (self.dim, *self.hidden_dims, self.n_outputs)
        if min(widths) < 1:
            raise UserError(f"Every layer of a network needs at least one unit, and the widths are {widths}.")
        check_value("dropout", self.dropout, BELOW_ONE)
        if self.classes and len(self.classes) != self.n_outputs:
            raise UserError(f"There are {self.n_outputs} outputs and {len(self.classes)} names for them.")


SIZES = {"mlp-symmetry": Config(dim=6, hidden_dims=(2,), n_outputs=1, output="sigmoid")}  # the paper's figure 1


class MLP(nn.Module):
    """Network output(W … activation(W x' + b) … + b), where x' = (x - mean) / scale.

    mean, scale (dim,): of the training data; they are saved with the network. They are 0 and 1 unless set.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        widths = (config.dim, *config.hidden_dims, config.n_outputs)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.activation, self.output = activation(config.activation), activation(config.output)
        self.dropouts = nn.ModuleList(Dropout(config.dropout) for _ in config.hidden_dims)
        self.register_buffer("mean", torch.zeros(config.dim))
        self.register_buffer("scale", torch.ones(config.dim))

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        x = (x - self.mean) / self.scale
        for layer, dropout in zip(self.layers[:-1], self.dropouts, strict=True):
            x = dropout(self.activation(layer(x)))
        return self.output(self.layers[-1](x))

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the layers."""
        return self.layers

    @torch.inference_mode()
    def predict(self, x: Float[Tensor, "batch dim"]) -> Int[Tensor, "batch"]:
        """Return the class with the largest output, on the device of x. The network may be on another one."""
        return self(x.to(self.mean.device)).argmax(-1).to(x.device)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the outputs, or their numbers."""
        return self.config.classes or tuple(map(str, range(self.config.n_outputs)))

    @torch.inference_mode()
    def predict_proba(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        """Return each class's share of the decision: softmax of logits, or sigmoids divided by their sum."""
        outputs = self(x.to(self.mean)).float().to(x.device)
        if self.config.output == "identity":
            return outputs.softmax(-1)
        return outputs / outputs.sum(-1, keepdim=True).clamp_min(1e-9)


def build(config: Config) -> MLP:
    """Build a network with random weights ("to break symmetry"), scaled so that activations keep their variance in all
    layers."""
    model = MLP(config)
    gain = 1.0  # assumes inputs with variance 1
    for layer in model.layers:
        assert isinstance(layer, nn.Linear)
        nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))
        nn.init.zeros_(layer.bias)
        gain = forward_gain(model.activation)
    return model


def forward_gain(function: Activation) -> float:
    """Return 1/√E[f(z)²] for a standard normal z: with this gain, the sums in the next layer have variance 1 again.

    It is He et al.'s √2 (2015) for the ramp, generalised to any activation.
    """
    # on the CPU, also within a context of another device
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64, device="cpu")
    density = torch.exp(-z.square() / 2)
    return float((density.sum() / (density * function(z).square()).sum()).sqrt())


WEIGHT_NAMES = {"layers.*": "layers.*", "mean": "mean", "scale": "scale"}  # no other program has such a format
MODEL_TYPES = {"keifu_mlp": "MLP"}
WRITES_TEXT = False


FIELDS: hf.Fields = {
    **{name: name for name in ("dim", "n_outputs", "activation", "output", "dropout")},
    "hidden_dims": hf.Field("hidden_dims", read=tuple, write=list),
    "classes": hf.Field(  # the same field as in transformers
        "id2label", read=lambda labels: tuple(labels[str(index)] for index in range(len(labels))),
        write=lambda names: {str(index): name for index, name in enumerate(names)},
    ),
}  # fmt: skip
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)
