"""The optimizer, and a learning rate that is a function of tokens seen, not of steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from mdm.config import UserError


@dataclass
class OptimizerSettings:
    """AdamW as in PyTorch (decay is multiplied by lr).

    warmup:   share of the token horizon over which lr rises linearly from 0; at most 0.25
    final_lr: share of lr that the cosine ends at
    clip:     largest gradient norm; gradients are clipped before they enter the moments
    """

    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-8
    weight_decay: float = 0.02
    warmup: float = 0.05
    final_lr: float = 0.0
    clip: float = 1.0

    def validate(self) -> None:
        if self.lr <= 0:
            raise UserError(f"optimizer.lr must be positive, got {self.lr}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"optimizer.betas must be two numbers in [0, 1), got {self.betas}")
        if not 0 <= self.warmup <= 0.25:
            raise UserError(f"optimizer.warmup must be in [0, 0.25] of the horizon, got {self.warmup}")
        if self.clip <= 0:
            raise UserError(f"optimizer.clip must be positive, got {self.clip}")


def adamw(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over matrices with weight decay, and norm gains without."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=tuple(settings.betas), eps=settings.eps, fused=True)


def learning_rate(settings: OptimizerSettings, tokens: int, horizon: int) -> float:
    """Linear warm-up, then a cosine from lr to final_lr * lr over the token horizon (2602.21472: cosine)."""
    warmup = settings.warmup * horizon
    if tokens < warmup:
        return settings.lr * tokens / warmup
    progress = min((tokens - warmup) / max(horizon - warmup, 1), 1.0)
    return settings.lr * (settings.final_lr + (1 - settings.final_lr) * (1 + math.cos(math.pi * progress)) / 2)


class EMA:
    """Exponential moving average of the weights, evaluated in their place. Works on sharded parameters too."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise UserError(f"ema must be in (0, 1), or null for none; got {decay}")
        self.decay = decay
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        for name, p in parameters:
            self.average[name].lerp_(p, 1 - self.decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchanges the model's weights with the average; a second call brings them back."""
        for name, p in model.named_parameters():
            held = p.detach().clone()
            p.copy_(self.average[name])
            self.average[name].copy_(held)
