"""The parts of latent diffusion give diffusers' numbers from diffusers' folders, and back: autoencoders and U-Nets."""

import json

import pytest
import torch
from quick import others_slow
from safetensors.torch import load_file, save_file

from keifu import checkpoints
from keifu.errors import UserError
from keifu.layers.unet.prepacked_conv import prepack
from keifu.models.diffusion import autoencoder_kl, conditioned_unet

diffusers = pytest.importorskip("diffusers")

UNET = {
    "sample_size": 8, "block_out_channels": (12, 20), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1, "norm_num_groups": 4,
    "attention_head_dim": 2, "cross_attention_dim": 14,
}  # fmt: skip
THREE = {
    "block_out_channels": (8, 16, 24), "layers_per_block": 2, "attention_head_dim": (2, 4, 8),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
ALONE = {
    "block_out_channels": (12,), "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}  # fmt: skip
UNETS = {
    "stable-diffusion-1": {},
    "stable-diffusion-2": {"use_linear_projection": True, "attention_head_dim": (3, 5), "upcast_attention": True},
    "three-levels-not-the-same-up-as-down": THREE,
    "one-level": ALONE,
    "two-blocks-a-transformer": {"transformer_layers_per_block": 2, "use_linear_projection": True},
    "inpainting": {"in_channels": 9},
    "no-middle": {"mid_block_type": None},
    "odd-widths": {"block_out_channels": (15, 35), "norm_num_groups": 5, "attention_head_dim": 5},
    "other-numbers": {
        "norm_eps": 1e-3, "freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0, "time_embedding_dim": 30,
        "sample_size": (8, 16),
    },
}  # fmt: skip
AUTOENCODERS = {
    "one-level": {"block_out_channels": (12,)},
    "two-levels": {"block_out_channels": (8, 20), "norm_num_groups": 4},
    "f8": {"block_out_channels": (4, 8, 12, 12), "layers_per_block": 2, "norm_num_groups": 2, "sample_size": [16, 24]},
    "f4-of-three-channels": {"block_out_channels": (9, 15, 6), "latent_channels": 3, "scaling_factor": 0.3},
    "grey": {"block_out_channels": (6, 9), "in_channels": 1, "out_channels": 1, "latent_channels": 5, "act_fn": "gelu"},
}


def shaken(model):
    """Return the model with every weight random, biases and norms too."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    return model.eval()


def unet(**changed):
    torch.manual_seed(1)
    return shaken(diffusers.UNet2DConditionModel(**UNET | changed))


def autoencoder(**changed):
    torch.manual_seed(1)
    kinds = {f"{way}_block_types": [kind] * len(changed["block_out_channels"])
             for way, kind in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D"))}  # fmt: skip
    return shaken(diffusers.AutoencoderKL(**{"norm_num_groups": 3, **kinds} | changed))


def close(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((ours - expected).abs().max() <= 1e-5 * expected.abs().max())


def same_files(weights, ours, theirs) -> bool:
    saved, original = weights(ours), weights(theirs)
    assert saved.keys() == original.keys()
    return all(saved[n].dtype == original[n].dtype and torch.equal(saved[n], original[n]) for n in original)


@pytest.mark.parametrize("case", others_slow(UNETS, *[*UNETS][::2]))
@torch.no_grad()
def test_unet_both_ways(case, weights, tmp_path) -> None:
    reference = unet(**UNETS[case])
    reference.save_pretrained(tmp_path / "theirs")
    model = checkpoints.load_model(tmp_path / "theirs")
    x, timestep = torch.randn(2, reference.config.in_channels, 8, 12), torch.tensor([7, 899])
    context, real = torch.randn(2, 9, 14), torch.arange(9) < torch.tensor([[9], [4]])
    expected = reference(x, timestep, context).sample
    assert expected.std() > 0.1 and close(model(x, timestep, context), expected)
    masked = reference(x, timestep, context, encoder_attention_mask=real).sample
    assert close(model(x, timestep, context, real), masked)
    if case != "one-level":
        assert not close(masked, expected)
    alone = model(x[1:], timestep[1:], context[1:, :4])  # padding that is masked is as if it were not there
    assert close(alone, masked[1:])

    checkpoints.save(model, None, tmp_path / "ours")
    assert same_files(weights, tmp_path / "ours", tmp_path / "theirs")
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(x, timestep, context).sample, expected)
    assert checkpoints.load_model(tmp_path / "ours").config == model.config


@pytest.mark.parametrize("sides", [(7, 4), (1, 1), (6, 5), (33, 38)])
@torch.no_grad()
def test_sides_that_do_not_halve_evenly(sides, tmp_path) -> None:
    reference = unet(**THREE)
    reference.save_pretrained(tmp_path)
    model = checkpoints.load_model(tmp_path)
    x, timestep, context = torch.randn(2, 4, *sides), torch.tensor([7, 899]), torch.randn(2, 9, 14)
    expected = reference(x, timestep, context).sample
    assert close(model(x, timestep, context), expected)
    assert close(prepack(model)(x, timestep, context), expected)


@pytest.mark.parametrize("case", AUTOENCODERS)
@torch.no_grad()
def test_autoencoder_both_ways(case, weights, tmp_path) -> None:
    reference = autoencoder(**AUTOENCODERS[case])
    reference.save_pretrained(tmp_path / "theirs")
    model = checkpoints.load_model(tmp_path / "theirs")
    factor = model.config.factor
    pictures, noise = torch.randn(2, model.config.channels, 3 * factor, 5 * factor), torch.randn(1)
    theirs, ours = reference.encode(pictures).latent_dist, model.encode(pictures)
    assert close(ours.mean, theirs.mean) and close(ours.log_variance, theirs.logvar)
    noise = torch.randn(ours.mean.shape)
    assert close(ours.sample(noise), theirs.mean + theirs.std * noise) and close(ours.kl(), theirs.kl())
    decoded = reference.decode(theirs.mean).sample
    assert decoded.std() > 0.1 and close(model.decode(theirs.mean), decoded) and close(model(pictures), decoded)

    checkpoints.save(model, None, tmp_path / "ours")
    assert same_files(weights, tmp_path / "ours", tmp_path / "theirs")
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours")
    assert torch.equal(again.decode(theirs.mean).sample, decoded)
    assert again.config.scaling_factor == reference.config.scaling_factor
    assert checkpoints.load_model(tmp_path / "ours").config == model.config


@torch.no_grad()
def test_attention_of_an_autoencoder_as_older_files_call_it(tmp_path) -> None:
    reference = autoencoder(**AUTOENCODERS["two-levels"])
    reference.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    assert any("proj_attn" in name for name in tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    pictures = torch.randn(1, 3, 6, 6)
    assert close(checkpoints.load_model(tmp_path)(pictures), reference(pictures).sample)


@torch.no_grad()
@pytest.mark.parametrize("case", ["stable-diffusion-1", "stable-diffusion-2"])
def test_bfloat16_stays_near(case, tmp_path) -> None:
    reference = unet(**UNETS[case])
    reference.save_pretrained(tmp_path)
    model = checkpoints.load_model(tmp_path, torch.bfloat16)
    given = torch.randn(1, 4, 8, 8), torch.tensor([30]), torch.randn(1, 5, 14)
    expected, got = reference(*given).sample, model(*given)
    assert got.dtype == torch.float32 and (got - expected).abs().max() < 0.06 * expected.abs().max()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"only_cross_attention": True}, "only_cross_attention"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "UNetMidBlock2DSimpleCrossAttn"),
        ({"down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]}, "SimpleCrossAttnDownBlock2D"),
        ({"act_fn": "gelu"}, "act_fn"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type"),
        ({"transformer_layers_per_block": [1, 2]}, "n_layers"),
        ({"down_block_types": ["DownBlock2D"]}, "2 widths, 1 stages down"),
        ({"attention_head_dim": [2, 2, 2]}, "3 numbers for 2 levels"),
        ({"attention_head_dim": 7}, "must divide dim"),
    ],
)
def test_a_unet_that_is_not_implemented_is_named(changed, named, tmp_path) -> None:
    unet().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(UserError, match=named):
        checkpoints.load_model(tmp_path)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "AttnDownEncoderBlock2D"),
        ({"use_quant_conv": False}, "use_quant_conv"),
        ({"shift_factor": 0.1}, "shift_factor"),
        ({"out_channels": 2}, "reads 3 channels and gives 2"),
    ],
)
def test_an_autoencoder_that_is_not_implemented_is_named(changed, named, tmp_path) -> None:
    autoencoder(block_out_channels=(6, 9)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(UserError, match=named):
        checkpoints.load_model(tmp_path)


def test_sizes_that_the_networks_cannot_take() -> None:
    small = autoencoder_kl.build(autoencoder_kl.Config(widths=(4, 4, 4), norm_groups=2))
    with pytest.raises(UserError, match="30 x 9 does not fit .* nearest size that does is 32 x 8"):
        small.encode(torch.randn(1, 3, 30, 9))
    config = conditioned_unet.Config(
        widths=(4, 4), attention=(0,), up_attention=(0,), norm_groups=2, n_heads=1, pad_around=False
    )
    network = conditioned_unet.build(config)
    context = torch.randn(1, 2, 768)
    with pytest.raises(UserError, match="7 x 4 does not fit .* nearest size that does is 8 x 4"):
        network(torch.randn(1, 4, 7, 4), torch.tensor([0]), context)
    with pytest.raises(UserError, match="reads 4 channels, not 9"):
        network(torch.randn(1, 9, 8, 4), torch.tensor([0]), context)
