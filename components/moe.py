"""A mixture of SwiGLU experts: each token goes through the k experts that its router likes best (2101.03961, 2409.02060).

    y = sum over the k largest g_e of  g_e * down_e(silu(gate_e x) * up_e x),    g = softmax(router x)

The weights g of the chosen are not normalised again, as in OLMoE and LLaDA-MoE.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, silu


class MixtureOfExperts(nn.Module):
    """`[batch, seq, width] -> [batch, seq, width]`; takes a feed-forward's place in a block.

    width, ffn_width: of the model, and inside an expert
    num_experts, experts_per_token: how many there are, and how many a token goes through

    `gate`, `up` and `down` hold a matrix for each expert: one tensor, or a list of them (`split`).
    """

    EXPERTS = ("gate", "up", "down")

    def __init__(self, width: int, ffn_width: int, num_experts: int, experts_per_token: int) -> None:
        super().__init__()
        if not 1 <= experts_per_token <= num_experts:
            raise ValueError(f"experts_per_token must be in 1..num_experts = {num_experts}, got {experts_per_token}")
        self.experts_per_token = experts_per_token
        self.router: nn.Linear = nn.Linear(width, num_experts, bias=False)
        self.gate: nn.Parameter = nn.Parameter(torch.empty(num_experts, ffn_width, width))
        self.up: nn.Parameter = nn.Parameter(torch.empty(num_experts, ffn_width, width))
        self.down: nn.Parameter = nn.Parameter(torch.empty(num_experts, width, ffn_width))
        for weight in (self.gate, self.up, self.down):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch seq width"]:
        flat = x.flatten(0, 1)
        chosen, expert = self.router(flat).float().softmax(dim=-1).topk(self.experts_per_token, dim=-1)
        order = expert.flatten().argsort(stable=True)  # (token, choice) pairs, those of one expert in a row
        token = order // self.experts_per_token
        counts = torch.bincount(expert.flatten(), minlength=len(self.gate)).tolist()
        parts = [
            linear(silu(linear(own, self.gate[e])) * linear(own, self.up[e]), self.down[e])
            for e, own in enumerate(flat[token].split(counts))
            if len(own)  # products of packed integers are not defined for no rows
        ]
        weighted = torch.cat(parts) * chosen.flatten()[order, None].to(x.dtype)
        return torch.zeros_like(flat, dtype=weighted.dtype).index_add(0, token, weighted).view_as(x)

    def split(self) -> None:
        """Makes each expert's matrices parameters of their own, in place, as quantizing needs them; it computes the same."""
        for name in self.EXPERTS:
            whole = getattr(self, name)
            if isinstance(whole, nn.Parameter):
                delattr(self, name)
                setattr(self, name, nn.ParameterList(nn.Parameter(w, whole.requires_grad) for w in whole.detach()))
