"""CompleteP: the initialization and per-tensor AdamW settings with which hyperparameters transfer over width and depth.

As completed in 2512.22382 (CompleteP: 2505.01618; muP: 2203.03466). With m_N = width / base width, m_L = depth / base depth
and alpha in [1/2, 1], a residual branch is  h + m_L^-alpha F(h),  and each tensor's base settings are multiplied by

    role          init std    lr                     eps                  weight decay
    embedding     1           1                      1/m_N                1
    hidden        m_N^-1/2    1/m_N m_L^(alpha-1)    1/m_N m_L^-alpha     m_N
    vector        1           m_L^(alpha-1)          1/m_N m_L^-alpha     1
    qk_gain       1           m_L^(alpha-1)          m_L^-alpha           1
    final_norm    1           1                      1/m_N                1
    unembedding   1/m_N       1/m_N                  1                    m_N

Width adds heads of a fixed size (the softmax keeps its 1/sqrt(head_dim)) and widens the feed-forward in proportion;
embeddings are untied. There is no output multiplier. The gains of a QK-norm are shared by all heads: their gradient sums
over a number of heads that grows as m_N while each one's part falls as 1/m_N, so that their eps keeps its size in width.

The functions take any module: `rules` map patterns of parameter names to roles, and a parameter that none matches is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ROLES = ("embedding", "hidden", "vector", "qk_gain", "final_norm", "unembedding")


@dataclass(frozen=True)
class Multipliers:
    """What a role's base settings are multiplied by."""

    init: float
    lr: float
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class CompleteP:
    """width: m_N; depth: m_L; both 1 at the base model, where the settings are tuned. alpha: in [1/2, 1]."""

    width: float = 1.0
    depth: float = 1.0
    alpha: float = 1.0

    def __post_init__(self) -> None:
        for name in ("width", "depth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"CompleteP: {name} must be positive, got {getattr(self, name)}")
        if not 0.5 <= self.alpha <= 1:
            raise ValueError(f"CompleteP: alpha must be in [0.5, 1], got {self.alpha}")

    @property
    def residual_multiplier(self) -> float:
        """What every residual branch is multiplied by."""
        return self.depth**-self.alpha

    def multipliers(self, role: str) -> Multipliers:
        """The row of the table."""
        n, depth_lr, depth_eps = self.width, self.depth ** (self.alpha - 1), self.depth**-self.alpha
        return {
            "embedding": Multipliers(1, 1, 1 / n, 1),
            "hidden": Multipliers(n**-0.5, depth_lr / n, depth_eps / n, n),
            "vector": Multipliers(1, depth_lr, depth_eps / n, 1),
            "qk_gain": Multipliers(1, depth_lr, depth_eps, 1),
            "final_norm": Multipliers(1, 1, 1 / n, 1),
            "unembedding": Multipliers(1 / n, 1 / n, 1, n),
        }[role]


def roles(names: Iterable[str], rules: Mapping[str, str]) -> dict[str, str]:
    """The role of each parameter: that of the first rule whose pattern (a regular expression) is found in its name.

    Raises ValueError for a role that does not exist, and for parameters that no rule matches, by name.
    """
    for pattern, role in rules.items():
        if role not in ROLES:
            raise ValueError(f"parameterization: role {role!r} of rule {pattern!r} is not one of {', '.join(ROLES)}")
    found = {name: next((role for pattern, role in rules.items() if re.search(pattern, name)), None) for name in names}
    matched = {name: role for name, role in found.items() if role is not None}
    if unmatched := [name for name in found if name not in matched]:
        raise ValueError(f"parameterization: no rule matches {', '.join(unmatched)}; add a pattern and its role to the rules")
    return matched


def param_groups(
    module: nn.Module,
    rules: Mapping[str, str],
    parameterization: CompleteP,
    lr: float,
    eps: float,
    weight_decay: float,
    decay_vectors: bool = False,
) -> list[dict[str, Any]]:
    """AdamW's groups of what is trained, one for each role, from the base model's settings.

    Each carries its multipliers too (`lr_multiplier`, `eps_multiplier`, `decay_multiplier`), for schedules and
    `components.sde.SDEScaler`. Vectors (norm gains, biases) decay only with `decay_vectors`.
    """
    grouped: dict[tuple[str, bool], list[nn.Parameter]] = {}
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for name, role in roles(parameters, rules).items():
        grouped.setdefault((role, parameters[name].ndim > 1 or decay_vectors), []).append(parameters[name])
    groups = []
    for (role, decayed), members in grouped.items():
        by = parameterization.multipliers(role)
        decay = by.weight_decay if decayed else 0.0
        groups.append(
            {
                "params": members,
                "lr": lr * by.lr,
                "eps": eps * by.eps,
                "weight_decay": weight_decay * decay,
                "lr_multiplier": by.lr,
                "eps_multiplier": by.eps,
                "decay_multiplier": decay,
            }
        )
    return groups


@torch.no_grad()
def initialize(
    module: nn.Module,
    rules: Mapping[str, str],
    parameterization: CompleteP,
    base_std: Callable[[str, nn.Parameter], float],
    generator: torch.Generator | None = None,
) -> None:
    """Matrices ~ N(0, (base_std * multiplier)^2), gains 1, biases 0.

    base_std: (name, parameter) -> the standard deviation that the same tensor has in the base model
    """
    parameters = dict(module.named_parameters())
    for name, role in roles(parameters, rules).items():
        parameter = parameters[name]
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            std = base_std(name, parameter) * parameterization.multipliers(role).init
            parameter.normal_(0.0, std, generator=generator)
