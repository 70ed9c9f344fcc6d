"""From left to right with a model of blocks whose finished tokens predict the next: token by token, or drafted by diffusion.

The autoregressive mode draws each token from what the finished ones before it say. Self-speculation draws from the very same
distribution in fewer passes: the diffusion mode drafts the rest of a block, q independent over its positions, and what the
finished copy of the draft says of each of its tokens, p, tells how far it may stand (speculative sampling, 2211.17192):

    accept d_i with probability min(1, p_i(d_i) / q_i(d_i));  the first that is not accepted is drawn from max(p_i - q_i, 0)

One pass judges a draft and makes the next one, for every number of tokens that may stand: its logits are `[rows, 1 + width,
width, vocab]`, of the finished copy, and of noisy copies of the block of which 0, 1, ... tokens are seen. A draft comes from
one pass, so that q is what its tokens were drawn from: the distribution is exact by that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from components.samplers.drawing import Drawing, invert_probabilities, probability_of
from components.samplers.state import POSITION, TIME, TOKEN, SamplerState


@dataclass(frozen=True)
class LeftToRight(Drawing):
    """The autoregressive mode: a token a pass, by the finished copy of the block."""

    causal = True
    drafts = False

    @property
    def deterministic(self) -> bool:
        return self.temperature == 0

    def start(self, state: SamplerState) -> SamplerState:
        """Raises ValueError where a given token stands behind one that is to be generated."""
        behind = state.generate.long().diff(dim=1) > 0
        given = state.generate.long().cummax(dim=1).values[:, :-1].bool()
        if bool((behind & given).any()):
            raise ValueError(f"{self.name} goes from left to right; what is given behind a gap it cannot see")
        return state

    def step(self, logits: Float[Tensor, "batch *copies seq vocab"], state: SamplerState) -> SamplerState:
        """The next token of each row."""
        p = self.probabilities(self.finished(logits))
        drawn = invert_probabilities(p, state.uniform[:, TOKEN])
        now = state.masked & (state.masked.long().cumsum(dim=1) == 1)
        return state.unmask(now, drawn, probability_of(drawn, logits[:, 0]))

    def finished(self, logits: Float[Tensor, "batch *copies seq vocab"]) -> Float[Tensor, "batch seq vocab"]:
        """What the finished copy says. Raises ValueError for logits of one copy alone."""
        if logits.ndim != 4:
            raise ValueError(f"{self.name} is for a model of blocks (components/block_diffusion), which gives logits of copies")
        return logits[:, 0]

    def probabilities(self, logits: Float[Tensor, "*shape vocab"]) -> Float[Tensor, "*shape vocab"]:
        """What is drawn from, in float64; at temperature 0 the most probable token alone."""
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).double()
        return self.tempered(logits).double().softmax(dim=-1)


@dataclass(frozen=True)
class SelfSpeculation(LeftToRight):
    """The distribution of `LeftToRight`, at temperature 0 its very tokens, in as many passes as it takes to be accepted."""

    drafts = True

    def step(self, logits: Float[Tensor, "batch *copies seq vocab"], state: SamplerState) -> SamplerState:
        """Judges each row's draft, draws the token behind what stands, and drafts the rest of the block."""
        width = state.tokens.shape[1]
        here = torch.arange(width, device=logits.device)
        p, masked = self.probabilities(self.finished(logits)), state.masked
        first = masked.long().argmax(dim=1, keepdim=True)
        q = state.draft
        assert q is not None  # whoever gives logits of copies has made room for it
        own, theirs = (v.gather(-1, state.tokens.clamp(max=p.shape[-1] - 1)[..., None])[..., 0] for v in (p, q))
        fresh = (state.step == 0)[:, None]  # there is no draft yet
        stands = masked & ~fresh & (state.uniform[:, POSITION] * theirs < own) | (here < first)
        count = stands.long().cumprod(dim=1).sum(dim=1, keepdim=True)  # the place of the first that does not stand
        rest = torch.where(fresh[..., None], p, (p - q).clamp(min=0))
        drawn = torch.where(here < count, state.tokens, invert_probabilities(rest, state.uniform[:, TOKEN]))
        now = masked & (here <= count)
        after = state.unmask(now, drawn, probability_of(drawn, logits[:, 0]))
        seen = count.clamp(max=width - 1)[..., None, None].expand(-1, 1, width, p.shape[-1])
        draft = self.probabilities(logits[:, 1:].gather(1, seen)[:, 0])
        drafted = invert_probabilities(draft, state.uniform[:, TIME])
        return replace(after, tokens=torch.where(after.masked, drafted, after.tokens), draft=draft)
