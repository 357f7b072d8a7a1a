"""A U-Net gives diffusers' predictions from diffusers' folders, and back: every layout that its config can say."""

import json
import shutil

import pytest
import torch
from quick import others_slow
from safetensors.torch import load_file, save_file

from keifu import checkpoints
from keifu.errors import UserError
from keifu.inference.images.pixel_diffusion import ImageRequest, PixelPipeline
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.models.diffusion import ddpm

diffusers = pytest.importorskip("diffusers")

PLAIN = {
    "sample_size": 16, "block_out_channels": (16, 32), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1, "norm_num_groups": 8,
}  # fmt: skip
PAPER = {
    "freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0, "attention_head_dim": None, "norm_eps": 1e-6,
}  # fmt: skip
ALONE = {"block_out_channels": (16,), "down_block_types": ("AttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
RESNETS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
FOUR = {
    "block_out_channels": (8, 8, 16, 24), "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"),
}  # fmt: skip
CASES = {
    "defaults": {},
    "the-paper's": PAPER,
    "four-levels-not-the-same-up-as-down": FOUR,
    "one-level": ALONE,
    "widths-that-are-no-multiples": {"block_out_channels": (24, 40), "attention_head_dim": 8},
    "odd-widths": {"block_out_channels": (15, 35), "norm_num_groups": 5, "attention_head_dim": 7},
    "heads-that-do-not-fill-the-channels": {"attention_head_dim": 5, "block_out_channels": (16, 24)},
    "scale-shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale-shift-with-a-norm-in-the-middle": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "groups-of-the-middle": {"attn_norm_num_groups": 2},
    "resnets-resample": RESNETS | {"downsample_type": "resnet", "upsample_type": "resnet"},
    "resnets-where-there-is-no-attention": RESNETS,
    "resnets-up-alone": {"upsample_type": "resnet", "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D")},
    "resnets-and-scale-shift": RESNETS | {"resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet"},
    "old-names-of-blocks": {"down_block_types": ("UNetResDownBlock2D", "UNetResAttnDownBlock2D")},
    "no-middle": {"mid_block_type": None},
    "no-attention-in-the-middle": {"add_attention": False},
    "scaled-middle": {"mid_block_scale_factor": 1.7},
    "centred": {"center_input_sample": True},
    "one-channel-and-a-variance": {"in_channels": 1, "out_channels": 2},
    "oblong": {"sample_size": (8, 24)},
    "no-size": {"sample_size": None},
    "mish": {"act_fn": "mish", "dropout": 0.3},
    "gelu": {"act_fn": "gelu", "norm_eps": 0.1},
    "relu": {"act_fn": "relu", "layers_per_block": 3},
    "time-dim": {"time_embedding_dim": 37},
    "learned-times": {"time_embedding_type": "learned", "num_train_timesteps": 900},
    "classes": {"num_class_embeds": 5},
    "numbers-beside": {"class_embed_type": "timestep"},
    "vectors-beside": {"class_embed_type": "identity"},
}  # fmt: skip


