"""DDPM (Ho, Jain and Abbeel, 2020) in one file: a U-Net that removes noise, and pictures drawn from noise.

Run `python ddpm.py`. It learns to draw four shapes on 12 x 12 pixels and writes ddpm.png, one row for each shape.
It needs torch alone and takes about 80 seconds on two cores. Guidance is from Ho and Salimans (2022).
"""

import math
import struct
import sys
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    """Sizes. The U-Net has two levels: `dim` channels, then twice as many at half the resolution."""

    channels: int = 1
    dim: int = 24
    norm_groups: int = 8
    n_classes: int = 4  # one more class, the null class, is for guidance
    steps: int = 1000  # T, the number of noise levels


class ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x))) + time)))."""

    def __init__(self, channels, out_channels, time_dim, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, channels, 1e-6), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, 1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # a new block changes nothing

    def forward(self, x, time):
        hidden = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class SpatialAttention(nn.Module):
    """x + attention(norm(x)): each pixel looks at all pixels."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.attention = nn.ModuleDict({"qkv": nn.Linear(channels, 3 * channels), "out": nn.Linear(channels, channels)})

    def forward(self, x):
        q, k, v = self.attention["qkv"](self.norm(x).flatten(2).mT).chunk(3, -1)
        seen = self.attention["out"](F.scaled_dot_product_attention(q, k, v))
        return x + seen.mT.unflatten(2, x.shape[2:])


