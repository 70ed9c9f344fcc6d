"""Named sizes. nano is for two cores; small, base and 3B keep the paper's aspect ratio, width / layers = 128.

Parameters without embeddings: small 0.10 B, base 0.81 B, 3B 2.7 B. Heads are 128 wide (48 in nano).
"""

from __future__ import annotations

from collections.abc import Mapping

from mdm.models.transformer import MaskedDiffusionModel, ModelConfig


def model(
    vocab_size: int,
    max_length: int,
    width: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    ffn_width: int | None = None,
    qk_norm: bool = True,
    residual_multiplier: float = 1.0,
    autoregressive: bool = False,
    blocks: dict[str, int] | None = None,
    causal: bool = False,
    orders: str | None = None,
    order_spread: float = 0.65,
) -> MaskedDiffusionModel:
    """A model of any shape. The recipe fills in vocab_size from the vocabulary, the rest is the user's.

    autoregressive: the baseline of the same blocks: causal, predicts the next token; its masker is components.maskers.NextToken
    blocks:         positions that are generated together, by modality (block diffusion): {text: 32, audio: 8}; a modality
                    without is generated whole
    causal:         of blocks: what is finished sees nothing behind it, so that `loss.next_token` can be trained beside
    orders:         two_streams: any order, exactly in one pass, with the masker components.orders.OrderMasker; learned,
                    learned_by_token: the order is learned too, with components.learned_orders.LearnedOrderMasker
    order_spread:   of learned orders, how far exponents go from 0.7 (components/learned_orders.py); 0: all alike, a control
    """
    if not isinstance(blocks or {}, Mapping):
        raise ValueError(f"model.blocks must name modalities, e.g. {{text: 32}}; got {blocks!r}")
    if causal and not blocks:
        raise ValueError("model.causal is of finished blocks: set model.blocks too, e.g. {text: 32}")
    return MaskedDiffusionModel(
        ModelConfig(
            vocab_size=vocab_size,
            max_length=max_length,
            width=width,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            ffn_width=ffn_width,
            qk_norm=qk_norm,
            residual_multiplier=residual_multiplier,
            causal=autoregressive or causal,
            predicts_next=autoregressive,
            blocks=dict(blocks or {}),
            orders=orders,
            order_spread=order_spread,
        )
    )


def pico(
    vocab_size: int,
    max_length: int = 64,
    width: int = 64,
    num_layers: int = 2,
    residual_multiplier: float = 1.0,
    autoregressive: bool = False,
    blocks: dict[str, int] | None = None,
    causal: bool = False,
    orders: str | None = None,
) -> MaskedDiffusionModel:
    """For sweeps over width and depth: heads of 16 and a feed-forward of 3x the width, so that shapes grow in proportion."""
    return model(
        vocab_size,
        max_length,
        width,
        num_layers,
        _heads(width, 16),
        None,
        3 * width,
        residual_multiplier=residual_multiplier,
        autoregressive=autoregressive,
        blocks=blocks,
        causal=causal,
        orders=orders,
    )


def nano(
    vocab_size: int,
    max_length: int = 128,
    width: int = 192,
    num_layers: int = 4,
    num_heads: int | None = None,
    residual_multiplier: float = 1.0,
    blocks: dict[str, int] | None = None,
    causal: bool = False,
    orders: str | None = None,
) -> MaskedDiffusionModel:
    """1.8 M parameters without embeddings: learns the quickstart in minutes on two cores."""
    heads = num_heads or _heads(width, 48)
    return model(
        vocab_size,
        max_length,
        width,
        num_layers,
        heads,
        residual_multiplier=residual_multiplier,
        blocks=blocks,
        causal=causal,
        orders=orders,
    )


def small(
    vocab_size: int,
    max_length: int = 1024,
    width: int = 1024,
    num_layers: int = 8,
    num_heads: int | None = None,
    residual_multiplier: float = 1.0,
    blocks: dict[str, int] | None = None,
    causal: bool = False,
    orders: str | None = None,
) -> MaskedDiffusionModel:
    """0.10 B parameters without embeddings."""
    heads = num_heads or _heads(width, 128)
    return model(
        vocab_size,
        max_length,
        width,
        num_layers,
        heads,
        residual_multiplier=residual_multiplier,
        blocks=blocks,
        causal=causal,
        orders=orders,
    )


def base(
    vocab_size: int,
    max_length: int = 2048,
    width: int = 2048,
    num_layers: int = 16,
    num_heads: int | None = None,
    residual_multiplier: float = 1.0,
    blocks: dict[str, int] | None = None,
    causal: bool = False,
    orders: str | None = None,
) -> MaskedDiffusionModel:
    """0.81 B parameters without embeddings."""
    heads = num_heads or _heads(width, 128)
    return model(
        vocab_size,
        max_length,
        width,
        num_layers,
        heads,
        residual_multiplier=residual_multiplier,
        blocks=blocks,
        causal=causal,
        orders=orders,
    )


def mdm_3b(
    vocab_size: int,
    max_length: int = 2048,
    width: int = 3072,
    num_layers: int = 24,
    num_heads: int | None = None,
    residual_multiplier: float = 1.0,
    blocks: dict[str, int] | None = None,
    causal: bool = False,
    orders: str | None = None,
) -> MaskedDiffusionModel:
    """2.7 B parameters without embeddings: the paper's 3B."""
    heads = num_heads or _heads(width, 128)
    return model(
        vocab_size,
        max_length,
        width,
        num_layers,
        heads,
        residual_multiplier=residual_multiplier,
        blocks=blocks,
        causal=causal,
        orders=orders,
    )


def _heads(width: int, size: int) -> int:
    """Heads of `size`: a wider model has more of them, not larger ones."""
    if width % size:
        raise ValueError(f"model.width {width} is not a multiple of {size}, the size of a head; set model.num_heads too")
    return width // size
