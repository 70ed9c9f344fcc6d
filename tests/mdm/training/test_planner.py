"""The planner against measurements: of one H100 (shared figures of the project), and of what a block keeps here."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from components.block_diffusion.layout import Layout
from components.block_diffusion.masker import BlockMasker
from components.maskers import FixedCountMasker
from components.orders import OrderMasker
from components.sequences import collate, task_sequence
from components.vocabulary import Vocabulary
from mdm.config import UserError
from mdm.data.pipeline import micro_batch
from mdm.data.settings import LossSettings
from mdm.evaluation.nelbo import hidden_of
from mdm.models import builders
from mdm.models.transformer import ModelConfig
from mdm.training.meter import work
from mdm.training.planner import CARDS, Doubling, parse_gpu, plan


def shape(width, layers, vocab):
    return ModelConfig(vocab_size=vocab, width=width, num_layers=layers, num_heads=width // 64, max_length=2048)


@pytest.mark.parametrize(
    ("width", "layers", "vocab", "length", "measured"),
    [
        (768, 12, 50_000, 1024, 447e3),
        (1024, 24, 50_000, 1024, 157e3),
        (1024, 24, 120_000, 2048, 161.5e3),
        (2048, 24, 120_000, 2048, 53.5e3),
    ],
)
def test_speed_is_near_what_one_h100_reached(width, layers, vocab, length, measured):
    """bf16, compiled, logits at masked positions only; 15 % is what another attention mask or vocabulary makes of it."""
    assert plan(shape(width, layers, vocab), 8, length, CARDS["h100"]).tokens_per_second == pytest.approx(measured, rel=0.15)


def test_memory_is_sharded_and_moments_shrink():
    config = shape(2048, 24, 120_000)
    one, eight = plan(config, 1, 2048, CARDS["h100"]), plan(config, 1, 2048, CARDS["h100"], 8)
    assert one.weights == pytest.approx(4 * one.parameters / 2**30)
    assert one.moments == pytest.approx(2 * one.weights)
    assert eight.moments == pytest.approx(one.moments / 8)
    assert plan(config, 1, 2048, CARDS["h100"], state="int8").moments == pytest.approx(one.moments / 4, rel=0.02)
    with torch.device("meta"):
        three = builders.mdm_3b(vocab_size=2).config  # at T 2048 on one 80 GB GPU
    config = ModelConfig(**{**vars(three), "vocab_size": 120_000, "max_length": 2048})
    assert plan(config, 1, 2048, CARDS["h100"], checkpointing="full", state="int8").total < 0.92 * 79


def test_a_token_goes_through_its_experts_alone():
    """A second expert of three matrices, in every layer: 6 floating-point operations a weight and position."""
    moe = {"num_heads": 2, "max_length": 64, "vocab_size": 100, "width": 64, "num_layers": 3, "ffn_width": 96}
    one, two = (
        plan(ModelConfig(**moe, num_experts=8, experts_per_token=k), 1, 64, CARDS["h100"]).flops_per_token for k in (1, 2)
    )
    assert two - one == pytest.approx(6 * 3 * (3 * 64 * 96))


def test_a_plan_by_hand():
    """Of 4 cards: gradients are sharded; half of the positions have logits; recomputing everything takes a third more."""
    config = shape(768, 12, 50_000)
    one, four = plan(config, 1, 1024, CARDS["h100"]), plan(config, 1, 1024, CARDS["h100"], 4)
    assert four.gradients == pytest.approx(4 * one.parameters / 4 / 2**30)
    assert one.logits == pytest.approx(1024 * 0.5 * 50_000 * 10 / 2**30)
    assert four.tokens_per_second == pytest.approx(4 * one.tokens_per_second)
    full = plan(config, 1, 1024, CARDS["h100"], checkpointing="full")
    assert full.tokens_per_second == pytest.approx(one.tokens_per_second * 3 / 4)
    assert full.activations < one.activations / 4


def test_gpus_are_named_with_their_count():
    assert parse_gpu("H100:8") == (CARDS["h100"], 8)
    assert parse_gpu("a100") == (CARDS["a100"], 1)
    for wrong in ("rtx", "h100:0", "h100:x", ":"):
        with pytest.raises(UserError, match="is not CARD or CARD:COUNT, e"):
            parse_gpu(wrong)


def test_what_a_mesh_and_micro_batches_do_to_memory():
    """Groups of 2 among 8 cards hold four times as much as one group of 8; several micro-batches hold whole gradients."""
    config, card = shape(768, 12, 50_000), CARDS["h100"]
    flat, hybrid = plan(config, 1, 1024, card, 8), plan(config, 1, 1024, card, 8, replicate=4)
    assert hybrid.moments == pytest.approx(4 * flat.moments)
    assert hybrid.gradients == pytest.approx(4 * flat.gradients)
    assert plan(config, 1, 1024, card, 8, accumulation=2).gradients == pytest.approx(4 * flat.parameters / 2**30)
    bf16 = flat.weights - 4 * flat.parameters / 8 / 2**30  # gathered: both embeddings, and two blocks of twelve
    assert bf16 == pytest.approx(2 * (2 * 768 * 50_000 + flat.blocks / 6) / 2**30, rel=1e-3)
    fp32 = plan(config, 1, 1024, card, 8, gather=4).weights - 4 * flat.parameters / 8 / 2**30
    assert fp32 == pytest.approx(2 * bf16)
    pair = plan(config, 1, 1024, card, 8, tensor=2)
    assert pair.moments == pytest.approx(flat.moments)
    assert pair.weights - 4 * flat.parameters / 8 / 2**30 == pytest.approx(bf16 / 2)
    assert flat.activations / 2 < pair.activations < flat.activations


def test_a_card_is_as_much_faster_as_its_products_and_its_memory():
    config = shape(2048, 24, 120_000)
    h100, h200, a100 = (plan(config, 8, 2048, CARDS[name]).tokens_per_second for name in ("h100", "h200", "a100"))
    assert 1.05 < h200 / h100 < 4.8 / 3.35
    assert 312 / 989 < a100 / h100 < 2.04 / 3.35


def test_rows_of_blocks_are_planned_with_their_finished_copies():
    """Text in blocks of 16: all but the last block twice. An image that is one block: as without blocks."""
    shapes = {"vocab_size": 90, "width": 64, "num_layers": 2, "num_heads": 2, "max_length": 256}
    config, given = ModelConfig(**shapes, blocks={"text": 16}), ({"text": 32, "image": 64}, ["text", "image"])
    text = Doubling.of(config, [("text", 64, 1.0)], *given, False)
    assert (text.widest, text.copies) == (
        112,
        (61 + 2 + 48) / 64,
    )  # text; before it, and three blocks, finished
    assert Doubling.of(config, [("text", 64, 1.0)], *given, True).widest == 128
    image = Doubling.of(config, [("text_to_image", None, 1.0)], *given, False)
    assert image.copies <= 1.0
    mixed = Doubling.of(config, [("text", 64, 0.5), ("text_to_image", None, 0.5)], *given, False)
    assert mixed.widest == 112
    assert image.copies < mixed.copies < text.copies
    card = CARDS["h100"]
    plain, own = plan(ModelConfig(**shapes), 4, 64, card), plan(config, 4, 64, card, doubling=text)
    assert own.activations == pytest.approx(plain.activations * 112 / 64)
    assert own.tokens_per_second < plain.tokens_per_second / 1.5
    assert own.weights == plain.weights


def test_rows_of_two_streams_are_planned_with_their_queries():
    """As they are trained: every position of a text but the structure and the last rank twice, and all of them predicted."""
    model = builders.nano(90, 128, 64, 2, 2, orders="two_streams")
    text = Vocabulary.build({"text": (80,)}, ("text",), tasks=["text"])
    batch = collate([[task_sequence(text, "text", {"text": torch.zeros(61, dtype=torch.long)}, {})]], [[0]], text.pad_id)
    micro = micro_batch(batch, OrderMasker(text.mask_id), LossSettings(), text)
    planned = Doubling.of(model.config, [("text", 64, 1.0)], {}, ["text"], False)
    tokens, pairs, _ = work(micro, text)
    assert (tokens, pairs, micro.rows.tokens.shape[1]) == (64 * planned.copies, 64 * planned.pairs, planned.widest)
    assert tokens == 61 + 63  # queries; structure and all tokens but the last of the order
    masked = builders.nano(90, 128, 64, 2, 2).config
    one, two = (plan(c, 4, 64, CARDS["h100"], doubling=d) for c, d in ((masked, None), (model.config, planned)))
    assert two.logits == 2 * one.logits


def test_a_real_row_of_blocks_takes_the_positions_and_the_flops_that_are_planned():
    """Counted by torch, forward and backward; its attention computes every pair here, a GPU's those that see each other."""
    model = builders.nano(90, 128, 64, 2, 2, blocks={"text": 16})
    text = Vocabulary.build({"text": (80,)}, ("text",), tasks=["text"])
    batch = collate([[task_sequence(text, "text", {"text": torch.zeros(61, dtype=torch.long)}, {})]], [[0]], text.pad_id)
    masker = BlockMasker(FixedCountMasker(text.mask_id), Layout(model.config.blocks, text.modalities))
    micro = micro_batch(batch, masker, LossSettings(), text)
    planned = Doubling.of(model.config, [("text", 64, 1.0)], {}, ["text"], False)
    tokens, pairs, _ = work(micro, text)
    assert (tokens, pairs, micro.rows.tokens.shape[1]) == (64 * planned.copies, 64 * planned.pairs, planned.widest)
    with FlopCounterMode(display=False) as counter:
        hidden_of(model, micro).sum().backward()
    assert counter.get_total_flops() == pytest.approx(model.flops(planned.widest, planned.widest**2, 0), rel=0.01)
