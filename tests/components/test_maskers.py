import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from components.maskers import (
    BernoulliMasker,
    FixedCountMasker,
    LowDiscrepancyTimes,
    Masker,
    NextToken,
    StratifiedTimes,
    TimeSampler,
    UniformTimes,
)
from components.samplers import Sampler
from components.schedules import Cosine, Geometric, Linear, Polynomial, Schedule
from components.sequences import collate, task_sequence
from components.tokenizers import Tokenizer
from components.types import Batch
from tests.oracles import LENGTH, exact_nelbo, perturbed_model, tiny_joint


def test_noise_depends_on_the_sample_index_alone(vocabulary, make_batch):
    """The same samples in one batch, in two, or packed in another order see the same masks and weights."""
    masker = BernoulliMasker(vocabulary.mask_id, seed=3)
    whole = masker(make_batch(6))
    parts = [masker(make_batch(6, first_index=0)), masker(make_batch(6, first_index=6))]
    assert_close(whole.mask, parts[0].mask)
    assert not torch.equal(parts[0].mask, parts[1].mask)
    batch = make_batch(2)
    sequences = [row_as_sequence(batch, i) for i in range(2)]
    packed = collate([sequences], [[0, 1]], vocabulary.pad_id, length=40)
    length = batch.tokens.shape[1]
    assert_close(masker(packed).weight[0, : 2 * length].view(2, length), masker(batch).weight)


def row_as_sequence(batch, row):
    from components.sequences import TokenSequence

    fields = [getattr(batch, n)[row] for n in ("tokens", "modality", "id_range", "maskable")]
    return TokenSequence(*fields, ~batch.maskable[row])


def test_prompts_structure_and_padding_are_never_masked(vocabulary, make_batch):
    for masker in (BernoulliMasker(vocabulary.mask_id), FixedCountMasker(vocabulary.mask_id)):
        noisy = masker(make_batch(64))
        assert not (noisy.mask & ~noisy.clean.maskable).any()
        assert_close(noisy.noisy[~noisy.mask], noisy.clean.tokens[~noisy.mask])
        assert (noisy.noisy[noisy.mask] == vocabulary.mask_id).all()
        assert (noisy.weight[~noisy.mask] == 0).all()
        assert (noisy.weight[noisy.mask] > 0).all()


def test_the_baseline_predicts_every_token_but_the_prompts_and_hides_none(vocabulary, make_batch):
    from components.maskers import NextToken

    batch = make_batch(2)
    seen = NextToken()(batch)
    assert torch.equal(seen.noisy, batch.tokens)
    assert torch.equal(seen.mask, batch.maskable)
    assert torch.equal(seen.weight, batch.maskable.float())


def test_bernoulli_mask_rate_follows_the_schedule(vocabulary, make_batch):
    """n maskable positions at a fixed rate r: the share masked is within 5 standard errors sqrt(r (1 - r) / n)."""
    batch = make_batch(2000)

    def half(seed: int, index: int) -> float:
        return 0.5

    for schedule in (Linear(), Cosine(), Polynomial(3.0)):
        noisy = BernoulliMasker(vocabulary.mask_id, schedule, half)(batch)
        t = torch.tensor(1 - (1 - 1e-3) * 0.5, dtype=torch.float64)
        rate = float(1 - schedule.alpha(t))
        n = int(batch.maskable.sum())
        assert abs(noisy.mask.sum().item() / n - rate) < 5 * math.sqrt(rate * (1 - rate) / n)


@pytest.mark.parametrize("times", [UniformTimes(), LowDiscrepancyTimes(16), StratifiedTimes(16)], ids=repr)
def test_times_are_uniform(times):
    """Kolmogorov-Smirnov over 4096 draws; 1.63 / sqrt(n) is the 1 % point for independent ones (the others do better)."""
    drawn = np.sort([times(0, i) for i in range(4096)])
    assert np.abs(drawn - (np.arange(4096) + 0.5) / 4096).max() < 1.63 / 64


@pytest.mark.parametrize("times", [LowDiscrepancyTimes(16), StratifiedTimes(16)], ids=repr)
def test_a_group_covers_every_sixteenth(times):
    for group in range(5):
        drawn = [times(7, 16 * group + i) for i in range(16)]
        if isinstance(times, LowDiscrepancyTimes):
            gaps = np.diff(np.sort(drawn))
            assert np.allclose(gaps, 1 / 16)
        else:
            assert sorted(int(16 * t) for t in drawn) == list(range(16))


