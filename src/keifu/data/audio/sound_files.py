"""Sound files (WAV, FLAC, MP3, Ogg) as samples of one channel at 16 kHz, by libsndfile and soxr."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from keifu.data.audio.log_mel import RATE
from keifu.errors import UserError
from keifu.untrusted import plain_file

LONGEST = 12 * 3600  # seconds
CHANNELS = 16
HIGHEST_RATE = 192_000  # samples a second
DENSEST = 150_000  # maximal samples of all channels per second of the longest sound
PART = 2**18  # samples of each channel that are decoded at once


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
        raise UserError("Reading sound needs soundfile and soxr: run pip install 'keifu[audio]'.") from error
    name = name or str(source)
    try:
        with soundfile.SoundFile(BytesIO(source) if isinstance(source, bytes) else plain_file(source)) as file:
            rate, channels, seconds = file.samplerate, file.channels, file.frames / file.samplerate
            if max(seconds, channels * file.frames / DENSEST) > longest or channels > CHANNELS or rate > HIGHEST_RATE:
                limits = f"at most {longest:,.0f} seconds and {CHANNELS} channels at {HIGHEST_RATE:,} Hz"
                limits = f"{limits}, and {longest * DENSEST:,.0f} samples of all channels, are read"
                raise UserError(f"{name} has {seconds:,.0f} seconds and {channels} channels at {rate} Hz; {limits}.")
            at_rate, parts = soxr.ResampleStream(rate, RATE, 1), file.blocks(PART, dtype="float32", always_2d=True)
            pieces = [at_rate.resample_chunk(part.mean(1)) for part in parts if not go_on()]
            last = at_rate.resample_chunk(np.zeros(0, np.float32), last=True)
            samples = torch.from_numpy(np.concatenate([*pieces, last]))
    except (soundfile.LibsndfileError, TypeError, ValueError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).rstrip(".").rpartition(": ")[2]
        raise UserError(f"{name} cannot be read as sound ({reason}): give WAV, FLAC, MP3 or Ogg.") from error
    if not len(samples) or not samples.isfinite().all():
        raise UserError(f"{name} has {'numbers that are not finite' if len(samples) else 'no sound in it'}.")
    return samples
