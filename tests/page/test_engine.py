"""The engine computes keifu's numbers: every packaged model in float32, with the kernel and in plain JavaScript."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import keifu
from keifu.inference.images.denoiser import label_denoiser
from keifu.inference.images.latent_diffusion import text_denoiser, text_tokens
from keifu.inference.images.samplers import configure_sampler, last_x
from keifu.inference.text.beam_search import Search, beam_search
from keifu.inference.text.translation import TranslationParams, source_ids, translate_texts

PACKAGED = Path(__file__).parents[2] / "pretrained/src/keifu_pretrained"
CLOSE = {"atol": 1e-4, "rtol": 0}


@cache
def loaded(name: str) -> tuple[Any, Any]:
    """Return a packaged model in float32, and its tokenizer."""
    return keifu.load(PACKAGED / name, dtype=torch.float32, device="cpu")


def assert_close(found: Sequence[float], expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float32), expected.detach().float().flatten(), **CLOSE)


@pytest.mark.parametrize("name", ["gpt-en", "chat-en"])
def test_decoder(engine, name: str) -> None:
    model, tokenizer = loaded(name)
    ids = tokenizer.encode("The old house by the sea was built in 1874, and its owner said that it is")
    prompt, rest = ids[:9], ids[9:]
    with torch.inference_mode():
        expected = model(torch.tensor([ids]))[0, 8:]
    for row, logits in zip(engine("decoderLogits", name, prompt, rest), expected, strict=True):
        assert_close(row, logits)


def test_bert(engine) -> None:
    model, tokenizer = loaded("bert-en")
    ids = tokenizer.encode("The book was [MASK] by an American author.", special=True, allow_special=True)
    with torch.inference_mode():
        states = model.encode(torch.tensor([ids]))
        words, follows = model.words(states), model.next_sentence(model.pool(states))
    found = engine("maskedLogits", "bert-en", ids)
    assert_close(found["words"], words)
    assert_close(found["follows"], follows)


@pytest.mark.parametrize("name", ["ja-en", "en-ja"])
def test_translator(engine, name: str) -> None:
    model, tokenizer = loaded(name)
    (source,) = source_ids(model, tokenizer, ["猫はテーブルの下で寝ています。"], ["It"])
    target = [model.config.start_id, *tokenizer.encode("The cat is sleeping")]
    with torch.inference_mode():
        logits = model(torch.tensor([source]), torch.tensor([target]))[0, -1]
    assert_close(engine("translatorLogits", name, source, target), logits)


def test_every_packaged_model_is_compared() -> None:
    compared = set(re.findall(r'"([a-z]+(?:-[a-z]+)?)"', Path(__file__).read_text("utf-8")))
    packaged = {path.name for path in PACKAGED.iterdir() if (path / "README.md").is_file()}
    assert len(packaged) == 11 and packaged <= compared


def test_network(engine) -> None:
    model, _ = loaded("network")
    pixels = torch.rand(784, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        assert_close(engine("networkLogits", pixels.tolist()), model(pixels[None]))


def test_neuron(engine) -> None:
    model, _ = keifu.load(PACKAGED / "neuron")
    inputs = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 1.0]], dtype=torch.float64)
    assert_close(engine("neuron", inputs.tolist()), inputs @ model.weight + model.bias)


def ddim(network: Any, noise: Any, x: torch.Tensor, steps: int) -> torch.Tensor:
    """Return what keifu's DDIM makes of the noise x."""
    chosen = configure_sampler(noise, "ddim", steps)
    return last_x(chosen.run(chosen.denoiser(network), x, chosen.schedule, torch.zeros_like))


def test_digit(engine) -> None:
    model, _ = loaded("digits")
    steps = 20 if engine.kernel else 2
    x = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        expected = ddim(label_denoiser(model, torch.tensor([3]), 2.0), model.noise, x, steps)
    assert_close(engine("drawDigit", x.flatten().tolist(), 3, {"steps": steps, "guidance": 2}), expected)


def test_emoji(engine) -> None:
    model, tokenizer = loaded("emoji")
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    tokens = [text_tokens(tokenizer, [text], model.config.context_length) for text in ("red heart", "")]
    with torch.inference_mode():
        latents = ddim(text_denoiser(model, *tokens, guidance=7.5, rescale=0.0), model.noise, x, 2)
        pixels = model.coder.decode(latents / model.config.scale)
    found = engine("drawEmoji", x.flatten().tolist(), "red heart", {"steps": 2, "guidance": 7.5})
    assert_close(found["context"], model.encode_text(tokens[0]))
    assert_close(found["latents"], latents)
    assert_close(found["pixels"], pixels)


def picture(side: int) -> tuple[list[int], torch.Tensor]:
    """Return the bytes of an opaque picture as a canvas has them, and its colours from 0 to 1."""
    colours = torch.randint(0, 256, (side, side, 3), generator=torch.Generator().manual_seed(4))
    rgba = torch.cat([colours, torch.full((side, side, 1), 255)], -1)
    return rgba.flatten().tolist(), (colours.permute(2, 0, 1) / 255)[None]


