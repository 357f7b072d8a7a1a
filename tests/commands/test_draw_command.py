"""keifu draw on a model of a few thousand weights: files, what they say, and the same picture again."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from keifu import checkpoints, cli, devices
from keifu.checkpoints import loading
from keifu.commands import draw
from keifu.commands.shared import drawing as drawn
from keifu.inference.images.png_metadata import read_record
from keifu.inference.images.samplers import SAMPLERS
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.models.diffusion import ddpm

SMALL = ddpm.Config(
    size=8, channels=3, dim=8, multipliers=(1, 2), n_residual_blocks=1, attention=(1,), norm_groups=4, middle_groups=4,
    dropout=0.0, n_classes=3, null_class=True, classes=("cat", "dog", "bird"), noise=Noise(steps=20, beta_end=0.3),
)  # fmt: skip


def build(folder: Path, config: ddpm.Config = SMALL, seed: int = 0) -> str:
    """Save a tiny model with random weights and return its folder. The last layer of a new model would be zero."""
    torch.manual_seed(seed)
    model = ddpm.build(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    checkpoints.save(model, None, folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)  # products this small wait for a second thread longer than they take
    monkeypatch.chdir(tmp_path)


def run(capsys: pytest.CaptureFixture, *words: str) -> list[str]:
    cli.main(["draw", *words])
    return capsys.readouterr().out.split()


def refused(capsys: pytest.CaptureFixture, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["draw", *words])
    assert stop.value.code
    return capsys.readouterr().err


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_and_draws_again(model: str, sampler: str, capsys: pytest.CaptureFixture) -> None:
    assert run(capsys, model, "--sampler", sampler, "--steps", "4", "--seed", "5", "-o", "a.png") == ["a.png"]
    assert run(capsys, "--again", "a.png") == ["a-again.png"]
    assert np.array_equal(pixels("a.png"), pixels("a-again.png")) and pixels("a.png").shape == (8, 8, 3)
    assert Image.open("a.png").text == Image.open("a-again.png").text
    told = json.loads(Image.open("a.png").text["keifu"])
    assert told["drawing"]["sampler"] == sampler and told["drawing"]["steps"] == 4 and told["drawing"]["seed"] == 5


def test_a_large_model_is_computed_in_bfloat16_where_the_processor_has_it(model, capsys, monkeypatch) -> None:
    monkeypatch.setattr(devices, "processor", lambda field: "avx512_bf16")
    told = {}
    for size, path in {10**9: "small.png", 1: "large.png"}.items():
        monkeypatch.setattr(drawn, "LARGE", size)
        run(capsys, model, "--steps", "3", "--seed", "5", "-o", path)
        told[path] = read_record(Path(path)).dtype
        run(capsys, "--again", path)
    assert told == {"small.png": None, "large.png": "bf16"}
    apart = np.abs(pixels("small.png").astype(int) - pixels("large.png").astype(int))
    assert 0 < apart.max() < 64
    run(capsys, model, "--steps", "3", "--seed", "5", "--precision", "float32", "-o", "asked.png")
    assert np.array_equal(pixels("asked.png"), pixels("small.png"))


def test_an_unknown_sampler_is_said_before_the_model_is_opened(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["draw", "no-such-model", "--sampler", "eulr"])
    assert "There is no sampler 'eulr'. Did you mean 'euler'?" in capsys.readouterr().err
    assert all(name in (draw.Options.__doc__ or "") for name in SAMPLERS)


def test_a_model_is_opened_and_planned_once(model: str, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(devices, "processor", lambda field: "avx512_bf16")
    opened, made = [], []
    for calls, module, name in ((opened, loading, "open_source"), (made, loading, "plan")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, real=real, calls=calls: [calls.append(args), real(*args)][1])
    run(capsys, model, "--steps", "1", "--seed", "5", "-o", "once.png")
    assert len(opened) == len(made) == 1


def test_several_pictures_are_a_sheet_and_files_of_their_own(model: str, capsys: pytest.CaptureFixture) -> None:
    options = ("--steps", "3", "--seed", "7", "--eta", "1", "--label", "dog", "--guidance", "2")
    written = run(capsys, model, "--count", "5", "--batch-size", "2", *options, "-o", "many.png")
    assert written == ["many.png", *(f"many-{number}.png" for number in range(1, 6))]
    assert len({pixels(path).tobytes() for path in written}) == 6
    for path in ("many.png", "many-4.png"):
        again = run(capsys, "--again", path)[0]
        assert np.array_equal(pixels(path), pixels(again))
    alone = run(capsys, model, *options[:3], "10", *options[4:])  # the fourth picture's seed
    assert alone == ["picture-10.png"]
    assert np.abs(pixels(alone[0]).astype(int) - pixels("many-4.png")).max() <= 1


def test_a_sheet_of_the_best_pictures_is_drawn_again(
    model: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keifu.commands.shared.drawing.check", lambda *options: None)
    monkeypatch.setattr("keifu.commands.shared.drawing.best_of", lambda *options: [2, 0])
    words = (model, "--best-of", "3", "--count", "2", "--clip", "none", "--steps", "2", "--seed", "3", "-o", "best.png")
    written = run(capsys, *words)
    assert written == ["best.png", "best-1.png", "best-2.png"]
    for path in written:
        again = run(capsys, "--again", path)[0]
        assert np.array_equal(pixels(path), pixels(again))


def test_a_fresh_seed_is_in_the_name_and_a_size_is_width_by_height(model: str, capsys: pytest.CaptureFixture) -> None:
    first, second = (run(capsys, model, "--steps", "1", "--size", "12x10")[0] for _ in range(2))
    assert re.fullmatch(r"picture-\d+\.png", first) and first != second
    assert Image.open(first).size == (12, 10)


def test_another_model_is_refused_by_its_fingerprint(model: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    other = build(tmp_path / "other", seed=1)
    run(capsys, model, "--steps", "2", "--seed", "1", "-o", "a.png")
    assert "not the model that drew a.png" in refused(capsys, other, "--again", "a.png")
    changed = build(tmp_path / "changed", replace(SMALL, noise=Noise(steps=20, beta_end=0.2)))
    assert "not the model" in refused(capsys, changed, "--again", "a.png")
    moved = build(tmp_path / "moved")  # the same weights elsewhere
    assert run(capsys, moved, "--again", "a.png", "-o", "b.png") == ["b.png"]


def test_a_picture_that_was_changed_is_said_to_differ(model: str, capsys: pytest.CaptureFixture) -> None:
    run(capsys, model, "--steps", "2", "--seed", "1", "-o", "a.png")
    image, facts = Image.open("a.png"), PngInfo()
    for name, text in image.text.items():
        facts.add_itxt(name, text)
    image.putpixel((0, 0), (1, 2, 3))
    image.save("a.png", pnginfo=facts)
    assert "is not a.png bit for bit: " in refused(capsys, "--again", "a.png")
    image.save("bare.png")
    assert "does not say how it was drawn" in refused(capsys, "--again", "bare.png")
    Path("torn.png").write_bytes(Path("a.png").read_bytes()[:60])
    assert "torn.png" in refused(capsys, "--again", "torn.png")
    Path("text.png").write_text("no picture")
    told = json.loads(Image.open("a.png").text["keifu"])
    for change, expected in (
        ({"count": "3"}, "gives '3' for count, which must be int"),
        ({"number": 5}, "is wrong: picture 5 of 1, 1 at a time"),
        ({"batch_size": 0}, "0 at a time"),
        ({"threads": "a"}, "gives 'a' for threads, which must be int"),
        ({"threads": 0}, "the threads as 0, which must be from 1 to 1,024"),
        ({"threads": 10**6}, "the threads as 1,000,000, which"),
        ({"count": 10**9}, "the count as 1,000,000,000, which must be from 1 to 10,000"),
        ({"drawing": told["drawing"] | {"candidates": 10**9}}, "the candidates as 1,000,000,000"),
        ({"drawing": told["drawing"] | {"size": [10**4, 10**4]}}, "100,000,000, which must be from 1 to 64"),
        ({"kept": [1]}, "the highest number as 2, which must be from 1 to 1"),
        ({"kept": [0, 0], "number": None}, "number of pixels as 128, which must be from 1 to 64"),
    ):
        (chunks := PngInfo()).add_text("keifu", json.dumps(told | change))
        Image.open("a.png").save("odd.png", pnginfo=chunks)
        said = refused(capsys, "--again", "odd.png")
        assert expected in said and said.count("record") == 1
    (chunks := PngInfo()).add_text("keifu", json.dumps(told | {"dtype": "/etc/passwd"}))
    Image.open("a.png").save("odd.png", pnginfo=chunks)
    assert "no number format of weights '/etc/passwd'" in refused(capsys, "--again", "odd.png")
    Image.new("L", (20_000, 16_000)).save("odd.png")
    assert "odd.png is damaged" in refused(capsys, "--again", "odd.png")
    assert "text.png is no picture" in refused(capsys, "--again", "text.png")
    assert "There is no picture none.png" in refused(capsys, "--again", "none.png")
    assert "leave out --steps" in refused(capsys, "--again", "a.png", "--steps", "3")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--label", "cow"], "bird, cat, dog"),
        (["--label", "3"], "0 to 2"),
        (["--guidance", "2"], "Guidance (2)"),
        (["--steps", "21"], "1 to 20"),
        (["--steps", "0"], "--steps must be a whole number from 1"),
        (["--sampler", "dpm"], "dpm++-2m"),
        (["--sampler", "euler", "--eta", "0.5"], "euler has none"),
        (["--eta", "2"], "--eta must be a number from 0 to 1"),
        (["--karras"], "Karras"),
        (["--size", "9"], "8 x 8"),
        (["--size", "٨x٨"], "which must be pixels of a side (64) or WIDTHxHEIGHT (64x48)."),
        (["--size", "axb"], "WIDTHxHEIGHT"),
        (["--count", "0"], "--count must be a whole number from 1"),
        (["a red heart"], "reads no text"),
        (["--guidance-rescale", "1.5"], "--guidance-rescale must be a number from 0 to 1"),
    ],
)
def test_what_cannot_be_drawn_is_said(model: str, words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert said in refused(capsys, model, *words)


def test_a_model_that_draws_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from keifu.models import gpt2

    config = gpt2.Config(vocab_size=20, context_length=8, dim=8, n_layers=1, n_heads=2)
    checkpoints.save(gpt2.build(config), None, tmp_path / "writer")
    assert "draws no pictures" in refused(capsys, str(tmp_path / "writer"))
    assert "There is no model" in refused(capsys)


def test_pixels_begin_with_a_picture_and_keep_what_a_mask_leaves(model: str, capsys: pytest.CaptureFixture) -> None:
    random = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(random).save("init.png")
    mask = np.zeros((10, 12), np.uint8)
    mask[2:5, 3:] = 255
    Image.fromarray(mask).save("mask.png")
    words = (model, "--steps", "4", "--seed", "1", "--init", "init.png")
    run(capsys, *words, "--mask", "mask.png", "-o", "a.png")
    assert np.array_equal(pixels("a.png")[mask == 0], random[mask == 0])
    assert not np.array_equal(pixels("a.png")[mask > 0], random[mask > 0])
    run(capsys, *words, "--strength", "0.5", "-o", "b.png")
    assert run(capsys, "--again", "b.png") == ["b-again.png"]


def test_grey_pictures_strips_and_bfloat16(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    grey = build(tmp_path / "grey", replace(SMALL, channels=1, n_classes=0, null_class=False, classes=()))
    words = ("--steps", "4", "--seed", "1", "--precision", "bfloat16", "--strip", "strip.png", "-o", "a.png")
    assert run(capsys, grey, *words) == ["a.png", "strip.png"]
    assert Image.open("a.png").mode == "L" and Image.open("strip.png").size[0] > 4 * 72
    drawn, strip = pixels("a.png"), pixels("strip.png")  # 8 pixels are enlarged 9 times
    rows = [strip[4 + row * (strip.shape[0] - 4) // 3 :][:72:9, 4:][..., 0] for row in range(3)]
    assert np.array_equal(rows[0][:, :72:9], drawn)  # before any noise
    assert np.array_equal(rows[1][:, 3 * 76 : 3 * 76 + 72 : 9], drawn)  # and after the last of it
    run(capsys, "--again", "a.png")
