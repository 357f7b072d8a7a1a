"""Recordings with their transcripts: a folder of your own, or digits that espeak-ng speaks (synthetic speech).

A folder has sound files and metadata.jsonl, with the fields file_name (a path in the folder), text and, if they are
known, speaker and "part": "test" for recordings to test on. Axes: samples, mels = frequency bands, frames.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from keifu.data.audio.log_mel import FOURIER, log_mel
from keifu.data.audio.sound_files import read_sound
from keifu.data.records import read_parts
from keifu.errors import UserError

FILE, DIGITS, SECONDS = "metadata.jsonl", "spoken-digits", 60  # the last: timeout of espeak-ng for a recording
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-029")
LEARNED = (("m1", "m2", "m3", "m4", "m5", "m6", "f1", "f2", "f3", "f4"), (130, 150, 170, 190, 210), 2000)
TESTED = (("m7", "f5"), (140, 160, 180, 200), 300)  # voices, words per minute and number of the test recordings


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
