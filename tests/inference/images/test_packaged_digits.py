"""The packaged `digits` model, drawn by the README's command and read by the packaged `network`."""

import re
from pathlib import Path

import pytest
import torch

import keifu
from keifu import cli
from keifu.data.images.io import read_image

ROOT = Path(__file__).parents[3]
COMMAND = "keifu draw digits --label 7 --guidance 2"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("label", ["7", "4"])
def test_a_drawn_digit_is_read_as_the_digit_that_was_asked_for(label: str, tmp_path: Path) -> None:
    assert COMMAND in (ROOT / "README.md").read_text(encoding="utf-8")
    words = re.sub("(?<=--label )7", label, COMMAND).split()[1:]
    cli.main([*words, "--seed", "0", "--count", "3", "--out", str(tmp_path / "sheet.png")])
    images = [read_image(tmp_path / f"sheet-{number}.png").image for number in (1, 2, 3)]
    pixels = torch.tensor([list(image.convert("L").tobytes()) for image in images]) / 255
    network, _ = keifu.load("network")
    assert [network.classes[index] for index in network.predict_proba(pixels).argmax(-1)] == [label] * 3
