"""AdamW as a run uses it: tuned settings, carried to its width, depth, batch and horizon (CompleteP and the SDE scaler)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from components.parameterization import CompleteP, param_groups
from components.sde import AdamWSettings, SDEScaler
from mdm.config import UserError
from mdm.data.settings import BatchSettings
from mdm.models.transformer import RULES, ModelConfig

STATES = ("float32", "int8", "float8")


@dataclass
class ParameterizationSettings:
    """The model at which the optimizer's settings were tuned; null is the model itself. alpha: see `CompleteP`."""

    base_width: int | None = None
    base_depth: int | None = None
    alpha: float = 1.0

    def of(self, config: ModelConfig) -> CompleteP:
        """How much wider and deeper a model is. Raises UserError."""
        try:
            return CompleteP(
                config.width / (self.base_width or config.width),
                config.num_layers / (self.base_depth or config.num_layers),
                self.alpha,
            )
        except ValueError as error:
            raise UserError(f"parameterization: {error}") from error


@dataclass
class OptimizerSettings:
    """AdamW as in PyTorch (decay is multiplied by lr), tuned at `batch.logical`, `base_tokens` and the base model.

    warmup:   share of the token horizon over which lr rises linearly from 0; at most 0.25
    final_lr: share of lr that the cosine ends at
    clip:     largest gradient norm; gradients are clipped before they enter the moments
    base_tokens, gamma: horizon of the tuning (null: this run's), and how the settings move with it; see `components.sde`
    state:    type of the moments: float32, int8 or float8 (torchao's, in blocks of 256 with a scale each)
    critical_steps: S_crit of a `sweep_batch`: a run that takes fewer steps warns; null is unknown
    """

    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-8
    weight_decay: float = 0.02
    warmup: float = 0.05
    final_lr: float = 0.0
    clip: float = 1.0
    base_tokens: int | None = None
    gamma: float = 0.44
    critical_steps: int | None = None
    state: str = "float32"

    def validate(self) -> None:
        if self.state not in STATES:
            raise UserError(f"optimizer.state: {self.state!r} is not one of {', '.join(STATES)}")
        if self.state == "float8" and not torch.cuda.is_available():
            raise UserError("optimizer.state: float8 needs a GPU; int8 runs anywhere")
        if not 0 < self.lr < math.inf:
            raise UserError(f"optimizer.lr must be positive, got {self.lr}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"optimizer.betas must be two numbers in [0, 1), got {self.betas}")
        if not 0 <= self.warmup <= 0.25:
            raise UserError(f"optimizer.warmup must be in [0, 0.25] of the horizon, got {self.warmup}")
        for name in ("eps", "clip", "base_tokens", "critical_steps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"optimizer.{name} must be positive, got {value}")
        for name in ("weight_decay", "final_lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"optimizer.{name} must be at least 0, got {getattr(self, name)}")

    def scaler(self, batch: BatchSettings, physical: int, tokens: int) -> SDEScaler:
        """These settings at a physical batch, for a horizon of `tokens`."""
        return SDEScaler(
            base=AdamWSettings(self.lr, self.betas[0], self.betas[1], self.eps, self.weight_decay),
            logical=batch.logical,
            physical=physical,
            tokens=tokens,
            base_tokens=self.base_tokens,
            gamma=self.gamma,
            warmup=self.warmup,
            final_lr=self.final_lr,
        )


def adamw(model: nn.Module, base: AdamWSettings, parameterization: CompleteP, state: str = "float32") -> torch.optim.Optimizer:
    """AdamW over groups by role; matrices decay, norm gains do not. The scaler's `configure` sets it before every step."""
    groups = param_groups(model, RULES, parameterization, base.lr, base.eps, base.weight_decay)
    if state == "float32":
        return torch.optim.AdamW(groups, fused=True)
    from torchao.optim import AdamW8bit, AdamWFp8

    return (AdamW8bit if state == "int8" else AdamWFp8)(groups)


def batch_warnings(scaler: SDEScaler, step_tokens: int, critical_steps: int | None) -> list[str]:
    """What is to be said of a physical batch whose steps see `step_tokens` tokens."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scaler.settings  # noqa: B018 (it warns)
    warnings.filterwarnings("ignore", message="kappa = ")  # once is enough: the settings are built at every step
    found = [str(w.message) for w in caught]
    steps = scaler.tokens / step_tokens
    if critical_steps is not None and steps < critical_steps:
        critical_batch = scaler.physical * steps / critical_steps
        found.append(
            f"steps of {scaler.physical} sequences leave {steps:.0f} of them, fewer than optimizer.critical_steps = "
            f"{critical_steps}: the loss gets worse past the critical batch, {critical_batch:.0f} sequences"
        )
    return found


class EMA:
    """Exponential moving average of the weights, evaluated in their place. Works on sharded parameters too.

    decay: of a step at the logical batch; one of kappa times that is decay^kappa, so that it averages over as many tokens
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.check(decay)
        self.decay = decay
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}

    @staticmethod
    def check(decay: float) -> None:
        if not 0 < decay < 1:
            raise UserError(f"ema must be in (0, 1), or null for none; got {decay}")

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, nn.Parameter]], kappa: float = 1.0) -> None:
        for name, p in parameters:
            self.average[name].lerp_(p, 1 - self.decay**kappa)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchanges the model's weights with the average; a second call brings them back."""
        for name, p in model.named_parameters():
            held = p.detach().clone()
            p.copy_(self.average[name])
            self.average[name].copy_(held)