def normalised(pixels: Any, colours: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (pixels.mean, pixels.std))
    return (colours - mean) / std


def test_clip(engine) -> None:
    model, tokenizer = loaded("emoji-clip")
    rgba, colours = picture(72)
    texts = ["red heart", "a smiling cat"]
    with torch.inference_mode():
        images = model.encode_image(normalised(model.config.pixels, colours))
        ids = [torch.tensor([tokenizer.encode(text, special=True)]) for text in texts]
        expected = model.logits(images, torch.cat([model.encode_text(row) for row in ids]))
    assert_close(engine("clipLogits", rgba, texts), expected)


def test_llava(engine) -> None:
    model, tokenizer = loaded("see")
    rgba, colours = picture(64)
    prompt = "User:\n<image>\nWhat colour is the shape?\nAssistant:\n"
    ids = tokenizer.encode(prompt, allow_special=True)
    at = ids.index(model.config.image_token)
    whole = ids[:at] + [model.config.image_token] * model.config.image_tokens + ids[at + 1 :]
    with torch.inference_mode():
        logits = model(torch.tensor([whole]), pixels=normalised(model.config.pixels, colours))[0, -1]
    assert_close(engine("seenLogits", rgba, prompt), logits)


@pytest.mark.parametrize("name", ["gpt-en", "chat-en"])
def test_greedy_texts(engine, name: str) -> None:
    if not engine.kernel:
        pytest.skip("plain JavaScript computes the same logits")
    model, tokenizer = loaded(name)
    prompt = "The city was founded"
    written = engine("greedy", name, tokenizer.encode(prompt), 24)
    expected = keifu.generate(model, tokenizer, prompt, raw=True, max_tokens=24, temperature=0, repetition_penalty=1.0)
    assert expected and engine("decode", name, written) == expected


class Continuations:
    """A decoder as keifu's beam search sees it, without a cache."""

    def __init__(self, model: Any, prompt: list[int]):
        self.model, self.texts = model, torch.tensor([prompt])

    def first(self) -> torch.Tensor:
        return self.model(self.texts)[:, -1]

    def next(self, tokens: torch.Tensor) -> torch.Tensor:
        self.texts = torch.cat([self.texts, tokens[:, None]], 1)
        return self.first()

    def select(self, rows: torch.Tensor) -> None:
        self.texts = self.texts[rows]


@pytest.mark.parametrize("beams", [1, 2, 4])
def test_beam_search_of_a_decoder(engine, beams: int) -> None:
    if not engine.kernel:
        pytest.skip("plain JavaScript computes the same logits")
    model, tokenizer = loaded("gpt-en")
    prompt = "The city was founded in the"
    search = Search(ends=(tokenizer.eos_id,), beams=beams)
    (expected,) = beam_search(Continuations(model, tokenizer.encode(prompt)), search, [12])
    found = engine("likeliestText", "gpt-en", prompt, beams)
    assert found["tokens"] == expected.tokens and found["ended"] == expected.ended
    length = len(expected.tokens) + expected.ended
    penalty = float(search.penalty(torch.tensor([float(length)])))
    assert found["logP"] / penalty == pytest.approx(expected.score, abs=1e-4)


SENTENCES = ["猫はテーブルの下で寝ています。", "昨日、新しい本を買いました。", "彼は私に何も言わずに部屋を出て行った。"]


@pytest.mark.parametrize("beams", [1, 4])
def test_translations(engine, beams: int) -> None:
    model, tokenizer = loaded("ja-en")
    if not engine.kernel:
        pytest.skip("plain JavaScript computes the same logits")
    parts = translate_texts(model, tokenizer, SENTENCES, TranslationParams(beam=beams))
    found = engine("translate", "ja-en", SENTENCES, beams)
    assert [each["text"] for each in found] == [each.text for (each,) in parts]
    assert [each["score"] for each in found] == pytest.approx([each.score for (each,) in parts], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("network", {"name": "model.safetensors", "cut": 500_000}, "ModelError: The weights file is damaged: layers."),
        ("network", {"name": "model.safetensors", "cut": 3}, "ModelError: The weights file is damaged: it has 3 bytes"),
        ("network", {"name": "model.safetensors", "cut": 40}, "ModelError: The weights file is damaged: its header"),
        ("network", {"name": "config.json", "cut": 40}, "ModelError: config.json is damaged"),
        ("network", {"name": "config.json", "text": '{"model_type": "mamba"}'}, "ModelError: The engine does not"),
        ("gpt-en", {"name": "tokenizer.json", "text": '{"model": {"type": "Unigram"}}'}, "ModelError: The engine"),
    ],
)  # fmt: skip
def test_damaged_and_unknown_files_are_refused_in_a_sentence(engine, name: str, change: Any, sentence: str) -> None:
    found = engine("refusal", name, change)
    assert found.startswith(sentence) and found.endswith(".")
