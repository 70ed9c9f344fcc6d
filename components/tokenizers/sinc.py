"""Resampling by a windowed sinc, as torchaudio does it by default: for codecs whose weights were trained behind that filter.

    y(j / to) = sum_n x(n / rate) c / rate h(c (n / rate - j / to)),    c = 0.99 min(rate, to)
    h(u) = sinc(u) cos^2(pi u / 12),    |u| < 6

The rates are divided by their greatest common divisor, so that the filter has few phases: one convolution with a channel each.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

ZEROS, ROLLOFF = 6, 0.99


def sinc_resample(waves: Float[Tensor, "*batch samples"], rate: int, to: int) -> Float[Tensor, "*batch resampled"]:
    """Waveforms from `rate` to `to` Hz; ceil(samples * to / rate) samples."""
    if rate == to:
        return waves
    divisor = math.gcd(rate, to)
    rate, to = rate // divisor, to // divisor
    cutoff = ROLLOFF * min(rate, to)
    width = math.ceil(ZEROS * rate / cutoff)
    n = torch.arange(-width, width + rate, dtype=torch.float64)[None] / rate
    phase = torch.arange(to, dtype=torch.float64)[:, None] / to
    u = ((n - phase) * cutoff).clamp(-ZEROS, ZEROS)
    filters = torch.sinc(u) * torch.cos(math.pi * u / (2 * ZEROS)) ** 2 * (cutoff / rate)
    flat = torch.nn.functional.pad(waves.reshape(-1, 1, waves.shape[-1]), (width, width + rate))
    out = torch.nn.functional.conv1d(flat, filters[:, None].to(flat), stride=rate).transpose(1, 2).flatten(1)
    length = math.ceil(to * waves.shape[-1] / rate)
    return out[:, :length].reshape(*waves.shape[:-1], length)
