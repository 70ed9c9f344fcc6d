"""What decides what our model computes: its sizes, and what open models bring beside (see mdm/models/open_formats.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from components.moe import SigmoidRouting
from components.vocabulary import Vocabulary
from components.weightings import Noise

ROUTERS = ("softmax", "sigmoid")
ORDERS = ("two_streams", "learned", "learned_by_token")
CHOICES = {"router": ROUTERS, "orders": ORDERS}

MAX_LAYERS = 2**12
MAX_MODULES = 2**20  # layers, times experts
MAX_ROTATIONS = 2**29  # numbers of the table of rotations: 2 GB
MAX_SIZE = 2**40
"""Beyond any model's. What a config says so is made before a tensor can vouch for it, and a config may be a stranger's."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides what is computed. The aspect ratio of the paper is width / num_layers = 128.

    head_dim:        channels of a head; None is width / num_heads.  rotary_share: of them that are rotated, the first ones
    tied_embeddings: the unembedding is the embedding
    num_experts, experts_per_token: feed-forwards of `ffn_width` that a router chooses among; None is one for all tokens
    num_shared_experts: such feed-forwards, as one, that every token goes through beside those
    first_dense_layers: layers without a mixture before those with, their feed-forward `dense_ffn_width` wide
    router:        "softmax" over all experts; or "sigmoid" of each, with a bias, in `expert_groups`, of which a token chooses
                   from `groups_per_token`, the result times `routing_scale` (see components/moe.py)
    predicts_next: the hidden state of a position predicts the *next* one, as in models adapted from autoregressive ones
                   (Dream); `hidden` moves it there, so that for everybody else each position predicts itself
    causal:        a position sees none behind it: with `predicts_next`, an autoregressive model (a baseline). Of a model of
                   blocks, a *finished* position sees none behind it, and its hidden state predicts the next token
    blocks:        positions of a block by modality (block diffusion, see components/block_diffusion); none: everything is
                   generated in one, and sees everything
    blocks_from_start: blocks are counted from a document's start, prompts included (LLaDA2, SDAR)
    noise:         what it was trained to undo, and what it learns there, by modality; masks where none is named
    orders:        "two_streams": any order, exactly, in one pass (mdm/models/two_stream.py); "learned": the order too, by heads
                   that say when a position's turn is (LoMDM); "learned_by_token": by a rate of each id (GenMD4); null: none
    order_mean, order_spread: of learned heads: exponents lie within mean +- spread (1 and 0 are masked diffusion)
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
    num_shared_experts: int = 0
    first_dense_layers: int = 0
    dense_ffn_width: int | None = None
    router: str = "softmax"
    expert_groups: int = 1
    groups_per_token: int = 1
    routing_scale: float = 1.0
    head_dim: int | None = None
    rotary_share: float = 1.0
    tied_embeddings: bool = False
    predicts_next: bool = False
    causal: bool = False
    noise: Mapping[str, Noise] = field(default_factory=dict, hash=False)
    blocks: Mapping[str, int] = field(default_factory=dict, hash=False)
    blocks_from_start: bool = False
    orders: str | None = None
    order_mean: float = 0.7
    order_spread: float = 0.65

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
        self._check_orders()
        experts = max(1, (self.num_experts or 0) + self.num_shared_experts)
        if self.num_layers > MAX_LAYERS or self.num_layers * experts > MAX_MODULES:
            raise ValueError(f"model.num_layers {self.num_layers} (x {experts} experts) is more than any model's")
        if self.head_dim is None and (self.width % self.num_heads or (self.width // self.num_heads) % 2):
            raise ValueError(
                f"model.width {self.width} does not divide into model.num_heads = {self.num_heads} heads of an even size"
            )
        if self.max_length * self.head_size > MAX_ROTATIONS:
            raise ValueError(f"model.max_length {self.max_length} is more than any model's")
        if self.num_heads * self.head_size > MAX_SIZE:
            raise ValueError(f"model.head_dim {self.head_size} x num_heads = {self.num_heads} is more than any model's")
        if self.rotary_share > 1 or self.rotated < 2 or self.rotated % 2:
            raise ValueError(
                f"model.rotary_share {self.rotary_share} of {self.head_size} channels (head_dim) is not an even number of them"
            )
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(f"model.num_heads {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}")
        if self.num_experts and self.experts_per_token > self.num_experts:
            raise ValueError(f"model.experts_per_token {self.experts_per_token} is more than num_experts = {self.num_experts}")
        self._check_experts()

    def _check_orders(self) -> None:
        """Raises ValueError for what does not go with orders."""
        if self.orders and (self.blocks or self.causal or self.predicts_next or self.noise):
            raise ValueError(
                f"model.orders={self.orders}: what a position sees is its order's to say, and its noise is masks; leave out "
                "model.blocks, model.causal, model.autoregressive and noise of other kinds"
            )
        if self.orders == "learned" and self.order_spread >= self.order_mean:
            raise ValueError(
                f"model.order_spread {self.order_spread} must be less than model.order_mean = {self.order_mean}: exponents are "
                "positive"
            )

    def _check_experts(self) -> None:
        """Raises ValueError for settings of experts that there are not, or that do not fit each other."""
        names = ("num_shared_experts", "first_dense_layers", "dense_ffn_width", "router")
        for name in names if not self.num_experts else ():
            if getattr(self, name) != (value := self.__dataclass_fields__[name].default):
                raise ValueError(f"model.{name} must be {value!r} where model.num_experts is null, got {getattr(self, name)!r}")
        if self.first_dense_layers > self.num_layers:
            raise ValueError(f"model.first_dense_layers {self.first_dense_layers} is more than num_layers = {self.num_layers}")
        for name in ("expert_groups", "groups_per_token", "routing_scale") if self.router == "softmax" else ():
            if getattr(self, name) != 1:
                raise ValueError(f"model.{name} must be 1 where model.router is softmax, got {getattr(self, name)}")
        if self.routing is not None and self.num_experts:
            try:
                self.routing.check(self.num_experts, self.experts_per_token)
            except ValueError as error:
                raise ValueError(f"model.expert_groups, model.groups_per_token: {error}") from error

    @classmethod
    def complaint(cls, name: str, value: Any) -> str | None:
        """What is wrong with a value of a key, as the end of a sentence; None where it may be. Files of others bring any."""
        kind = str(cls.__dataclass_fields__[name].type)
        if value is None and "None" in kind:
            return None
        if kind == "bool":
            return None if isinstance(value, bool) else f"must be true or false, got {value!r}"
        if kind == "float":
            least, what = (-1e-300, "at least 0") if name == "order_spread" else (0, "a positive number")
            fits = isinstance(value, (int, float)) and not isinstance(value, bool) and least < value < 1e30
            return None if fits else f"must be {what}, got {str(value)[:60]!r}"
        if name in CHOICES:
            return None if value in CHOICES[name] else f"must be one of {', '.join(CHOICES[name])}, got {str(value)[:60]!r}"
        if not isinstance(value, int) or isinstance(value, bool):
            return f"must be a whole number, got {value!r}"
        least = 0 if name in ("num_shared_experts", "first_dense_layers") else 1
        if value < least:
            return f"must be at least {least}, got {value}"
        return f"{str(value)[:30]} is more than any model's" if value > MAX_SIZE else None

    @property
    def two_streams(self) -> bool:
        """Whether it is asked in a stream of its own what stands at a position, see mdm/models/two_stream.py."""
        return self.orders == "two_streams"

    @property
    def learned_orders(self) -> bool:
        """Whether it learned when a position's turn is, see mdm/models/orders.py."""
        return self.orders in ("learned", "learned_by_token")

    @property
    def hidden_ffn(self) -> int:
        """SwiGLU's inner width: 8/3 of the width, rounded up to a multiple of 64, so that it costs what a 4x MLP does."""
        return self.ffn_width or math.ceil(8 * self.width / 3 / 64) * 64

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.width // self.num_heads

    @property
    def rotated(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.head_size * self.rotary_share)

    @property
    def routing(self) -> SigmoidRouting | None:
        """How the experts are chosen; None is by a softmax."""
        if self.router == "softmax":
            return None
        return SigmoidRouting(self.expert_groups, self.groups_per_token, self.routing_scale)

    @property
    def block(self) -> dict[str, Any]:
        """What all blocks of a model have in common, as `components.blocks.transformer_block` takes it."""
        norms = ("qk_norm", "norm_before_rope", "norm_eps")
        same = (
            "width",
            "num_heads",
            "num_kv_heads",
            "max_length",
            "qkv_bias",
            "rope_base",
            "residual_multiplier",
            "rotary_share",
        )
        return {"head_dim": self.head_size, **{name: getattr(self, name) for name in (*same, *norms)}}

    def experts_of(self, layer: int) -> int | None:
        """How many experts a layer has; None is one feed-forward for all."""
        return self.num_experts if layer >= self.first_dense_layers else None

    def ffn_of(self, layer: int) -> int:
        """The inner width of a layer's feed-forward, or of each of its experts."""
        return self.hidden_ffn if layer >= self.first_dense_layers else self.dense_ffn_width or self.hidden_ffn


def in_blocks(config: ModelConfig, blocks: Mapping[str, int], causal: bool | None, vocabulary: Vocabulary) -> ModelConfig:
    """The config of a model that goes on in blocks, from a masked or an autoregressive one: each position predicts itself.

    Rows that are text and nothing else are one canvas from their start on: what LLaDA2 and SDAR count their blocks from.

    causal: of finished positions; None leaves it as it was

    Raises ValueError for sizes that there cannot be.
    """
    own = config.causal if causal is None else causal
    alone = not vocabulary.structured and set(blocks) == set(vocabulary.modalities)
    try:
        return replace(config, blocks=dict(blocks), blocks_from_start=alone, causal=own, predicts_next=False)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("model.")) from error


def in_two_streams(config: ModelConfig) -> ModelConfig:
    """The config of a model that goes on in two streams, from a masked or an autoregressive one."""
    own: dict[str, Any] = {"blocks": {}, "blocks_from_start": False, "causal": False, "predicts_next": False, "noise": {}}
    return replace(config, orders="two_streams", **own)


def gone_on(
    config: ModelConfig, vocabulary: Vocabulary, blocks: Mapping[str, int] | None, causal: bool | None, orders: str | None
) -> ModelConfig:
    """The config of a checkpoint's model as a finetuning goes on with it: in blocks, in two streams, or as it was.

    Raises ValueError for sizes that there cannot be.
    """
    if orders is not None:
        return in_two_streams(config)
    return config if blocks is None else in_blocks(config, blocks, causal, vocabulary)
