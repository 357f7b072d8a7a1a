"""A diffusion Transformer gives diffusers' predictions and pictures from diffusers' folders, and back."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from quick import others_slow
from safetensors.torch import load_file

from keifu import checkpoints
from keifu.cli import main
from keifu.errors import UserError
from keifu.inference.images.pixel_diffusion import ImageRequest, PixelPipeline, SeededNoise
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.layers.diffusion.sampling_schedule import flow_schedule
from keifu.models.diffusion import autoencoder_kl, ddpm, dit
from keifu.models.hf.schedulers import read_scheduler

diffusers = pytest.importorskip("diffusers")

PLAIN = {
    "num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2,
    "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 5,
}  # fmt: skip
CASES = {
    "plain": {},
    "as-many-channels-out": {"out_channels": None},
    "odd-channels": {"in_channels": 3, "out_channels": 5},
    "one-channel": {"in_channels": 1, "out_channels": 1},
    "single-pixels": {"patch_size": 1, "sample_size": 7},
    "large-patches": {"patch_size": 4, "sample_size": 12},
    "odd-patches": {"patch_size": 3, "sample_size": 9},
    "one-patch": {"patch_size": 8},
    "sides-that-patches-do-not-fill": {"sample_size": 9},
    "large-patches-that-do-not-fill": {"sample_size": 15, "patch_size": 4},
    "one-layer": {"num_layers": 1},
    "no-classes": {"num_embeds_ada_norm": 0},
    "one-class": {"num_embeds_ada_norm": 1},
    "one-head": {"num_attention_heads": 1, "attention_head_dim": 20},
    "odd-heads": {"num_attention_heads": 4, "attention_head_dim": 5},
    "no-bias-in-attention": {"attention_bias": False},
    "affine": {"norm_elementwise_affine": True},
    "affine-eps": {"norm_elementwise_affine": True, "norm_eps": 0.1, "attention_bias": False},
    "eps": {"norm_eps": 0.3},
    "gelu": {"activation_fn": "gelu"},
    "geglu": {"activation_fn": "geglu"},
    "quick": {"activation_fn": "geglu-approximate"},
    "swiglu": {"activation_fn": "swiglu"},
    "silu": {"activation_fn": "linear-silu"},
    "dropout": {"dropout": 0.3},
    "upcast": {"upcast_attention": True, "norm_num_groups": 7},
}


def theirs(**changed):
    """Return diffusers' network, every weight random, biases and norms too."""
    torch.manual_seed(1)
    model = diffusers.DiTTransformer2DModel(**PLAIN | changed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    return model


def inputs(model, side: int | None = None):
    config = model.config
    side = side or config.sample_size
    label = torch.tensor([config.num_embeds_ada_norm, 0])
    return torch.randn(2, config.in_channels, side, side), torch.tensor([7.25, 899]), label


def close(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((ours - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize(
    "case",
    others_slow(
        CASES,
        "plain",
        "odd-channels",
        "odd-patches",
        "sides-that-patches-do-not-fill",
        "no-classes",
        "one-head",
        "no-bias-in-attention",
        "affine",
        "geglu",
        "upcast",
    ),
)
@torch.no_grad()
def test_predictions_both_ways(case, weights, tmp_path) -> None:
    reference = theirs(**CASES[case])
    reference.save_pretrained(tmp_path / "theirs")
    model, tokenizer = checkpoints.load(tmp_path / "theirs")
    assert tokenizer is None
    for side in (None, 2 * reference.config.sample_size):  # positions are stretched over another size
        given = inputs(reference, side)
        expected = reference(*given).sample
        assert expected.std() > 0.1 and close(model(*given), expected)
    assert close(model(given[0][1:], given[1][1:], given[2][1:]), expected[1:])
    null = torch.full((2,), reference.config.num_embeds_ada_norm)
    assert close(model(*given[:2]), reference(*given[:2], null).sample)

    checkpoints.save(model, None, tmp_path / "ours")
    saved, original = weights(tmp_path / "ours/transformer"), weights(tmp_path / "theirs")
    assert saved.keys() == original.keys()
    assert all(saved[n].dtype == original[n].dtype and torch.equal(saved[n], original[n]) for n in original)
    again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "ours", subfolder="transformer")
    assert torch.equal(again(*given).sample, expected)
    assert checkpoints.load(tmp_path / "ours")[0].config == model.config


@torch.no_grad()
def test_pictures_need_not_be_square() -> None:
    """Each half of an oblong picture of two equal squares has the same prediction, if positions do not tell them
    apart; diffusers takes squares alone."""
    config = dit.TransformerConfig(
        size=4, n_heads=1, head_dim=8, n_layers=1, n_classes=0, channels=1, out_channels=None
    )
    model = dit.build(dit.Config(config, None, noise=Noise("flow", target="flow"))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, time = torch.randn(1, 1, 4, 8), torch.tensor([3.0])
    given = model(x, time)
    assert given.shape == x.shape
    turned = model(x.flip(-1), time)
    assert not torch.allclose(given, turned.flip(-1))


@torch.no_grad()
def test_bfloat16_stays_near(tmp_path) -> None:
    reference = theirs()
    reference.save_pretrained(tmp_path)
    model = checkpoints.load_model(tmp_path, torch.bfloat16)
    given = inputs(reference)
    expected, got = reference(*given).sample, model(*given)
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


VAE = {
    "block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 4,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "sample_size": 16, "scaling_factor": 0.3,
}  # fmt: skip
SCHEDULERS = {
    "ddim": (lambda: diffusers.DDIMScheduler(clip_sample=False), "ddim"),
    "flow": (lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=2.5), "euler"),
}


def pipeline(scheduler: str, **changed):
    torch.manual_seed(2)
    return diffusers.DiTPipeline(
        transformer=theirs(**changed), vae=diffusers.AutoencoderKL(**VAE).eval(), scheduler=SCHEDULERS[scheduler][0]()
    )


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guidance", [pytest.param(1.0, marks=pytest.mark.slow), 3.0])
def test_pictures_are_those_of_the_pipeline(scheduler, guidance, weights, tmp_path, monkeypatch) -> None:
    flow = diffusers.FlowMatchEulerDiscreteScheduler  # it lacks a method that the pipeline calls, and needs none
    monkeypatch.setattr(flow, "scale_model_input", lambda self, x, t: x, raising=False)
    changed = {} if scheduler == "ddim" else {"out_channels": 4}
    if guidance > 1:
        changed |= {"num_embeds_ada_norm": 1000}  # diffusers' pipeline has this number of the null class alone
    whole = pipeline(scheduler, **changed)
    whole.save_pretrained(tmp_path / "theirs")
    if guidance == 1:  # as published pipelines have it; diffusers reads it and does not write it
        index = json.loads((tmp_path / "theirs/model_index.json").read_text())
        index["id2label"] = {str(number): f"class {number}, number {number}" for number in range(5)}
        (tmp_path / "theirs/model_index.json").write_text(json.dumps(index))
    model = checkpoints.load_model(tmp_path / "theirs")
    seeds = [3, 11]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    whole.set_progress_bar_config(disable=True)
    expected = whole([4, 4], guidance, generators, 6, output_type="pt").images
    painter = PixelPipeline(model)
    label = painter.label("class 4") if guidance == 1 else 4
    request = painter.resolved(ImageRequest(sampler=SCHEDULERS[scheduler][1], steps=6, label=label, guidance=guidance))
    *_, last = painter.drawing(request, seeds)
    got = (painter.model.to_pictures(last.x) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert painter.draw(request, seeds).shape == (2, 3, 16, 16)

    checkpoints.save(model, None, tmp_path / "ours")
    for part in ("transformer", "vae"):
        saved, original = weights(tmp_path / "ours" / part), weights(tmp_path / "theirs" / part)
        assert saved.keys() == original.keys() and all(torch.equal(saved[name], original[name]) for name in saved)
    again = diffusers.DiTPipeline.from_pretrained(tmp_path / "ours")
    again.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    torch.testing.assert_close(
        again([4, 4], guidance, generators, 6, output_type="pt").images, expected, rtol=0, atol=1e-6
    )
    assert guidance > 1 or again.labels["number 3"] == again.labels["class 3"] == 3
    assert checkpoints.load_model(tmp_path / "ours").config == model.config


def small(**changed) -> dit.Config:
    transformer = dit.TransformerConfig(
        size=8, channels=1, out_channels=None, n_heads=2, head_dim=8, n_layers=1, n_classes=3
    )
    return dit.Config(
        **{"transformer": transformer, "autoencoder": None, "noise": Noise("flow", target="flow")} | changed
    )


def test_a_model_of_pixels_is_a_pipeline_without_an_autoencoder(tmp_path) -> None:
    config = small(classes=("a", "b", "c"), noise=Noise("flow", target="flow", shift=2.0))
    checkpoints.save(dit.build(config), None, tmp_path)
    assert checkpoints.load_model(tmp_path).config == config
    whole = diffusers.DiTPipeline.from_pretrained(tmp_path, vae=None)
    assert whole.vae is None and whole.scheduler.config.shift == 2 and whole.labels == {"a": 0, "b": 1, "c": 2}
    assert not any(
        name.startswith("vae") for name in load_file(tmp_path / "transformer/diffusion_pytorch_model.safetensors")
    )


@pytest.mark.parametrize(
    "noise", [Noise("flow", target="picture"), Noise("flow", target="velocity", shift=3.0), Noise(target="flow")]
)
def test_a_noise_that_no_scheduler_has_is_kept_in_keifus_own_form(noise, tmp_path) -> None:
    config = small(noise=noise)
    checkpoints.save(dit.build(config), None, tmp_path)
    assert not (tmp_path / "model_index.json").exists() and checkpoints.load_model(tmp_path).config == config


DYNAMIC = {
    "usual": {},
    "falling": {"base_shift": 2.5, "max_shift": 0.3, "base_image_seq_len": 9, "max_image_seq_len": 70, "shift": 3.0},
    "linear": {"time_shift_type": "linear", "base_shift": 1.5, "max_shift": 4.0, "num_train_timesteps": 37},
}


@pytest.mark.parametrize("case", DYNAMIC)
def test_a_dynamic_shift_is_that_of_diffusers(case, tmp_path) -> None:
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    flow = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **DYNAMIC[case])
    said: Any = flow.config
    noise = read_scheduler({**said, "_class_name": "FlowMatchEulerDiscreteScheduler"})
    assert noise.dynamic is not None
    for length, steps in ((1, 3), (16, 1), (256, 28), (300, 7), (5000, 11)):
        ends = said.base_image_seq_len, said.max_image_seq_len, said.base_shift, said.max_shift
        if case == "falling" and length > 100:
            continue  # far beyond its ends
        flow.set_timesteps(steps, mu=calculate_shift(length, *ends))
        found = flow_schedule(replace(noise, dynamic=replace(noise.dynamic, length=length)), steps).steps
        levels = torch.tensor([[each.level.timestep, each.level.sigma] for each in found])
        torch.testing.assert_close(levels, torch.stack([flow.timesteps, flow.sigmas[:-1]], 1), rtol=1e-6, atol=1e-7)
    with pytest.raises(UserError, match="depends on a picture's patches, and this model has none"):
        flow_schedule(noise, 3)

    model = dit.build(small(noise=noise)).eval()
    for parameter in model.parameters():  # a new model has no flow
        torch.nn.init.normal_(parameter, std=0.3)
    checkpoints.save(model, None, tmp_path)
    again = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert all(again.config[name] == value for name, value in said.items() if not name.startswith("_"))
    loaded: Any = checkpoints.load_model(tmp_path)
    assert loaded.config == model.config and loaded.noise_of((8, 12)).dynamic.length == 24
    painter = PixelPipeline(loaded)
    for size in ((8, 8), (16, 8)):
        request = painter.resolved(ImageRequest(sampler="euler", steps=2, size=size))
        *_, last = painter.drawing(request, [3])
        mu = calculate_shift(size[0] * size[1] // 4, *ends)
        flow.set_timesteps(2, mu=mu)
        x = noisy = SeededNoise([3])(torch.empty(1, 1, *size))
        with torch.inference_mode():
            for t in flow.timesteps:
                x = flow.step(loaded(x, t[None]), t, x).prev_sample
        torch.testing.assert_close(last.x, x, rtol=1e-4, atol=1e-4)
        assert (x - noisy).abs().mean() > 0.1


REFUSED = {
    "norm_type": ("transformer/config.json", {"norm_type": "ada_norm"}),
    "time_shift_type": ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True, "time_shift_type": "cosine"}),
    "both are 256": ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True, "max_image_seq_len": 256}),
    "shift_terminal": ("scheduler/scheduler_config.json", {"shift_terminal": 0.1}),
    "invert_sigmas": ("scheduler/scheduler_config.json", {"invert_sigmas": True}),
    "stochastic_sampling": ("scheduler/scheduler_config.json", {"stochastic_sampling": True}),
    "use_exponential_sigmas": ("scheduler/scheduler_config.json", {"use_exponential_sigmas": True}),
    "mish": ("transformer/config.json", {"activation_fn": "mish"}),
    "A patch of 9": ("transformer/config.json", {"patch_size": 9}),
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_is_not_implemented_is_named(named, tmp_path) -> None:
    checkpoints.save(dit.build(small()), None, tmp_path)
    place, change = REFUSED[named]
    content = json.loads((tmp_path / place).read_text()) | change
    (tmp_path / place).write_text(json.dumps(content))
    with pytest.raises(UserError, match=named):
        checkpoints.load(tmp_path)


def test_the_first_published_form_of_the_config(tmp_path) -> None:
    reference = theirs()
    reference.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"_class_name": "Transformer2DModel"}))
    given = inputs(reference)
    assert close(checkpoints.load_model(tmp_path)(*given), reference(*given).sample)


