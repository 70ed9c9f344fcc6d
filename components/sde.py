"""The SDE batch scaler: AdamW's settings, tuned at one batch size and horizon, carried to another (arXiv 2602.21472).

    kappa = (B / B_base) * (D_base / D)^gamma                 B in sequences, D in tokens
    lr * sqrt(kappa),   beta^kappa,   eps / sqrt(kappa),   weight decay * sqrt(kappa)

AdamW in a small-step limit follows a stochastic differential equation (Malladi et al., 2205.10287; weight decay:
2512.22382). A step of a batch kappa times as large is kappa times as much of that equation's time; with these settings the
trajectory, as a function of tokens, stays the same. So the schedule is a function of tokens too. It holds while noise
dominates a step: up to a critical batch, past which too few steps are left (`components.critical_batch`).

Gradient clipping is not free of scale: it acts on the gradient before the moments see it, and small batches are noisier, so
they are clipped more often at the same threshold.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AdamWSettings:
    """lr, betas, eps and weight decay of AdamW."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"AdamWSettings: {name} must be positive, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"AdamWSettings: {name} must be in [0, 1), got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise ValueError(f"AdamWSettings: weight_decay must be at least 0, got {self.weight_decay}")


def sde_kappa(batch: float, base_batch: float, tokens: float = 1.0, base_tokens: float = 1.0, gamma: float = 0.0) -> float:
    """How much larger a step's sample is than where the settings were tuned.

    batch, base_batch:   sequences of a step; an anti-masked copy counts
    tokens, base_tokens: the horizons D and D_base
    gamma:               how the best settings move with the horizon; fitted, 0 where the horizon is the same
    """
    for name, value in (("batch", batch), ("base_batch", base_batch), ("tokens", tokens), ("base_tokens", base_tokens)):
        if not value > 0:
            raise ValueError(f"sde_kappa: {name} must be positive, got {value}")
    return batch / base_batch * (base_tokens / tokens) ** gamma


def sde_scale(base: AdamWSettings, kappa: float, decay: str = "coupled") -> AdamWSettings:
    """The settings of a step with kappa times the sample of `base`'s (2602.21472; 2205.10287, 2512.22382).

    decay: "coupled": the step decays weights by lr * weight_decay, as in PyTorch's AdamW, so weight_decay grows with
           sqrt(kappa); "decoupled": by weight_decay alone, as in the original (1711.05101), so it grows with kappa

    Raises ValueError for a kappa that is not positive. Warns where beta1^kappa falls under 0.5: a step is then no small
    part of the momentum's memory, and the equation no longer describes it.
    """
    if not (kappa > 0 and math.isfinite(kappa)):
        raise ValueError(f"sde_scale: kappa must be positive and finite, got {kappa}")
    if decay not in ("coupled", "decoupled"):
        raise ValueError(f"sde_scale: decay {decay!r} is not one of coupled, decoupled")
    root = math.sqrt(kappa)
    scaled = AdamWSettings(
        lr=base.lr * root,
        beta1=base.beta1**kappa,
        beta2=base.beta2**kappa,
        eps=base.eps / root,
        weight_decay=base.weight_decay * (root if decay == "coupled" else kappa),
    )
    if 0 < scaled.beta1 < 0.5 <= base.beta1:
        warnings.warn(
            f"kappa = {kappa:.3g} makes beta1 {base.beta1:.3g} -> {scaled.beta1:.2g}, under 0.5: the batch is past what the "
            "SDE scaling describes; use a smaller physical batch, or tune again at a larger logical one",
            stacklevel=2,
        )
    return scaled


def warmup_cosine(progress: float, warmup: float = 0.0, final: float = 0.0) -> float:
    """The factor of the learning rate after a share `progress` of the horizon: linear warm-up over `warmup`, then a cosine."""
    if progress < warmup:
        return progress / warmup
    done = min((progress - warmup) / max(1 - warmup, 1e-12), 1.0)
    return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True, kw_only=True)
class SDEScaler:
    """AdamW's settings for a physical batch, from those tuned at a logical one, and its learning rate as a function of tokens.

    base:        settings tuned at batches of `logical` sequences over a horizon of `base_tokens`
    physical:    sequences of a step as it runs
    tokens:      the horizon
    base_tokens: the horizon of the tuning; None is this one
    gamma:       see `sde_kappa`
    warmup, final_lr: share of the horizon in which lr rises from 0, and the share of lr at which its cosine ends
    decay:       see `sde_scale`

    Raises ValueError for sizes that are not positive, and for a warm-up that is not shorter than the horizon.
    """

    base: AdamWSettings
    logical: int
    physical: int
    tokens: int
    base_tokens: int | None = None
    gamma: float = 0.0
    warmup: float = 0.0
    final_lr: float = 0.0
    decay: str = "coupled"

    def __post_init__(self) -> None:
        for name in ("logical", "physical", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"SDEScaler: {name} must be at least 1, got {getattr(self, name)}")
        if self.base_tokens is not None and self.base_tokens < 1:
            raise ValueError(f"SDEScaler: base_tokens must be at least 1, got {self.base_tokens}")
        if not 0 <= self.warmup < 1:
            raise ValueError(
                f"SDEScaler: the horizon of {self.tokens} tokens is shorter than the warm-up: warmup must be a share in "
                f"[0, 1) of it, got {self.warmup}"
            )

    @property
    def kappa(self) -> float:
        return sde_kappa(self.physical, self.logical, self.tokens, self.base_tokens or self.tokens, self.gamma)

    @property
    def settings(self) -> AdamWSettings:
        """Those of the base, scaled; `lr` is its peak."""
        return sde_scale(self.base, self.kappa, self.decay)

    def lr(self, seen: float) -> float:
        """The learning rate of the step that ends at `seen` tokens."""
        return self.base.lr * math.sqrt(self.kappa) * warmup_cosine(seen / self.tokens, self.warmup, self.final_lr)

    def configure(self, optimizer: torch.optim.Optimizer, seen: float) -> None:
        """Writes the settings of the step that ends at `seen` tokens into every group of an AdamW.

        A group may carry `lr_multiplier`, `eps_multiplier` and `decay_multiplier` (`components.parameterization` gives them).
        """
        settings, lr = self.settings, self.lr(seen)
        for group in optimizer.param_groups:
            own = lr * group.get("lr_multiplier", 1.0)
            group["lr"] = group["lr"].fill_(own) if isinstance(group["lr"], torch.Tensor) else own  # torchao's keep a tensor
            group["betas"] = (settings.beta1, settings.beta2)
            group["eps"] = settings.eps * group.get("eps_multiplier", 1.0)
            group["weight_decay"] = settings.weight_decay * group.get("decay_multiplier", 1.0)


def rescale_moments(optimizer: torch.optim.Optimizer, ratio: float) -> None:
    """What an AdamW has gathered, as if every batch had been `ratio` times as large: for a batch changed in mid-run.

    `exp_avg` stays; `exp_avg_sq`, which noise dominates, is divided by the ratio; `step` too, so that bias correction stays
    a function of tokens: (beta^ratio)^(step / ratio). The settings are the new `SDEScaler`'s.
    """
    if not (ratio > 0 and math.isfinite(ratio)):
        raise ValueError(f"rescale_moments: ratio must be positive and finite, got {ratio}")
    for state in optimizer.state.values():
        if state:
            second = state["exp_avg_sq"]
            whole = second.dequantize() if hasattr(second, "codes") else second  # torchao's, in 8 bits
            second.copy_(whole / ratio)
            state["step"].div_(ratio)
