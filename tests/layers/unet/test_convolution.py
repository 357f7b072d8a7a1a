"""What pictures pass through, beside the same written out: doubling, packing, the place of the noise level."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from keifu.layers.unet.conv import (
    AdaptiveResidualBlock,
    DoublingConv2d,
    Downsample,
    ResidualBlock,
    SpatialAttention,
    Upsample,
)
from keifu.layers.unet.prepacked_conv import PackedConv2d, prepack
from keifu.layers.unet.timestep_embedding import TimestepSinusoids
from keifu.models.diffusion import ddpm

SMALL = ddpm.Config(size=32, dim=16, multipliers=(1, 2), attention=(1,), norm_groups=4, middle_groups=4, dropout=0.0)


def norm(channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels)


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.05
    return model.eval()


@pytest.mark.parametrize("sides", [(16, 16), (17, 31), (3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_doubling_is_a_convolution_of_each_pixel_four_times(sides, bias):
    conv = DoublingConv2d(6, 5, 3, padding=1, bias=bias)
    ours, theirs = (torch.randn(2, 6, *sides, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    results = []
    for x, work in ((ours, conv), (theirs, plain(conv))):
        x.requires_grad_()
        y = work(x)
        (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
        results.append([y.detach(), x.grad, *(p.grad.clone() for p in conv.parameters())])
        conv.zero_grad()
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def plain(conv: nn.Conv2d):
    def work(x):
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), conv.weight, conv.bias, padding=1)

    return work


NEEDS_BFLOAT16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this processor"
)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=NEEDS_BFLOAT16)])
def test_a_packed_network_predicts_the_same(dtype):
    model = randomised(ddpm.build(SMALL)).to(dtype)
    fast = prepack(model)
    assert isinstance(fast.unet.first, PackedConv2d) and isinstance(model.unet.first, nn.Conv2d)
    for batch, side in ((1, 32), (3, 16)):
        x, timestep = torch.randn(batch, 3, side, side), torch.randint(1000, (batch,))
        with torch.inference_mode():
            got, expected = fast(x, timestep), model(x, timestep)
        near = 2e-6 if dtype == torch.float32 else 2e-2
        assert (got - expected).abs().max() <= near * expected.abs().max()
    assert {id(p) for p in fast.parameters()} < {id(p) for p in model.parameters()}  # nothing else was copied


def test_what_cannot_be_packed_is_left_alone():
    assert prepack(linear := nn.Linear(2, 2)) is linear
    reflecting = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))
    assert prepack(reflecting) is reflecting
    double = nn.Sequential(nn.Conv2d(1, 1, 3)).double()
    assert prepack(double) is double


def test_the_noise_level_is_added_or_scales_and_shifts():
    x, time = torch.randn(2, 8, 6, 6), torch.randn(2, 5)
    added = randomised(ResidualBlock(8, 12, norm, 5))
    hidden = added.conv1(F.silu(added.norm1(x))) + added.time(time)[..., None, None]
    expected = added.shortcut(x) + added.conv2(F.silu(added.norm2(hidden)))
    torch.testing.assert_close(added(x, time), expected)

    adaptive = randomised(AdaptiveResidualBlock(8, 8, norm, 5, scale=2.0))
    scale, shift = adaptive.time(time)[..., None, None].split(8, 1)
    hidden = adaptive.norm2(adaptive.conv1(F.silu(adaptive.norm1(x)))) * (1 + scale) + shift
    torch.testing.assert_close(adaptive(x, time), (x + adaptive.conv2(F.silu(hidden))) / 2)

    alone = randomised(ResidualBlock(8, 8, norm))  # an autoencoder's, without a noise level
    expected = x + alone.conv2(F.silu(alone.norm2(alone.conv1(F.silu(alone.norm1(x))))))
    torch.testing.assert_close(alone(x), expected)


def test_resolutions():
    x = torch.randn(1, 8, 6, 10)
    assert Upsample(8)(x).shape == (1, 8, 12, 20)
    assert Downsample(8)(x).shape == Downsample(8, around=True)(x).shape == (1, 8, 3, 5)
    below = Downsample(8)
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1)), below.conv.weight, below.conv.bias, stride=2)
    torch.testing.assert_close(below(x), expected)
    shrinking = ResidualBlock(8, 8, norm, resample=nn.AvgPool2d(2))
    assert shrinking(x).shape == (1, 8, 3, 5)


@pytest.mark.parametrize(("heads", "head_dim", "inner"), [(1, None, 8), (4, None, 8), (1, 3, 6)])
def test_attention_between_pixels(heads, head_dim, inner):
    look, x = randomised(SpatialAttention(8, norm, heads, head_dim)), torch.randn(2, 8, 3, 5)
    assert look.attention.qkv.weight.shape == (3 * inner, 8)
    turned = look(x.transpose(2, 3)).transpose(2, 3)  # pixels have no place but what the convolutions tell them
    torch.testing.assert_close(look(x), turned)
    assert not torch.allclose(look(x), x)
    with pytest.raises(ValueError, match="head of 9 numbers does not fit into 8"):
        SpatialAttention(8, norm, head_dim=9)


def test_sinusoids_of_a_timestep():
    got = TimestepSinusoids(7)(torch.tensor([0, 7]))
    frequencies = torch.tensor([1.0, 0.01, 0.0001])
    assert got.shape == (2, 7) and got[0].tolist() == [0, 0, 0, 1, 1, 1, 0]
    torch.testing.assert_close(got[1, :3], (7 * frequencies).sin())
    flipped = TimestepSinusoids(6, cosine_first=True)(torch.tensor([7]))
    torch.testing.assert_close(flipped[0, :3], (7 * frequencies).cos())


def test_a_new_network_predicts_nothing_and_every_weight_learns_in_time():
    """What each block ends with starts at zero (the released code's initialisation)."""
    model = ddpm.build(SMALL)
    x, timestep = torch.randn(2, 3, 32, 32), torch.tensor([1, 500])
    assert not model(x, timestep).any()
    randomised(model).train()
    model(x, timestep).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    kernels = [module.weight.std() for module in ddpm.build(SMALL).modules() if isinstance(module, nn.Conv2d)]
    assert sum(bool(std == 0) for std in kernels) == 13  # 12 blocks and the last convolution


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_lie_channels_last(channels):
    model = ddpm.build(replace(SMALL, channels=channels))
    seen = []
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(lambda module, given: seen.append(given[0].stride(1)))
    model(torch.randn(2, channels, 16, 16), torch.tensor([3]))
    assert set(seen) == {1}


def test_the_null_class_is_what_no_label_means():
    model = randomised(ddpm.build(replace(SMALL, n_classes=3, null_class=True)))
    x, timestep = torch.randn(2, 3, 16, 16), torch.tensor([3, 4])
    nothing = model(x, timestep)
    assert torch.equal(nothing, model(x, timestep, torch.tensor([3, 3])))
    assert not torch.equal(nothing, model(x, timestep, torch.tensor([0, 3])))
    always = ddpm.build(replace(SMALL, n_classes=3))
    with pytest.raises(ValueError, match="one class or another"):
        always(x, timestep)
