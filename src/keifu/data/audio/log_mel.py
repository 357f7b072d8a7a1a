"""Log-mel features of sound: the energy of each frequency band, 100 times a second.

Axes: samples = at 16 kHz, mels = frequency bands, frames = samples / 160, frequencies = of the Fourier transform.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

RATE, FOURIER, HOP = 16_000, 400, 160  # samples per second, per Fourier transform, and between two frames
FRAMES_PER_SECOND = RATE // HOP
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
    spectrum = torch.stft(samples, FOURIER, HOP, window=torch.hann_window(FOURIER), return_complex=True)[:, :-1]
    energy = (mel_filters(n_mels) @ spectrum.abs().square()).clamp(min=1e-10).log10()
    return (torch.maximum(energy, energy.max() - 8) + 4) / 4
