"""Orders against what they say of themselves, and the mean over all of them against masked diffusion's bound, exactly."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from components.data.nodes import IN_A_ROW
from components.noise import sample_rng
from components.orders import (
    ROW,
    ByBlock,
    Curriculum,
    Explicit,
    OrderMasker,
    Permuted,
    Sequential,
    Strided,
    canvases,
    one_after_another,
)
from components.types import PAD_DOCUMENT, STRUCTURE, Batch
from tests.oracles import LENGTH, all_sequences, exact_nelbo, perturbed_model, tiny_joint


def ranks(order, *lengths, index=0):
    return order(lengths, sample_rng(0, "order", index)).tolist()


def looked_at(kind, **values):
    """What a class says of values that no annotation has kept out: a config's."""
    made = object.__new__(kind)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    made.__post_init__()


def test_sequential_goes_from_left_to_right_a_group_at_a_time():
    assert ranks(Sequential(), 5) == [0, 1, 2, 3, 4]
    assert ranks(Sequential(group=2), 3, 2) == [0, 0, 1, 1, 2]


def test_permuted_is_any_permutation_and_all_of_them_come():
    assert sorted(ranks(Permuted(), 6)) == list(range(6))
    assert sorted(ranks(Permuted(group=4), 10)) == [0] * 4 + [1] * 4 + [2] * 2
    seen = [tuple(ranks(Permuted(), 3, index=i)) for i in range(600)]
    counts = [seen.count(o) for o in itertools.permutations(range(3))]
    assert min(counts) > 100 - 5 * math.sqrt(100 * 5 / 6)  # five standard deviations of a count of 600 / 6


def test_blocks_come_one_after_the_other_and_never_cross_canvases():
    found = ranks(ByBlock(3, Permuted()), 7, 2)
    parts = [found[:3], found[3:6], found[6:7], found[7:]]
    assert [sorted(p) for p in parts] == [[0, 1, 2], [3, 4, 5], [6], [7, 8]]
    assert ranks(ByBlock(2, Sequential(group=2)), 4) == [0, 0, 1, 1]


def test_strided_has_its_heads_one_by_one_and_then_one_of_every_stream():
    """ARMD's blocks {k, k + L/S, k + 2 L/S, ...}, behind the S heads."""
    assert ranks(Strided(streams=3), 9) == [0, 3, 4, 1, 3, 4, 2, 3, 4]
    assert ranks(Strided(streams=1), 5, 2) == ranks(Sequential(), 5, 2)
    assert ranks(Strided(streams=2), 4, 2) == [0, 2, 1, 2, 3, 4]  # a canvas after the other
    with pytest.raises(ValueError, match="streams = 4 do not divide a canvas of 6 positions"):
        Strided(4)([6], np.random.default_rng(0))


def test_an_explicit_order_names_positions_in_their_turn():
    assert ranks(Explicit([2, 0, 1]), 3) == [1, 2, 0]
    for wrong in ([0, 0, 1], [1, 2, 3], [0, 2], ["a", "b"], ["a", 1], 3, None, [[0, 1]]):
        with pytest.raises(ValueError, match="no permutation: it has to name each of 0 to"):
            looked_at(Explicit, order=wrong)
    with pytest.raises(ValueError, match="names 3 positions, and 4 are generated"):
        Explicit([2, 0, 1])([4], np.random.default_rng(0))


@pytest.mark.parametrize("make", [lambda n: Sequential(group=n), lambda n: Permuted(group=n), lambda n: Strided(n), ByBlock])
@pytest.mark.parametrize("size", [0, -1, True])
def test_groups_are_whole_numbers(make, size):
    with pytest.raises(ValueError, match="at least 1; got"):
        make(size)