def test_counts_stay_between_shares_and_the_loss_is_then_no_bound():
    """Every count within is drawn as often; blocks of one are masked whatever the shares."""
    masker = FixedCountMasker(9, LowDiscrepancyTimes(40), least=0.3, most=0.8)
    noisy = masker(Batch.of(torch.zeros(40, 10, dtype=torch.long), 0))
    assert not masker.complete
    assert FixedCountMasker(9, pairs=True).complete
    counts = noisy.mask.sum(dim=1)
    assert [int((counts == k).sum()) for k in range(11)] == pytest.approx([0, 0, 0, *[40 / 6] * 6, 0, 0], abs=1)
    assert_close(noisy.weight[noisy.mask], (10 / counts)[:, None].expand(-1, 10)[noisy.mask])
    assert bool(masker(Batch.of(torch.zeros(40, 1, dtype=torch.long), 0)).mask.all())
    whole = FixedCountMasker(9, LowDiscrepancyTimes(40))(Batch.of(torch.zeros(40, 10, dtype=torch.long), 0))
    assert sorted(whole.mask.sum(dim=1).tolist()) == sorted([*range(1, 11)] * 4)
    with pytest.raises(ValueError, match=r"0 <= least < most <= 1, got least = 0\.8 and most = 0\.3"):
        FixedCountMasker(9, least=0.8, most=0.3)
    with pytest.raises(ValueError, match=r"pairs have every count, not least = 0\.3 to most = 1\.0"):
        FixedCountMasker(9, pairs=True, least=0.3)


@pytest.mark.parametrize("make", [BernoulliMasker, FixedCountMasker])
def test_pairs_are_complements(vocabulary, make_batch, make):
    batch = make_batch(8, first_index=0)
    noisy = make(vocabulary.mask_id, pairs=True)(batch)
    maskable = batch.maskable
    for j in range(4):
        assert ((noisy.mask[2 * j] ^ noisy.mask[2 * j + 1])[maskable[0]]).all()


@pytest.mark.parametrize("pairs", [False, True])
def test_times_keep_t_min_from_the_ends_where_weights_diverge(vocabulary, make_batch, pairs):
    """At the lowest time the mask rate is t_min and the weight 1/t_min; with pairs also the complement's at the highest."""

    def lowest(seed: int, index: int) -> float:
        return 1 - 2**-53

    def highest(seed: int, index: int) -> float:
        return 0.0

    batch = make_batch(600)
    noisy = BernoulliMasker(vocabulary.mask_id, times=lowest, t_min=0.25, pairs=pairs)(batch)
    rows = slice(0, None, 2) if pairs else slice(None)  # the complements are the odd ones
    assert_close(noisy.weight[rows][noisy.mask[rows]].unique(), torch.tensor([4.0]))
    n = int(batch.maskable[rows].sum())
    assert noisy.mask[rows].sum().item() / n == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / n))
    if pairs:
        noisy = BernoulliMasker(vocabulary.mask_id, times=highest, t_min=0.25, pairs=True)(batch)
        assert_close(noisy.weight[1::2][noisy.mask[1::2]].unique(), torch.tensor([4.0]))  # 1 / (1 - t) at t = 1 - t_min


def test_a_plain_batch_has_new_masks_where_its_indices_are_new(vocabulary):
    masker = BernoulliMasker(vocabulary.mask_id)
    tokens = torch.randint(0, 7, (4, 16), generator=torch.Generator().manual_seed(0))
    first, again, following = (masker(Batch.of(tokens, first_index=i)) for i in (0, 0, 4))
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.mask, following.mask)
    assert torch.equal(masker(Batch.of(tokens[2:], first_index=2)).mask, first.mask[2:])
    batch = first.clean
    assert batch.maskable.all()
    assert batch.one_document_per_row
    assert batch.document[:, 0].tolist() == [0, 1, 2, 3]
    assert batch.position[1].tolist() == list(range(16))
    with pytest.raises(TypeError, match="first_index"):
        Batch.of(tokens)


def settable(protocol) -> list[str]:
    """Members that a protocol asks to be set, too: a frozen dataclass or a constant does not offer that to a type checker."""
    return sorted(getattr(protocol, "__annotations__", {}))


@pytest.mark.parametrize("protocol", [Masker, TimeSampler, Schedule, Sampler, Tokenizer], ids=lambda p: p.__name__)
def test_protocols_ask_for_nothing_that_can_be_set(protocol):
    assert settable(protocol) == []


def test_our_own_classes_are_what_the_protocols_ask_for(vocabulary):
    maskers = (BernoulliMasker(vocabulary.mask_id), FixedCountMasker(vocabulary.mask_id), NextToken())
    assert all(isinstance(m, Masker) for m in maskers)
    assert all(isinstance(t, TimeSampler) for t in (UniformTimes(), LowDiscrepancyTimes(), StratifiedTimes()))
    assert all(isinstance(s, Schedule) for s in (Linear(), Cosine(), Polynomial(2.0), Geometric()))
    assert not isinstance(UniformTimes(), Masker)


def test_fixed_count_weights(vocabulary, make_batch):
    noisy = FixedCountMasker(vocabulary.mask_id)(make_batch(256))
    counts = noisy.mask.sum(1)
    assert set(counts.tolist()) == {1, 2, 3, 4}
    assert_close(noisy.weight.sum(1), torch.full((256,), 4.0))
    pair = FixedCountMasker(vocabulary.mask_id, pairs=True)(make_batch(512))
    k = pair.mask.sum(1)
    assert set(k.tolist()) == {0, 1, 2, 3, 4}
    assert_close(pair.weight.sum(1), torch.where(k > 0, 5.0, 0.0))


