"""Latent diffusion (Rombach et al., 2022) in one file: an autoencoder, and diffusion in its latents from words.

Run `python latent_diffusion.py`. It learns to compress drawn shapes of 24 x 24 pixels to 6 x 6 latents, then to draw
latents from captions such as "large red ring", by cross-attention to the words. It writes latent_diffusion.png: above,
pictures and their reconstructions; below, pictures drawn from captions. Torch alone, 90 seconds on two cores.
"""

import math
import struct
import sys
import zlib
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x))) + time))). The autoencoder has no time."""

    def __init__(self, channels, out, groups, time_dim=None, eps=1e-6):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, channels, eps), nn.Conv2d(channels, out, 3, padding=1)
        self.time = nn.Linear(time_dim, out) if time_dim else None
        self.norm2, self.conv2 = nn.GroupNorm(groups, out, eps), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x, time=None):
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = hidden if time is None else hidden + self.time(time)[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class Attention(nn.Module):
    """Multi-head attention to the same tokens (`qkv`), or to a context (`q`, `kv`)."""

    def __init__(self, dim, n_heads, context_dim=None, bias=False):
        super().__init__()
        sizes = {"qkv": (dim, 3 * dim)} if context_dim is None else {"q": (dim, dim), "kv": (context_dim, 2 * dim)}
        for name, size in sizes.items():
            self.add_module(name, nn.Linear(*size, bias=bias))
        self.n_heads, self.out = n_heads, nn.Linear(dim, dim)

    def forward(self, x, context=None):
        parts = self.qkv(x).chunk(3, -1) if context is None else (self.q(x), *self.kv(context).chunk(2, -1))
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in parts)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PixelAttention(nn.Module):
    """x + attention(norm(x)): each pixel looks at all pixels."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm, self.attention = nn.GroupNorm(groups, channels, 1e-6), Attention(channels, 1, bias=True)

    def forward(self, x):
        return x + self.attention(self.norm(x).flatten(2).mT).mT.unflatten(2, x.shape[2:])


class Autoencoder(nn.Module):
    """A variational autoencoder: pictures to the mean and log-variance of latents, and latents to pictures."""

    def __init__(self, channels=3, latents=4, widths=(16, 32, 32), groups=8):
        super().__init__()
        top, block, up = widths[-1], partial(ResidualBlock, groups=groups), []
        down = [nn.Conv2d(channels, widths[0], 3, padding=1), block(widths[0], widths[0])]
        for narrow, wide in zip(widths, widths[1:]):
            down += [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(narrow, narrow, 3, stride=2), block(narrow, wide)]
            wider = nn.Upsample(scale_factor=2.0), nn.Conv2d(wide, wide, 3, padding=1)
            up = [*wider, block(wide, narrow), block(narrow, narrow), *up]
        middles = [[block(top, top), PixelAttention(top, groups), block(top, top)] for _ in range(2)]

        def end(width, out):
            return nn.GroupNorm(groups, width, 1e-6), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1)

        self.encoder = nn.Sequential(*down, *middles[0], *end(top, 2 * latents), nn.Conv2d(2 * latents, 2 * latents, 1))
        up = [*middles[1], block(top, top), block(top, top), *up, *end(widths[0], channels)]
        self.decoder = nn.Sequential(nn.Conv2d(latents, latents, 1), nn.Conv2d(latents, top, 3, padding=1), *up)


class Transformer(nn.Module):
    """x + last(block(first(norm(x)))): self-attention of pixels, cross-attention to the words, a gated feed-forward."""

    def __init__(self, dim, n_heads, context_dim, groups):
        super().__init__()
        self.norm, self.first = nn.GroupNorm(groups, dim, 1e-6), nn.Conv2d(dim, dim, 1)
        self.attention_norm, self.attention = nn.LayerNorm(dim), Attention(dim, n_heads)
        self.cross_attention_norm, self.cross_attention = nn.LayerNorm(dim), Attention(dim, n_heads, context_dim)
        self.feedforward_norm, self.up_gate = nn.LayerNorm(dim), nn.Linear(dim, 8 * dim)
        self.down, self.last = nn.Linear(4 * dim, dim), nn.Conv2d(dim, dim, 1)

    def forward(self, pixels, context):
        x = self.first(self.norm(pixels)).flatten(2).mT
        x = x + self.attention(self.attention_norm(x))
        x = x + self.cross_attention(self.cross_attention_norm(x), context)
        up, gate = self.up_gate(self.feedforward_norm(x)).chunk(2, -1)
        x = x + self.down(up * F.gelu(gate))
        return pixels + self.last(x.mT.unflatten(2, pixels.shape[2:]))


