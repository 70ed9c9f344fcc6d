"""What a model of learned orders has beside the transformer: heads that say when a position's turn is, or a rate of each id.

    learned           LoMDM (arXiv 2602.02112): two heads on the transformer's hidden states, of the clean row (for the forward
                      exponents) and of what is masked so far (for the reverse ones); each a block and a layer to one number.
                      They learn from the transformer and do not teach it: no gradient goes back
    learned_by_token  GenMD4 (2406.04329): one rate for each id, for both

Both begin as masked diffusion: the last layer of a head is 0, and every id's rate 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchtune.modules import RMSNorm

from components.blocks import transformer_block
from components.learned_orders import exponents
from components.precision import precise
from mdm.models.shape import ModelConfig

ONE = math.log(math.e - 1)  # whose softplus is 1
SCALE = 10.0  # of a head's scores: from 0 a few hundred steps of AdamW then move them far enough for a sigmoid to show it


class OrderHead(nn.Module):
    """Hidden states -> a number for each position: the higher, the earlier its turn."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.block = transformer_block(**config.block, ffn_width=config.hidden_ffn)
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.score = nn.Linear(config.width, 1, bias=False)

    def forward(
        self, hidden: Float[Tensor, "batch seq width"], mask: Any = None, position: Int[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch seq"]:
        """mask, position: as of `MaskedDiffusionModel.hidden`."""
        return SCALE * precise(self.score(self.norm(self.block(hidden, mask=mask, input_pos=position)))[..., 0])


class LearnedOrder(nn.Module):
    """The two heads of LoMDM: `clean` of the row itself, which the forward process knows, `noisy` of what is masked so far."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mean, self.spread = config.order_mean, config.order_spread
        self.clean, self.noisy = OrderHead(config), OrderHead(config)

    def exponents(
        self, scores: Float[Tensor, "*samples documents positions"], there: Bool[Tensor, "documents positions"]
    ) -> Float[Tensor, "*samples documents positions"]:
        """A head's scores of the maskable positions of each document as exponents."""
        return exponents(scores, there, self.mean, self.spread)


class TokenRates(nn.Module):
    """A rate for each id of the vocabulary (GenMD4): called, their logarithms."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def grow(self, added: int) -> None:
        """Rates of 1 for so many further ids."""
        self.bias = nn.Parameter(torch.cat([self.bias, self.bias.new_zeros(added)]))

    def forward(self) -> Float[Tensor, " vocab"]:
        return nn.functional.softplus(precise(self.bias) + ONE).log()


def order_of(config: ModelConfig) -> LearnedOrder | TokenRates | None:
    """What a model's config asks for; None where its orders are not learned."""
    if config.orders == "learned":
        return LearnedOrder(config)
    return TokenRates(config) if config.orders == "learned_by_token" else None
