"""Whisper by the native step: PyTorch's keys, values, logits and transcripts from the same weights."""

import gc
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from native_toys import everywhere, unpacked

from keifu import checkpoints
from keifu.errors import UserError
from keifu.inference.speech.transcription import TranscriptionParams, transcribe
from keifu.layers.lora import LoraSettings, Target, attach
from keifu.layers.transformer.speech import SpeechRecognizer
from keifu.models.speech import whisper
from keifu.native.compiler import Unavailable
from keifu.native.model import native_form
from keifu.native.targets import NativeHearer, NativeSpeech, Targets

sys.path.append(str(Path(__file__).parents[1] / "inference"))
from speech_toys import published, tokenizer  # pyright: ignore[reportMissingImports]

pytestmark = pytest.mark.usefixtures("opened")
SHAPE = whisper.Config(
    vocab_size=97, context_length=50, audio_length=70, n_mels=7, dim=24, hidden_dim=42, n_layers=3, n_decoder_layers=2,
    n_heads=4, start_id=71, end_id=70, pad_id=70,
)  # fmt: skip
KINDS = {
    "more sound than text": SHAPE,
    "odd": replace(SHAPE, dim=30, n_heads=5, hidden_dim=31, activation="relu", n_decoder_layers=4, audio_length=101),
    "one head, more text than sound": replace(SHAPE, dim=44, n_heads=1, activation="gelu_tanh", audio_length=33),
}
LENGTH = 40


