"""The model: one bidirectional transformer over one token stream. It takes no time input (MD4, RADD, LLaDA).

    tokens -> embedding -> blocks -> final norm -> hidden;    logits = hidden @ unembedding.T

`hidden` and `unembedding` are what the loss takes; `forward` gives plain logits, for sampling.

The blocks grow what open models need (see mdm/models/open_models.py): biases, other norms, experts, a shift by one position.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchtune.modules import RMSNorm

from components.blocks import transformer_block
from components.parameterization import CompleteP, initialize
from components.visibility import (
    Places,
    attention_mask,
    block_causal,
    causal,
    doubled,
    doubled_causal,
    same_document,
    two_streams,
)
from mdm.hardware import Recorder
from mdm.models.orders import LearnedOrder, TokenRates, order_of
from mdm.models.shape import ModelConfig as ModelConfig

RULES = {
    r"(^|\.)embedding\.": "embedding",
    r"(^|\.)unembedding\.": "unembedding",
    r"^norm\.|^order\.(clean|noisy)\.norm\.": "final_norm",
    r"^order\.(clean|noisy)\.score\.weight": "unembedding",
    r"^order\.(.*\.)?bias$": "vector",
    r"[qk]_(norm|proj\.norm)\.": "qk_gain",
    r"\.(sa|mlp)_norm\.": "vector",
    r"\.(attn|mlp)\..*weight$|\.mlp\.(gate|up|down)$": "hidden",
    r"\.attn\..*bias$": "vector",
}
"""The role of each of the model's tensors (see `components.parameterization`)."""