class Stage(nn.Module):
    """Residual blocks at one resolution, an attention after each of the first `n_attentions`, and a resampling.

    Resampling: half the resolution by a convolution with stride 2, or twice the resolution by repeated pixels.
    """

    def __init__(self, config, widths, out, n_attentions=0, resample=None):
        super().__init__()
        groups, self.up = config.norm_groups, resample == "up"
        self.residuals = nn.ModuleList(ResidualBlock(width, out, 4 * config.dim, groups) for width in widths)
        self.attentions = nn.ModuleList(SpatialAttention(out, groups) for _ in range(n_attentions))
        conv = nn.Conv2d(out, out, 3, padding=1) if self.up else nn.Conv2d(out, out, 3, stride=2)
        self.resample = nn.ModuleDict({"conv": conv}) if resample else None

    def forward(self, x, time, read=None, kept=None):
        """`read`: states of the way down, which each block takes from the end. `kept`: gets every new state."""
        for i, residual in enumerate(self.residuals):
            x = residual(x if read is None else torch.cat([x, read.pop()], 1), time)
            x = self.attentions[i](x) if i < len(self.attentions) else x
            if kept is not None:
                kept.append(x)
        if self.resample is None:
            return x
        return self.resample["conv"](F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class UNet(nn.Module):
    """Two stages down, a middle, two stages up. Each block on the way up also reads a state of the way down."""

    def __init__(self, config):
        super().__init__()
        fine, coarse = config.dim, 2 * config.dim
        self.first = nn.Conv2d(config.channels, fine, 3, padding=1)
        self.down = nn.ModuleList([Stage(config, [fine], fine, resample="down"), Stage(config, [fine], coarse, 1)])
        self.middle = Stage(config, [coarse, coarse], coarse, 1)
        self.up = nn.ModuleList([
            Stage(config, [coarse + coarse, coarse + fine], coarse, 2, resample="up"),
            Stage(config, [coarse + fine, fine + fine], fine),
        ])  # fmt: skip
        self.norm = nn.GroupNorm(config.norm_groups, fine, 1e-6)
        self.last = nn.Conv2d(fine, config.channels, 3, padding=1)

    def forward(self, x, time):
        x = self.first(x)
        states = [x]
        x = self.down[0](x, time, kept=states)
        states.append(x)
        x = self.down[1](x, time, kept=states)
        x = self.middle(x, time)
        for stage in self.up:
            x = stage(x, time, read=states)
        return self.last(F.silu(self.norm(x)))


class DDPM(nn.Module):
    """U-Net with a timestep embedding and a class embedding. It predicts the noise in a noisy picture."""

    def __init__(self, config):
        super().__init__()
        self.config, dim, time_dim = config, config.dim, 4 * config.dim
        self.time = nn.ModuleDict({"linear1": nn.Linear(dim, time_dim), "linear2": nn.Linear(time_dim, time_dim)})
        self.label, self.unet = nn.Embedding(config.n_classes + 1, time_dim), UNet(config)
        beta = torch.linspace(1e-4, 0.02, config.steps)  # noise that each step adds
        self.alpha_bar = (1 - beta).cumprod(0)  # share of the picture's variance that is left

    def forward(self, x, timestep, label):
        half = self.config.dim // 2
        angles = timestep[:, None].float() * (-math.log(10_000) * torch.arange(half) / (half - 1)).exp()
        time = self.time["linear1"](torch.cat([angles.sin(), angles.cos()], -1))
        return self.unet(x, F.silu(self.time["linear2"](F.silu(time)) + self.label(label)))

    def loss(self, picture, label):
        """Return the squared error of the predicted noise at random timesteps (algorithm 1)."""
        timestep, noise = torch.randint(self.config.steps, (len(picture),)), torch.randn_like(picture)
        left = self.alpha_bar[timestep][:, None, None, None]
        noisy = left.sqrt() * picture + (1 - left).sqrt() * noise
        label = torch.where(torch.rand(len(label)) < 0.1, self.config.n_classes, label)  # the null class
        return F.mse_loss(self(noisy, timestep, label), noise)

    @torch.inference_mode()
    def sample(self, label, size, steps=50, guidance=2.0):
        """Draw one picture for each label, from noise, by DDIM's steps (Song et al., 2020)."""
        x = torch.randn(len(label), self.config.channels, size, size)
        nothing = torch.full_like(label, self.config.n_classes)
        visited = torch.linspace(self.config.steps - 1, 0, steps).long()
        for i, t in enumerate(visited):
            timestep = t.expand(len(label))
            with_label, without = self(x, timestep, label), self(x, timestep, nothing)
            noise = without + guidance * (with_label - without)
            left = self.alpha_bar[t]
            after = self.alpha_bar[visited[i + 1]] if i + 1 < steps else torch.tensor(1.0)
            picture = ((x - (1 - left).sqrt() * noise) / left.sqrt()).clamp(-1, 1)
            noise = (x - left.sqrt() * picture) / (1 - left).sqrt()  # of the picture as it was clipped
            x = after.sqrt() * picture + (1 - after).sqrt() * noise
        return x


def shapes(count, size=12):
    """Draw `count` discs, squares, crosses and rings, with random centres and radii, from -1 to 1."""
    label, radius = torch.randint(4, (count,)), 3 + 2 * torch.rand(count, 1, 1)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    down, right = (radius + (size - 1 - 2 * radius) * torch.rand(count, 1, 1) for _ in range(2))
    y, x = (rows - down).abs(), (columns - right).abs()
    far, edge = (y**2 + x**2).sqrt(), torch.maximum(x, y)
    cross = torch.maximum(torch.minimum(x, y) - 1, edge - radius)
    outside = torch.stack([far - radius, edge - radius, cross, (far - radius).abs() - 1], 1)  # distances in pixels
    picture = (0.5 - outside[torch.arange(count), label]).clamp(0, 1)
    return (2 * picture - 1)[:, None], label


def write_png(path, grey):
    """Write a grey picture [height, width] with numbers from 0 to 1 as a PNG file."""
    rows = b"".join(b"\0" + bytes(row) for row in (grey.clamp(0, 1) * 255).byte().tolist())
    head = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 8, 0, 0, 0, 0)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, data in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))


def main(steps=1250, batch_size=32):
    """Train, draw eight pictures of each shape, and write them to ddpm.png."""
    torch.manual_seed(0)
    model = DDPM(Config())
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(1, steps + 1):
        loss = model.loss(*shapes(batch_size))
        optimizer.param_groups[0]["lr"] = 2e-3 * min(step / 50, 1.02 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.4f}")
    pictures = F.interpolate(model.sample(torch.arange(4).repeat_interleave(8), size=12), scale_factor=4.0)
    grid = pictures[:, 0].unflatten(0, (4, 8)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    write_png("ddpm.png", (grid + 1) / 2)
    print("ddpm.png: discs, squares, crosses, rings")


if __name__ == "__main__":
    print(__doc__.strip()) if "--help" in sys.argv else main()
