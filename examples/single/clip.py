"""CLIP (Radford et al., 2021) in one file: pictures and captions in one space.

Run `python clip.py`. It learns from drawn shapes and 36 captions, such as "a small red disc". It then names pictures of
these captions, and of four combinations of the same words that it has not seen. It needs torch alone and takes under
two minutes on two cores.
"""

import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Tower:
    """Sizes of an encoder. Both have the same kind of blocks."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int


@dataclass
class Config:
    """Sizes. The defaults are ViT-B/32 as OpenAI released it."""

    vocab_size: int = 49_408
    context_length: int = 77
    text: Tower = None
    image_size: int = 224
    patch_size: int = 32
    image: Tower = None
    embedding_dim: int = 512


class Attention(nn.Module):
    """Multi-head self-attention. It is causal in the text encoder, and sees everything in the image encoder."""

    def __init__(self, tower, causal):
        super().__init__()
        self.n_heads, self.causal = tower.n_heads, causal
        self.qkv, self.out = nn.Linear(tower.dim, 3 * tower.dim), nn.Linear(tower.dim, tower.dim)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with x · sigmoid(1.702 x), a fast GELU, between them."""

    def __init__(self, tower):
        super().__init__()
        self.up, self.down = nn.Linear(tower.dim, tower.hidden_dim), nn.Linear(tower.hidden_dim, tower.dim)

    def forward(self, x):
        hidden = self.up(x)
        return self.down(hidden * torch.sigmoid(1.702 * hidden))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x))."""

    def __init__(self, tower, causal):
        super().__init__()
        self.attention, self.feedforward = Attention(tower, causal), FeedForward(tower)
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(tower.dim), nn.LayerNorm(tower.dim)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.feedforward(self.feedforward_norm(x))


class TextEncoder(nn.Module):
    """GPT-2's layers. The state at the end token represents the caption."""

    def __init__(self, config):
        super().__init__()
        dim = config.text.dim
        self.embedding, self.positions = nn.Embedding(config.vocab_size, dim), nn.Embedding(config.context_length, dim)
        self.blocks = nn.ModuleList(Block(config.text, causal=True) for _ in range(config.text.n_layers))
        self.norm, self.projection = nn.LayerNorm(dim), nn.Linear(dim, config.embedding_dim, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.01)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        ends = tokens.argmax(-1)  # the end token has the highest id
        return self.projection(self.norm(x)[torch.arange(len(x)), ends])


class PatchEmbedding(nn.Module):
    """A picture as a sequence: a class token, then one token for each patch, plus learned positions."""

    def __init__(self, config):
        super().__init__()
        dim, patch = config.image.dim, config.patch_size
        self.patches = nn.Conv2d(3, dim, patch, patch, bias=False)
        self.whole = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.positions = nn.Embedding((config.image_size // patch) ** 2 + 1, dim)
        nn.init.normal_(self.positions.weight, std=dim**-0.5)

    def forward(self, pixels):
        x = self.patches(pixels).flatten(2).mT
        return torch.cat([self.whole.expand(len(x), 1, -1), x], 1) + self.positions.weight


class ImageEncoder(nn.Module):
    """A vision Transformer. The state of the class token represents the picture."""

    def __init__(self, config):
        super().__init__()
        dim = config.image.dim
        self.embedding, self.first_norm, self.norm = PatchEmbedding(config), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(config.image, causal=False) for _ in range(config.image.n_layers))
        self.projection = nn.Linear(dim, config.embedding_dim, bias=False)

    def forward(self, pixels):
        x = self.first_norm(self.embedding(pixels))
        for block in self.blocks:
            x = block(x)
        return self.projection(self.norm(x[:, 0]))


class Clip(nn.Module):
    """The two encoders, and the logarithm of the scale of the logits."""

    def __init__(self, config):
        super().__init__()
        self.text, self.image = TextEncoder(config), ImageEncoder(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, pixels, tokens):
        """Return the scaled cosine of every picture and every caption: [pictures, captions]."""
        images, texts = F.normalize(self.image(pixels), dim=-1), F.normalize(self.text(tokens), dim=-1)
        return self.logit_scale.exp() * images @ texts.T


def contrastive_loss(logits):
    """Return the mean cross-entropy of finding each picture's caption, and each caption's picture, in the batch."""
    pairs = torch.arange(len(logits))
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


COLOURS = {"red": (1, 0, 0), "green": (0, 0.8, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "white": (1, 1, 1)}
SHAPES = ("disc", "square", "cross", "ring")
SIZES = ("small", "large")
WORDS = ["<pad>", "a", *SIZES, *COLOURS, *SHAPES, "<end>"]
CAPTIONS = [("a", size, colour, shape) for size in SIZES for colour in COLOURS for shape in SHAPES]
UNSEEN = [CAPTIONS.index(("a", size, *pair)) for size in SIZES for pair in (("red", "ring"), ("blue", "cross"))]


def draw(caption, size=24):
    """Draw the shape that a caption names at a random place on grey noise: [3, size, size], from -1 to 1."""
    _, large, colour, shape = caption
    radius = (3.0 if large == "small" else 6.0) + torch.rand(())
    down, right = radius + (size - 1 - 2 * radius) * torch.rand(2)
    y, x = (torch.arange(size)[:, None] - down).abs(), (torch.arange(size)[None] - right).abs()
    far, edge = (y**2 + x**2).sqrt(), torch.maximum(y, x)
    inside = {
        "disc": far < radius, "square": edge < radius * 0.9, "cross": (torch.minimum(y, x) < 1) & (edge < radius),
        "ring": (far - radius).abs() < 1.2,
    }[shape]  # fmt: skip
    noise = 0.2 * torch.rand(3, size, size)
    return 2 * torch.where(inside, torch.tensor(COLOURS[colour])[:, None, None], noise) - 1


def main(steps=2500, batch_size=36):
    """Train on 36 of 40 captions, and test on the four that were left out."""
    torch.manual_seed(0)
    tokens = torch.tensor([[*(WORDS.index(word) for word in caption), len(WORDS) - 1] for caption in CAPTIONS])
    tower = Tower(dim=64, hidden_dim=128, n_layers=2, n_heads=4)
    model = Clip(Config(len(WORDS), 5, tower, image_size=24, patch_size=4, image=tower, embedding_dim=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    seen = [index for index in range(len(CAPTIONS)) if index not in UNSEEN]
    for step in range(1, steps + 1):
        batch = [seen[i] for i in torch.randperm(len(seen))[:batch_size].tolist()]
        loss = contrastive_loss(model(torch.stack([draw(CAPTIONS[i]) for i in batch]), tokens[batch]))
        optimizer.param_groups[0]["lr"] = 2e-3 * min(step / 30, 1.02 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 250 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    for name, group in (("seen", seen), ("unseen", UNSEEN)):
        truth = torch.tensor(group).repeat_interleave(20)
        pictures = torch.stack([draw(CAPTIONS[i]) for i in truth])
        with torch.no_grad():
            right = model(pictures, tokens).argmax(-1) == truth
        print(f"{name} captions: {right.float().mean():.1%} of {len(truth)} pictures get their name, of 40 names")


if __name__ == "__main__":
    print(__doc__.strip()) if "--help" in sys.argv else main()
