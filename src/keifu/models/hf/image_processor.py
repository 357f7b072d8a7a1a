"""Image preprocessing (resize, crop, normalise) as in transformers' preprocessor_config.json."""

from dataclasses import dataclass
from typing import Any

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers, from 0
SCALE = 0.00392156862745098  # 1 / 255
FIXED = {"do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "rescale_factor": SCALE}


@dataclass(frozen=True)
class Pixels:
    """The shorter side is resized to `size` pixels by the filter `resample`, both sides where `squash` is set; the
    centre `crop` x `crop` is kept; values from 0 to 1 are normalised by `mean` and `std` of each channel.

    The defaults are OpenAI's.
    """

    size: int = 224
    crop: int = 224
    resample: str = "bicubic"
    squash: bool = False
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


def read_pixels(json: dict[str, Any] | None, image_size: int) -> Pixels:
    """Return the content of a preprocessor_config.json; without one, the published defaults for images of `image_size`.
    """
    json = json or {}
    for name, fine in FIXED.items():
        if json.get(name, fine) not in (None, fine):
            raise ValueError(f"its preprocessor_config sets {name} to {json[name]!r}, and keifu implements {fine!r}.")
    size, resample = json.get("size", image_size), json.get("resample", 3)
    sides = size if isinstance(size, dict) else {"shortest_edge": size}
    squash = "shortest_edge" not in sides
    edge = _side(sides) if squash else sides["shortest_edge"]
    if sides.get("longest_edge") or resample not in range(len(FILTERS)):
        raise ValueError(f"its preprocessor_config has the size {size!r} and the filter {resample!r}: not implemented.")
    mean, std = tuple(json.get("image_mean", MEAN)), tuple(json.get("image_std", STD))
    return Pixels(edge, _side(json.get("crop_size", image_size)), FILTERS[resample], squash, mean, std)


def _side(size: Any) -> int:
    sides = {size["height"], size["width"]} if isinstance(size, dict) else {size}
    if len(sides) != 1:
        raise ValueError(f"its preprocessor_config has the size {size!r}, and only squares are implemented.")
    return sides.pop()


def write_pixels(pixels: Pixels) -> dict[str, Any]:
    """Return the preprocessor_config.json that transformers reads."""
    square = {"height": pixels.size, "width": pixels.size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        **FIXED,
        "do_convert_rgb": True,
        "size": square if pixels.squash else {"shortest_edge": pixels.size},
        "crop_size": {"height": pixels.crop, "width": pixels.crop},
        "resample": FILTERS.index(pixels.resample),
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }
