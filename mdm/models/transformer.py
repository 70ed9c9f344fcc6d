"""The model: one bidirectional transformer over one token stream. It takes no time input (MD4, RADD, LLaDA).

    tokens -> embedding -> blocks -> final norm -> hidden;    logits = hidden @ unembedding.T

`hidden` and `unembedding` are what the loss takes; `forward` gives plain logits, for sampling.

The blocks grow what open models need (see mdm/models/open_models.py): biases, other norms, experts, a shift by one position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchtune.modules import RMSNorm

from components.blocks import transformer_block
from components.parameterization import CompleteP, initialize
from components.visibility import Places, attention_mask, block_causal, causal, doubled, doubled_causal, same_document
from components.weightings import Noise
from mdm.hardware import Recorder

RULES = {
    r"(^|\.)embedding\.": "embedding",
    r"(^|\.)unembedding\.": "unembedding",
    r"^norm\.": "final_norm",
    r"[qk]_(norm|proj\.norm)\.": "qk_gain",
    r"\.(sa|mlp)_norm\.": "vector",
    r"\.(attn|mlp)\..*weight$|\.mlp\.(gate|up|down)$": "hidden",
    r"\.attn\..*bias$": "vector",
}
"""The role of each of the model's tensors (see `components.parameterization`)."""

MAX_LAYERS = 2**12
MAX_MODULES = 2**20  # layers, times experts
MAX_ROTATIONS = 2**29  # numbers of the table of rotations: 2 GB
MAX_SIZE = 2**40
"""Beyond any model's. What a config says so is made before a tensor can vouch for it, and a config may be a stranger's."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides what is computed. The aspect ratio of the paper is width / num_layers = 128.

    num_experts, experts_per_token: feed-forwards of `ffn_width` that a router chooses among; None is one for all tokens
    predicts_next: the hidden state of a position predicts the *next* one, as in models adapted from autoregressive ones
                   (Dream); `hidden` moves it there, so that for everybody else each position predicts itself
    causal:        a position sees none behind it: with `predicts_next`, an autoregressive model (a baseline). Of a model of
                   blocks, a *finished* position sees none behind it, and its hidden state predicts the next token
    blocks:        positions of a block by modality (block diffusion, see components/block_diffusion); none: everything is
                   generated in one, and sees everything
    blocks_from_start: blocks are counted from a document's start, prompts included (LLaDA2, SDAR)
    noise:         what it was trained to undo, and what it learns there, by modality; masks where none is named
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    max_length: int
    num_kv_heads: int | None = None
    ffn_width: int | None = None
    qk_norm: bool = True
    norm_before_rope: bool = False
    qkv_bias: bool = False
    norm_eps: float = 1e-6
    rope_base: float = 10_000
    residual_multiplier: float = 1.0
    num_experts: int | None = None
    experts_per_token: int = 1
    predicts_next: bool = False
    causal: bool = False
    noise: Mapping[str, Noise] = field(default_factory=dict, hash=False)
    blocks: Mapping[str, int] = field(default_factory=dict, hash=False)
    blocks_from_start: bool = False

    def __post_init__(self) -> None:
        for modality, size in self.blocks.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"model.blocks.{modality} must be a whole number of positions, at least 1; got {size!r}")
        if self.blocks and self.predicts_next:
            raise ValueError("model.blocks: in a block a position predicts itself; set model.predicts_next=false")
        if self.blocks_from_start and len(set(self.blocks.values())) != 1:
            raise ValueError(
                f"model.blocks_from_start: blocks that are counted from the start have one size, got {dict(self.blocks)}"
            )
        for name in [n for n in self.__dataclass_fields__ if n not in ("noise", "blocks")]:
            complaint = self.complaint(name, getattr(self, name))
            if complaint is not None:
                raise ValueError(f"model.{name} {complaint}")
        if self.num_layers > MAX_LAYERS or self.num_layers * (self.num_experts or 1) > MAX_MODULES:
            raise ValueError(f"model.num_layers {self.num_layers} (x {self.num_experts or 1} experts) is more than any model's")
        if self.max_length * (self.width // self.num_heads) > MAX_ROTATIONS:
            raise ValueError(f"model.max_length {self.max_length} is more than any model's")
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ValueError(
                f"model.width {self.width} does not divide into model.num_heads = {self.num_heads} heads of an even size"
            )
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(f"model.num_heads {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}")
        if self.num_experts and self.experts_per_token > self.num_experts:
            raise ValueError(f"model.experts_per_token {self.experts_per_token} is more than num_experts = {self.num_experts}")

    @classmethod
    def complaint(cls, name: str, value: Any) -> str | None:
        """What is wrong with a value of a key, as the end of a sentence; None where it may be. Files of others bring any."""
        kind = str(cls.__dataclass_fields__[name].type)
        if value is None and "None" in kind:
            return None
        if kind == "bool":
            return None if isinstance(value, bool) else f"must be true or false, got {value!r}"
        if kind == "float":
            fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e30
            return None if fits else f"must be a positive number, got {str(value)[:60]!r}"
        if not isinstance(value, int) or isinstance(value, bool):
            return f"must be a whole number, got {value!r}"
        if value < 1:
            return f"must be at least 1, got {value}"
        return f"{str(value)[:30]} is more than any model's" if value > MAX_SIZE else None

    @property
    def hidden_ffn(self) -> int:
        """SwiGLU's inner width: 8/3 of the width, rounded up to a multiple of 64, so that it costs what a 4x MLP does."""
        return self.ffn_width or math.ceil(8 * self.width / 3 / 64) * 64


