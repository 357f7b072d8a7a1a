"""Log-mel features are those of transformers; sound files are read, and damaged ones refused."""

import io
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch

from keifu.data.audio.log_mel import log_mel
from keifu.data.audio.recordings import read_sound
from keifu.errors import UserError

TONES = torch.sin(torch.arange(48_000) * torch.linspace(0.01, 0.9, 48_000)) * torch.linspace(1, 0, 48_000)


@pytest.mark.parametrize("n_mels", [80, 128, 20])
def test_features_are_those_of_transformers(n_mels) -> None:
    import transformers

    noise = torch.randn(16_000 * 3, generator=torch.Generator().manual_seed(0)) * 0.01
    for samples in (TONES, noise, torch.zeros(48_000)):
        extractor = transformers.WhisperFeatureExtractor(feature_size=n_mels, chunk_length=3)
        expected = extractor(samples.numpy(), sampling_rate=16_000, return_tensors="pt").input_features[0]
        got = log_mel(samples, n_mels)
        assert got.shape == expected.shape and (got - expected).abs().max() < 1e-5


def written(samples: np.ndarray, rate: int = 16_000, kind: str = "WAV", **settings) -> bytes:
    soundfile, file = pytest.importorskip("soundfile"), io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, **settings)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "near"), [("WAV", 1e-3), ("FLAC", 1e-3), ("MP3", 0.1), ("OGG", 0.1)])
def test_sound_of_any_rate_and_channels_is_read(kind, near, tmp_path) -> None:
    tone = np.sin(np.arange(44_100) * 0.03)
    (tmp_path / "sound").write_bytes(written(np.stack([tone, 0.5 * tone], 1), 44_100, kind))
    got = read_sound(tmp_path / "sound")
    assert abs(len(got) - 16_000) <= 40
    expected = 0.75 * torch.sin(torch.arange(len(got)) * 0.03 * 44_100 / 16_000)
    middle = slice(2000, 14_000)
    assert (got - expected)[middle].abs().max() < near or kind == "MP3"
    assert abs(float(got[middle].square().mean().sqrt() / expected[middle].square().mean().sqrt()) - 1) < 0.02


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no sound at all", "clip cannot be read as sound"),
        (b"", "clip cannot be read as sound"),
        (lambda: written(np.zeros(0)), "clip has no sound in it"),
        (lambda: written(np.zeros(16_000 * 3)), "3 seconds and 1 channels at 16000 Hz; at most 2 s"),
        (lambda: written(np.zeros((100, 17))), "17 channels"),
        (lambda: written(np.full(100, np.nan), subtype="FLOAT"), "numbers that are not finite"),
        (
            lambda: written(np.zeros((40_000, 8), np.int16), 32_000),
            "at 32000 Hz; .* and 300,000 samples of all channels",
        ),
        (lambda: written(np.zeros(100), 400_000), "at 400000 Hz; at most 2 seconds and 16 channels at 192,000 Hz"),
    ],
    ids=["text", "nothing", "empty", "long", "channels", "nan", "work", "rate"],
)
def test_damaged_and_long_sound_is_one_sentence(data, message) -> None:
    pytest.importorskip("soundfile")
    with pytest.raises(UserError, match=message) as refusal:
        read_sound(data if isinstance(data, bytes) else data(), 2.0, "clip")
    assert "\n" not in str(refusal.value)


def test_a_small_file_does_not_fill_the_memory() -> None:
    data = written(np.zeros((192_000 * 12, 8), np.int16), 192_000, "FLAC")
    tracemalloc.start()
    try:
        samples = read_sound(data, 200.0)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(data) < 100_000 and len(samples) == 16_000 * 12
    assert most < 30e6  # all samples of all channels would take 74 MB


@pytest.mark.slow
def test_half_an_hour_of_sound_takes_little_more_memory_than_its_samples(tmp_path) -> None:
    """The file has some 100 kB. Its samples are 115 MB and its features 58 MB; the spectrum would be 290 MB."""
    pytest.importorskip("soundfile")
    (tmp_path / "silence.flac").write_bytes(written(np.zeros(16_000 * 1800, np.int16), 16_000, "FLAC"))
    code = """
import resource, sys
from pathlib import Path
from keifu.data.audio.log_mel import log_mel
from keifu.data.audio.recordings import read_sound
log_mel(read_sound(Path(sys.argv[1]))[:32_000], 80)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
"""
    code += "features = log_mel(read_sound(Path(sys.argv[2])), 80)\n"
    code += "print(features.shape[1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    (tmp_path / "short.wav").write_bytes(written(np.zeros(16_000 * 2)))
    words = [sys.executable, "-c", code, str(tmp_path / "short.wav"), str(tmp_path / "silence.flac")]
    frames, kilobytes = map(int, subprocess.run(words, capture_output=True, text=True, timeout=60).stdout.split())
    assert frames == 180_000
    assert kilobytes < 280_000


def test_the_features_of_parts_are_those_of_the_whole(monkeypatch) -> None:
    expected = log_mel(TONES, 80)
    for part in (2, 7, 299, 300):
        monkeypatch.setattr("keifu.data.audio.log_mel.PART", part)
        assert (log_mel(TONES, 80) - expected).abs().max() < 1e-6


def test_the_reading_ends_between_two_parts(monkeypatch) -> None:
    data, parts = written(np.zeros(9000)), []

    def leave() -> None:
        parts.append(1)
        if len(parts) == 2:
            raise InterruptedError

    monkeypatch.setattr("keifu.data.audio.recordings.PART", 1000)
    with pytest.raises(InterruptedError):
        read_sound(data, go_on=leave)
    assert len(parts) == 2


def test_a_missing_file_is_named(tmp_path) -> None:
    pytest.importorskip("soundfile")
    with pytest.raises((UserError, FileNotFoundError), match=r"none\.wav"):
        read_sound(tmp_path / "none.wav")
