"""From a picture and a mask to pictures, against diffusers' pipelines for both, and the command."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from quick import quick

from keifu import checkpoints, cli
from keifu.errors import UserError
from keifu.inference.images.image_to_image import read_input_image
from keifu.inference.images.latent_diffusion import LatentDiffusionPipeline
from keifu.inference.images.pixel_diffusion import ImageRequest

diffusers = pytest.importorskip("diffusers")
LEADING = {"timestep_spacing": "leading"}
SCHEDULERS = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "euler": ("EulerDiscreteScheduler", LEADING),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", LEADING),
    "heun": ("HeunDiscreteScheduler", LEADING | {"beta_start": 1e-4, "beta_end": 0.02}),  # not its defaults
    "lms": ("LMSDiscreteScheduler", LEADING),
    "plms": ("PNDMScheduler", {}),
    "dpm++-2m": ("DPMSolverMultistepScheduler", LEADING),
    "dpm++-2m-sde": ("DPMSolverMultistepScheduler", LEADING | {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", LEADING),
}
# Set out in the middle, diffusers' LMS weighs slopes that it has not seen; its PLMS, whose first step stands twice in
# the list, ends a step early, and is given the right list here.
CASES = [(name, 0.65) for name in SCHEDULERS if name != "lms"] + [("lms", 1.0), ("ddim", 1.0)]
IN_IMAGES = {"ddim", "euler", "euler-ancestral", "lms", "dpm++-2m"}  # others are slow here and quick with a mask


def cases(quick: bool) -> list[Any]:
    """Return all cases, of which those of `IN_IMAGES` are quick, or those of the other samplers."""
    return [pytest.param(*case, marks=[] if (case[0] in IN_IMAGES) is quick else [pytest.mark.slow]) for case in CASES]


SEEDS, TEXT, SIZE = [3, 2**40], "a red heart", (24, 40)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the paths of a picture of 40 x 24 random pixels and of a mask with an odd edge."""
    folder = tmp_path_factory.mktemp("originals")
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(folder / "init.png")
    mask = np.zeros(SIZE, np.uint8)
    mask[3:17, 5:22] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder / "init.png", folder / "mask.png"


@pytest.fixture(scope="module")
def painter(pipeline) -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline(*checkpoints.load(pipeline[1]))


@pytest.fixture(scope="module")
def filler(pipeline, tmp_path_factory) -> tuple[Any, LatentDiffusionPipeline]:
    """Return a maker of diffusers' pipeline whose U-Net also reads a mask, and keifu's pipeline of the same weights."""
    torch.manual_seed(5)
    parts = dict(pipeline[0].components)
    unet = diffusers.UNet2DConditionModel.from_config(parts["unet"].config, in_channels=9)
    theirs = partial(diffusers.StableDiffusionInpaintPipeline, **parts | {"unet": unet}, requires_safety_checker=False)
    folder = tmp_path_factory.mktemp("filler")
    theirs().save_pretrained(folder)
    return theirs, LatentDiffusionPipeline(*checkpoints.load(folder))