def theirs(**changed):
    """Return diffusers' network, every weight random, biases and norms too."""
    torch.manual_seed(1)
    model = diffusers.UNet2DModel(**PLAIN | changed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    return model


def inputs(model, sides=(16, 24)):
    """Return noisy pictures, timesteps, and a label as the network asks for one."""
    config = model.config
    labels = {"timestep": torch.tensor([3.0, 250.0]), "identity": torch.randn(2, 4 * config.block_out_channels[0])}
    label = labels.get(config.class_embed_type)
    if config.num_class_embeds:
        label = torch.tensor([4, 0])
    return torch.randn(2, config.in_channels, *sides), torch.tensor([7, 899]), label


def close(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((ours - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize(
    "case",
    others_slow(
        CASES,
        "defaults",
        "the-paper's",
        "four-levels-not-the-same-up-as-down",
        "odd-widths",
        "scale-shift",
        "resnets-resample",
        "no-middle",
        "learned-times",
        "classes",
        "vectors-beside",
    ),
)
@torch.no_grad()
def test_predictions_both_ways(case, weights, tmp_path) -> None:
    reference = theirs(**CASES[case])
    reference.save_pretrained(tmp_path / "theirs")
    model, tokenizer = checkpoints.load(tmp_path / "theirs")
    assert tokenizer is None
    given = inputs(reference)
    expected = reference(*given).sample
    assert expected.std() > 0.1 and close(model(*given), expected)
    single = model(given[0][1:], given[1][1:], None if given[2] is None else given[2][1:])
    assert close(single, expected[1:])

    checkpoints.save(model, None, tmp_path / "ours")
    saved, original = weights(tmp_path / "ours/unet"), weights(tmp_path / "theirs")
    assert saved.keys() == original.keys()
    assert all(saved[n].dtype == original[n].dtype and torch.equal(saved[n], original[n]) for n in original)
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours").unet
    assert torch.equal(again(*given).sample, expected)
    assert checkpoints.load(tmp_path / "ours")[0].config == model.config


@torch.no_grad()
@pytest.mark.parametrize("case", ["the-paper's", "scale-shift", "classes"])
def test_bfloat16_stays_near(case, tmp_path) -> None:
    """The noisy picture and the prediction stay float32 around a network in bfloat16."""
    reference = theirs(**CASES[case])
    reference.save_pretrained(tmp_path)
    model = checkpoints.load_model(tmp_path, torch.bfloat16)
    given = inputs(reference)
    expected, got = reference(*given).sample, model(*given)
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


@torch.no_grad()
def test_attention_as_older_files_call_it(weights, tmp_path) -> None:
    reference = theirs()
    reference.save_pretrained(tmp_path)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for new, old in older.items():
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    assert any("proj_attn" in name for name in tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    given = inputs(reference)
    assert close(checkpoints.load_model(tmp_path)(*given), reference(*given).sample)


@torch.no_grad()
def test_shards_both_ways(tmp_path) -> None:
    reference = theirs()
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    model, given = checkpoints.load_model(tmp_path / "theirs"), inputs(reference)
    checkpoints.save(model, None, tmp_path / "ours", max_shard_bytes=50_000)
    assert len(list((tmp_path / "ours/unet").glob("*.safetensors"))) > 2
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours").unet
    assert torch.equal(again(*given).sample, reference(*given).sample)
    checkpoints.save(model, None, tmp_path / "ours")  # now whole: no shard may stay behind
    assert [file.name for file in (tmp_path / "ours/unet").glob("*model*")] == ["diffusion_pytorch_model.safetensors"]
    assert torch.equal(checkpoints.load_model(tmp_path / "ours/unet")(*given), model(*given))


SCHEDULERS = {
    "DDPMScheduler": {},
    "DDPMScheduler-cosine": {"beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_large"},
    "DDPMScheduler-unclipped": {"clip_sample": False, "variance_type": "learned_range"},
    "DDPMScheduler-sigmoid": {"beta_schedule": "sigmoid", "prediction_type": "sample", "clip_sample_range": 2.0},
    "DDPMScheduler-trained": {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3, "thresholding": True},
    "DDPMScheduler-velocity": {
        "beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
    "DDIMScheduler": {"set_alpha_to_one": False, "steps_offset": 1},
    "PNDMScheduler": {"skip_prk_steps": True},
    "EulerDiscreteScheduler": {},
}  # fmt: skip


@pytest.mark.parametrize("case", SCHEDULERS)
def test_noise_both_ways(case, tmp_path) -> None:
    kind = case.partition("-")[0]
    scheduler = getattr(diffusers, kind)(**SCHEDULERS[case])
    diffusers.DDPMPipeline(unet=theirs(), scheduler=scheduler).save_pretrained(tmp_path / "theirs")
    model = checkpoints.load_model(tmp_path / "theirs")
    noise = model.noise
    assert torch.allclose(noise.alpha_bar.float(), scheduler.alphas_cumprod, rtol=1e-5, atol=1e-9)
    assert noise.clip == (scheduler.config.clip_sample_range if scheduler.config.get("clip_sample") else None)
    checkpoints.save(model, None, tmp_path / "ours")
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours").scheduler
    assert torch.allclose(again.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-6)
    named = ("prediction_type", "variance_type", "thresholding", "timestep_spacing", "set_alpha_to_one", "steps_offset")
    written = [name for name in named if name in scheduler.config and name in again.config]
    assert {name: again.config[name] for name in written} == {name: scheduler.config[name] for name in written}
    assert checkpoints.load_model(tmp_path / "ours").noise == noise


@torch.no_grad()
@pytest.mark.parametrize("changed", [{}, {"variance": "fixed_large"}, {"target": "velocity", "schedule": "cosine"}])
def test_a_saved_pipeline_draws_the_same_picture(changed, tmp_path) -> None:
    noise = Noise(**{"steps": 12, "beta_end": 0.3, "variance": "fixed_small"} | changed)
    config = ddpm.Config(size=8, dim=8, multipliers=(1, 2), attention=(1,), norm_groups=4, middle_groups=4, noise=noise)
    model = ddpm.build(config).eval()
    for parameter in model.parameters():
        parameter += torch.randn_like(parameter) * 0.05
    checkpoints.save(model, None, tmp_path)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    seeds = [3, 2**40]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    expected = pipeline(2, generators, num_inference_steps=12, output_type="pt", return_dict=False)[0]
    for _ in range(2):  # the model itself, then the saved one
        *_, last = PixelPipeline(model).drawing(ImageRequest(sampler="ddpm", steps=12), seeds)
        torch.testing.assert_close((last.x / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=1e-5)
        model = checkpoints.load_model(tmp_path)


def test_what_the_paper_calls_its_networks() -> None:
    """As the converted weights of CIFAR-10 and of the 256-pixel sets are configured."""
    shared = {"norm_eps": 1e-6, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "act_fn": "silu"}
    shared |= {"attention_head_dim": None, "layers_per_block": 2, "scheduler": {"variance_type": "fixed_large"}}
    cifar = shared | {
        "sample_size": 32, "block_out_channels": [128, 256, 256, 256], "dropout": 0.1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    }  # fmt: skip
    got, expected = vars(ddpm.from_published(cifar)), vars(ddpm.SIZES["ddpm-cifar10"])
    assert all(value is None or got[name] == value for name, value in expected.items())


@pytest.mark.parametrize(
    "unsaid",
    [
        {"n_heads": 4, "middle_groups": 8, "noise": Noise(schedule="cosine", variance="learned_range")},
        {"middle_groups": None},
    ],
)
def test_a_config_that_diffusers_cannot_say_is_kept_in_keifus_own_form(unsaid, tmp_path) -> None:
    config = ddpm.Config(
        size=8, dim=16, multipliers=(1, 2), norm_groups=8, n_classes=2, null_class=True, classes=("a", "b"), **unsaid
    )
    model = ddpm.build(config).eval()
    checkpoints.save(model, None, tmp_path)
    again = checkpoints.load_model(tmp_path)
    assert not (tmp_path / "model_index.json").exists() and again.config == config
    given = torch.randn(1, 3, 8, 8), torch.tensor([3])
    assert torch.equal(again(*given), model(*given))


def test_classes_and_their_names_are_kept(tmp_path) -> None:
    config = ddpm.Config(
        size=8, dim=8, multipliers=(1,), n_residual_blocks=1, attention=(), norm_groups=4, middle_groups=4, n_classes=2,
        null_class=True, classes=("cat", "dog"),
    )  # fmt: skip
    checkpoints.save(ddpm.build(config), None, tmp_path)
    again = checkpoints.load_model(tmp_path).config
    assert (again.n_classes, again.null_class, again.classes) == (2, True, ("cat", "dog"))
    assert diffusers.DDPMPipeline.from_pretrained(tmp_path).unet.config.num_class_embeds == 3


REFUSED = {
    "SkipDownBlock2D": {"down_block_types": ("SkipDownBlock2D", "DownBlock2D")},
    "AttnSkipUpBlock2D": {"up_block_types": ("UpBlock2D", "AttnSkipUpBlock2D")},
    "fourier": {"time_embedding_type": "fourier"},
    "spatial": {"resnet_time_scale_shift": "spatial"},
    "downsample_padding": {"downsample_padding": 2},
    "projection": {"class_embed_type": "projection"},
    "KDownBlock2D": {"down_block_types": ("DownBlock2D", "KDownBlock2D")},
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_is_not_implemented_is_named(named, tmp_path) -> None:
    theirs().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | REFUSED[named]))
    with pytest.raises(UserError, match=named):
        checkpoints.load(tmp_path)


def test_a_pipeline_with_a_missing_part(tmp_path) -> None:
    diffusers.DDPMPipeline(unet=theirs(), scheduler=diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "scheduler")
    with pytest.raises(UserError, match=r"a DDPMPipeline and lacks its scheduler \(scheduler/scheduler_config.json\)"):
        checkpoints.load(tmp_path)
    shutil.rmtree(tmp_path / "unet")
    with pytest.raises(UserError, match="lacks its unet .* and its scheduler"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "field", "kind"),
    [("model_index.json", "pipeline", "AudioLDMPipeline"), ("unet/config.json", "model", "UNet1DModel")],
)
def test_a_pipeline_or_network_of_another_family_is_named(file, field, kind, tmp_path) -> None:
    diffusers.DDPMPipeline(unet=theirs(), scheduler=diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    content = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(content | {"_class_name": kind}))
    with pytest.raises(UserError, match=f"{field}.*{kind}"):
        checkpoints.load(tmp_path)


def test_pickled_weights_are_refused_with_the_class_that_converts_them(tmp_path) -> None:
    theirs().save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"let diffusers convert it: UNet2DModel\.from_pretrained"):
        checkpoints.load(tmp_path)


def test_wrong_tensors_are_named(tmp_path) -> None:
    theirs().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["extra"] = tensors.pop("conv_in.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing \(conv_in.weight\); 1 not part of the model \(extra\)"):
        checkpoints.load(tmp_path)


def test_sizes_that_the_network_cannot_take() -> None:
    model = ddpm.build(ddpm.Config(dim=8, multipliers=(1, 1, 1), attention=(), norm_groups=4, middle_groups=4))
    with pytest.raises(UserError, match="30 x 9 does not fit .* nearest size that does is 32 x 8"):
        model(torch.randn(1, 3, 30, 9), torch.tensor([0]))
    with pytest.raises(UserError, match="reads 3 channels, and these pictures have 1"):
        model(torch.randn(1, 1, 32, 32), torch.tensor([0]))
    with pytest.raises(UserError, match="draws no classes"):
        model(torch.randn(1, 3, 32, 32), torch.tensor([0]), torch.tensor([0]))