class MaskedDiffusionModel(nn.Module):
    """A masked diffusion transformer.

    recorder: records the forward passes of sampling (see mdm/hardware.py); None launches their kernels one by one
    """

    recorder: Recorder | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        blocks = [
            transformer_block(
                **config.block,
                ffn_width=config.ffn_of(i),
                num_experts=config.experts_of(i),
                experts_per_token=config.experts_per_token,
                causal=config.causal and not config.blocks,
                routing=config.routing,
                num_shared_experts=config.num_shared_experts,
            )
            for i in range(config.num_layers)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.unembedding = nn.Linear(config.width, config.vocab_size, bias=False)
        self.order = order_of(config)  # the last: the others have the same initial weights without it
        for block in (*blocks, *self.order_blocks):  # one table of rotations for all: at 100 k positions each is 64 MB
            block.attn.pos_embeddings = blocks[0].attn.pos_embeddings
        self.tie()

    @property
    def order_blocks(self) -> list[Any]:
        """The blocks of the heads that say when a position's turn is, where there are some."""
        return [self.order.clean.block, self.order.noisy.block] if isinstance(self.order, LearnedOrder) else []

    def tie(self) -> None:
        """Makes one parameter of embedding and unembedding, where the config says so: after either was replaced."""
        if self.config.tied_embeddings:
            self.unembedding.weight = self.embedding.weight

    def init_weights(self, generator: torch.Generator | None = None, parameterization: CompleteP | None = None) -> None:
        """Embedding N(0, 1); matrices N(0, 1/fan_in), those that write into the residual stream smaller by sqrt(2 layers).

        That is the base model; `parameterization` says how much wider and deeper this one is, and scales it from there.
        """
        scaled = parameterization or CompleteP()

        def base_std(name: str, parameter: nn.Parameter) -> float:
            if name.startswith("embedding"):
                return 1.0
            if name.endswith("score.weight"):
                return 0.0  # every position's turn is as early as any other's
            std = (parameter.shape[-1] / scaled.width) ** -0.5
            if name.endswith(("output_proj.weight", "w2.weight", "mlp.down")):
                std /= math.sqrt(2 * self.config.num_layers / scaled.depth)
            return std

        initialize(self, RULES, scaled, base_std, generator)

    @torch.no_grad()
    def grow(self, vocab_size: int, max_length: int | None = None, generator: torch.Generator | None = None) -> None:
        """Appends ids to the vocabulary, their rows drawn with the spread of the rows there are; allows longer sequences."""
        added = vocab_size - self.config.vocab_size
        for module in (self.embedding, self.unembedding):
            old = module.weight
            rows = torch.empty(added, old.shape[1]).normal_(0, old.float().std().item(), generator=generator).to(old)
            module.weight = nn.Parameter(torch.cat([old, rows]))
        self.tie()
        if isinstance(self.order, TokenRates):
            self.order.grow(added)
        self.embedding.num_embeddings = self.unembedding.out_features = vocab_size
        length = max(max_length or 0, self.config.max_length)
        self.config = replace(self.config, vocab_size=vocab_size, max_length=length)
        rope = self._rope()
        rope.max_seq_len = length
        rope.rope_init()

    def change(self, config: ModelConfig) -> None:
        """Makes it see what another config of the same weights says, see `in_blocks`."""
        self.config = config
        for block in self.blocks:
            attention: Any = block.attn
            attention.is_causal = config.causal and not config.blocks

    def _rope(self) -> Any:
        """The table of rotations of all blocks."""
        first: Any = self.blocks[0]
        return first.attn.pos_embeddings

    def reach(self, length: int) -> None:
        """Makes the table of rotations long enough for rows of `length`, which may be more than it was trained with."""
        rope = self._rope()
        if rope.max_seq_len < length:
            rope.max_seq_len = length
            self.restore_buffers()

    def restore_buffers(self) -> None:
        """Makes what is not among the weights, after they were put into a model without any: the table of rotations, a tie."""
        self.tie()
        rope = self._rope()
        rope.to_empty(device=self.embedding.weight.device)
        with torch.device(self.embedding.weight.device):  # where torchtune makes it is nobody's choice else
            rope.rope_init()

    def hidden(
        self, tokens: Int[Tensor, "batch seq"], mask: Any = None, position: Int[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch seq width"]:
        """Hidden states, normalised. `mask`: from `sees`; None lets every position see every other of its row."""
        h = self.embedding(tokens)
        for block in self.blocks:
            h = block(h, mask=mask, input_pos=position)
        h = self.norm(h)
        if not self.config.predicts_next:
            return h
        before = torch.cat([h[:, :1], h[:, :-1]], dim=1)
        return before if position is None else torch.where((position == 0)[..., None], h, before)

    def log_rates(self) -> Float[Tensor, " vocab"]:
        """Of a model that learned a rate of each id: their logarithms."""
        assert isinstance(self.order, TokenRates)  # others have none
        return self.order()

    def sees(self, places: Places, keys: Places | None = None, last: int | None = None) -> Any:
        """The attention mask of this model. Of blocks or ranks, with streams: what training and decoding need; without: each
        position sees its own block and those before. keys, last: where they are not the queries themselves"""
        c = self.config
        if c.two_streams and places.stream is not None:
            rule = two_streams
        elif c.blocks and places.block is not None:
            rule = block_causal if places.stream is None else doubled_causal if c.causal else doubled
        else:
            rule = causal if c.causal and not c.blocks else same_document
        return attention_mask(rule, places, keys, last)

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        document: Int[Tensor, "batch seq"] | None = None,
        position: Int[Tensor, "batch seq"] | None = None,
        block: Int[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits over the whole vocabulary at every position (not restricted to what may stand there).

        Raises ValueError for a model of two streams: what it predicts is asked for (mdm.models.two_stream.hidden_at).

        document: of each position, where rows hold several or padding;  block: of a model of blocks; None: the row is one block
        """
        if self.config.two_streams:
            raise ValueError(
                "a model of two streams says what stands at a position that is asked for: mdm.models.two_stream.hidden_at, or "
                "mdm.evaluation.order_likelihood"
            )
        if document is None and block is None:
            return self.unembedding(self.hidden(tokens, None, position))
        index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        own = torch.zeros_like(tokens) if document is None else document
        return self.unembedding(self.hidden(tokens, self.sees(Places(own, index, block)), position))

    def num_parameters(self, embeddings: bool = True) -> int:
        """Parameters; without embeddings: neither the input embedding nor the unembedding."""
        total = sum(p.numel() for p in self.parameters())
        return total if embeddings else total - sum(p.numel() for p in {self.embedding.weight, self.unembedding.weight})

    def flops(self, tokens: float, pairs: float, logits: float) -> float:
        """Training FLOPs (forward and backward): 6 per weight that a token is multiplied with (4 where it is frozen).

        pairs:  of tokens, of which one attends to the other: 12 * layers * channels of all heads each, for attention's two
                products
        logits: that are made, each a row of the unembedding times a hidden state
        """
        c = self.config
        passes, heads = 1.0, 0
        if c.learned_orders:  # two samples of masks, and where heads look at it the clean row, forward alone
            passes = 2 + len(self.order_blocks) / 6
            heads = sum(6 * p.numel() for b in self.order_blocks for p in b.parameters() if p.ndim > 1) * 3 // 2
        used = c.experts_per_token / c.num_experts if c.num_experts else 1.0  # of the experts, which are of three dimensions
        weights = [p for b in self.blocks for p in b.parameters() if p.ndim > 1]
        multiplied = sum((6 if p.requires_grad else 4) * p.numel() * (used if p.ndim == 3 else 1.0) for p in weights)
        attended = passes * c.num_layers + 3 * len(self.order_blocks) // 2
        attention = 12 * attended * c.num_heads * c.head_size * pairs
        return (passes * multiplied + heads) * tokens + 6 * c.width * logits + attention

    def flops_per_token(self, context: int, unembedded: float = 0.5, vocabulary: int | None = None) -> float:
        """Training FLOPs per token of a document of `context` tokens.

        The unembedding is counted for the share of positions that are masked (`unembedded`) and the rows multiplied there
        (`vocabulary`). In blocks and in two streams a token has a finished copy; of both together, each sees as many as one
        sees without.
        """
        copies = 2 if self.config.blocks or self.config.two_streams else 1
        return self.flops(copies, context, unembedded * (self.config.vocab_size if vocabulary is None else vocabulary))

    def config_dict(self) -> dict[str, Any]:
        """Its config as plain values; noise beside masks, blocks and orders, only where there are some."""
        plain = asdict(replace(self.config, noise={}))
        plain["noise"] = {modality: own.to_dict() for modality, own in self.config.noise.items()}
        if self.config.orders is None:
            del plain["orders"], plain["order_mean"], plain["order_spread"]
        return {key: value for key, value in plain.items() if value or key not in ("noise", "blocks", "blocks_from_start")}
