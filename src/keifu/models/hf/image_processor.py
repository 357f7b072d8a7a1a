"""Image preprocessing (resize, crop, normalise) as in transformers' preprocessor_config.json."""

from dataclasses import dataclass
from typing import Any

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in the order of Pillow's numbers
SCALE = 0.00392156862745098  # 1 / 255
SCALED = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": SCALE}
FIXED = {**SCALED, "do_center_crop": True}
LONGEST = 4096  # the largest side of a picture that is cut into tiles


@dataclass(frozen=True)
class Pixels:
    """Preprocessing of pictures: resize the shorter side to `size` pixels with the filter `resample` (both sides if
    `squash`), keep the centre `crop` x `crop`, and normalise values from 0 to 1 by each channel's `mean` and `std`.

    The defaults are OpenAI's.
    """

    size: int = 224
    crop: int = 224
    resample: str = "bicubic"
    squash: bool = False
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


@dataclass(frozen=True)
class Tiles:
    """Preprocessing of pictures in tiles: resize the longer side to `longest` pixels with the filter `resample`, then
    both sides to multiples of `tile`, and cut the picture into tiles. The whole picture, resized to `tile` x `tile`,
    follows them. Without `split` there is only the whole picture.

    The defaults are SmolVLM-256M's.
    """

    longest: int = 2048
    tile: int = 512
    split: bool = True
    resample: str = "lanczos"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


def read_tiles(json: dict[str, Any] | None, tile: int) -> Tiles:
    """Read Idefics3's preprocessor_config.json. Without one: four tiles of this size along a side."""
    if json is None:
        return Tiles(4 * tile, tile)
    _check(json, SCALED)
    longest, side = json.get("size"), json.get("max_image_size")
    resample = json.get("resample", FILTERS.index(Tiles.resample))
    if side != {"longest_edge": tile}:
        raise ValueError(f"its preprocessor_config has the max_image_size {side!r}, and a tile has {tile} pixels.")
    if not isinstance(longest, dict) or [*longest] != ["longest_edge"] or not 0 < longest["longest_edge"] <= LONGEST:
        raise ValueError(f"its preprocessor_config has the size {longest!r}: a longest_edge of 1 to {LONGEST} is read.")
    if resample not in range(len(FILTERS)):
        raise ValueError(f"its preprocessor_config has the filter {resample!r}: not implemented.")
    split, mean, std = json.get("do_image_splitting", True), json.get("image_mean"), json.get("image_std")
    normal = tuple(mean or Tiles.mean), tuple(std or Tiles.std)
    return Tiles(longest["longest_edge"], tile, bool(split), FILTERS[resample], *normal)


def write_tiles(tiles: Tiles) -> dict[str, Any]:
    """Return the preprocessor_config.json that transformers reads."""
    return {
        "image_processor_type": "Idefics3ImageProcessor",
        "processor_class": "Idefics3Processor",
        **SCALED,
        "do_convert_rgb": True,
        "do_pad": True,
        "do_image_splitting": tiles.split,
        "size": {"longest_edge": tiles.longest},
        "max_image_size": {"longest_edge": tiles.tile},
        "resample": FILTERS.index(tiles.resample),
        "image_mean": list(tiles.mean),
        "image_std": list(tiles.std),
    }


def read_pixels(json: dict[str, Any] | None, image_size: int) -> Pixels:
    """Read a preprocessor_config.json. Without one: the published defaults for images of `image_size`."""
    json = json or {}
    _check(json, FIXED)
    size, resample = json.get("size", image_size), json.get("resample", 3)
    sides = size if isinstance(size, dict) else {"shortest_edge": size}
    squash = "shortest_edge" not in sides
    edge = _side(sides) if squash else sides["shortest_edge"]
    if sides.get("longest_edge") or resample not in range(len(FILTERS)):
        raise ValueError(f"its preprocessor_config has the size {size!r} and the filter {resample!r}: not implemented.")
    mean, std = tuple(json.get("image_mean", MEAN)), tuple(json.get("image_std", STD))
    return Pixels(edge, _side(json.get("crop_size", image_size)), FILTERS[resample], squash, mean, std)


def _check(json: dict[str, Any], fixed: dict[str, Any]) -> None:
    for name, only in fixed.items():
        if json.get(name, only) not in (None, only):
            raise ValueError(f"its preprocessor_config sets {name} to {json[name]!r}, and keifu implements {only!r}.")


def _side(size: Any) -> int:
    sides = {size["height"], size["width"]} if isinstance(size, dict) else {size}
    if len(sides) != 1:
        raise ValueError(f"its preprocessor_config has the size {size!r}, and only squares are implemented.")
    return sides.pop()


def write_pixels(pixels: Pixels) -> dict[str, Any]:
    """Return the preprocessor_config.json that transformers reads."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        **FIXED,
        "do_convert_rgb": True,
        "size": {"height": pixels.size, "width": pixels.size} if pixels.squash else {"shortest_edge": pixels.size},
        "crop_size": {"height": pixels.crop, "width": pixels.crop},
        "resample": FILTERS.index(pixels.resample),
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }
