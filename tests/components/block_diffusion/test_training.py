"""The bound of blocks against enumeration, and the doubled rows against a pass for each block, with gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from components.block_diffusion import BlockMasker, Layout
from components.corruption import KernelCorruption
from components.kernels import Hybrid
from components.maskers import BernoulliMasker, FixedCountMasker, LowDiscrepancyTimes
from components.schedules import Linear
from components.types import Batch
from components.vocabulary import Vocabulary

V, L, MASK = 3, 4, 3
STRINGS = torch.tensor(list(itertools.product(range(V), repeat=L)))
P = torch.rand(len(STRINGS), generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 2
P = P / P.sum()


def posterior(z):
    """log p(x_i | what of z is no mask), `[positions, V]`, by enumeration: what a perfect denoiser says."""
    fits = ((z == STRINGS) | (z == MASK)).all(dim=1)
    joint = torch.where(fits, P, 0.0)
    return (
        torch.stack([torch.stack([joint[STRINGS[:, i] == v].sum() for v in range(V)]) for i in range(L)]).log()
        - joint.sum().log()
    )


def bound(x, size, ask=posterior):
    """E of weight * cross-entropy over all that a fixed count can mask in each block, given what is before."""
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, L, size):
        for k in range(1, size + 1):
            subsets = list(itertools.combinations(range(start, start + size), k))
            for chosen in subsets:
                z = x.clone()
                z[start + size :] = MASK  # what is behind is not seen
                z[list(chosen)] = MASK
                nats = -ask(z)[list(chosen), x[list(chosen)]].sum()
                total = total + size / k * nats / len(subsets) / size
    return total


@pytest.mark.parametrize("size", [1, 2, 4])
def test_with_a_perfect_denoiser_the_bound_is_the_entropy_at_every_block_size(size):
    entropy = -(P * P.log()).sum()
    assert_close(sum(p * bound(x, size) for p, x in zip(P, STRINGS, strict=True)), entropy)


def test_blocks_of_one_are_the_chain_rule_and_one_block_the_masked_bound():
    """With a denoiser that is wrong: bounds differ then, so that each must be the one that it is said to be."""
    table = torch.randn(4**L, L, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(-1)

    def ask(z):
        return table[int((z * 4 ** torch.arange(L)).sum())]

    x = STRINGS[50]
    chain = sum(-ask(torch.cat([x[:i], torch.full((L - i,), MASK)]))[i, x[i]] for i in range(L))
    assert_close(bound(x, 1, ask), chain)
    orders = list(itertools.permutations(range(L)))
    masked = 0.0  # the masked bound is the mean over all orders (RADD, 2406.03736)
    for order in orders:
        z = torch.full((L,), MASK)
        for i in order:
            masked = masked - ask(z)[i, x[i]] / len(orders)
            z[i] = x[i]
    assert_close(bound(x, 4, ask), masked)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_the_masker_draws_has_that_bound_for_its_mean(size):
    """Over 4,096 documents with low-discrepancy times; the tolerance is five standard errors of their mean."""
    x, n = STRINGS[50], 4096
    masker = BlockMasker(FixedCountMasker(MASK, LowDiscrepancyTimes(n)), Layout({"text": size}, ["text"]))
    noisy = masker(Batch.of(x.expand(n, L).contiguous(), 0))
    known, each = {}, []
    for row in range(n):
        nats = 0.0
        for start in range(0, L, size):
            z = torch.cat([x[:start], noisy.noisy[row, start : start + size], torch.full((L - start - size,), MASK)])
            key = tuple(z.tolist())
            known[key] = known[key] if key in known else posterior(z)
            here = torch.arange(start, start + size)
            nats = nats - (noisy.weight[row, here] * known[key][here, x[here]])[noisy.mask[row, here]].sum()
        each.append(float(nats))
    each = torch.tensor(each, dtype=torch.float64)
    assert abs(each.mean() - bound(x, size)) < 5 * each.std() / n**0.5 + 1e-9


def test_one_block_is_the_masker_itself_and_blocks_of_one_are_all_masked_and_weigh_one():
    batch = Batch.of(torch.randint(3, (6, 8), generator=torch.Generator().manual_seed(0)), 10)
    for masker in (
        FixedCountMasker(MASK, pairs=True),
        BernoulliMasker(MASK, Linear(), seed=3),
        KernelCorruption(Vocabulary.build({"text": (3,)}, may_end=()), Hybrid(0.2)),
    ):
        plain, whole = masker(batch), BlockMasker(masker, Layout({"text": 8}, ["text"]))(batch)
        for name in ("noisy", "mask", "weight"):
            assert torch.equal(getattr(plain, name), getattr(whole, name)), (type(masker), name)
    ones = BlockMasker(FixedCountMasker(MASK), Layout({"text": 1}, ["text"]))(batch)
    assert bool(ones.mask.all())
    assert bool((ones.weight == 1).all())


def test_blocks_have_times_of_their_own_and_pairs_are_complements_in_each():
    batch = Batch.of(torch.zeros(64, 32, dtype=torch.long), 0)
    layout = Layout({"text": 16}, ["text"])
    noisy = BlockMasker(FixedCountMasker(MASK, LowDiscrepancyTimes(64)), layout)(batch)
    counts = noisy.mask.view(64, 2, 16).sum(dim=2)
    assert (counts[:, 0] != counts[:, 1]).float().mean() > 0.8
    assert all(sorted(counts[:, b].tolist()) == sorted([*range(1, 17)] * 4) for b in range(2))  # low discrepancy in each
    paired = BlockMasker(FixedCountMasker(MASK, pairs=True), layout)(batch)
    assert bool((paired.mask[0::2] ^ paired.mask[1::2]).all())


def test_a_prompt_at_the_beginning_of_a_canvas_is_counted_with_it():
    """A response after its prompt has the blocks that it has where the whole text is generated, or goes on from an edit."""
    maskable = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1, 1, 0]]).bool()
    modality = torch.tensor([[-1, 0, 0, 0, 0, 0, 0, 0, -1]] * 2)
    document = torch.tensor([[0] * 9, [1] * 9])
    batch = Batch(document, modality, modality, maskable, document, torch.arange(9).expand(2, -1))
    assert Layout({"a": 3}, ["a"])(batch).tolist() == [[0, 1, 1, 1, 2, 2, 2, 3, 4]] * 2


def test_blocks_are_of_canvases_or_counted_from_the_start():
    """Given, a canvas of 5 of modality 0, structure, a canvas of 3 of modality 1; a second document behind, and padding."""
    maskable = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 0]]).bool()
    modality = torch.tensor([[-1, 0, -1, 0, 0, 0, 0, 0, -1, 1, 1, 1, -1, 0, 0, -1]])
    document = torch.tensor([[7] * 12 + [8] * 3 + [-1]])
    position = torch.tensor([[*range(12), *range(3), 0]])
    batch = Batch(torch.zeros_like(document), modality, modality, maskable, document, position)
    found = Layout({"a": 2}, ["a", "b"])(batch)
    assert found.tolist() == [[0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 5, 5, 0, 1, 1, 0]]
    assert Layout({"a": 4}, ["a", "b"], from_start=True)(batch).tolist() == [[0] * 4 + [1] * 4 + [2] * 4 + [0] * 4]
    for sizes, line in (
        ({"c": 2}, r"blocks.c: there is no such modality; there are a, b"),
        ({"a": 0}, "blocks.a must be at least 1"),
    ):
        with pytest.raises(ValueError, match=line):
            Layout(sizes, ["a", "b"])
    with pytest.raises(ValueError, match="have one size"):
        Layout({"a": 2, "b": 3}, ["a", "b"], from_start=True)
