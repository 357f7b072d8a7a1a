"""The perceptron (Rosenblatt, 1958) and the multi-layer network (Rumelhart, Hinton and Williams, 1986) in one file.

Run `python neurons.py`. A perceptron learns AND and fails on XOR. Two layers learn XOR. A wider network then reads
drawn digits. It needs torch alone and takes a few seconds.
"""

import math
import sys

import torch
from torch import nn


class Perceptron:
    """Neuron with a hard threshold: it outputs 1 where w · x + b >= 0, and 0 elsewhere."""

    def __init__(self, dim):
        self.weight = torch.zeros(dim, dtype=torch.float64)
        self.bias = torch.zeros((), dtype=torch.float64)

    def __call__(self, x):
        return (x @ self.weight + self.bias >= 0).double()

    def learn(self, inputs, targets, most_passes=20):
        """Show the examples in turn. Return the number of corrections, and whether a pass had no mistake."""
        corrections = 0
        for _ in range(most_passes):
            mistakes = 0
            for x, target in zip(inputs, targets):
                error = target - self(x)  # 1, 0 or -1
                # The perceptron rule: move the plane towards the example, only where the output is wrong.
                self.weight += error * x
                self.bias += error
                mistakes += int(error != 0)
            corrections += mistakes
            if mistakes == 0:
                return corrections, True
        return corrections, False


class MLP(nn.Module):
    """Layers of smooth units: h = sigmoid(W h + b), and logits from the last layer."""

    def __init__(self, dim, hidden_dims, n_outputs):
        super().__init__()
        widths = [dim, *hidden_dims, n_outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))
        for layer in self.layers:
            # Different weights break the symmetry between units. This scale keeps sums near 1.
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.sigmoid(layer(x))
        return self.layers[-1](x)


@torch.no_grad()
def backpropagate(model, x, targets):
    """Return the gradients of the mean cross-entropy, by the chain rule, without autograd.

    The paper's idea is this loop: the error of a layer's inputs is the error of its outputs, times its weights,
    times the slope of the unit.
    """
    states = [x]
    for layer in model.layers[:-1]:
        states.append(torch.sigmoid(layer(states[-1])))
    logits = model.layers[-1](states[-1])

    error = logits.softmax(-1)
    error[torch.arange(len(x)), targets] -= 1
    error /= len(x)
    gradients = []
    for layer, state in zip(reversed(model.layers), reversed(states)):
        gradients = [error.T @ state, error.sum(0), *gradients]
        error = (error @ layer.weight) * state * (1 - state)  # the slope of the sigmoid is s (1 - s)
    return gradients


def train(model, x, targets, steps, learning_rate=0.02, batch_size=128, seed=0):
    """Train with Adam on random batches and return the last loss."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for _ in range(steps):
        batch = torch.randint(len(x), (min(batch_size, len(x)),), generator=generator)
        loss = nn.functional.cross_entropy(model(x[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


GLYPHS = """
.###. ..#.. .###. .###. #..#. ##### .###. ##### .###. .###.
#...# .##.. #...# #...# #..#. #.... #.... ....# #...# #...#
#...# ..#.. ...#. ..##. ##### ####. ####. ...#. .###. .####
#...# ..#.. ..#.. #...# ...#. ....# #...# ..#.. #...# ....#
.###. .###. ##### .###. ...#. ####. .###. .#... .###. .###.
""".split()


def draw_digits(count, seed):
    """Draw `count` noisy digits of 8 x 8 pixels, shifted by up to 3 pixels. Return them flat, with their labels."""
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.tensor([[[c == "#" for c in GLYPHS[10 * row + digit]] for row in range(5)] for digit in range(10)])
    labels = torch.randint(10, (count,), generator=generator)
    shifts = torch.randint(4, (count, 2), generator=generator)
    pictures = torch.zeros(count, 8, 8)
    for picture, label, (down, right) in zip(pictures, labels, shifts):
        picture[down : down + 5, right : right + 5] = shapes[label].float()
    noise = 0.25 * torch.randn(count, 8, 8, generator=generator)
    return (pictures + noise).flatten(1), labels


def main(steps=3000):
    """Run the three experiments and print what each one shows."""
    torch.manual_seed(0)
    inputs = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64)
    for name, targets in (("AND", [0, 0, 0, 1]), ("XOR", [0, 1, 1, 0])):
        corrections, learned = Perceptron(2).learn(inputs, torch.tensor(targets, dtype=torch.float64))
        outcome = "learned" if learned else "not learned: no line separates the classes"
        print(f"perceptron, {name}: {corrections} corrections, {outcome}")

    network = MLP(2, (4,), 2)
    targets = torch.tensor([0, 1, 1, 0])
    loss = train(network, inputs.float(), targets, steps=500, learning_rate=0.1)
    print(f"two layers, XOR: loss {loss:.3f}, outputs {network(inputs.float()).argmax(-1).tolist()}")

    x, labels = draw_digits(10_000, seed=1)
    test_x, test_labels = draw_digits(1000, seed=2)
    network = MLP(64, (128,), 10)
    by_hand = backpropagate(network, x[:32], labels[:32])
    nn.functional.cross_entropy(network(x[:32]), labels[:32]).backward()
    gap = max((a - p.grad).abs().max().item() for a, p in zip(by_hand, network.parameters()))
    print(f"backpropagation by hand and by autograd differ by at most {gap:.1e}")

    train(network, x, labels, steps, learning_rate=0.005)
    right = (network(test_x).argmax(-1) == test_labels).float().mean().item()
    # The baseline: the mean picture of each class, compared by distance.
    means = torch.stack([x[labels == digit].mean(0) for digit in range(10)])
    nearest = (torch.cdist(test_x, means).argmin(-1) == test_labels).float().mean().item()
    print(f"digits that it has not seen: {right:.1%} right; nearest mean picture: {nearest:.1%}")


if __name__ == "__main__":
    print(__doc__.strip()) if "--help" in sys.argv else main()
