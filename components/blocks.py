"""Bidirectional transformer blocks, assembled from torchtune's modules.

    h <- h + m * Attention(RMSNorm(h)),    h <- h + m * SwiGLU(RMSNorm(h)),    m the residual multiplier

Attention is not causal (but for a baseline); q and k are rotated (RoPE) and, by default, normalised (QK-norm). Who may attend
to whom is a mask from components/visibility.py.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TransformerSelfAttentionLayer,
)
from torchtune.modules.attention_utils import _sdpa_or_flex_attention

from components.moe import MixtureOfExperts, SigmoidRouting

SHORT = 512  # keys; beyond, a matrix of all scores costs more memory than the fused kernel costs time
_fused = _sdpa_or_flex_attention()


def attention(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch heads keys dim"],
    v: Float[Tensor, "batch heads keys dim"],
    mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Float[Tensor, "batch heads queries dim"]:
    """torchtune's fused attention; on a CPU, for short rows, the two products and the softmax themselves. Who sees nothing: 0.

    Forward and backward in bf16 these take a quarter of the fused kernel's time (77 positions, 4 heads of 48, two cores).
    """
    if mask is not None and mask.shape[-1] < k.shape[-2]:  # of a row of queries and content (two streams), the content
        k, v = k[..., -mask.shape[-1] :, :], v[..., -mask.shape[-1] :, :]
    if q.is_cuda or k.shape[-2] > SHORT or dropout_p > 0 or is_causal:
        return _fused(q, k, v, mask=mask, dropout_p=dropout_p, is_causal=is_causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is None:
        return scores.softmax(dim=-1).to(v.dtype) @ v
    scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)  # of minus infinity alone there is no softmax
    nothing = ~mask.any(dim=-1)
    return (scores.softmax(dim=-1).to(v.dtype) @ v).masked_fill(nothing[:, None, :, None], 0.0)


class NormedProjection(nn.Linear):
    """A projection to heads, each normalised *before* its rotation (LLaDA-MoE, OLMoE, Qwen3); torchtune's norms come after.

    The two differ where gains do: a rotation mixes a pair of channels, and so the gains of both.
    """

    def __init__(self, width: int, heads: int, head_dim: int, bias: bool, norm_eps: float) -> None:
        super().__init__(width, heads * head_dim, bias=bias)
        self.heads = heads
        self.norm: nn.Module = RMSNorm(head_dim, eps=norm_eps)

    def forward(self, input: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch seq out"]:
        return self.normed(super().forward(input))

    def normed(self, projected: Float[Tensor, "batch seq out"]) -> Float[Tensor, "batch seq out"]:
        """What is done to the product, whoever computes it."""
        return self.norm(projected.unflatten(-1, (self.heads, -1))).flatten(-2)


class _PartialRotation(RotaryPositionalEmbeddings):
    """Rotates the first `dim` channels of each head and leaves the others as they are (GPT-NeoX, LLaDA2)."""

    def forward(
        self, x: Float[Tensor, "batch seq heads head_dim"], *, input_pos: Int[Tensor, "*batch seq"] | None = None
    ) -> Float[Tensor, "batch seq heads head_dim"]:
        return torch.cat([super().forward(x[..., : self.dim], input_pos=input_pos), x[..., self.dim :]], dim=-1)


class ResidualMultiplier(nn.Module):
    """Scales a residual branch: CompleteP's (depth / base depth)^-alpha (2505.01618)."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return x * self.factor


def transformer_block(
    width: int,
    num_heads: int,
    ffn_width: int,
    max_length: int,
    num_kv_heads: int | None = None,
    qk_norm: bool = True,
    norm_before_rope: bool = False,
    qkv_bias: bool = False,
    rope_base: float = 10_000,
    norm_eps: float = 1e-6,
    residual_multiplier: float = 1.0,
    num_experts: int | None = None,
    experts_per_token: int = 1,
    causal: bool = False,
    head_dim: int | None = None,
    rotary_share: float = 1.0,
    routing: SigmoidRouting | None = None,
    num_shared_experts: int = 0,
) -> TransformerSelfAttentionLayer:
    """One pre-norm block, `[batch, seq, width] -> [batch, seq, width]`.

    num_kv_heads: fewer key / value heads than query heads is grouped-query attention; None is as many
    qk_norm:      queries and keys are normalised, after their rotation or `norm_before_rope`
    num_experts:  a mixture of so many feed-forwards of ffn_width, `experts_per_token` at a time; None is one for all
    causal:       a position sees none behind it, where no mask is given: for the autoregressive baseline
    head_dim:     channels of a head, which need not make up the width; None is width / num_heads
    rotary_share: of a head's channels that are rotated, the first ones
    routing:      of a mixture: another than softmax;  num_shared_experts: feed-forwards of ffn_width that all tokens go through

    Raises ValueError where the width does not divide into the heads, or the heads into the key / value heads.
    """
    num_kv_heads = num_kv_heads or num_heads
    if head_dim is None:
        if width % num_heads or (width // num_heads) % 2:
            raise ValueError(f"width {width} does not divide into num_heads = {num_heads} heads of an even size")
        head_dim = width // num_heads
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads {num_heads} is not a multiple of num_kv_heads = {num_kv_heads}")
    rotated = int(head_dim * rotary_share)
    if not 0 < rotated <= head_dim or rotated % 2:
        raise ValueError(f"rotary_share {rotary_share} of head_dim = {head_dim} is not an even number of channels")

    def linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False)

    def heads(number: int, normed: bool = False) -> nn.Linear:
        if normed and qk_norm and norm_before_rope:
            return NormedProjection(width, number, head_dim, qkv_bias, norm_eps)
        return nn.Linear(width, number * head_dim, bias=qkv_bias)

    def scale() -> nn.Module | None:
        return None if residual_multiplier == 1.0 else ResidualMultiplier(residual_multiplier)

    self_attention = MultiHeadAttention(
        embed_dim=width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        q_proj=heads(num_heads, normed=True),
        k_proj=heads(num_kv_heads, normed=True),
        v_proj=heads(num_kv_heads),
        output_proj=linear(num_heads * head_dim, width),
        pos_embeddings=(RotaryPositionalEmbeddings if rotated == head_dim else _PartialRotation)(
            rotated,
            max_seq_len=max_length,
            base=rope_base,  # pyright: ignore[reportArgumentType] (said to be an int, and taken to a power of 1 / dim)
        ),
        q_norm=RMSNorm(head_dim, eps=norm_eps) if qk_norm and not norm_before_rope else None,
        k_norm=RMSNorm(head_dim, eps=norm_eps) if qk_norm and not norm_before_rope else None,
        max_seq_len=max_length,
        is_causal=causal,
    )
    self_attention._attention_call = attention

    def feed_forward(inner: int) -> nn.Module:
        return FeedForward(gate_proj=linear(width, inner), down_proj=linear(inner, width), up_proj=linear(width, inner))

    if num_experts is None:
        mlp = feed_forward(ffn_width)
    else:
        shared = feed_forward(num_shared_experts * ffn_width) if num_shared_experts else None
        mlp = MixtureOfExperts(width, ffn_width, num_experts, experts_per_token, routing, shared)
    return TransformerSelfAttentionLayer(
        self_attention,
        mlp,
        sa_norm=RMSNorm(width, eps=norm_eps),
        mlp_norm=RMSNorm(width, eps=norm_eps),
        sa_scale=scale(),
        mlp_scale=scale(),
    )
