"""A waveform at another sample rate, by scipy's polyphase filter."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from jaxtyping import Float64


def resample(audio: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Polyphase resampling (SciPy) from `rate` to `to` Hz."""
    if rate == to:
        return audio.astype(np.float32)
    from scipy.signal import resample_poly

    divisor = int(np.gcd(rate, to))
    up, down = to // divisor, rate // divisor
    taps = low_pass(max(up, down))
    own = taps.astype(audio.dtype) if np.issubdtype(audio.dtype, np.floating) else taps
    return np.asarray(resample_poly(audio, up, down, window=own), dtype=np.float32)


@functools.lru_cache(maxsize=16)
def low_pass(factor: int) -> Float64[np.ndarray, " taps"]:
    """The filter that `resample_poly` designs by itself, at every call: of a short clip that is half of the time."""
    from scipy.signal import firwin

    taps: Any = firwin(20 * factor + 1, 1 / factor, window=("kaiser", 5.0))  # pyright: ignore[reportArgumentType]
    return taps
