"""Log-mel spectrograms, without a dependency of their own."""

from __future__ import annotations

import numpy as np

SAMPLE_RATE = 8000
SHORTEST = 640  # samples, 80 ms: of a shorter clip there is no spectrum to compare


def log_mel(audio: np.ndarray, window: int = 256, hop: int = 160, bands: int = 24) -> np.ndarray:
    """Log-mel spectrogram `[frames, bands]` of 8 kHz audio: 32 ms windows every 20 ms; silence follows a very short clip."""
    from scipy.signal import ShortTimeFFT
    from scipy.signal.windows import hann

    padded = np.pad(audio, (0, max(SHORTEST - len(audio), 0))).astype(float)
    spectrum = ShortTimeFFT(hann(window), hop, SAMPLE_RATE, scale_to="magnitude").spectrogram(padded)
    return np.log10(_mel_filters(bands, spectrum.shape[0]) @ spectrum + 1e-8).T


def _mel_filters(bands: int, bins: int) -> np.ndarray:
    """Triangles evenly spaced on the mel scale, 2595 log10(1 + f/700)."""
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)
    f = np.linspace(0, SAMPLE_RATE / 2, bins)[None]
    low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return np.clip(np.minimum((f - low) / (mid - low), (high - f) / (high - mid)), 0, None)
