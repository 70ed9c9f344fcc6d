"""What several seeds say of a figure: its mean, a difference, and whether that is more than noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]


def values(runs: Rows, key: str) -> np.ndarray:
    """A figure of every run that has it."""
    return np.array([r[key] for r in runs if r.get(key) is not None], dtype=float)


def mean(v: np.ndarray) -> dict[str, Any]:
    """Mean over seeds, and its standard error: None of one seed."""
    error = float(v.std(ddof=1) / np.sqrt(len(v))) if len(v) > 1 else None
    return {"mean": float(v.mean()), "standard_error": error, "seeds": len(v)}


def compared(runs: Rows, key: str, first: Rows, theirs: str) -> dict[str, Any]:
    """A figure's mean, and its difference from another's of the first group."""
    own, other = mean(values(runs, key)), mean(values(first, theirs))
    errors = [m["standard_error"] for m in (own, other)]
    error = None if None in errors else float(np.hypot(*errors))
    return {**own, "difference": own["mean"] - other["mean"], "difference_error": error}


def sure(c: Mapping[str, Any]) -> bool:
    """Whether a difference is more than two standard errors."""
    return abs(c["difference"]) > 2 * (c["difference_error"] or 0)


def signed(c: Mapping[str, Any], digits: int) -> str:
    """A difference in words."""
    error = c["difference_error"]
    noise = "" if error is None else f" +-{error:.{digits}f}" + ("" if sure(c) else " (within noise)")
    return f"{c['difference']:+.{digits}f}{noise}"


def with_error(m: Mapping[str, Any], digits: int = 3) -> str:
    """A mean in words."""
    return f"{m['mean']:.{digits}f}" + ("" if m["standard_error"] is None else f" +-{m['standard_error']:.{digits}f}")
