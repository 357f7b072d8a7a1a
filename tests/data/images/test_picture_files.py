"""Pictures of every mode and condition become upright RGB or grey of 8 bits on white, or a sentence."""

import io
import os
import resource
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from keifu.commands.shared.inputs import read_pictures
from keifu.data.images.io import composite_on_white, fit_image, read_image
from keifu.errors import UserError
from keifu.inference.images.png_metadata import read_record

RED, CLEAR = (255, 0, 0, 255), (0, 0, 255, 0)


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def two_pixels(mode: str = "RGBA") -> Image.Image:
    """Return opaque red on the left, transparent blue on the right."""
    image = Image.new("RGBA", (2, 1), CLEAR)
    image.putpixel((0, 0), RED)
    return image if mode == "RGBA" else image.convert(mode)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparent_parts_become_white(kind: str) -> None:
    found = read_image(saved(two_pixels(), kind, **({"lossless": True} if kind == "WEBP" else {}))).image
    assert found.mode == "RGB" and np.asarray(found).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_half_transparent_parts_are_mixed_with_white() -> None:
    assert np.asarray(composite_on_white(Image.new("RGBA", (1, 1), (0, 0, 0, 51)))).tolist() == [[[204, 204, 204]]]


def test_a_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    found = read_image(saved(image, transparency=1)).image
    assert np.asarray(found).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_grey_with_transparency_stays_grey() -> None:
    found = read_image(saved(Image.new("LA", (1, 1), (10, 0)))).image
    assert found.mode == "L" and found.getpixel((0, 0)) == 255


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (65_535, 255), (257 * 100, 100), (257 * 100 + 129, 101)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_to_eight(kind: str, value: int, expected: int) -> None:
    shot = read_image(saved(Image.fromarray(np.full((2, 3), value, np.uint16)), kind))
    assert shot.image.mode == "L" and shot.image.getpixel((1, 1)) == expected
    assert shot.remarks == ("of 16 bits or more a channel: scaled to 8",)


def test_numbers_that_are_no_colours_are_refused() -> None:
    with pytest.raises(UserError, match="^here holds numbers from -3 to -3, which are not colours: scale them to"):
        read_image(saved(Image.fromarray(np.full((2, 2), -3, np.float32)), "TIFF"), "here")
    assert read_image(saved(Image.fromarray(np.full((2, 2), 0.5, np.float32)), "TIFF")).image.getpixel((0, 0)) == 128


def test_cmyk_becomes_rgb() -> None:
    shot = read_image(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))
    assert shot.image.mode == "RGB" and shot.image.getpixel((4, 4)) == (255, 0, 0)
    assert shot.remarks == ("in CMYK: turned into RGB",)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    first, second = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    lossless = {"lossless": True} if kind == "WEBP" else {}
    shot = read_image(saved(first, kind, save_all=True, append_images=[second], **lossless))
    assert shot.image.getpixel((2, 2)) == (255, 0, 0)
    assert shot.remarks == ("animated or of several pages: the first one counts",)


def test_turned_photographs_are_set_upright() -> None:
    image = Image.new("RGB", (2, 1), (255, 0, 0))
    facts = Image.Exif()
    facts[0x0112] = 6  # the camera was turned by a quarter
    assert read_image(saved(image, "PNG", exif=facts)).image.size == (1, 2)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "YCbCr"])