def reference(pipeline: Any, sampler: str, init: Path, strength: float, **settings: Any) -> list[torch.Tensor]:
    """Return diffusers' latents after each step, for two seeds and the same picture."""
    kind, changed = SCHEDULERS[sampler]
    pipeline.scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config, **changed)
    pipeline.set_progress_bar_config(disable=True)
    if sampler == "plms":
        pipeline.get_timesteps = partial(_whole_first_step, pipeline.scheduler)
    steps: list[torch.Tensor] = []

    def watch(_: Any, step: int, timestep: Any, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps.append(found["latents"].clone())
        return found

    pixels = torch.from_numpy(np.asarray(Image.open(init)).copy()).permute(2, 0, 1)[None] / 255
    made = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    pipeline(
        [TEXT] * 2, image=pixels.repeat(2, 1, 1, 1), strength=strength, generator=made, output_type="latent",
        callback_on_step_end=watch, **settings,
    )  # fmt: skip
    if sampler == "heun":  # two of theirs are a step
        steps = steps[1::2] + steps[-1:]
    sigmas = getattr(pipeline.scheduler, "sigmas", torch.ones(1))
    scaled = sampler in ("euler", "euler-ancestral", "heun", "lms")
    ends = sigmas[1::2] if sampler == "heun" else sigmas[1:]
    ends = ends[-len(steps) :].tolist() if scaled else [0.0] * len(steps)
    steps = [x / (end**2 + 1) ** 0.5 for x, end in zip(steps, ends, strict=True)]
    return steps[1:] if sampler == "plms" else steps


def _whole_first_step(scheduler: Any, num_inference_steps: int, strength: float, device: Any) -> Any:
    """Return the timesteps of PLMS, with the second of the remaining ones twice."""
    taken = int(num_inference_steps * strength)
    left = torch.cat([scheduler.timesteps[:1], scheduler.timesteps[2:]])[-taken:]
    return torch.cat([left[:2], left[1:]]), taken


def same(painter: LatentDiffusionPipeline, wanted: ImageRequest, expected: list[torch.Tensor]) -> None:
    states = [*painter.drawing(painter.resolved(wanted), SEEDS)]
    assert len(states) == len(expected) == painter.resolved(wanted).n_steps
    for state, latents in zip(states, expected, strict=True):
        assert (state.x - latents).abs().max() <= 1e-5 * latents.abs().max()


@pytest.mark.parametrize(("sampler", "strength"), cases(True))
def test_image_to_image_is_diffusers(pipeline, painter, files, sampler: str, strength: float) -> None:
    theirs = diffusers.StableDiffusionImg2ImgPipeline(**pipeline[0].components, requires_safety_checker=False)
    expected = reference(theirs, sampler, files[0], strength, num_inference_steps=7, guidance_scale=4.0)
    init = read_input_image(files[0])
    same(painter, ImageRequest(sampler, 7, text=TEXT, guidance=4.0, init=init, strength=strength), expected)


@pytest.mark.parametrize(("sampler", "strength"), cases(False))
def test_inpainting_is_diffusers(pipeline, painter, files, sampler: str, strength: float) -> None:
    """With the U-Net of text to image: what the mask leaves gets its noise anew at every step."""
    guidance = 1.0 if sampler == "plms" else 4.0
    theirs = diffusers.StableDiffusionInpaintPipeline(**pipeline[0].components, requires_safety_checker=False)
    unused = torch.zeros(2, 4, *(side // painter.model.config.factor for side in SIZE))  # spares the generators a draw
    expected = reference(
        theirs, sampler, files[0], strength, num_inference_steps=7, guidance_scale=guidance, height=SIZE[0],
        width=SIZE[1], mask_image=Image.open(files[1]), masked_image_latents=unused,
    )  # fmt: skip
    init, mask = (read_input_image(file) for file in files)
    same(
        painter,
        ImageRequest(sampler, 7, text=TEXT, guidance=guidance, init=init, mask=mask, strength=strength),
        expected,
    )


@pytest.mark.parametrize(
    ("sampler", "strength", "guidance"),
    quick((name, *each) for name in ("ddim", "heun", "dpm++-2m-sde") for each in ((0.65, 1.0), (1.0, 4.0))),
)
def test_a_network_that_reads_masks_is_diffusers(filler, files, sampler: str, strength: float, guidance: float) -> None:
    masks = torch.from_numpy(np.asarray(Image.open(files[1])).copy())[None, None].repeat(2, 1, 1, 1) / 255
    expected = reference(
        filler[0](), sampler, files[0], strength, num_inference_steps=7, guidance_scale=guidance, height=SIZE[0],
        width=SIZE[1], mask_image=masks,
    )  # fmt: skip
    init, mask = (read_input_image(file) for file in files)
    wanted = ImageRequest(sampler, 7, text=TEXT, guidance=guidance, init=init, mask=mask, strength=strength)
    same(filler[1], wanted, expected)


def test_what_is_not_drawn_anew_keeps_its_pixels_and_each_picture_its_seed(painter, files) -> None:
    init, mask = (read_input_image(file) for file in files)
    wanted = painter.resolved(ImageRequest("ddim", 3, text=TEXT, guidance=3.0, init=init, mask=mask))
    assert wanted.strength == 1 and wanted.size == SIZE
    both, alone = painter.draw(wanted, [1, 2]), painter.draw(wanted, [2])
    before = torch.from_numpy(np.asarray(Image.open(files[0])).copy()).permute(2, 0, 1)
    anew = torch.from_numpy(np.asarray(Image.open(files[1])).copy()) > 0
    assert torch.equal(both[:, :, ~anew], before[None][:, :, ~anew].repeat(2, 1, 1))
    assert (both[1].int() - alone[0]).abs().max() <= 1 and not torch.equal(both[0], both[1])
    assert (both[0].int() - before)[:, anew].abs().max() > 1


def test_less_strength_stays_nearer_to_the_picture(painter, files) -> None:
    init = read_input_image(files[0])
    own = painter.model.to_latents(init.pixels(SIZE, 3)[None])
    far = []
    for strength in (0.1, 0.5, 1.0):
        wanted = painter.resolved(ImageRequest("ddim", 10, text=TEXT, init=init, strength=strength))
        *_, last = painter.drawing(wanted, [1])
        far.append(float((last.x - own).square().mean()))
    assert far == sorted(far)


def draw(capsys: pytest.CaptureFixture, *words: str) -> list[str]:
    cli.main(["draw", *words])
    return capsys.readouterr().out.split()


def refused(capsys: pytest.CaptureFixture, *words: str) -> str:
    with pytest.raises(SystemExit):
        cli.main(["draw", *words])
    return capsys.readouterr().err


def test_the_command_draws_on_pictures_and_again(pipeline, files, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name, file in zip(("init.png", "mask.png"), files, strict=True):
        Path(name).write_bytes(file.read_bytes())
    words = [str(pipeline[1]), TEXT, "--steps", "4", "--seed", "4", "--guidance", "2", "--init", "init.png"]
    assert draw(capsys, *words, "--mask", "mask.png", "-o", "a.png") == ["a.png"]
    told = json.loads(Image.open("a.png").text["keifu"])["drawing"]
    assert told["strength"] == 1 and len(told["init"]["digest"]) == 64 and told["mask"]["place"].endswith("mask.png")
    assert draw(capsys, "--again", "a.png") == ["a-again.png"]
    draw(capsys, *words, "--size", "16x24", "--strength", "0.6", "--count", "2", "-o", "b.png")
    assert Image.open("b-1.png").size == (16, 24)
    assert draw(capsys, "--again", "b-2.png") == ["b-2-again.png"]
    Path("init.png").rename("moved.png")
    assert "init.png, which is not there: name its place (--init)" in refused(capsys, "--again", "a.png")
    assert draw(capsys, "--again", "a.png", "--init", "moved.png") == ["a-again.png"]
    Path("init.png").write_bytes(files[1].read_bytes())
    assert "init.png is not the picture that a.png was drawn with" in refused(capsys, "--again", "a.png")
    assert "b.png was drawn without --mask" in refused(
        capsys, "--again", "b.png", "--init", "moved.png", "--mask", "mask.png"
    )


def test_pictures_that_do_not_fit_are_refused(pipeline, files, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 24)).save("init.png")
    Image.new("L", (20, 23)).save("mask.png")
    Image.new("L", (20, 24)).save("black.png")
    speck = Image.new("L", (20, 24))
    speck.putpixel((1, 1), 255)
    speck.save("speck.png")
    Image.new("RGB", (18, 23)).save("odd.png")
    cases = {
        "--init none.png": "There is no picture none.png",
        "--init init.png --mask mask.png": "20 x 23 pixels, and the picture 20 x 24 (width x height)",
        "--init init.png --mask black.png": "has no white",
        "--init init.png --mask speck.png": "smaller than the 2 x 2 pixels",
        "--init odd.png": "nearest size that does is 24 x 18 (height x width)",
        "--mask mask.png": "A mask is for a picture to begin with",
        "--strength 0.5": "A strength is for a picture",
        "--init init.png --strength 1.5": "above 0 and at most 1, not 1.5",
        "--init init.png --steps 4 --strength 0.2": "leaves none of 4 steps: take 0.25",
    }
    for words, said in cases.items():
        assert said in refused(capsys, str(pipeline[1]), TEXT, *words.split()), words


def test_a_network_that_reads_masks_needs_one(filler, files) -> None:
    for given in ({}, {"init": read_input_image(files[0])}):
        with pytest.raises(UserError, match=r"fills in a masked part .*--init, --mask"):
            filler[1].resolved(ImageRequest(text=TEXT, **given))
