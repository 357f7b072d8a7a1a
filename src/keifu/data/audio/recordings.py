"""Sound files (WAV, FLAC, MP3, Ogg) as samples of one channel at 16 kHz, by libsndfile and soxr; and recordings with
their transcripts: a folder of your own, or digits that espeak-ng speaks (synthetic speech).

A folder has sound files and metadata.jsonl, with the fields file_name (a path in the folder), text and, if they are
known, speaker and "part": "test" for recordings to test on. Axes: samples, mels = frequency bands, frames.
"""

import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from keifu.data.audio.log_mel import FOURIER, RATE, log_mel
from keifu.data.records import read_parts
from keifu.errors import UserError, install
from keifu.untrusted import plain_file

LONGEST = 12 * 3600  # seconds
CHANNELS = 16
HIGHEST_RATE = 192_000  # samples a second
DENSEST = 150_000  # maximal samples of all channels per second of the longest sound
PART = 2**18  # samples of each channel that are decoded at once
FILE, DIGITS, SECONDS = "metadata.jsonl", "spoken-digits", 60  # the last: timeout of espeak-ng for a recording
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-029")
LEARNED = (("m1", "m2", "m3", "m4", "m5", "m6", "f1", "f2", "f3", "f4"), (130, 150, 170, 190, 210), 2000)
TESTED = (("m7", "f5"), (140, 160, 180, 200), 300)  # voices, words per minute and number of the test recordings


def read_sound(
    source: Path | bytes, longest: float = LONGEST, name: str = "", go_on: Callable[[], None] = lambda: None
) -> Float[Tensor, " samples"]:  # fmt: skip
    """Read a sound file, or the bytes of one, as float32 samples at 16 kHz; several channels are averaged. name: of the
    file in errors.

    Raises `UserError` for damaged or empty sound, for more than `longest` seconds, and for more than `longest` *
    DENSEST samples of all channels. The header's length is checked before decoding, and the sound is decoded and
    resampled in parts, so a small file cannot fill the memory. `go_on` is called for each part and may raise an
    exception to stop reading.
    """
    try:
        import soundfile
        import soxr
    except (ImportError, OSError) as error:
        raise UserError(f"Reading sound needs soundfile and soxr: run {install('audio')}.") from error
    name, finite = name or str(source), True
    try:
        with soundfile.SoundFile(BytesIO(source) if isinstance(source, bytes) else plain_file(source)) as file:
            rate, channels, seconds = file.samplerate, file.channels, file.frames / file.samplerate
            if max(seconds, channels * file.frames / DENSEST) > longest or channels > CHANNELS or rate > HIGHEST_RATE:
                limits = f"at most {longest:,.0f} seconds and {CHANNELS} channels at {HIGHEST_RATE:,} Hz"
                limits = f"{limits}, and {longest * DENSEST:,.0f} samples of all channels, are read"
                raise UserError(f"{name} has {seconds:,.0f} seconds and {channels} channels at {rate} Hz; {limits}.")
            at_rate, parts = soxr.ResampleStream(rate, RATE, 1), file.blocks(PART, dtype="float32", always_2d=True)
            # one array for all, because a list of parts and their concatenation would take twice as much memory
            samples, count = np.empty(math.ceil(file.frames * RATE / rate) + RATE, np.float32), 0
            for part in chain(parts, [np.zeros((0, 1), np.float32)]):
                go_on()
                piece = at_rate.resample_chunk(part.mean(1), last=not len(part))
                finite = finite and bool(np.isfinite(piece).all())
                samples[count : count + len(piece)] = piece
                count += len(piece)
    except (soundfile.LibsndfileError, TypeError, ValueError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).rstrip(".").rpartition(": ")[2]
        raise UserError(f"{name} cannot be read as sound ({reason}): give WAV, FLAC, MP3 or Ogg.") from error
    if not count or not finite:
        raise UserError(f"{name} has {'numbers that are not finite' if count else 'no sound in it'}.")
    return torch.from_numpy(samples[:count])


@dataclass(frozen=True)
class Recording:
    """Sound with its transcript. read: function that returns the file's path or its bytes."""

    file_name: str
    text: str
    speaker: str
    read: Callable[[], bytes | Path]

    def samples(self) -> Float[Tensor, " samples"]:
        """Return the sound at 16 kHz."""
        return read_sound(self.read(), name=self.file_name)


def read_recordings(source: str) -> tuple[list[Recording], list[Recording]]:
    """Return the training and the test recordings of a folder or of the spoken digits."""
    if source == DIGITS:
        return _digits(*LEARNED), _digits(*TESTED)
    folder = Path(source)

    def recording(record: dict[str, Any]) -> Recording:
        name = record["file_name"]
        return Recording(name, record["text"].strip(), str(record.get("speaker") or name), partial(Path, folder, name))

    learned, tested = read_parts(folder, FILE, ("file_name", "text"), "sound file")
    return [*map(recording, learned)], [*map(recording, tested)]


def _digits(variants: Sequence[str], speeds: Sequence[int], count: int) -> list[Recording]:
    """Return recordings of one to four digits. espeak-ng speaks each when it is read."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise UserError(f"{DIGITS} are spoken by espeak-ng, which is missing: install Debian's package espeak-ng.")
    random, recordings = np.random.default_rng(count), list[Recording]()
    for number in range(count):
        voice = f"{random.choice(ACCENTS)}+{random.choice(variants)}"
        text = " ".join(random.choice(WORDS, random.integers(1, 5)))
        how = ("-D", "-v", voice, "-s", str(random.choice(speeds)), "-p", str(random.integers(30, 71)))
        recordings.append(Recording(f"{number}.wav", text, voice, partial(_speak, program, *how, text)))
    return recordings


def _speak(*command: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "spoken.wav"
        try:
            subprocess.run([*command, "-w", str(out)], check=True, stdin=subprocess.DEVNULL, timeout=SECONDS)
            return out.read_bytes()
        except (OSError, subprocess.SubprocessError) as error:
            raise UserError(f"espeak-ng did not speak {command[-1]!r} ({error}): check how it is installed.") from error


def hear(recording: Recording, n_mels: int, window: int) -> Float[Tensor, "mels frames"]:
    """Return the features of a recording in half precision, padded with silence to the length of the window. Raises
    `UserError` for a longer recording."""
    features = log_mel(F.pad(recording.samples(), (0, FOURIER)), n_mels)
    if (frames := features.shape[1]) > window:
        has = f"{frames / 100:.1f} seconds, and a window {window / 100:.1f}"
        raise UserError(f"{recording.file_name} has {has}: set --model.audio-length, 50 for each second.")
    return F.pad(features, (0, window - frames), mode="replicate").half()