def test_sizes_that_the_network_cannot_take() -> None:
    model = dit.build(small())
    with pytest.raises(UserError, match="multiples of 2: the nearest size that does is 8 x 8"):
        model.check_size(1, 9, 8)
    with pytest.raises(UserError, match="reads 1 channels, not 3"):
        model(torch.randn(1, 3, 8, 8), torch.tensor([0]))
    with pytest.raises(UserError, match="latents have 4"):
        small(autoencoder=autoencoder_kl.Config())


def test_a_model_of_latents_draws_again_from_a_picture_and_in_a_mask(tmp_path, capsys) -> None:
    """By the command: the same bits again; what a mask keeps is the given picture; no strip of latents."""
    torch.manual_seed(0)
    transformer = dit.TransformerConfig(size=8, n_heads=2, head_dim=8, n_layers=1, n_classes=2)
    coder = autoencoder_kl.Config(size=16, widths=(8, 16), n_residual_blocks=1, norm_groups=4)
    noise = Noise("flow", target="flow", clip=None, shift=2.0)
    model = dit.build(dit.Config(transformer, coder, ("left, port", "right"), noise))
    for parameter in model.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    checkpoints.save(model, None, tmp_path / "model")
    given = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy()
    Image.fromarray(given).save(tmp_path / "given.png")
    white = Image.new("L", (16, 16))
    white.paste(255, (0, 0, 8, 16))
    white.save(tmp_path / "mask.png")
    out = str(tmp_path / "out.png")
    words = ["draw", str(tmp_path / "model"), "--label", "port", "--guidance", "3", "--steps", "4", "--seed", "5"]
    words += ["--init", str(tmp_path / "given.png"), "--strength", "0.5", "-o", out]
    main(words)
    main(["draw", "--again", out])
    assert "bit for bit" in capsys.readouterr().err
    main([*words, "--mask", str(tmp_path / "mask.png")])
    drawn = np.asarray(Image.open(out))
    assert (drawn[:, 8:] == given[:, 8:]).all() and (drawn[:, :8] != given[:, :8]).any()
    with pytest.raises(SystemExit):
        main([*words, "--strip", str(tmp_path / "strip.png")])
    assert "steps are latents" in capsys.readouterr().err


def test_a_unet_with_a_flow_is_a_pipeline_that_diffusers_draws_with(tmp_path) -> None:
    torch.manual_seed(0)
    config = ddpm.Config(
        size=8, dim=8, multipliers=(1, 2), n_residual_blocks=1, attention=(), norm_groups=4, middle_groups=4,
        noise=Noise("flow", target="flow", shift=3.0),
    )  # fmt: skip
    model = ddpm.build(config).eval()
    torch.nn.init.normal_(dict(model.named_parameters())["unet.last.weight"], std=0.1)
    checkpoints.save(model, None, tmp_path)
    again: Any = checkpoints.load_model(tmp_path)
    assert again.noise == config.noise
    theirs = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(2, [torch.Generator().manual_seed(seed) for seed in (3, 4)], 5, output_type="np").images
    *_, last = PixelPipeline(model).drawing(ImageRequest("euler", 5), [3, 4])
    got = (last.x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(got, torch.from_numpy(expected), rtol=0, atol=1e-5)
