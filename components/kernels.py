"""Noise kernels: what may become of a token, and how to go back.

    q(z_t | x) = alpha x + mask m + uniform u,        alpha + mask + uniform = 1

m is the mask token and u uniform over the N ids that may stand at the position (its id range, and the end token where it may
end). Kernels are functions of the noise level tau, from 0 (clean) to 1; a schedule says when which level is reached, tau =
1 - schedule.alpha(t). One formula serves all of them, since every kernel keeps a token or draws it afresh:

    q(z_t | z_s) = r [z_t = z_s] + (1 - r) (...),    r = alpha_t / alpha_s
    q(z_s | z_t, p): keep z_t with probability  r q_s(z_t | p) / q_t(z_t | p),  else draw z_s from  q_s(. | p)

where q_s(. | p) = alpha_s p + mask_s m + uniform_s u. For the posterior to be Bayes', p has to be what the *other* positions
say of the token, P(x_i | z without i): the leave-one-out distribution, and not E[x_i | z], which knows z_i already. For masks
the two are the same (2605.22765).

    Mask           absorbing: MDLM 2406.07524, MD4 2406.04329
    Uniform        UDLM 2412.10193, Duo 2506.10892
    Hybrid         a share p_u of uniform noise at its peak: GIDD 2503.04482
    HybridLogSNR   the mixture goes from one noise to the other with the log-SNR: 2512.10858
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

MASKED = -1
"""The place of the mask token, where ids are numbered from 0 to N - 1."""
HELD = 7.0  # log-SNR: tau 0.0009, and 0.9991
FEW = 0.01  # a share of uniform noise that is as good as none at the end, where sampling begins


@dataclass(frozen=True)
class Levels:
    """A kernel at a noise level.

    alpha, mask, uniform: shares of kept, masked and uniformly drawn tokens
    mask_rate, uniform_rate: how fast d/dtau a token becomes a mask, or any of the N ids: b' - (alpha'/alpha) b
    """

    alpha: Float[Tensor, "*shape"]
    mask: Float[Tensor, "*shape"]
    uniform: Float[Tensor, "*shape"]
    mask_rate: Float[Tensor, "*shape"]
    uniform_rate: Float[Tensor, "*shape"]

    def of_token(self, masked: Tensor, size: Tensor | int) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """Probability of noise being just this token, and the rate at which it arises: of the mask, or of one of N ids."""
        return torch.where(masked, self.mask, self.uniform / size), torch.where(
            masked, self.mask_rate, self.uniform_rate / size
        )


@runtime_checkable
class Kernel(Protocol):
    """Anything with these is a kernel: shares that sum to 1, with rates that are nowhere negative."""

    @property
    def masks_only(self) -> bool:
        """Whether noise is the mask token alone."""
        ...

    @property
    def ends_masked(self) -> bool:
        """Whether at tau = 1 every token is the mask token, or as good as every one: sampling begins with masks then."""
        ...

    def levels(self, tau: Float[Tensor, "*shape"]) -> Levels:
        """The shares and rates at noise levels in (0, 1)."""
        ...


@dataclass(frozen=True)
class Mask:
    """Tokens are masked, and nothing else."""

    masks_only = True
    ends_masked = True

    def levels(self, tau: Float[Tensor, "*shape"]) -> Levels:
        zero = torch.zeros_like(tau)
        return Levels(1 - tau, tau, zero, 1 / (1 - tau), zero)


@dataclass(frozen=True)
class Uniform:
    """Tokens become any token of their position; there is no mask token in the noise."""

    masks_only = False
    ends_masked = False

    def levels(self, tau: Float[Tensor, "*shape"]) -> Levels:
        zero = torch.zeros_like(tau)
        return Levels(1 - tau, zero, tau, zero, 1 / (1 - tau))


@dataclass(frozen=True)
class Hybrid:
    """Masks, with uniform noise in between: alpha : mask : uniform = 1 - tau : tau : c,  c = B (tau (1 - tau))^(gamma/2).

    p_u:   share of uniformly drawn tokens at tau = 1/2, where it is largest: B = 2^gamma p_u / (1 - p_u). 0 is the masker
    gamma: how late and how early uniform noise is seen; in (0, 2]: beyond, its rate turns negative
    """

    p_u: float = 0.1
    gamma: float = 1.0
    ends_masked = True

    def __post_init__(self) -> None:
        if not 0 <= self.p_u < 1:
            raise ValueError(f"Hybrid: p_u, the share of uniform noise, must be in [0, 1), got {self.p_u}")
        if not 0 < self.gamma <= 2:
            raise ValueError(f"Hybrid: gamma must be in (0, 2], got {self.gamma}: beyond, a rate of the noise is negative")

    @property
    def masks_only(self) -> bool:
        return self.p_u == 0

    def levels(self, tau: Float[Tensor, "*shape"]) -> Levels:
        clean = 1 - tau
        c = 2**self.gamma * self.p_u / (1 - self.p_u) * (tau * clean) ** (self.gamma / 2)
        total = 1 + c
        # alpha (uniform/alpha)' with c' = gamma/2 (1 - 2 tau)/(tau (1 - tau)) c
        rate = c * (self.gamma / 2 * (1 - 2 * tau) / tau + 1) / (clean * total)
        return Levels(clean / total, tau / total, c / total, 1 / (clean * total), rate)


@dataclass(frozen=True)
class HybridLogSNR:
    """Noise that is uniform in the share g = sigmoid(slope L + shift), and the mask else; L = log(alpha / (1 - alpha)).

    Beyond log-SNR +-HELD, where no time of training lies (KernelCorruption's t_max), g stays as it is: else noise that was
    never seen to be masks would end in nothing but masks, and sampling begin there.

    shift: far below 0 is masked, far above uniform;  slope: in [-1, 1]: beyond, a rate turns negative
    """

    shift: float = 0.0
    slope: float = 1.0
    masks_only = False

    def __post_init__(self) -> None:
        if not abs(self.slope) <= 1:
            raise ValueError(
                f"HybridLogSNR: slope must be in [-1, 1], got {self.slope}: beyond, a rate of the noise is negative"
            )
        if not math.isfinite(self.shift):
            raise ValueError(f"HybridLogSNR: shift must be a number, got {self.shift}")

    @property
    def ends_masked(self) -> bool:
        return self.shift - self.slope * HELD < math.log(FEW / (1 - FEW))

    def levels(self, tau: Float[Tensor, "*shape"]) -> Levels:
        log_snr = torch.log((1 - tau) / tau)
        g = torch.sigmoid(self.slope * log_snr.clamp(-HELD, HELD) + self.shift)
        slope, faster = self.slope * (log_snr.abs() < HELD).to(tau.dtype), 1 / (1 - tau)
        mask_rate, uniform_rate = (1 - g) * (1 + slope * g) * faster, g * (1 - slope * (1 - g)) * faster
        return Levels(1 - tau, tau * (1 - g), tau * g, mask_rate, uniform_rate)


KERNELS: Mapping[str, type] = {"mask": Mask, "uniform": Uniform, "hybrid": Hybrid, "hybrid_log_snr": HybridLogSNR}
"""The kernels by the names that a saved model has for them."""


def described(kernel: Kernel) -> dict[str, Any]:
    """A kernel as plain values. Raises ValueError for one that is not the library's own."""
    name = next((n for n, kind in KERNELS.items() if type(kernel) is kind), None)
    if name is None:
        raise ValueError(f"a model's config can name the kernels {', '.join(KERNELS)}, not {type(kernel).__name__}")
    settings: Any = kernel
    return {"kernel": name, **asdict(settings)}


def prior(levels_at_one: Levels, position: Float[Tensor, "*shape"], token: Float[Tensor, "*shape"], size: Tensor) -> Tensor:
    """A draw from pure noise, by two uniform numbers: MASKED, or a place from 0 to N - 1."""
    drawn = (token * size).long().clamp(max=size - 1)
    return torch.where(position < levels_at_one.mask, MASKED, drawn)


def marginal(
    p: Float[Tensor, "*shape ids"], levels: Levels, allowed: Tensor | None = None
) -> tuple[Float[Tensor, "*shape ids"], Float[Tensor, "*shape"]]:
    """q(. | p) over the ids, and its probability of the mask. allowed: those that noise may be; None is all."""
    share = torch.ones_like(p) if allowed is None else allowed.expand_as(p).to(p.dtype)
    uniform = levels.uniform[..., None] * share / share.sum(dim=-1, keepdim=True)
    return levels.alpha[..., None] * p + uniform, levels.mask


def kept(
    p_at_z: Float[Tensor, "*shape"], masked: Tensor, now: Levels, earlier: Levels, size: Tensor | int
) -> Float[Tensor, "*shape"]:
    """Probability that a step from level t (`now`) to s < t (`earlier`) keeps z_t, before anything is drawn afresh.

    p_at_z: leave-one-out probability of the token that stands there; 0 where it is the mask
    """
    at_t, _ = now.of_token(masked, size)
    at_s, _ = earlier.of_token(masked, size)
    r = now.alpha / earlier.alpha
    keep = r * (earlier.alpha * p_at_z + at_s) / (now.alpha * p_at_z + at_t).clamp(min=torch.finfo(p_at_z.dtype).tiny)
    return torch.where(at_t > 0, keep.clamp(max=1), 1.0)  # what no noise could be is clean, whatever p says of it


def posterior(
    p: Float[Tensor, "*shape ids"], z: Int[Tensor, "*shape"], now: Levels, earlier: Levels
) -> tuple[Float[Tensor, "*shape ids"], Float[Tensor, "*shape"]]:
    """q(z_s | z_t, p) over all N ids, and its probability of the mask.

    p: leave-one-out distribution;  z: place of z_t, or MASKED
    """
    masked, place = z == MASKED, z.clamp(min=0)
    p_at_z = torch.where(masked, 0.0, p.gather(-1, place[..., None])[..., 0])
    keep = kept(p_at_z, masked, now, earlier, p.shape[-1])
    ids, mask = marginal(p, earlier)
    ids = (1 - keep)[..., None] * ids
    stays = torch.where(masked, 0.0, keep)
    return ids.scatter_add(-1, place[..., None], stays[..., None]), (1 - keep) * mask + torch.where(masked, keep, 0.0)
