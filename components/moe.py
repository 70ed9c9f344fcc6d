"""A mixture of SwiGLU experts: each token goes through the k experts that its router likes best (2101.03961, 2409.02060).

    y = sum over the k largest g_e of  g_e * down_e(silu(gate_e x) * up_e x),    g = softmax(router x)

The weights g of the chosen are not normalised again, as in OLMoE and LLaDA-MoE. `SigmoidRouting` is another way to choose and
to weigh; a shared expert is one that every token goes through beside those.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear, silu


@dataclass(frozen=True)
class SigmoidRouting:
    """Each expert scored by itself, in groups (DeepSeek-V3, 2412.19437; LLaDA2, 2512.15745).

        s = sigmoid(router x);    chosen: the k largest s_e + bias_e in the best groups;    g_e = scale * s_e / sum of chosen s

    A group is as good as its two best experts together. The bias balances the experts' load and takes no part in the weights;
    the one expert of k = 1 keeps its s as it is.

    groups, groups_per_token: in how many groups the experts lie, and from how many of them a token may choose
    scale: of the experts' sum, beside the shared expert
    """

    groups: int = 1
    groups_per_token: int = 1
    scale: float = 1.0

    def check(self, num_experts: int, experts_per_token: int) -> None:
        """Raises ValueError where the experts do not lie in such groups, or too few are left to choose from."""
        if num_experts % self.groups or num_experts < 2 * self.groups:
            raise ValueError(f"{num_experts} experts do not lie in {self.groups} groups of one size, of two or more")
        if not 1 <= self.groups_per_token <= self.groups:
            raise ValueError(f"groups_per_token must be in 1..groups = {self.groups}, got {self.groups_per_token}")
        if experts_per_token > (left := num_experts // self.groups * self.groups_per_token):
            raise ValueError(f"experts_per_token {experts_per_token} is more than the {left} experts of the chosen groups")

    def __call__(
        self, logits: Float[Tensor, "tokens experts"], bias: Float[Tensor, " experts"], k: int
    ) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
        """Weights of the chosen experts, and which they are."""
        scores = logits.sigmoid()
        biased = (scores + bias).unflatten(-1, (self.groups, -1))
        if self.groups_per_token < self.groups:
            best = biased.topk(2, dim=-1).values.sum(dim=-1).topk(self.groups_per_token, dim=-1).indices
            out = torch.ones_like(biased[..., 0], dtype=torch.bool).scatter(1, best, False)
            biased = biased.masked_fill(out[..., None], -torch.inf)
        expert = biased.flatten(1).topk(k, dim=-1).indices
        chosen = scores.gather(1, expert)
        return self.scale * (chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20) if k > 1 else chosen), expert


class MixtureOfExperts(nn.Module):
    """`[batch, seq, width] -> [batch, seq, width]`; takes a feed-forward's place in a block.

    width, ffn_width: of the model, and inside an expert
    num_experts, experts_per_token: how many there are, and how many a token goes through
    routing: another than the softmax above
    shared:  a feed-forward that every token goes through too

    `gate`, `up` and `down` hold a matrix for each expert: one tensor, or a list of them (`split`). Raises ValueError for sizes
    that do not fit each other.
    """

    EXPERTS = ("gate", "up", "down")

    def __init__(
        self,
        width: int,
        ffn_width: int,
        num_experts: int,
        experts_per_token: int,
        routing: SigmoidRouting | None = None,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= experts_per_token <= num_experts:
            raise ValueError(f"experts_per_token must be in 1..num_experts = {num_experts}, got {experts_per_token}")
        self.experts_per_token = experts_per_token
        self.router: nn.Linear = nn.Linear(width, num_experts, bias=False)
        self.routing: SigmoidRouting | None = routing
        self.shared: nn.Module | None = shared
        self.expert_bias: Tensor
        if routing is not None:
            routing.check(num_experts, experts_per_token)
            self.register_buffer("expert_bias", torch.zeros(num_experts))  # no gradient ever reaches it
        self.gate: nn.Parameter = nn.Parameter(torch.empty(num_experts, ffn_width, width))
        self.up: nn.Parameter = nn.Parameter(torch.empty(num_experts, ffn_width, width))
        self.down: nn.Parameter = nn.Parameter(torch.empty(num_experts, width, ffn_width))
        for weight in (self.gate, self.up, self.down):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch seq width"]:
        flat = x.flatten(0, 1)
        if self.routing is None:
            chosen, expert = self.router(flat).float().softmax(dim=-1).topk(self.experts_per_token, dim=-1)
        else:
            chosen, expert = self.routing(self._logits(flat), self.expert_bias, self.experts_per_token)
        order = expert.flatten().argsort(stable=True)  # (token, choice) pairs, those of one expert in a row
        token = order // self.experts_per_token
        counts = torch.bincount(expert.flatten(), minlength=len(self.gate)).tolist()
        parts = [
            linear(silu(linear(own, self.gate[e])) * linear(own, self.up[e]), self.down[e])
            for e, own in enumerate(flat[token].split(counts))
            if len(own)  # products of packed integers are not defined for no rows
        ]
        weighted = torch.cat(parts) * chosen.flatten()[order, None].to(x.dtype)
        mixed = torch.zeros_like(flat, dtype=weighted.dtype).index_add(0, token, weighted).view_as(x)
        return mixed if self.shared is None else mixed + self.shared(x)

    def _logits(self, flat: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens experts"]:
        """In float32, whatever the model is in: of hundreds of scores, rounded ones have others win. An adapter has its own."""
        if type(self.router) is not nn.Linear:
            return self.router(flat).float()
        with torch.autocast(flat.device.type, enabled=False):
            return linear(flat.float(), self.router.weight.float())

    def split(self) -> None:
        """Makes each expert's matrices parameters of their own, in place, as quantizing needs them; it computes the same."""
        for name in self.EXPERTS:
            whole = getattr(self, name)
            if isinstance(whole, nn.Parameter):
                delattr(self, name)
                setattr(self, name, nn.ParameterList(nn.Parameter(w, whole.requires_grad) for w in whole.detach()))
