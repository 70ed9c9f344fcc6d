"""Audio clips, whatever file, row or array they come in: mono, float32 in [-1, 1].

read_audio(source, rate)    any audio file, at the rate asked for
waveform(array)             an array; integers are scaled from their own range
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from components.data.bad import BadSample
from components.data.reading import name_for, opened, unreadable
from components.resampling import resample

MAX_SAMPLES = 2**29
"""Numbers in a clip, all channels together (2 GiB as float32): what claims more is left out before memory is taken."""

RATES = (100, 1_000_000)
"""Sample rates that a recording can have, in Hz."""

MAX_PEAK = 10.0
"""A float waveform is in [-1, 1], a little over where a decoder overshoots; this far over it, it is integers as floats."""

CANCELS = 1e-3
"""Channels cancel where their mean keeps less of their energy than this (-30 dB; of n unrelated ones it keeps 1 / n)."""

cancelled: set[str] = set()
"""The clips so far whose channels cancel, by name."""


def read_audio(source: Any, sample_rate: int, name: str | None = None) -> np.ndarray:
    """A clip as mono float32 at `sample_rate` Hz: the mean of its channels.

    Where the channels cancel in their mean, the loudest alone is taken; such clips are counted in `cancelled`, and printed.

    Raises BadSample: no audio, no samples, NaN, a sample rate that is none, more than `MAX_SAMPLES`.
    """
    import soundfile

    name = name or name_for(source, "audio")
    try:
        with opened(source, name) as stream, soundfile.SoundFile(stream) as file:
            rate, parts, count = file.samplerate, [], 0
            if not RATES[0] <= rate <= RATES[1]:
                raise BadSample(name, f"its sample rate is {rate} Hz; rates are {RATES[0]:,} to {RATES[1]:,}")
            grows = max(1.0, sample_rate / rate)
            while count * grows <= MAX_SAMPLES:  # in parts: a header may claim any length
                parts.append(file.read(2**20, dtype="float32", always_2d=True))
                count += parts[-1].size
                if len(parts[-1]) < 2**20:
                    break
    except BadSample:
        raise
    except Exception as error:  # decoders of many formats
        raise unreadable(name, "audio", error) from error
    if count * grows > MAX_SAMPLES:
        raise BadSample(name, f"it is longer than {MAX_SAMPLES:,} samples")
    return resample(waveform(_mono(np.concatenate(parts), name), name), rate, sample_rate)


def duration(source: Any, name: str | None = None) -> float:
    """Seconds of a clip, by its header. Raises BadSample."""
    import soundfile

    name = name or name_for(source, "audio")
    try:
        with opened(source, name) as stream:
            return soundfile.info(stream).duration
    except BadSample:
        raise
    except Exception as error:
        raise unreadable(name, "audio", error) from error


def _mono(channels: np.ndarray, name: str) -> np.ndarray:
    """Samples x channels -> their mean, or the loudest channel where the mean is next to nothing."""
    mean = channels.mean(axis=1)
    energy = np.square(channels, dtype=np.float64).mean(axis=0) if channels.shape[1] > 1 and len(channels) else np.zeros(1)
    if not np.square(mean, dtype=np.float64).sum() < CANCELS * energy.mean() * len(channels):  # NaN is for `waveform`
        return mean
    if name not in cancelled:
        cancelled.add(name)
        if len(cancelled) in (1, 10, 100, 1000, 10_000, 100_000):
            print(f"channels cancel in their mean, one is taken: {len(cancelled)} clip(s) so far, now {name}")
    return channels[:, int(energy.argmax())]


def waveform(raw: Any, name: str = "audio") -> np.ndarray:
    """A mono clip in an array as float32: floats as they are, integers of up to 32 bits scaled from their range to [-1, 1].

    Raises BadSample: two-dimensional, empty, of another dtype (bool, complex, int64, ...), NaN, or far outside [-1, 1].
    """
    if isinstance(raw, (str, bytes, Mapping)) or not hasattr(raw, "__array__"):
        raise BadSample(name, f"a waveform is an array of numbers, got {type(raw).__name__}")
    array = np.asarray(raw)
    if array.ndim != 1:
        raise BadSample(name, f"a waveform has one dimension, got shape {array.shape}; mix its channels, e.g. raw.mean(axis=1)")
    if len(array) == 0:
        raise BadSample(name, "the waveform is empty")
    if array.dtype.kind in "iu" and array.dtype.itemsize <= 4:
        half = 2.0 ** (8 * array.dtype.itemsize - 1)
        array = ((array.astype(np.float64) - (half if array.dtype.kind == "u" else 0)) / half).astype(np.float32)
    elif array.dtype.kind != "f":
        raise BadSample(name, f"a waveform is float, or integer of at most 32 bits, got {array.dtype}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise BadSample(name, "it holds NaN or infinite samples")
    peak = float(np.abs(array).max())
    if peak > MAX_PEAK:
        raise BadSample(name, f"it peaks at {peak:.4g}, and a float waveform is in [-1, 1]; integers keep their dtype")
    return array
