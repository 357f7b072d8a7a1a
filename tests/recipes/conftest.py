"""What the tests of recipes share; those that read captions have drawings and a small CLIP of them."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import toy_captions  # noqa: E402

from keifu.recipes.images import clip  # noqa: E402


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """What is made of pictures goes into a folder of the tests; gives what patches for as long as a file's tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEIFU_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield patch


@pytest.fixture
def one_thread(_repeatable: None) -> None:
    """Products this small wait for a second thread longer than they take."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of coloured shapes with captions in two languages."""
    return toy_captions.drawings(tmp_path_factory.mktemp("drawings"))


@pytest.fixture(scope="module")
def towers(own_cache: pytest.MonkeyPatch, drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained CLIP of these captions."""
    out = tmp_path_factory.mktemp("clip")
    settings = replace(toy_captions.small_clip(drawings).training, steps=4, warmup=0)
    clip.run(toy_captions.small_clip(drawings, training=settings), out, False)
    return out
