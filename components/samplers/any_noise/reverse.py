"""The reverse process of any noise kernel, one step of it: from level t to s < t every token is kept, or drawn afresh.

    keep z_t with probability  r q_s(z_t | p) / q_t(z_t | p),   else  z_s ~ q_s(. | p) = alpha_s p + mask_s m + uniform_s u

which is q(z_s | z_t, p) (components/kernels.py). Exact at one position where p is leave-one-out; a model that learned another
distribution has its tilt taken off. Uniform noise is over the ids that have a logit above -inf.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.kernels import Levels, kept, marginal
from components.precision import precise
from components.samplers.drawing import Drawing, invert_probabilities, probability_of
from components.samplers.state import POSITION, TIME, TOKEN, SamplerState
from components.weightings import untilted


@dataclass(frozen=True)
class Denoised:
    """What the model says of a noisy state.

    own:     its leave-one-out logits, untempered;  p: the distributions that are drawn from
    masked:  where the mask token stands;  size: N of each position;  levels: of the noise now
    """

    own: Float[Tensor, "batch seq vocab"]
    p: Float[Tensor, "batch seq vocab"]
    allowed: Bool[Tensor, "batch seq vocab"]
    masked: Bool[Tensor, "batch seq"]
    size: Int[Tensor, "batch seq"]
    levels: Levels

    def at(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
        """p of some tokens; 0 where the mask stands."""
        return torch.where(self.masked, 0.0, self.p.gather(-1, tokens[..., None])[..., 0])


def denoised(logits: Float[Tensor, "batch seq vocab"], state: SamplerState, tau: Tensor, drawing: Drawing) -> Denoised:
    """What the model's logits say at noise levels tau `[batch]`, drawn from as `drawing` says."""
    allowed = logits > float("-inf")
    size, masked = allowed.sum(dim=-1).clamp(min=1), state.tokens == state.mask_id
    tau = tau[:, None].expand(state.tokens.shape)
    levels = state.noise.levels(tau, state.modality)
    tilt = state.noise.tilt(levels, tau, state.modality, masked, size)
    own = precise(logits)
    if tilt is not None:
        own = untilted(own, state.tokens.masked_fill(masked, -1), tilt)
    kept_logits = drawing.tempered(own)
    if drawing.temperature == 0:
        best = kept_logits.argmax(dim=-1, keepdim=True)
        kept_logits = torch.full_like(kept_logits, float("-inf")).scatter(-1, best, 0.0)
    return Denoised(own, kept_logits.double().softmax(dim=-1), allowed, masked, size, levels)


def backward(said: Denoised, earlier: Levels, state: SamplerState) -> Int[Tensor, "batch seq"]:
    """z_s ~ q(z_s | z_t, p): kept by POSITION; masked by TIME; which token by TOKEN."""
    keep = state.uniform[:, POSITION] < kept(said.at(state.tokens), said.masked, said.levels, earlier, said.size)
    return torch.where(keep, state.tokens, afresh(said.p, said.allowed, earlier, state))


def afresh(
    p: Float[Tensor, "batch seq vocab"], allowed: Bool[Tensor, "batch seq vocab"], levels: Levels, state: SamplerState
) -> Int[Tensor, "batch seq"]:
    """A draw from q(. | p)."""
    ids, mask = marginal(p, levels, allowed)
    drawn = invert_probabilities(ids, state.uniform[:, TOKEN])
    return torch.where(state.uniform[:, TIME] < mask, state.mask_id, drawn)


def stepped(
    state: SamplerState, tokens: Int[Tensor, "batch seq"], own: Float[Tensor, "batch seq vocab"], time: Float[Tensor, " batch"]
) -> SamplerState:
    """The state with other tokens at the positions that are generated. None is settled until time is over.

    own: logits of which the tokens have their confidence
    """
    new = state.generate & (tokens != state.tokens)
    tokens = torch.where(state.generate, tokens, state.tokens)
    over = time <= 0
    drawn = new & (tokens != state.mask_id)
    confidence = torch.where(drawn, probability_of(tokens.masked_fill(~drawn, 0), own), state.confidence)
    return replace(
        state,
        tokens=tokens,
        masked=state.generate & ~over[:, None],
        confidence=confidence.masked_fill(tokens == state.mask_id, 0.0),
        step=state.step + 1,
        time=time,
        finished=over,
    )
