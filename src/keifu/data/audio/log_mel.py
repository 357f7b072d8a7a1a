"""Log-mel features of sound: the energy of each frequency band, 100 times a second.

Axes: samples = at 16 kHz, mels = frequency bands, frames = samples / 160, frequencies = of the Fourier transform.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

RATE, FOURIER, HOP = 16_000, 400, 160  # samples per second, per Fourier transform, and between two frames
FRAMES_PER_SECOND = RATE // HOP
PART = 2**14  # frames whose spectrum is in memory at once: it takes five times as much memory as the sound
HIGHEST = 8000.0  # Hz
LINEAR_TO, BANDS_BELOW, STEP = 1000.0, 15.0, math.log(6.4) / 27  # Slaney's scale: linear to 1,000 Hz, then logarithmic


def mel_filters(n_mels: int) -> Float[Tensor, "mels frequencies"]:
    """Return triangular filters of equal area, whose peaks are evenly spaced on Slaney's mel scale (1998)."""
    highest = BANDS_BELOW + math.log(HIGHEST / LINEAR_TO) / STEP
    mels = torch.linspace(0, highest, n_mels + 2, dtype=torch.float64)
    above = LINEAR_TO * ((mels - BANDS_BELOW) * STEP).exp()
    edges = torch.where(mels < BANDS_BELOW, mels * LINEAR_TO / BANDS_BELOW, above)
    frequencies = torch.linspace(0, RATE / 2, FOURIER // 2 + 1, dtype=torch.float64)
    low, peak, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (frequencies - low) / (peak - low), (high - frequencies) / (high - peak)
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (high - low)).float()


def log_mel(samples: Float[Tensor, " samples"], n_mels: int) -> Float[Tensor, "mels frames"]:
    """Return Whisper's features: log₁₀ of the energy, clipped to 8 below the maximum of this sound, then (x + 4) /
    4."""
    frames, window, filters = len(samples) // HOP, torch.hann_window(FOURIER), mel_filters(n_mels)
    features = samples.new_empty(n_mels, frames)
    for first in range(0, frames, PART):
        last = min(frames, first + PART) - 1
        start, end = first * HOP - FOURIER // 2, last * HOP + FOURIER // 2  # a frame's centre is at its number * HOP
        beyond = max(0, -start), max(0, end - len(samples))
        part = F.pad(samples[None, max(0, start) : end], beyond, mode="reflect")[0]
        spectrum = torch.stft(part, FOURIER, HOP, window=window, center=False, return_complex=True)
        features[:, first : last + 1] = (filters @ spectrum.abs().square()).clamp(min=1e-10).log10()
    return features.clamp_(min=features.max() - 8).add_(4).div_(4)
