"""Pictures in rows with captions."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from keifu.data.images import grid as module
from keifu.data.images.grid import grid, png, sheet, wrap
from keifu.errors import UserError


def colours(count: int, channels: int = 3) -> torch.Tensor:
    return (torch.arange(count) * 10).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, channels, 4, 6)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_picture_has_its_place(channels: int) -> None:
    image = np.asarray(sheet(colours(5, channels), columns=3, scale=2, margin=1))
    assert image.shape == (2 * 9 + 1, 3 * 13 + 1, 3)
    for place in range(5):
        row, column = divmod(place, 3)
        cell = image[1 + row * 9 : 9 + row * 9, 1 + column * 13 : 13 + column * 13]
        assert (cell == place * 10).all()
    assert (image[0] == 255).all() and (image[10:, 28:] == 255).all()


def test_captions_stand_below_and_enlarge_small_pictures() -> None:
    bare, named = sheet(colours(4)), sheet(colours(4), ["a", "", "name", "b"])
    assert bare.size == (2 * 10 + 4, 2 * 8 + 4) and named.width == 2 * (72 + 4) + 4
    below = np.asarray(named)[4 + 48 : 4 + 48 + 20]
    assert below[:, 4:76].min() < 200 and below[:, 80:152].min() == 255
    assert sheet(colours(4), [""] * 4, scale=1).size == bare.size


def test_captions_are_cut_to_two_lines() -> None:
    assert wrap("one two", 500) == "one two"
    first, second = wrap("a rather long name of something that is not short", 72).split("\n")
    assert first == "a rather long" and second.endswith("…")
    assert wrap("unbreakableunbreakable", 72).count("\n") == 1 and wrap("", 72) == ""


def test_japanese_words_get_a_font_that_has_them(monkeypatch) -> None:
    asked, font = [], module._open_font(False)
    monkeypatch.setattr(module, "_open_font", lambda far_east: asked.append(far_east) or font)
    for text in ("été", "日本", "カタカナ", "😀", "中文"):
        module._font(text)
    assert asked == [False, True, True, False, True]


def test_a_png_keeps_what_it_is_told() -> None:
    about = {"settings": '{"seed": 1}', "title": "日本"}
    image = Image.open(io.BytesIO(grid(colours(2), about=about)))
    assert image.text == about and image.size == (24, 12)
    assert Image.open(io.BytesIO(png(Image.new("L", (2, 2))))).mode == "L"


def test_refusals() -> None:
    with pytest.raises(UserError, match="no pictures to lay"):
        sheet(colours(0))
    with pytest.raises(UserError, match="3 pictures need as many captions, and 2 were given"):
        sheet(colours(3), ["a", "b"])
