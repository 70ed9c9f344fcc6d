"""What a run will need: memory by part, floating-point operations, and tokens a second on a given machine.

    plan(config, micro=16, length=2048, card=CARDS["h100"], count=8)

Memory is counted: weights, gradients and AdamW's moments (sharded over the processes), what a block keeps for its backward
pass, and the logits of one chunk. Time is that of the products, at the rate that large ones reached, and of all that lies
between them, which waits for memory:

    seconds a token = FLOPs / (0.795 peak) + 472 bytes * width * layers / bandwidth

Both figures are fitted to compiled training on one H100, of widths 768 to 2048: a prediction. What else a run costs: `costs`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from components.block_diffusion.layout import Layout
from components.block_diffusion.rows import doubled_rows
from components.orders import OrderMasker
from components.sequences import collate, overhead, task_sequence
from components.tasks import find_task
from components.types import PAD_DOCUMENT, NoisyBatch
from components.vocabulary import Vocabulary
from mdm.config import UserError
from mdm.models.transformer import MaskedDiffusionModel, ModelConfig


@dataclass(frozen=True)
class Card:
    """A GPU: its memory in GiB, the dense bf16 peak in TFLOP/s, and its memory's TB/s (from the maker's data sheet)."""

    name: str
    memory: float
    tflops: float
    bandwidth: float


CARDS = {
    "a100": Card("A100", 79, 312, 2.04),
    "h100": Card("H100", 79, 989, 3.35),
    "h200": Card("H200", 140, 989, 4.8),
    "b200": Card("B200", 178, 2250, 8.0),
}

PRODUCTS = 786 / 989  # of the peak: what a large product reached on an H100
BETWEEN = 472  # bytes a token, layer and unit of width: norms, gates, casts, the optimizer; fitted on an H100 (3.35 TB/s)
NARROWEST = 768  # of the models that it was fitted to; narrower ones are slower than that


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

    blocks: parameters but the embeddings
    """

    parameters: int
    blocks: int
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


@dataclass(frozen=True)
class Doubling:
    """What the rows of a training take: those of blocks and of two streams hold two copies of what needs both.

    widest: positions of the widest row;  copies: positions for each of the data's, on average;  pairs: of a position of the
    data, how many its copies attend to, on average
    """

    widest: int
    copies: float
    pairs: float

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        rows: Sequence[tuple[str, int | None, float]],
        canvas: Mapping[str, int],
        modalities: Sequence[str],
        next_token: bool,
    ) -> Doubling:
        """By rows as they are trained. rows: task, positions (of packed text: one document) and share of each"""
        vocabulary = Vocabulary.build(dict.fromkeys(modalities, (2,)), modalities, [task for task, *_ in rows])
        widest, data, taken, pairs = 0, 0.0, 0.0, 0.0
        for task, pack, share in rows:
            lengths = dict(canvas) if pack is None else {"text": pack - overhead(vocabulary, task)}
            parts = {m: torch.zeros(lengths[m], dtype=torch.long) for m in find_task(task).modalities}
            batch = collate([[task_sequence(vocabulary, task, parts, {})]], [[0]], vocabulary.pad_id)
            if config.two_streams:
                noisy = OrderMasker(vocabulary.mask_id)(batch)
            else:
                block = Layout(config.blocks, vocabulary.modalities, config.blocks_from_start)(batch)
                weight = batch.maskable.float()
                noisy = NoisyBatch(batch, batch.tokens, batch.maskable, weight, weight, block=block)
            doubled = doubled_rows(noisy, next_token)
            widest = max(widest, doubled.tokens.shape[1])
            data += share * batch.num_tokens
            taken += share * int((doubled.places.document != PAD_DOCUMENT).sum())
            pairs += share * doubled.pairs
        return cls(widest, taken / data, pairs / data)


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
    replicate: int = 1,
    tensor: int = 1,
    gather: float = 2.0,
    accumulation: int = 1,
    doubling: Doubling | None = None,
) -> Plan:
    """The plan of a training run in bf16 with float32 weights, sharded over `count` cards (FSDP2).

    masked:       mean share of the positions that are predicted; of two streams it is all
    replicate:    groups of cards that hold all weights each (hybrid sharding)
    tensor:       cards that share each row's products
    gather:       bytes of a gathered weight
    accumulation: micro-batches of a step; more than one keep whole gradients until the last
    doubling:     of blocks and of two streams: what the second copies of its rows take
    """
    taken = doubling or Doubling(length, 1.0, length)
    masked = 1.0 if config.two_streams else masked
    parameters, blocks, flops = counted(config, taken.copies, taken.pairs, masked)
    gib = 2**30
    rows, split = micro * length, count // replicate
    # Gathered at a time: the embeddings, which stay for the whole step, the block at work and the next.
    whole = 0.0 if split == tensor else gather * (parameters - blocks + 2 * blocks / config.num_layers) / tensor / gib
    logits = min(rows * masked * config.vocab_size, max_logits)
    return Plan(
        parameters=parameters,
        blocks=blocks,
        weights=4 * parameters / split / gib + whole,
        gradients=4 * parameters / (split if accumulation == 1 else tensor) / gib,
        moments=moment_bytes(state) * parameters / split / gib,
        activations=micro * taken.widest * kept_bytes(config, checkpointing, tensor) / gib,
        logits=logits * 10 / gib,  # bf16, float32, and float32's gradient
        flops_per_token=flops,
        tokens_per_second=count / token_seconds(config, flops, card, taken.copies) / recompute(checkpointing),
    )