def test_a_curriculum_goes_on_at_its_shares_and_blends_them():
    stages = {0: Sequential(), 0.5: Sequential(group=2), 0.75: Permuted(group=4)}
    hard = Curriculum(stages)
    at = [hard.at(p, np.random.default_rng(0)) for p in (0, 0.49, 0.5, 0.74, 0.75, 2.0)]
    assert at == [Sequential(), Sequential(), Sequential(2), Sequential(2), Permuted(4), Permuted(4)]
    blend = Curriculum(stages, blend=True)
    drawn = [blend.at(0.4, np.random.default_rng(i)) for i in range(1000)]
    share = sum(o == Sequential(2) for o in drawn) / 1000
    assert abs(share - 0.8) < 5 * math.sqrt(0.8 * 0.2 / 1000)
    assert set(drawn) == {Sequential(), Sequential(2)}
    assert blend.at(0.9, np.random.default_rng(0)) == Permuted(4)
    assert ranks(hard, 4) == ranks(Permuted(4), 4)


@pytest.mark.parametrize(
    "wrong",
    [{}, {0.1: Permuted()}, {0: Permuted(), 1.0: Permuted()}, {-0.5: Permuted(), 0: Permuted()}, {"0.0": Permuted()},
     {0: Permuted(), "half": Permuted()}, {False: Permuted()}, {0: Permuted(), math.nan: Permuted()}, [Permuted()], None],
    ids=str,
)  # fmt: skip
def test_stages_begin_at_shares_of_a_training(wrong):
    with pytest.raises(ValueError, match=r"shares of a training in \[0, 1\), the first of them 0; got"):
        looked_at(Curriculum, stages=wrong)


@pytest.mark.parametrize("wrong", [None, 3, "Permuted", Curriculum({0: Permuted()})], ids=str)
def test_parts_of_an_order_are_orders(wrong):
    with pytest.raises(
        ValueError, match=r"stages\.0 must be one of components\.orders, and no Curriculum, or a callable of yours; got"
    ):
        looked_at(Curriculum, stages={0: wrong})
    with pytest.raises(
        ValueError, match=r"inside must be one of components\.orders, and no Curriculum, or a callable of yours; got"
    ):
        looked_at(ByBlock, size=2, inside=wrong)


def batch_of_two():
    """A row of a prompt, two canvases and structure between them, and a padded one."""
    modality = torch.tensor([[0, 0, STRUCTURE, 0, 0, 0, STRUCTURE, 1, 1], [0, 0, 0, 0, STRUCTURE, STRUCTURE] + [STRUCTURE] * 3])
    maskable = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0, 0, 0, 0]]).bool()
    document = torch.tensor([[7] * 9, [8] * 5 + [PAD_DOCUMENT] * 4])
    place = torch.arange(9).expand(2, -1)
    return Batch(torch.arange(18).view(2, 9), modality, modality.clamp(min=-1), maskable, document, place)


def test_the_masker_asks_every_token_in_its_turn_and_gives_the_rest_first():
    batch = batch_of_two()
    noisy = OrderMasker(99, Sequential())(batch)
    assert noisy.block.tolist() == [[0, 0, 0, 1, 2, 3, 0, 4, 5], [1, 1, 2, 3, 0, 0, 0, 0, 0]]  # given on its own canvas: 1
    assert noisy.apart
    assert torch.equal(noisy.mask, batch.maskable)
    assert torch.equal(noisy.weight, batch.maskable.float())
    assert torch.equal(noisy.noisy, batch.tokens.masked_fill(batch.maskable, 99))
    strided = OrderMasker(99, ByBlock(2, Sequential(2)))(batch)  # blocks count each canvas from its start
    assert strided.block.tolist()[0] == [0, 0, 0, 1, 1, 2, 0, 3, 3]


def test_an_order_is_a_function_of_seed_and_index_alone():
    batch, masker = batch_of_two(), OrderMasker(99, seed=3)
    assert not masker.pairs  # a row is all that there is to ask of a sample
    alone = masker(batch.select(torch.tensor([1])))
    assert torch.equal(alone.block[0], masker(batch).block[1])
    assert not torch.equal(OrderMasker(99, seed=4)(batch).block, masker(batch).block)
    packed = [Batch.of(torch.zeros(1, 9, dtype=torch.long), (place << IN_A_ROW) + 5) for place in (0, 1)]
    orders = [masker(document).block for document in packed]  # of the documents of one packed row
    assert not torch.equal(*orders)


def test_a_curriculum_goes_by_the_rows_of_its_stream():
    order = Curriculum({0: Sequential(), 0.5: Sequential(group=3)})
    for rows in (None, 0, -5):
        with pytest.raises(ValueError, match=f"goes by `horizon`, the rows of its stream in the whole training; got {rows}"):
            OrderMasker(99, order, horizon=rows)
    masker, batch = OrderMasker(99, order, horizon=10), batch_of_two()
    early = masker(batch)
    assert early.block[0].tolist() == [0, 0, 0, 1, 1, 1, 0, 2, 2]  # document 7 of 10 is behind the half
    place = batch.document + (5 << 40)  # the place in a packed row, above the row's own bits
    packed = replace(batch, document=torch.where(batch.document == PAD_DOCUMENT, PAD_DOCUMENT, place - 7 + 4))
    assert masker(packed).block[0].tolist() == [0, 0, 0, 1, 2, 3, 0, 4, 5]
    assert ROW == (1 << IN_A_ROW) - 1


def test_a_stage_that_does_not_fit_is_said_at_the_start():
    late = Curriculum({0: Sequential(), 0.9: Strided(streams=4)})
    with pytest.raises(ValueError, match="streams = 4 do not divide a canvas of 3 positions"):
        OrderMasker(99, late, horizon=1000)(batch_of_two())
    fitting = {0: Permuted(), 0.9: Strided(streams=1)}
    tried = OrderMasker(99, Curriculum(fitting), horizon=1000)(batch_of_two())  # draws nothing of what is drawn
    assert torch.equal(tried.block, OrderMasker(99, Permuted())(batch_of_two()).block)


def test_an_order_of_ones_own_is_looked_at():
    batch = batch_of_two()
    assert torch.equal(OrderMasker(99, lambda lengths, rng: list(range(sum(lengths))))(batch).block,
                       OrderMasker(99, Sequential())(batch).block)  # fmt: skip
    far = OrderMasker(99, lambda lengths, rng: 2**50 - 7 * np.arange(sum(lengths)) // 2 * 2)(batch)
    assert far.block[1].tolist() == [1, 1, 3, 2, 0, 0, 0, 0, 0]  # ranks are told apart, not counted with
    for none in ("Permuted", 3, None, {"group": 2}, OrderMasker(99)):
        with pytest.raises(ValueError, match=r"order must be one of components\.orders, or a callable of yours; got"):
            looked_at(OrderMasker, order=none)
    for wrong in (lambda lengths, rng: np.arange(2), lambda lengths, rng: -np.ones(sum(lengths), dtype=int),
                  lambda lengths, rng: np.zeros(sum(lengths)), lambda lengths, rng: [[0], [1, 2]],
                  lambda lengths, rng: None):  # fmt: skip
        with pytest.raises(ValueError, match="is no order: of 5 positions it has to give as many ranks"):
            OrderMasker(99, wrong)(batch)


def test_canvases_are_runs_of_one_modality():
    assert canvases(np.array([3, 4, 5, 7, 8]), batch_of_two().modality[0].numpy()) == [3, 2]
    assert canvases(np.array([0, 1, 3, 4, 5]), batch_of_two().modality[0].numpy()) == [2, 3]  # a modality comes twice
    assert canvases(np.zeros(0, dtype=int), np.zeros(4, dtype=int)) == []
    assert one_after_another([np.array([1, 0]), np.array([0, 0]), np.zeros(0, dtype=int), np.array([0])]).tolist() == [
        1,
        0,
        2,
        2,
        3,
    ]


def test_the_mean_over_all_orders_of_singletons_is_the_masked_bound():
    """Of a table model with an arbitrary conditional for every set of visible tokens, exactly."""
    joint = tiny_joint()
    table = perturbed_model(joint)
    total, orders = 0.0, list(itertools.permutations(range(LENGTH)))
    for order in orders:
        noisy = OrderMasker(99, Explicit(order))(Batch.of(all_sequences(), 0))
        for i in range(LENGTH):
            hidden = tuple((noisy.block[0] >= noisy.block[0, i]).tolist())  # what i's own turn does not see
            total += (joint.flatten() * table[hidden][:, i]).sum().item() / len(orders)
    assert total == pytest.approx(exact_nelbo(joint, table), abs=1e-12)