class Denoiser(nn.Module):
    """A U-Net of one resolution that predicts the noise in latents, from a timestep and the words."""

    def __init__(self, channels=4, dim=64, n_heads=4, context_dim=32, groups=8):
        super().__init__()
        self.frequencies = (-math.log(10_000) * torch.arange(dim // 2) / (dim // 2)).exp()
        self.time = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, 4 * dim), nn.SiLU())
        self.first, self.last = nn.Conv2d(channels, dim, 3, padding=1), nn.Conv2d(dim, channels, 3, padding=1)
        widths = (dim, dim, dim, 2 * dim, 2 * dim)
        self.residuals = nn.ModuleList(ResidualBlock(width, dim, groups, 4 * dim, 1e-5) for width in widths)
        self.transformers = nn.ModuleList(Transformer(dim, n_heads, context_dim, groups) for _ in range(4))
        self.norm = nn.GroupNorm(groups, dim, 1e-5)

    def forward(self, x, timestep, words):
        angles = timestep[:, None] * self.frequencies
        time = self.time(torch.cat([angles.cos(), angles.sin()], -1))
        first = self.first(x)
        down = self.transformers[0](self.residuals[0](first, time), words)
        x = self.transformers[1](self.residuals[1](down, time), words)
        x = self.residuals[2](x, time)  # below, each block also reads a state of the way down
        x = self.transformers[2](self.residuals[3](torch.cat([x, down], 1), time), words)
        x = self.transformers[3](self.residuals[4](torch.cat([x, first], 1), time), words)
        return self.last(F.silu(self.norm(x)))


COLOURS = {"red": (1, 0, 0), "green": (0, 0.8, 0), "blue": (0, 0.2, 1), "yellow": (1, 1, 0)}
WORDS = ["<nothing>", "small", "large", *COLOURS, "disc", "square", "ring"]


def draw(count, size=24):
    """Draw shapes in the middle of black, [count, 3, size, size] from -1 to 1; with captions, three word ids each."""
    words = torch.stack([torch.randint(*bounds, (count,)) for bounds in ((1, 3), (3, 7), (7, 10))], 1)
    x, radius = torch.arange(size) - (size - 1) / 2, (4 * words[:, 0] + torch.rand(count))[:, None, None]
    far, edge = (x**2 + x[:, None] ** 2).sqrt(), torch.maximum(x.abs(), x[:, None].abs())
    shapes = torch.stack([far < radius, edge < radius, (far - radius).abs() < 1.5], 1)
    inside = shapes[torch.arange(count), words[:, 2] - 7]
    return 2 * inside[:, None] * torch.tensor([*COLOURS.values()])[words[:, 1] - 3][:, :, None, None] - 1, words


def train(parameters, loss_of, steps, learning_rate=2e-3):
    """Take `steps` steps of Adam and print the loss ten times."""
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for step in range(1, steps + 1):
        loss = loss_of()
        optimizer.param_groups[0]["lr"] = learning_rate * min(step / 20, 1.02 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, steps // 10) == 0:
            print(f"  step {step}  loss {loss.item():.4f}")


def write_png(path, colours):
    """Write a picture [height, width, 3] with numbers from 0 to 1 as a PNG file."""
    rows = zlib.compress(b"".join(b"\0" + bytes(row) for row in (colours.clamp(0, 1) * 255).byte().flatten(1).tolist()))
    chunks = {b"IHDR": struct.pack(">2I5B", *colours.shape[1::-1], 8, 2, 0, 0, 0), b"IDAT": rows, b"IEND": b""}
    packed = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks.items()]
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


def main(autoencoder_steps=300, steps=800):
    """Train both parts, and draw 8 pictures from captions."""
    torch.manual_seed(0)
    autoencoder, denoiser, table = Autoencoder(), Denoiser(), nn.Embedding(len(WORDS), 32)
    alpha_bar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)

    def reconstruction():
        pictures, _ = draw(16)
        mean, log_variance = autoencoder.encoder(pictures).chunk(2, 1)
        latents = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        kl = (mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2
        return F.mse_loss(autoencoder.decoder(latents), pictures) + 1e-4 * kl

    def noise_error():
        (pictures, words), timestep = draw(32), torch.randint(1000, (32,))
        latents, noise = autoencoder.encoder(pictures)[:, :4].detach() * scale, torch.randn(32, 4, 6, 6)
        words = torch.where(torch.rand(32, 1) < 0.1, 0, words)  # for guidance
        left = alpha_bar[timestep][:, None, None, None]
        return F.mse_loss(denoiser(left.sqrt() * latents + (1 - left).sqrt() * noise, timestep, table(words)), noise)

    train(autoencoder.parameters(), reconstruction, autoencoder_steps)
    scale = 1 / autoencoder.encoder(draw(64)[0])[:, :4].detach().std()  # latents of variance 1
    train([*denoiser.parameters(), *table.parameters()], noise_error, steps)
    with torch.no_grad():
        (pictures, words), x, visited = draw(8), torch.randn(8, 4, 6, 6), torch.linspace(999, 0, 50).long()
        for t, after in zip(visited, [*alpha_bar[visited[1:]], torch.tensor(1.0)]):
            both = [denoiser(x, t.expand(8), table(w)) for w in (words, torch.zeros_like(words))]
            noise, left = both[1] + 2 * (both[0] - both[1]), alpha_bar[t]
            x = after.sqrt() * (x - (1 - left).sqrt() * noise) / left.sqrt() + (1 - after).sqrt() * noise
        rows = [pictures, autoencoder.decoder(autoencoder.encoder(pictures)[:, :4]), autoencoder.decoder(x / scale)]
    print("drawn: " + ", ".join(" ".join(WORDS[i] for i in row) for row in words.tolist()))
    grid = F.interpolate(torch.cat(rows), scale_factor=3.0).unflatten(0, (3, 8)).permute(0, 3, 1, 4, 2)
    write_png("latent_diffusion.png", (grid.reshape(3 * 72, 8 * 72, 3) + 1) / 2)


if __name__ == "__main__":
    print(__doc__.strip()) if "--help" in sys.argv else main()
