"""Pictures for CLIP are transformers' to the bit, whatever their size, shape and colours."""

import io

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from keifu.data.images.io import read_image
from keifu.data.images.preprocessing import Preprocessing
from keifu.models.hf.image_processor import Pixels, read_pixels, write_pixels

SHAPES = [(224, 224), (225, 223), (37, 500), (500, 37), (1, 1), (3, 2), (640, 481), (72, 72), (23, 23), (449, 224)]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    random = np.random.default_rng([width, height])
    if mode == "P":  # a palette with a transparent colour
        image = Image.fromarray(random.integers(0, 255, (height, width, 4), np.uint8), "RGBA").quantize(16)
        image.info["transparency"] = 3
        return image
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    pixels = random.integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels, mode)


def ours(pixels: Pixels) -> Preprocessing:
    return Preprocessing(**vars(pixels))


def theirs(**options) -> transformers.CLIPImageProcessorPil:
    return transformers.CLIPImageProcessorPil(**options)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_to_the_bit(shape) -> None:
    image = picture(*shape)
    for size in (224, 23):
        options = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
        expected = theirs(**options)(image, return_tensors="pt").pixel_values
        assert torch.equal(ours(Pixels(size, size))([image]), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P"])
def test_every_kind_of_colours_to_the_bit(mode) -> None:
    image, file = picture(61, 47, mode), io.BytesIO()
    image.save(file, "TIFF" if mode == "CMYK" else "PNG")
    read = read_image(file.getvalue()).image
    expected = theirs()(Image.open(file), return_tensors="pt").pixel_values
    assert torch.equal(ours(Pixels())([read]), expected)


def test_16_bits_are_scaled_where_transformers_cuts_them_off() -> None:
    deep, file = np.linspace(0, 65_535, 64, dtype=np.uint16).reshape(8, 8), io.BytesIO()
    Image.fromarray(deep).save(file, "PNG")
    shown = ours(Pixels(8, 8, mean=(0.0,) * 3, std=(1.0,) * 3))([read_image(file.getvalue()).image])
    assert torch.allclose(shown[0, 0], torch.from_numpy(deep / 65_535).float(), atol=0.5 / 255)


OTHERS = {
    "cut-wider-than-resized": {"size": {"shortest_edge": 20}, "crop_size": {"height": 33, "width": 33}},
    "larger-before-the-cut": {"size": {"shortest_edge": 50}, "crop_size": {"height": 31, "width": 31}},
    "squashed": {"size": {"height": 30, "width": 30}, "crop_size": {"height": 30, "width": 30}},
    "bilinear": {"resample": 2, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]},
    "lanczos": {"resample": 1},
    "old-sizes": {"size": 64, "crop_size": 64},
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_a_file_may_say(case, tmp_path) -> None:
    processor, image = theirs(**OTHERS[case]), picture(71, 90)
    pixels = read_pixels(processor.to_dict() | OTHERS[case], 224)
    assert torch.equal(ours(pixels)([image]), processor(image, return_tensors="pt").pixel_values)
    assert read_pixels(write_pixels(pixels), 1) == pixels
    again = transformers.CLIPImageProcessorPil(**write_pixels(pixels))
    assert torch.equal(ours(pixels)([image]), again(image, return_tensors="pt").pixel_values)


def test_what_is_not_implemented_is_refused() -> None:
    for wrong in ({"do_center_crop": False}, {"rescale_factor": 1 / 127.5}, {"crop_size": {"height": 3, "width": 4}},
                  {"size": {"shortest_edge": 3, "longest_edge": 9}}, {"resample": 9}):  # fmt: skip
        with pytest.raises(ValueError, match="preprocessor_config"):
            read_pixels(wrong, 224)
