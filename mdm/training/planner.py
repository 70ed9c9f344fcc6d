"""What a run will need: memory by part, floating-point operations, and tokens a second on a given machine.

    plan(config, micro=16, length=2048, card=CARDS["h100"], count=8)

Memory is counted: weights, gradients and AdamW's moments (all sharded over the processes), what a block keeps for its
backward pass, and the logits of one chunk. Time is the model's FLOPs over the share of the peak that was measured for such a
model (MFU): a prediction.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from mdm.config import UserError
from mdm.models.transformer import MaskedDiffusionModel, ModelConfig


@dataclass(frozen=True)
class Card:
    """A GPU: its memory in GiB, and the dense bf16 peak in TFLOP/s (from the maker's data sheet)."""

    name: str
    memory: float
    tflops: float


CARDS = {
    "a100": Card("A100", 79, 312),
    "h100": Card("H100", 79, 989),
    "h200": Card("H200", 140, 989),
    "b200": Card("B200", 178, 2250),
}

MEASURED_MFU = {768: 0.33, 1024: 0.45, 2048: 0.50}
"""Share of the peak that training reached on one H100 in bf16, compiled, by width; narrower models reach less."""


def peak_tflops() -> float | None:
    """The bf16 peak of this machine's GPU; None without one, or for one that is not in the table."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower()
    return next((card.tflops for key, card in CARDS.items() if key in name), None)


def parse_gpu(text: str) -> tuple[Card, int]:
    """ "h100:8" -> the card, and how many. Raises UserError."""
    match = re.fullmatch(r"(\w+?)(?::(\d+))?", text.strip().lower())
    if match is None or match.group(1) not in CARDS or match.group(2) == "0":
        raise UserError(f"gpu: {text!r} is not CARD or CARD:COUNT, e.g. h100:8; cards are {', '.join(CARDS)}")
    return CARDS[match.group(1)], int(match.group(2) or 1)


@dataclass(frozen=True)
class Plan:
    """Memory of one process in GiB by part, and the time of the run.

    micro:  rows of one forward pass of a process;  length: their positions
    """

    parameters: int
    weights: float
    gradients: float
    moments: float
    activations: float
    logits: float
    flops_per_token: float
    tokens_per_second: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.moments + self.activations + self.logits


def plan(
    config: ModelConfig,
    micro: int,
    length: int,
    card: Card,
    count: int = 1,
    checkpointing: str | None = None,
    state: str = "float32",
    masked: float = 0.5,
    max_logits: int = 2**27,
) -> Plan:
    """The plan of a training run in bf16 with float32 weights, sharded over `count` cards (FSDP2).

    masked: mean share of the positions that are masked
    """
    with torch.device("meta"):
        model = MaskedDiffusionModel(config)
    parameters, gib = model.num_parameters(), 2**30
    moment = {"float32": 8.0, "int8": 2.0 * (1 + 4 / 256), "float8": 2.0 * (1 + 4 / 256)}[state]
    rows = micro * length
    unsharded = 0.0 if count == 1 else 2 * (parameters + model.num_parameters(embeddings=False) / config.num_layers) / gib
    logits = min(rows * masked * config.vocab_size, max_logits)
    flops = model.flops_per_token(length, masked)
    return Plan(
        parameters=parameters,
        weights=4 * parameters / count / gib + unsharded,
        gradients=4 * parameters / count / gib,
        moments=moment * parameters / count / gib,
        activations=rows * kept_bytes(config, checkpointing) / gib,
        logits=logits * 10 / gib,  # bf16, float32, and float32's gradient
        flops_per_token=flops,
        tokens_per_second=count * card.tflops * 1e12 * expected_mfu(config.width) / flops / _recompute(checkpointing),
    )


def kept_bytes(config: ModelConfig, checkpointing: str | None) -> float:
    """Bytes a position that the blocks keep for the backward pass, compiled, in bf16.

    Of a block: the residual stream twice, in float32; in bf16 both norms' outputs, q, k (before their norms too), v and
    attention's output, and three times SwiGLU's inner width (of each expert that a token goes through). "selective" keeps the
    input and the products; "full" the input alone, and one block's rest at a time.
    """
    width, inner = config.width, config.hidden_ffn * (config.experts_per_token if config.num_experts else 1)
    kv = (config.num_kv_heads or config.num_heads) / config.num_heads
    normed = 1 + kv if config.qk_norm else 0
    whole = 8 * width + 2 * (width * (2 + 2 + 2 * kv + normed) + 3 * inner)
    products = 4 * width + 2 * (width * (2 + 2 * kv + 2) + 2 * inner)
    each = {None: whole, "selective": products, "full": 4 * width}[checkpointing]
    return float(each * config.num_layers + (whole if checkpointing else 0) + 8 * width)


def expected_mfu(width: int) -> float:
    """The measured share of the peak of the closest width."""
    return MEASURED_MFU[min(MEASURED_MFU, key=lambda known: abs(known - width))]


def _recompute(checkpointing: str | None) -> float:
    """Time against a run that keeps everything: a second forward pass is a third more."""
    return {None: 1.0, "selective": 1.05, "full": 4 / 3}[checkpointing]