@functools.lru_cache
def counted(config: ModelConfig, copies: float, pairs: float, masked: float) -> tuple[int, int, float]:
    """Parameters, those of the blocks, and FLOPs a token of the data: `copies` are computed, `pairs` attended to."""
    with torch.device("meta"):
        model = MaskedDiffusionModel(config)
    flops = model.flops(copies, pairs, masked * config.vocab_size)
    return model.num_parameters(), model.num_parameters(embeddings=False), flops


def token_seconds(config: ModelConfig, flops: float, card: Card, copies: float = 1.0) -> float:
    """Of one card, keeping all activations: the products, and what lies between them."""
    moved = copies * BETWEEN * config.width * config.num_layers
    return flops / (PRODUCTS * card.tflops * 1e12) + moved / (card.bandwidth * 1e12)


def moment_bytes(state: str) -> float:
    """Bytes a parameter of AdamW's two moments."""
    return {"float32": 8.0, "int8": 2.0 * (1 + 4 / 256), "float8": 2.0 * (1 + 4 / 256)}[state]


def kept_bytes(config: ModelConfig, checkpointing: str | None, tensor: int = 1) -> float:
    """Bytes a position that the blocks keep for the backward pass, compiled, in bf16.

    Of a block: the residual stream twice, in float32; in bf16 both norms' outputs, q, k (before their norms too), v and
    attention's output, and three times SwiGLU's inner width (of each expert that a token goes through). "selective" keeps the
    input and the products; "full" the input alone, and one block's rest at a time. Each of the cards that share the products
    (`tensor`) keeps its part of heads and inner width, and all of the rest.
    """
    width, heads = config.width, config.num_heads * config.head_size
    inner = config.hidden_ffn * (config.experts_per_token + config.num_shared_experts if config.num_experts else 1)
    kv = (config.num_kv_heads or config.num_heads) / config.num_heads
    normed = 1 + kv if config.qk_norm else 0
    whole = 8 * width + 2 * (2 * width + (heads * (2 + 2 * kv + normed) + 3 * inner) / tensor)
    products = 4 * width + 2 * (width + (heads * (1 + 2 * kv + 1) + width + 2 * inner) / tensor)
    each = {None: whole, "selective": products, "full": 4 * width}[checkpointing]
    return float(each * config.num_layers + (whole if checkpointing else 0) + 8 * width)


def recompute(checkpointing: str | None) -> float:
    """Time against a run that keeps everything: a second forward pass is a third more."""
    return {None: 1.0, "selective": 1.05, "full": 4 / 3}[checkpointing]
