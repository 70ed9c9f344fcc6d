"""How large a batch may be: the critical batch of a sweep, and the gradient noise scale. Neither is computed from the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

POWERS = np.linspace(0.5, 4.0, 71)


@dataclass(frozen=True)
class CriticalBatch:
    """Where a sweep over batch sizes, each SDE-scaled and of the same horizon, begins to lose.

    steps, batch: S_crit and B_crit = tokens / (tokens of a sequence * S_crit): past it the loss is `tolerance` over the floor
    low, high:    B_crit's 90 % interval (bootstrap over the fit's residuals)
    floor:        the loss of many small steps
    reached:      whether the sweep went past it; if not, `batch` is an extrapolation, and the largest of the sweep is fine
    """

    steps: float
    batch: float
    low: float
    high: float
    floor: float
    tolerance: float
    reached: bool


def critical_batch(
    batches: Sequence[float] | np.ndarray,
    steps: Sequence[float] | np.ndarray,
    losses: Sequence[float] | np.ndarray,
    tolerance: float = 0.01,
    draws: int = 400,
) -> CriticalBatch:
    """Fits loss = floor + a * steps^-p (a >= 0, 0.5 <= p <= 4) and says where the second term is `tolerance` of the first.

    A discretised SDE errs by a power of its step size, first order to begin with (2205.10287), and at a fixed horizon the
    step size is 1 / steps. Each run is one entry of the three sequences; seeds are repeated entries.

    Raises ValueError for fewer than four batch sizes, or a tolerance that is not positive.
    """
    b, s, y = (np.asarray(v, dtype=float) for v in (batches, steps, losses))
    if not len(b) == len(s) == len(y):
        raise ValueError(f"critical_batch: {len(b)} batches, {len(s)} steps and {len(y)} losses; one of each for every run")
    sizes = np.unique(b)
    if len(sizes) < 4:
        raise ValueError(f"critical_batch: at least four batch sizes are needed, got {len(sizes)}")
    if not tolerance > 0:
        raise ValueError(f"critical_batch: tolerance must be positive, got {tolerance}")
    sequences = float(np.median(b * s))  # the horizon in sequences, D / L: B_crit = sequences / S_crit

    def crossing(losses: np.ndarray) -> tuple[float, float, np.ndarray]:
        floor, a, p = _fit(s, losses)
        return floor, (a / (tolerance * floor)) ** (1 / p) if a > 0 else 0.0, floor + a * s**-p

    floor, critical, fitted = crossing(y)
    rng = np.random.default_rng(0)
    residuals = (y - fitted) * np.sqrt(len(y) / max(len(y) - 3, 1))  # three constants were fitted
    resampled = [crossing(fitted + rng.choice(residuals, len(y)))[1] for _ in range(draws)]
    low, high = (float(sequences / max(q, 1e-9)) for q in np.quantile(resampled, [0.95, 0.05]))
    batch = sequences / max(critical, 1e-9)
    return CriticalBatch(critical, batch, low, high, floor, tolerance, bool(batch <= sizes[-1]))


def _fit(steps: np.ndarray, losses: np.ndarray) -> tuple[float, float, float]:
    """Least squares of floor + a * steps^-p, a >= 0: linear for each p of a grid."""
    scale = steps.min()  # so that the powers stay near 1
    x = (steps / scale) ** -POWERS[:, None]
    centred = x - x.mean(1, keepdims=True)
    a = np.maximum(centred @ (losses - losses.mean()) / (centred**2).sum(1), 0.0)
    floor = losses.mean() - a * x.mean(1)
    best = int(((losses - floor[:, None] - a[:, None] * x) ** 2).sum(1).argmin())
    return float(floor[best]), float(a[best] * scale ** POWERS[best]), float(POWERS[best])


def gradient_noise_scale(batches: Sequence[float] | np.ndarray, squared_norms: Sequence[float]) -> float:
    """tr(Sigma) / |G|^2 in sequences, from the mean squared gradient norm at two or more batch sizes (1812.06162).

    E |g_B|^2 = |G|^2 + tr(Sigma) / B, fitted by least squares on the relative error. A diagnostic of its own: the batch at
    which noise and signal of one gradient are equal, at that point of training; infinite where no signal is seen.
    """
    b, y = np.asarray(batches, dtype=float), np.asarray(squared_norms, dtype=float)
    if len(np.unique(b)) < 2 or len(b) != len(y):
        raise ValueError(f"gradient_noise_scale: a squared norm at two batch sizes at least; got {len(y)} at {sorted(set(b))}")
    (signal, noise), *_ = np.linalg.lstsq(np.stack([1 / y, 1 / (b * y)], axis=1), np.ones(len(y)), rcond=None)
    return float(noise / signal) if signal > 0 else float("inf")