def monte_carlo(masker, vocabulary, draws: int) -> tuple[float, float]:
    """Mean and standard error of the loss of a tiny joint's imperfect model, under a masker's masks and weights."""
    joint = tiny_joint()
    cross_entropy = perturbed_model(joint)
    g = torch.Generator().manual_seed(0)
    which = torch.multinomial(joint.flatten(), draws // (1 + masker.pairs), replacement=True, generator=g)
    sequence = task_sequence(vocabulary, "text", {"text": torch.zeros(LENGTH, dtype=torch.long)}, {})
    batch = collate([[sequence]] * draws, [[i] for i in range(draws)], vocabulary.pad_id)
    noisy = masker(batch)
    mask, weight = noisy.mask[:, 2:5], noisy.weight[:, 2:5].double()
    rows = which.repeat_interleave(1 + masker.pairs)
    table = torch.stack([cross_entropy[tuple(m.tolist())] for m in mask.unique(dim=0)])
    loss = (weight * table[mask.unique(dim=0, return_inverse=True)[1], rows]).sum(1)
    if masker.pairs:
        loss = loss.view(-1, 2).mean(1)
    return loss.mean().item(), loss.std().item() / math.sqrt(len(loss))


@pytest.mark.parametrize(
    "masker",
    [
        lambda m: FixedCountMasker(m, UniformTimes()),
        lambda m: FixedCountMasker(m, UniformTimes(), pairs=True),
        lambda m: BernoulliMasker(m, Linear(), UniformTimes()),
        lambda m: BernoulliMasker(m, Cosine(), UniformTimes(), pairs=True),
        lambda m: BernoulliMasker(m, Polynomial(2.0), UniformTimes(), pairs=True),
    ],
    ids=["fixed", "fixed pairs", "linear", "cosine pairs", "quadratic pairs"],
)
def test_every_masker_estimates_the_exact_nelbo(vocabulary, masker):
    """Within 4.5 standard errors of the enumerated bound; t_min = 1e-3 adds a bias of at most 0.3 % (L * t_min)."""
    exact = exact_nelbo(tiny_joint(), perturbed_model(tiny_joint()))
    mean, error = monte_carlo(masker(vocabulary.mask_id), vocabulary, 20_000)
    assert error < 0.03 * exact
    assert abs(mean - exact) < 4.5 * error + 0.003 * exact


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Polynomial(2.0), Polynomial(0.5)], ids=repr)
def test_anti_masking_is_unbiased_for_every_schedule(schedule):
    """The pair's expected loss, by quadrature over t and enumeration of masks, is the NELBO; weighing the complement by the
    schedule's weight at 1 - t instead is not, unless alpha(1 - t) = 1 - alpha(t)."""
    from tests.components.test_schedules import gauss_legendre

    joint = tiny_joint()
    cross_entropy = perturbed_model(joint)
    t, w = gauss_legendre(400)
    alpha, prime = schedule.alpha(t), schedule.alpha_prime(t)
    pair = wrong = 0.0
    for mask, ce in cross_entropy.items():
        k = sum(mask)
        loss = float((joint.flatten() * ce.sum(-1)).sum())
        if k == 0:
            continue
        as_mask = (1 - alpha) ** k * alpha ** (3 - k)
        as_complement = alpha**k * (1 - alpha) ** (3 - k)
        own = (w * as_mask * schedule.nelbo_weight(t)).sum()
        pair += float((own + (w * as_complement * -prime / alpha).sum()) / 2) * loss
        wrong += float((own + (w * as_complement * schedule.nelbo_weight(1 - t)).sum()) / 2) * loss
    exact = exact_nelbo(joint, cross_entropy)
    assert pair == pytest.approx(exact, rel=1e-6)
    if schedule != Linear():
        assert abs(wrong - exact) > 0.01 * exact


def test_per_modality_schedules_apply_to_their_own_positions(vocabulary, make_batch):
    batch = make_batch(3000, task="joint_text_image")
    schedules = {"text": Polynomial(4.0), "image": Linear(), "audio": Linear()}

    def half(seed: int, index: int) -> float:
        return 0.5

    noisy = BernoulliMasker(vocabulary.mask_id, schedules, half, modalities=vocabulary.modalities)(batch)
    for i, rate in ((0, 0.5**4), (1, 0.5)):
        own = batch.maskable & (batch.modality == i)
        n = int(own.sum())
        assert abs(noisy.mask[own].float().mean().item() - rate) < 5 * math.sqrt(rate * (1 - rate) / n) + 0.002
    with pytest.raises(ValueError, match="a schedule for each of"):
        BernoulliMasker(vocabulary.mask_id, {"text": Linear()}, modalities=vocabulary.modalities)


def test_bad_settings_are_named(vocabulary):
    with pytest.raises(ValueError, match="t_min must be in"):
        BernoulliMasker(vocabulary.mask_id, t_min=1.0)
    with pytest.raises(ValueError, match=r"with pairs, got 0\.7"):
        BernoulliMasker(vocabulary.mask_id, pairs=True, t_min=0.7)
    with pytest.raises(ValueError, match="group must be at least 1, got 0"):
        LowDiscrepancyTimes(0)
