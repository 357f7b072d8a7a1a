"""Whisper's checkpoints give transformers' logits from transformers' files, and back, bit for bit."""

import json
from typing import Any

import pytest
import torch
import transformers

from keifu import checkpoints
from keifu.data.audio.log_mel import log_mel
from keifu.errors import UserError

SIZES = {
    "vocab_size": 97, "num_mel_bins": 7, "max_source_positions": 25, "max_target_positions": 24, "d_model": 24,
    "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 42, "decoder_ffn_dim": 42, "pad_token_id": 70, "bos_token_id": 70, "eos_token_id": 70,
    "decoder_start_token_id": 71, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
CASES = {
    "as-published": {},
    "relu-deeper-decoder": {
        "scale_embedding": True, "activation_function": "relu", "encoder_layers": 1, "decoder_layers": 4,
    },
    "odd-sizes": {
        "d_model": 30, "encoder_attention_heads": 5, "decoder_attention_heads": 5, "num_mel_bins": 13,
        "max_source_positions": 31, "encoder_ffn_dim": 31, "decoder_ffn_dim": 31, "activation_function": "gelu_new",
    },
}  # fmt: skip
TARGET = torch.arange(60).view(3, 20)


def published(**changes) -> transformers.WhisperForConditionalGeneration:
    torch.manual_seed(1)
    config = transformers.WhisperConfig(**SIZES | changes)
    model: Any = transformers.WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.15)
    return model


def features(reference) -> torch.Tensor:
    frames = 2 * reference.config.max_source_positions
    return torch.randn(3, reference.config.num_mel_bins, frames, generator=torch.Generator().manual_seed(2))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_both_ways(case, weights, tmp_path) -> None:
    reference = published(**CASES[case])
    reference.save_pretrained(tmp_path / "theirs")
    model: Any = checkpoints.load_model(tmp_path / "theirs")
    sound = features(reference)
    expected = reference(input_features=sound, decoder_input_ids=TARGET).logits
    assert expected.std() > 0.1 and close(model(sound, TARGET), expected)

    state = model.listen(sound, capacity=20)
    first = model.hidden(TARGET[:, :7], state)
    rows = torch.tensor([0, 0, 1, 1, 2, 2])
    state.select(rows)
    rest = [model.hidden(TARGET[rows, i : i + 1], state) for i in range(7, 20)]
    assert close(model.logits(torch.cat([first[rows], *rest], 1)), expected[rows])

    checkpoints.save(model, None, tmp_path / "ours")
    saved, original = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    assert saved.keys() == original.keys()
    assert all(saved[n].dtype == original[n].dtype and torch.equal(saved[n], original[n]) for n in saved)
    again = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(input_features=sound, decoder_input_ids=TARGET).logits, expected)


def test_transformers_reads_the_features_that_are_saved(tmp_path) -> None:
    published(max_source_positions=50).save_pretrained(tmp_path)
    checkpoints.save(checkpoints.load_model(tmp_path), None, tmp_path / "ours")
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(tmp_path / "ours")
    sound = torch.randn(9000, generator=torch.Generator().manual_seed(3))
    expected: Any = extractor(sound.numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    assert expected.shape == (1, 7, 100)
    assert torch.allclose(log_mel(torch.nn.functional.pad(sound, (0, 7000)), 7), expected[0], atol=1e-4)


def test_other_sound_and_other_windows_are_refused(tmp_path) -> None:
    reference = published()
    reference.save_pretrained(tmp_path)
    model: Any = checkpoints.load_model(tmp_path)
    with pytest.raises(UserError, match="has 50 frames, and this sound has 40"):
        model.listen(torch.zeros(1, 7, 40))
    with pytest.raises(UserError, match="25 tokens do not fit the 24"):
        model(torch.zeros(1, 7, 50), torch.zeros(1, 25, dtype=torch.long))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"decoder_ffn_dim": 30}))
    with pytest.raises(UserError, match="encoder_ffn_dim and decoder_ffn_dim differ"):
        checkpoints.load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"hop_length": 200}))
    with pytest.raises(UserError, match="sets hop_length to 200, and only 160"):
        checkpoints.load_model(tmp_path)
