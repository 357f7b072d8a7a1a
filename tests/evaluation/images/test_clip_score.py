"""CLIP scores against transformers' CLIPModel, and the command that draws captions and has a CLIP look at them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from keifu import checkpoints, cli
from keifu.data.tokenizers import bpe
from keifu.errors import UserError
from keifu.evaluation.images.text_to_image import best, clip_scores, cosines
from keifu.models.clip import clip, image as clip_image, text as clip_text
from keifu.models.diffusion import autoencoder_kl, conditioned_unet, latent_diffusion

TEXTS = ["a red heart", "a blue cat", "赤いハート", "a green book on a table"]


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.learn(TEXTS * 5, 560).replace(max_length=20)


@pytest.fixture(scope="module")
def towers(tokenizer, tmp_path_factory) -> Path:
    """Save a small CLIP with random weights and return its folder."""
    text = clip_text.Config(560, 40, 24, 40, 2, 3, end_id=tokenizer.eos_id, embedding_dim=14)
    image = clip_image.Config(21, 7, 3, 20, 36, 2, 2, embedding_dim=14)
    torch.manual_seed(3)
    model = clip.build(clip.Config(text, image, clip.Pixels(21, 21)))
    out = tmp_path_factory.mktemp("clip")
    checkpoints.save(model, tokenizer, out)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return 40 pictures of 8 pixels with captions in two languages."""
    root, rows, random = tmp_path_factory.mktemp("pictures"), [], np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(random.integers(0, 255, (8, 8, 3), np.uint8)).save(root / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text_en": f"a {number} heart", "text_ja": f"{number}の本"})
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return root


@torch.no_grad()
def test_scores_are_those_of_transformers(towers) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPModel.from_pretrained(towers).eval()
    prepare = transformers.CLIPImageProcessorPil.from_pretrained(towers)
    pictures = torch.randint(0, 256, (4, 3, 33, 29), dtype=torch.uint8)
    images = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in pictures]
    pixels = prepare(images, return_tensors="pt").pixel_values
    words = transformers.PreTrainedTokenizerFast.from_pretrained(towers, pad_token="<|endoftext|>")
    found = theirs(pixel_values=pixels, **words(TEXTS, padding=True, return_tensors="pt"))
    expected = found.logits_per_image / theirs.logit_scale.exp()
    model, tokenizer = checkpoints.load(towers)
    ours = cosines(model, tokenizer, pictures, TEXTS)
    assert (ours - expected).abs().max() <= 1e-5
    own, others = clip_scores(ours)
    direct = 100 * torch.clamp(expected, min=0)
    assert torch.allclose(own, direct.diagonal(), atol=1e-3)
    shuffled = [direct[range(4), [(n + shift) % 4 for n in range(4)]] for shift in (1, 2, 3)]
    assert torch.allclose(others, torch.stack(shuffled).mean(0), atol=1e-3)
    order = sorted(range(4), key=lambda n: -float(expected[n, 0]))
    assert best(ours, 3) == order[:3]


def test_as_many_texts_as_pictures(towers) -> None:
    model, tokenizer = checkpoints.load(towers)
    with pytest.raises(UserError, match="2 pictures need as many texts, and 1 were given"):
        cosines(model, tokenizer, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["a"])


@pytest.fixture(scope="module")
def painter(tokenizer, tmp_path_factory) -> Path:
    """Save a small latent diffusion with random weights and return its folder."""
    text = clip_text.Config(560, 20, 16, 24, 1, 2, end_id=tokenizer.eos_id, projected=False)
    unet = conditioned_unet.Config(4, 2, 2, (8,), 1, (0,), (0,), 2, context_dim=16, norm_groups=4)
    autoencoder = autoencoder_kl.Config(8, 3, 2, (4, 8), 1, 4, scale=1.0)
    torch.manual_seed(0)
    model = latent_diffusion.build(latent_diffusion.Config(text, unet, autoencoder))
    out = tmp_path_factory.mktemp("painter")
    checkpoints.save(model, tokenizer, out)
    return out


def test_the_command(painter, towers, folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    shared = ["evaluate", str(painter), "--on", str(folder), "--steps", "2", "--limit", "6", "--json"]
    shown = tmp_path / "near.png"
    cli.parse([*shared, "--metric", "clip-score", "--clip", str(towers), "--language", "ja", "--output", str(shown)])()
    found = json.loads(capsys.readouterr().out)
    assert {"CLIP score", "CLIP score, captions shuffled", "CLIP score of real pictures"} <= found.keys()
    assert "own caption first of 6" in found and "CLIP score of held-out captions" in found
    assert "language ja" in found["notes"][0] and Image.open(shown).width > 8
    cli.parse([*shared, "--metric", "distances", "--guidance", "1"])()
    found = json.loads(capsys.readouterr().out)
    assert "CLIP score" not in found and any("x 1000" in name for name in found)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--metric", "clip-score"], "name one with --clip"),
        (["--metric", "clip"], "Did you mean 'clip-score'|clip-score"),
        (["--language", "fr"], "'fr'.*Known: en, ja"),
        (["--shots", "3"], "--shots has no meaning here"),
        (["--on", "one"], "one has 1 picture with a caption, and at least 2 are needed"),
    ],
)
def test_what_is_refused(more, told, painter, folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("one").mkdir()
    (tmp_path / "one/metadata.jsonl").write_text((folder / "metadata.jsonl").read_text().partition("\n")[0])
    Path("one/0.png").write_bytes((folder / "0.png").read_bytes())
    with pytest.raises(UserError, match=told):
        cli.parse(["evaluate", str(painter), "--on", str(folder), *more])()