def test_plain_modes(mode: str) -> None:
    image = Image.new("RGB", (3, 2), (255, 255, 255)).convert(mode)
    kind = "JPEG" if mode == "YCbCr" else "PNG"
    found = read_image(saved(image, kind))
    assert found.image.mode == ("L" if mode in "1L" else "RGB") and not found.remarks
    assert np.asarray(found.image).min() == 255


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_cut_off_picture_is_a_sentence_that_names_it(kind: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = saved(Image.fromarray(noise), kind)
    path = tmp_path / "half.png"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="half.png is (damaged or cut off|not a picture)"):
        read_image(path)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_an_animation_that_is_cut_anywhere_is_read_or_a_sentence(kind: str) -> None:
    frames = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (24, 24, 3), np.uint8)) for n in range(3)]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    refused = 0
    for length in range(0, len(data), max(1, len(data) // 150)):
        try:
            read_image(data[:length], "cut")
        except UserError as error:
            refused += str(error).startswith("cut ")
    assert refused > 20


def jpeg_header(width: int, height: int) -> bytes:
    """Return a small JPEG file whose header gives a large size."""
    data = bytearray(saved(Image.new("RGB", (8, 8)), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = height.to_bytes(2) + width.to_bytes(2)
    return bytes(data)


def test_too_many_pixels_are_refused_by_the_header_before_memory_is_taken() -> None:
    bomb = jpeg_header(13_000, 13_000)
    assert len(bomb) < 1000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        UserError, match="^bomb has 13,000 x 13,000 pixels and would take 676 MB of memory; at most 300"
    ):
        read_image(bomb, "bomb")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
    deep = saved(Image.fromarray(np.zeros((100, 100), np.uint16)))
    with pytest.raises(UserError, match="would take 0 MB of memory; at most 0 MB"):
        read_image(deep, largest=79_999)
    assert read_image(deep, largest=80_000).image.size == (100, 100)


def test_a_form_of_a_format_that_is_not_implemented_is_a_sentence() -> None:
    data = bytearray(saved(Image.new("RGB", (4, 4)), "BMP"))
    data[30] = 9  # a compression that no program writes
    with pytest.raises(UserError, match="^a.bmp is damaged or cut off: Unsupported BMP compression"):
        read_image(bytes(data), "a.bmp")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_the_formats_that_are_read(kind: str) -> None:
    assert read_image(saved(Image.new("RGB", (8, 8), (255, 0, 0)), kind)).image.size == (8, 8)


@pytest.mark.parametrize("kind", ["DDS", "EPS", "ICNS", "TGA"])
def test_other_formats_are_refused_by_what_the_file_holds(kind: str) -> None:
    with pytest.raises(UserError, match="^a.png is not a picture of a format that keifu reads, which are PNG, JPEG"):
        read_image(saved(Image.new("RGB", (16, 16)), kind), "a.png")


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a program `gs` that only leaves a file behind, and return the path of that file."""
    mark = tmp_path / "executed"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {mark}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return mark


def test_postscript_under_the_name_of_a_picture_reaches_no_ghostscript(ghostscript: Path, tmp_path: Path) -> None:
    file = tmp_path / "cat.png"
    file.write_bytes(saved(Image.new("RGB", (4, 4)), "EPS"))
    with pytest.raises(UserError, match="is not a picture of a format"):
        read_image(file)
    with pytest.raises(UserError, match="is no picture"):
        read_record(file)
    assert not ghostscript.exists()
    with pytest.raises(subprocess.CalledProcessError):  # Pillow alone would have started it
        Image.open(file).load()
    assert ghostscript.exists()


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_no_picture_is_a_sentence(content: bytes) -> None:
    with pytest.raises(UserError, match="^word.png is (not a picture|damaged)"):
        read_image(content, "word.png")
    with pytest.raises(UserError, match="There is no picture /nowhere.png"):
        read_image(Path("/nowhere.png"))
    with pytest.raises(UserError, match="--image takes a file, and word.png is on the network: download it first"):
        read_pictures([Path("https://example.com/word.png")])


def test_sizes() -> None:
    wide = Image.new("RGB", (40, 20), (0, 0, 0))
    wide.paste((255, 0, 0), (10, 0, 30, 20))
    assert fit_image(wide, None, None).shape == (20, 40, 3)
    assert (fit_image(wide, 10, None)[:, 1:-1] == (255, 0, 0)).all()
    padded = fit_image(wide, 40, 1, "pad")
    assert padded.shape == (40, 40, 1) and (padded[:10] == 255).all() and padded[20, 2, 0] == 0
    assert fit_image(wide, 8, 3, "stretch").shape == (8, 8, 3)
    assert (fit_image(wide, 20, None) == np.asarray(wide)[:, 10:30]).all()  # no resampling where only a part is cut out