def in_blocks(config: ModelConfig, blocks: Mapping[str, int], causal: bool | None) -> ModelConfig:
    """The config of a model that goes on in blocks, from a masked or an autoregressive one: each position predicts itself.

    causal: of finished positions; None leaves it as it was
    """
    own = config.causal if causal is None else causal
    return replace(config, blocks=dict(blocks), blocks_from_start=False, causal=own, predicts_next=False)


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
                width=config.width,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                ffn_width=config.hidden_ffn,
                max_length=config.max_length,
                qk_norm=config.qk_norm,
                norm_before_rope=config.norm_before_rope,
                qkv_bias=config.qkv_bias,
                norm_eps=config.norm_eps,
                rope_base=config.rope_base,
                residual_multiplier=config.residual_multiplier,
                num_experts=config.num_experts,
                experts_per_token=config.experts_per_token,
                causal=config.causal and not config.blocks,
            )
            for _ in range(config.num_layers)
        ]
        for block in blocks:  # one table of rotations for all: at 100 k positions each is 64 MB
            block.attn.pos_embeddings = blocks[0].attn.pos_embeddings
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.unembedding = nn.Linear(config.width, config.vocab_size, bias=False)

    def init_weights(self, generator: torch.Generator | None = None, parameterization: CompleteP | None = None) -> None:
        """Embedding N(0, 1); matrices N(0, 1/fan_in), those that write into the residual stream smaller by sqrt(2 layers).

        That is the base model; `parameterization` says how much wider and deeper this one is, and scales it from there.
        """
        scaled = parameterization or CompleteP()

        def base_std(name: str, parameter: nn.Parameter) -> float:
            if name.startswith("embedding"):
                return 1.0
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
        """Makes what is not among the weights, after they were put into a model without any: the table of rotations."""
        rope = self._rope()
        rope.to_empty(device=self.embedding.weight.device)
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

    def sees(self, places: Places, keys: Places | None = None) -> Any:
        """The attention mask of this model. Of blocks, with streams: what training and decoding in blocks need; without: each
        position sees its own block and those before. keys: where they are not the queries themselves"""
        c = self.config
        if c.blocks and places.block is not None:
            rule = block_causal if places.stream is None else doubled_causal if c.causal else doubled
        else:
            rule = causal if c.causal and not c.blocks else same_document
        return attention_mask(rule, places, keys)

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        document: Int[Tensor, "batch seq"] | None = None,
        position: Int[Tensor, "batch seq"] | None = None,
        block: Int[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits over the whole vocabulary at every position (not restricted to what may stand there).

        document: of each position, where rows hold several or padding;  block: of a model of blocks; None: the row is one block
        """
        if document is None and block is None:
            return self.unembedding(self.hidden(tokens, None, position))
        index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        own = torch.zeros_like(tokens) if document is None else document
        return self.unembedding(self.hidden(tokens, self.sees(Places(own, index, block)), position))

    def num_parameters(self, embeddings: bool = True) -> int:
        """Parameters; without embeddings: neither the input embedding nor the unembedding."""
        total = sum(p.numel() for p in self.parameters())
        return total if embeddings else total - self.embedding.weight.numel() - self.unembedding.weight.numel()

    def flops(self, tokens: float, pairs: float, logits: float) -> float:
        """Training FLOPs (forward and backward): 6 per weight that a token is multiplied with (4 where it is frozen).

        pairs:  of tokens, of which one attends to the other: 12 * layers * width each, for attention's two products
        logits: that are made, each a row of the unembedding times a hidden state
        """
        c = self.config
        used = c.experts_per_token / c.num_experts if c.num_experts else 1.0  # of the experts, which are of three dimensions
        weights = [p for b in self.blocks for p in b.parameters() if p.ndim > 1]
        multiplied = sum((6 if p.requires_grad else 4) * p.numel() * (used if p.ndim == 3 else 1.0) for p in weights)
        return multiplied * tokens + 6 * c.width * logits + 12 * c.num_layers * c.width * pairs

    def flops_per_token(self, context: int, unembedded: float = 0.5, vocabulary: int | None = None) -> float:
        """Training FLOPs per token of a document of `context` tokens.

        The unembedding is counted for the share of positions that are masked (`unembedded`) and the rows multiplied there
        (`vocabulary`).
        """
        return self.flops(1, context, unembedded * (self.config.vocab_size if vocabulary is None else vocabulary))

    def config_dict(self) -> dict[str, Any]:
        """Its config as plain values; noise beside masks, and blocks, only where there are some."""
        plain = asdict(replace(self.config, noise={}))
        plain["noise"] = {modality: own.to_dict() for modality, own in self.config.noise.items()}
        return {key: value for key, value in plain.items() if value or key not in ("noise", "blocks", "blocks_from_start")}
