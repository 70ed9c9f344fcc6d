"""How should a run's tokens be shared among modalities, and does one modality help another?

    L_m(w) = E_m + B_m / (w_m + sum_k T_km w_k)^b_m        w: shares of the tokens, whose number is the same for all

T_km is what a token of modality k is worth to modality m, in tokens of its own: 0 is no transfer. Interference beyond the
tokens that are not spent on m would need T below 0, which the law does not have: the residuals show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdm.config import UserError
from mdm.pages.report import figure_png

Rows = Sequence[Mapping[str, Any]]
TASKS = {"digits": "bits/text_to_image", "speech": "bits/text_to_speech", "text": "bits/text"}
"""The stream of the quickstart's data -> the figure that its modality is judged by."""


def conclude(rows: Rows) -> tuple[dict[str, Any], str]:
    """The law of each modality, from the group `grid`, and what it predicts of the group `held_out`. Raises UserError."""
    done = [r for r in rows if r["status"] == "finished"]
    lost = [r["cell"] for r in rows if r["status"] != "finished"]
    if lacks := [name for name in TASKS if any(f"share/{name}" not in r for r in done)]:
        raise UserError(f"mixing: it is about the streams {', '.join(TASKS)} of the quickstart's data; there is no {lacks[0]}")
    grid, held = ([r for r in done if r["group"] == g] for g in ("grid", "held_out"))
    if len({tuple(shares(r)) for r in grid}) < 6:
        raise UserError(
            f"mixing: a fit needs at least 6 mixtures that finished; there are {len({tuple(shares(r)) for r in grid})}"
        )
    w = np.array([shares(r) for r in grid])
    modalities: dict[str, Any] = {}
    lines = [f"{len(grid)} runs of {len({tuple(x) for x in w})} mixtures at equal tokens, {_seeds(grid)}."]
    for m, (name, key) in enumerate(TASKS.items()):
        own = w[:, m] > 0  # without a token of its own a modality is not learned at all
        y = np.array([r[key] for r in grid], dtype=float)
        theta = _fit(w[own], y[own], m)
        error = float(np.sqrt(np.mean((predicted(theta, w[own], m) - y[own]) ** 2)))
        tested = [(float(predicted(theta, np.array([shares(r)]), m)[0]), r[key]) for r in held if shares(r)[m] > 0]
        others = [k for k in range(3) if k != m]
        draws = _bootstrap(w[own], y[own], m, theta)
        transfer = {
            list(TASKS)[k]: {
                "value": float(theta[3 + i]),
                "interval_90": [float(q) for q in np.quantile([d[3 + i] for d in draws], [0.05, 0.95])],
            }
            for i, k in enumerate(others)
        }
        modalities[name] = {
            "E": float(theta[0]), "B": float(theta[1]), "b": float(theta[2]), "transfer_from": transfer, "fit_error": error,
            "held_out": [{"predicted": p, "measured": q} for p, q in tested],
        }  # fmt: skip
        worst = max((abs(p - q) for p, q in tested), default=float("nan"))
        said = ", ".join(
            f"{t['value']:.2f} ({t['interval_90'][0]:.2f} to {t['interval_90'][1]:.2f}) from {k}" for k, t in transfer.items()
        )
        lines.append(
            f"{name}: {y[own].min():.2f} to {y[own].max():.2f} bits per token; a token is worth {said} (90 % bootstrap); the "
            f"law fits within {error:.3f} and predicts the held-out mixtures within {worst:.3f}."
        )
    if lost:
        lines.append(f"Left out: {', '.join(lost)}.")
    return {"modalities": modalities, "left_out": lost, "unit": "bits per token"}, " ".join(lines)


def shares(row: Mapping[str, Any]) -> list[float]:
    """A run's shares of the tokens, in the order of TASKS."""
    return [float(row[f"share/{name}"]) for name in TASKS]


def _seeds(grid: Rows) -> str:
    count = len({r["seed"] for r in grid})
    return "one seed each" if count == 1 else f"{count} seeds"


def predicted(theta: np.ndarray, w: np.ndarray, m: int) -> np.ndarray:
    """L_m of mixtures `[mixtures, 3]`."""
    others = [k for k in range(3) if k != m]
    effective = w[:, m] + w[:, others] @ theta[3:5]
    return theta[0] + theta[1] * effective ** -theta[2]


def _fit(w: np.ndarray, y: np.ndarray, m: int, starts: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """Least squares over E, B, b and both transfers, from several starts."""
    from scipy.optimize import least_squares

    low, high = np.array([0, 0, 0.05, 0, 0]), np.array([y.min(), np.inf, 2.0, 1.0, 1.0])
    starts = starts or [
        np.array([y.min() * e, y.mean() * 0.1, b, t, t]) for e in (0.5, 0.9) for b in (0.2, 0.8) for t in (0.01, 0.3)
    ]
    found = [
        least_squares(lambda th: predicted(th, w, m) - y, np.clip(s, low + 1e-9, high - 1e-9), bounds=(low, high))
        for s in starts
    ]
    return min(found, key=lambda f: f.cost).x


def _bootstrap(w: np.ndarray, y: np.ndarray, m: int, theta: np.ndarray, draws: int = 100) -> list[np.ndarray]:
    """Fits to the law with resampled residuals."""
    rng, fitted = np.random.default_rng(0), predicted(theta, w, m)
    residuals = (y - fitted) * np.sqrt(len(y) / max(len(y) - 5, 1))
    return [_fit(w, fitted + rng.choice(residuals, len(y)), m, [theta]) for _ in range(draws)]


def draw(rows: Rows, summary: Mapping[str, Any]) -> bytes:
    """For each modality its loss over its own share, measured and by the law; and the held-out mixtures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.8))
    done = [r for r in rows if r["status"] == "finished"]
    for m, (axis, (name, key)) in enumerate(zip(axes, TASKS.items(), strict=False)):
        law = summary["modalities"][name]
        theta = np.array([law["E"], law["B"], law["b"], *(t["value"] for t in law["transfer_from"].values())])
        for group, style in (("grid", "ko"), ("held_out", "k^")):
            own = [r for r in done if r["group"] == group and shares(r)[m] > 0]
            axis.plot(
                [shares(r)[m] for r in own], [r[key] for r in own], style, fillstyle="none", label=group.replace("_", " ")
            )
        s = np.linspace(0.05, 1, 50)
        rest = [(1 - s) / 2] * 2
        curve = np.stack([s if k == m else rest[0] for k in range(3)], axis=1)
        axis.plot(s, predicted(theta, curve, m), "-", color="0.5", label="law, the rest in equal parts")
        axis.set(title=name, xlabel="share of the tokens", ylabel="held-out NELBO (bits per token)" if m == 0 else "")
        pairs = law["held_out"]
        axes[3].plot([p["measured"] for p in pairs], [p["predicted"] for p in pairs], "os^"[m], color=str(0.25 * m), label=name)
    axes[0].legend(frameon=False, fontsize="small")
    ends = axes[3].get_xlim()
    axes[3].plot(ends, ends, ":", color="0.5")
    axes[3].set(title="held-out mixtures", xlabel="measured", ylabel="predicted")
    axes[3].legend(frameon=False, fontsize="small")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure_png(figure)
