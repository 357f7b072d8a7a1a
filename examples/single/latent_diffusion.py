"""Latent diffusion (Rombach et al., 2022) in one file: an autoencoder, and diffusion in its latents from words.

Run `python latent_diffusion.py`. It learns to compress drawn shapes of 24 x 24 pixels to 6 x 6 latents, then to draw
latents from captions such as "large red ring", by cross-attention to the words. It writes latent_diffusion.png: above,
pictures and their reconstructions; below, pictures drawn from captions. It needs torch alone.
"""

import math
import struct
import zlib

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
        self.n_heads, self.cross = n_heads, context_dim is not None
        if self.cross:
            self.q, self.kv = nn.Linear(dim, dim, bias=bias), nn.Linear(context_dim, 2 * dim, bias=bias)
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, context=None):
        parts = (self.q(x), *self.kv(context).chunk(2, -1)) if self.cross else self.qkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in parts)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PixelAttention(nn.Module):
    """x + attention(norm(x)): each pixel looks at all pixels."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm, self.attention = nn.GroupNorm(groups, channels, 1e-6), Attention(channels, 1, bias=True)

    def forward(self, x, context=None):
        return x + self.attention(self.norm(x).flatten(2).mT).mT.unflatten(2, x.shape[2:])


class Stage(nn.Module):
    """Residual blocks at one resolution, attentions after the first of them, and half (or twice) the resolution."""

    def __init__(self, residuals, attentions=(), resample=None, up=False):
        super().__init__()
        self.residuals, self.attentions, self.up = nn.ModuleList(residuals), nn.ModuleList(attentions), up
        channels, step = resample or 1, 1 if up else 2
        conv = nn.Conv2d(channels, channels, 3, step, padding=1 if up else 0)
        self.resample = nn.ModuleDict({"conv": conv}) if resample else None

    def forward(self, x, time=None, context=None, read=None, kept=None):
        """`read`: states of the way down, which each block takes from the end. `kept` gets every new state."""
        for i, residual in enumerate(self.residuals):
            x = residual(x if read is None else torch.cat([x, read.pop()], 1), time)
            x = self.attentions[i](x, context) if i < len(self.attentions) else x
            if kept is not None:
                kept.append(x)
        if self.resample is None:
            return x
        return self.resample["conv"](F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class Coder(nn.Module):
    """The encoder (`up` False: levels, then the middle) or the decoder (the middle, then levels)."""

    def __init__(self, ins, outs, widths, blocks, groups, up):
        super().__init__()
        order = widths[::-1] if up else widths
        self.up, self.levels, before = up, nn.ModuleList(), order[0]
        self.first, self.last = nn.Conv2d(ins, order[0], 3, padding=1), nn.Conv2d(order[-1], outs, 3, padding=1)
        for i, width in enumerate(order):
            residuals = [ResidualBlock(before if n == 0 else width, width, groups) for n in range(blocks)]
            self.levels.append(Stage(residuals, (), width if i < len(order) - 1 else None, up))
            before = width
        top = widths[-1]
        self.middle = Stage([ResidualBlock(top, top, groups) for _ in range(2)], [PixelAttention(top, groups)])
        self.norm = nn.GroupNorm(groups, order[-1], 1e-6)

    def forward(self, x):
        x = self.first(x)
        for part in [self.middle, *self.levels] if self.up else [*self.levels, self.middle]:
            x = part(x)
        return self.last(F.silu(self.norm(x)))


class Autoencoder(nn.Module):
    """A variational autoencoder: pictures to the mean and log-variance of latents, and latents to pictures."""

    def __init__(self, channels=3, latents=4, widths=(16, 32, 32), blocks=1, groups=8):
        super().__init__()
        self.encoder = Coder(channels, 2 * latents, widths, blocks, groups, up=False)
        self.decoder = Coder(latents, channels, widths, blocks + 1, groups, up=True)
        self.to_moments, self.from_latents = nn.Conv2d(2 * latents, 2 * latents, 1), nn.Conv2d(latents, latents, 1)

    def encode(self, x):
        return self.to_moments(self.encoder(x)).chunk(2, 1)

    def decode(self, latents):
        return self.decoder(self.from_latents(latents))


class Transformer(nn.Module):
    """x + last(block(first(norm(x)))): self-attention of pixels, cross-attention to the words, a gated feed-forward."""

    def __init__(self, dim, n_heads, context_dim, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, 1e-6)
        self.first, self.last = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        block = {name: nn.LayerNorm(dim) for name in ("attention_norm", "cross_attention_norm", "feedforward_norm")}
        block |= {"attention": Attention(dim, n_heads), "cross_attention": Attention(dim, n_heads, context_dim)}
        gated = {"up_gate": nn.Linear(dim, 8 * dim), "down": nn.Linear(4 * dim, dim)}
        self.blocks = nn.ModuleList([nn.ModuleDict(block | {"feedforward": nn.ModuleDict(gated)})])

    def forward(self, pixels, context):
        block, x = self.blocks[0], self.first(self.norm(pixels)).flatten(2).mT
        x = x + block["attention"](block["attention_norm"](x))
        x = x + block["cross_attention"](block["cross_attention_norm"](x), context)
        up, gate = block["feedforward"]["up_gate"](block["feedforward_norm"](x)).chunk(2, -1)
        x = x + block["feedforward"]["down"](up * F.gelu(gate))
        return pixels + self.last(x.mT.unflatten(2, pixels.shape[2:]))


class Denoiser(nn.Module):
    """A U-Net of one resolution that predicts the noise in latents, from a timestep and the words."""

    def __init__(self, channels=4, dim=64, n_heads=4, context_dim=32, groups=8, blocks=1):
        super().__init__()
        self.dim, time_dim = dim, 4 * dim
        self.time = nn.ModuleDict({"linear1": nn.Linear(dim, time_dim), "linear2": nn.Linear(time_dim, time_dim)})

        def stage(ins, attends):
            residuals = [ResidualBlock(width, dim, groups, time_dim, 1e-5) for width in ins]
            return Stage(residuals, [Transformer(dim, n_heads, context_dim, groups) for _ in range(attends)])

        self.unet = nn.ModuleDict({
            "first": nn.Conv2d(channels, dim, 3, padding=1), "last": nn.Conv2d(dim, channels, 3, padding=1),
            "down": nn.ModuleList([stage([dim] * blocks, blocks)]), "middle": stage([dim] * 2, 1),
            "up": nn.ModuleList([stage([2 * dim] * (blocks + 1), blocks + 1)]), "norm": nn.GroupNorm(groups, dim, 1e-5),
        })  # fmt: skip

    def forward(self, x, timestep, context):
        angles = timestep[:, None].float() * (-math.log(10_000) * torch.arange(self.dim // 2) / (self.dim // 2)).exp()
        time = self.time["linear1"](torch.cat([angles.cos(), angles.sin()], -1))
        time, unet = F.silu(self.time["linear2"](F.silu(time))), self.unet
        x = unet["first"](x)
        states = [x]
        x = unet["down"][0](x, time, context, kept=states)
        x = unet["up"][0](unet["middle"](x, time, context), time, context, read=states)
        return unet["last"](F.silu(unet["norm"](x)))


COLOURS = {"red": (1, 0, 0), "green": (0, 0.8, 0), "blue": (0, 0.2, 1), "yellow": (1, 1, 0)}
WORDS = ["<nothing>", "small", "large", *COLOURS, "disc", "square", "ring"]


def draw(words, size=24):
    """Draw the shape that three word ids name, in the middle of black: [3, size, size], from -1 to 1."""
    radius = (4 if words[0] == 1 else 8) + torch.rand(()).item()
    y, x = torch.meshgrid(torch.arange(size) - 11.5, torch.arange(size) - 11.5, indexing="ij")
    far, edge = (y**2 + x**2).sqrt(), torch.maximum(y.abs(), x.abs())
    inside = {"disc": far < radius, "square": edge < radius, "ring": (far - radius).abs() < 1.5}[WORDS[words[2]]]
    return 2 * inside * torch.tensor(list(COLOURS.values())[words[1] - 3])[:, None, None] - 1


def batch_of(count):
    """Return pictures and their captions, three word ids each."""
    words = torch.stack([torch.randint(*bounds, (count,)) for bounds in ((1, 3), (3, 7), (7, 10))], 1)
    return torch.stack([draw(row) for row in words.tolist()]), words


def train(parameters, loss_of, steps, learning_rate=2e-3):
    """Take `steps` steps of Adam and print the loss ten times."""
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for step in range(1, steps + 1):
        loss = loss_of()
        optimizer.param_groups[0]["lr"] = learning_rate * min(step / 20, 1.02 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (steps // 10) == 0:
            print(f"  step {step}  loss {loss.item():.4f}")


def write_png(path, colours):
    """Write a picture [height, width, 3] with numbers from 0 to 1 as a PNG file."""
    rows = b"".join(b"\0" + bytes(row) for row in (colours.clamp(0, 1) * 255).byte().flatten(1).tolist())
    head = struct.pack(">IIBBBBB", colours.shape[1], colours.shape[0], 8, 2, 0, 0, 0)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, data in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))


def main():
    """Train both parts, and draw 8 pictures from captions."""
    torch.manual_seed(0)
    autoencoder, denoiser, table = Autoencoder(), Denoiser(), nn.Embedding(len(WORDS), 32)
    alpha_bar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)

    def reconstruction():
        pictures, _ = batch_of(16)
        mean, log_variance = autoencoder.encode(pictures)
        latents = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        kl = (mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2
        return (autoencoder.decode(latents) - pictures).square().mean() + 1e-4 * kl

    def noise_error():
        pictures, words = batch_of(32)
        latents, noise = autoencoder.encode(pictures)[0].detach() * scale, torch.randn(32, 4, 6, 6)
        words = torch.where(torch.rand(32, 1) < 0.1, 0, words)  # for guidance
        timestep = torch.randint(1000, (32,))
        left = alpha_bar[timestep][:, None, None, None]
        return F.mse_loss(denoiser(left.sqrt() * latents + (1 - left).sqrt() * noise, timestep, table(words)), noise)

    train(autoencoder.parameters(), reconstruction, 300)
    with torch.no_grad():
        scale = 1 / autoencoder.encode(batch_of(64)[0])[0].std()  # latents of variance 1
    train([*denoiser.parameters(), *table.parameters()], noise_error, 800)
    with torch.no_grad():
        pictures, words = batch_of(8)
        x, visited = torch.randn(8, 4, 6, 6), torch.linspace(999, 0, 50).long()
        for t, after in zip(visited, [*alpha_bar[visited[1:]], torch.tensor(1.0)]):
            both = [denoiser(x, t.expand(8), table(w)) for w in (words, torch.zeros_like(words))]
            noise, left = both[1] + 2 * (both[0] - both[1]), alpha_bar[t]
            x = after.sqrt() * (x - (1 - left).sqrt() * noise) / left.sqrt() + (1 - after).sqrt() * noise
        rows = [pictures, autoencoder.decode(autoencoder.encode(pictures)[0]), autoencoder.decode(x / scale)]
    print("drawn: " + ", ".join(" ".join(WORDS[i] for i in row) for row in words.tolist()))
    grid = F.interpolate(torch.cat(rows), scale_factor=3.0).unflatten(0, (3, 8)).permute(0, 3, 1, 4, 2)
    write_png("latent_diffusion.png", (grid.reshape(3 * 72, 8 * 72, 3) + 1) / 2)


if __name__ == "__main__":
    main()
