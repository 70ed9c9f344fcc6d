"""A waveform at another sample rate, by scipy's polyphase filter."""

from __future__ import annotations

import numpy as np


def resample(audio: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Polyphase resampling (SciPy) from `rate` to `to` Hz."""
    if rate == to:
        return audio.astype(np.float32)
    from scipy.signal import resample_poly

    divisor = int(np.gcd(rate, to))
    return resample_poly(audio, to // divisor, rate // divisor).astype(np.float32)