def hearing(config: whisper.Config, seed: int = 1) -> SpeechRecognizer:
    """Return one with weights so large that each layer counts."""
    torch.manual_seed(seed)
    model = whisper.build(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return model


def heard(config: whisper.Config, windows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sound, and tokens that are written about it."""
    sound = torch.randn(windows, config.n_mels, 2 * config.audio_length)
    return sound, torch.randint(0, config.vocab_size, (windows, LENGTH))


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected).norm() / expected.norm())


def written(packed: NativeSpeech, memory: Any, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """Return logits after each token; the first come together, as a prompt."""
    length = memory[0][0].shape[1]
    targets = Targets(packed, memory, [length] * len(tokens), LENGTH, len(tokens))
    first = targets.write(tokens[:, :prompt], range(prompt)).clone()
    rest = [targets.next(tokens[:, place]).clone() for place in range(prompt, LENGTH)]
    return torch.cat([first, torch.stack(rest, 1)], 1)


@pytest.mark.parametrize(
    ("instructions", "kind", "weights"),
    everywhere(KINDS, KINDS, ("f32", "bf16", "int8", "int4")),
    indirect=["instructions"],
)
@torch.inference_mode()
def test_logits_are_those_of_the_same_numbers_in_pytorch(kind: str, weights: str, instructions: str) -> None:
    model, config = hearing(KINDS[kind]), KINDS[kind]
    sound, tokens = heard(config)
    packed = NativeSpeech(model, weights)
    memory, own = packed.encode(sound), unpacked(model, packed)
    exact = weights == "f32"
    for mine, pair in zip(memory, model.encode(sound), strict=True):
        for got, expected in zip(mine, pair, strict=True):
            rounding = {"f32": 1e-5, "bf16": 0.01, "int8": 0.03, "int4": 0.3}[weights]
            assert relative(got, expected.transpose(1, 2).flatten(2)) < rounding
    shape = (len(sound), config.audio_length, config.n_heads, -1)
    same: Any = [tuple(each.float().view(shape).transpose(1, 2) for each in pair) for pair in memory]
    assert isinstance(own, SpeechRecognizer)
    expected = own.logits(own.hidden(tokens, own.begin(same)))
    error = (written(packed, memory, tokens, 7) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < (1e-5 if exact else 0.1) and error.median() < (1e-6 if exact else 0.03)
    if exact:
        assert (written(packed, memory, tokens, 7) - model(sound, tokens)).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@torch.inference_mode()
def test_windows_and_prompts_have_the_same_bits_alone(weights: str) -> None:
    model = hearing(SHAPE)
    sound, tokens = heard(SHAPE, 3)
    packed = NativeSpeech(model, weights)
    together, alone = packed.encode(sound), [packed.encode(each[None]) for each in sound]
    assert all(
        torch.equal(whole[place], single[0])
        for layer, pair in enumerate(together)
        for number, whole in enumerate(pair)
        for place, single in enumerate(each[layer][number] for each in alone)
    )
    logits = written(packed, together, tokens, 33)
    assert torch.equal(written(packed, alone[1], tokens[1:2], 1), logits[1:2])


@torch.inference_mode()
def test_transcripts_that_part_go_on_as_pytorchs() -> None:
    """A prompt that fills a block, then rows that continue others."""
    model = hearing(SHAPE)
    sound, tokens = heard(SHAPE, 1)
    hearer = NativeHearer(NativeSpeech(model, "f32"), 3)
    steps = torch.randint(0, 97, (LENGTH, 3))
    logits: list[torch.Tensor] = []
    for each in (model, hearer):
        state: Any = each.begin(each.encode(sound), 50)
        found = [each.write(tokens[:, :32], state, [0, 31])[0].clone()]
        state.select(torch.zeros(3, dtype=torch.long))
        for place in range(10):
            found.append(each.write(steps[place][:, None], state, [0])[:, 0].clone())
            state.select(torch.tensor([[0, 0, 1], [2, 1, 0], [1, 2, 2]][place % 3]))
        logits.append(torch.cat(found))
    assert (logits[0] - logits[1]).abs().max() < 1e-5 * logits[0].abs().max()


def transcript(model: Any, words: Any, choice: dict[str, Any]) -> list[Any]:
    sound = torch.randn(16_000 * 2 - 700, generator=torch.Generator().manual_seed(3))
    found = transcribe(model, words, sound, TranscriptionParams(**choice))
    return [[each.language for each in [found]], *(each.tokens for each in found.segments)]


@pytest.mark.parametrize(
    "choice",
    [{"fallback": False}, {"language": "ja", "beams": 3, "fallback": False}, {"language": "en", "prompt": "one two"}],
    ids=["greedy", "beams", "drawn again"],
)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_transcripts_are_pytorchs(tmp_path: Path, seed: int, choice: dict[str, Any], monkeypatch) -> None:
    words = tokenizer()
    published(words, seed).save_pretrained(tmp_path)
    expected = transcript(checkpoints.load_model(tmp_path), words, choice)
    model = checkpoints.load_model(tmp_path, weights="own")
    packed = native_form(model, NativeSpeech)
    assert packed is not None and packed.weights == "f32" and transcript(model, words, choice) == expected
    assert len(expected) > 2
    monkeypatch.setattr(Targets, "write", None)
    with pytest.raises(TypeError):
        transcript(model, words, choice)


def test_a_whisper_is_loaded_and_packed_too(tmp_path: Path) -> None:
    words = tokenizer()
    published(words, 0).save_pretrained(tmp_path)
    model = checkpoints.load_model(tmp_path, weights="int8")
    packed = native_form(model, NativeSpeech)
    assert isinstance(model, SpeechRecognizer) and packed is not None and packed.weights == "int8"
    assert packed.listener is not None and packed.listener.weights == "int8"
    assert native_form(checkpoints.load_model(tmp_path), NativeSpeech) is None
    for place in range(1, 4):
        assert len(transcript(model, words, {"language": "en", "fallback": False})[place]) > 0


@pytest.mark.parametrize("weights", ["f32", "int8"])
def test_the_memory_of_both_forms_ends_with_the_model(weights: str, tmp_path: Path) -> None:
    """Without a search for cycles, which `keifu serve` does not wait for when it unloads a model."""
    published(tokenizer(), 0).save_pretrained(tmp_path)
    model = checkpoints.load_model(tmp_path, weights=weights)
    with torch.no_grad():
        model.get_parameter("norm.bias").add_(1)
    before = native_form(model, NativeSpeech)
    packed = [weakref.ref(each) for each in (model, vars(model)["native"].packed)]
    gc.disable()
    try:
        del model, before
        assert [each() for each in packed] == [None, None]
    finally:
        gc.enable()


def test_what_cannot_be_is_refused() -> None:
    packed = NativeSpeech(hearing(SHAPE), "int8")
    with pytest.raises(UserError, match="has 140 frames, and this sound has 130"):
        packed.encode(torch.zeros(1, 7, 130))
    with pytest.raises(Unavailable, match=r"decoder.0.feedforward has an activation that native code does not have"):
        NativeSpeech(hearing(replace(SHAPE, activation="quick_gelu")), "int8")
    with pytest.raises(Unavailable, match="the model is a Linear"):
        NativeSpeech(torch.nn.Linear(1, 1), "int8")
    adapted = hearing(SHAPE)
    attach(adapted, {Target("decoder.0.attention.out", 0, 24, "out_proj"): LoraSettings(2)})
    with pytest.raises(Unavailable, match="adapters"):
        NativeSpeech(adapted, "int8")
