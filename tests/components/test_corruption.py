"""Corruption by any kernel: against the maskers, its levels and an enumerated bound; and what a model learns by it."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from components.corruption import Corruption, KernelCorruption
from components.divergence import divergence
from components.kernels import Hybrid, HybridLogSNR, Kernel, Levels, Mask, Uniform
from components.losses import coefficients, loss_from_hidden, positions_by_range
from components.maskers import BernoulliMasker, UniformTimes
from components.schedules import Cosine, Linear, Polynomial, Truncated
from components.sequences import collate
from components.types import Batch
from components.vocabulary import Vocabulary
from components.weightings import LEAVE_ONE_OUT, WEIGHTINGS, Noise, Noises, untilted
from tests.components.test_maskers import row_as_sequence
from tests.oracles import LENGTH, SYMBOLS, all_sequences, tiny_joint

KERNELS = [Uniform(), Hybrid(0.3), Hybrid(0.2, 2.0), HybridLogSNR(), HybridLogSNR(0.5, -1.0)]
OF_TEXT = Vocabulary.of_text(9, mask=4, pad=1, end=8)


def always(t: float, t_min: float = 1e-3, t_max: float = 1 - 1e-3):
    """Times that come out as t, of what is drawn from (t_min, t_max]."""

    def times(seed: int, index: int) -> float:
        return (t_max - t) / (t_max - t_min)

    return times


def tokens_of(vocabulary: Vocabulary, rows: int, length: int, first_index: int = 0) -> Batch:
    """Random tokens of the first range, none of them the mask."""
    known = vocabulary.allowed(torch.tensor(0)).nonzero()[:, 0]
    g = torch.Generator().manual_seed(0)
    return Batch.of(known[torch.randint(0, len(known), (rows, length), generator=g)], first_index)


@pytest.mark.parametrize("kernel", [Mask(), Hybrid(0.0), Hybrid(0.0, 2.0)], ids=repr)
@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Polynomial(3.0)], ids=repr)
def test_masks_alone_are_the_maskers(vocabulary, make_batch, schedule, kernel):
    """The same seed and indices: the same masks, the same weights, and no token that became another."""
    batch = make_batch(150, task="joint_text_image")
    noisy = KernelCorruption(vocabulary, kernel, schedule, seed=5)(batch)
    expected = BernoulliMasker(vocabulary.mask_id, schedule, seed=5)(batch)
    for name in ("noisy", "mask", "weight"):
        assert torch.equal(getattr(noisy, name), getattr(expected, name))
    assert torch.equal(noisy.training, noisy.weight)
    assert noisy.replaced is None


def test_pairs_of_masks_are_the_maskers_on_the_linear_schedule_alone(vocabulary, make_batch):
    """Where alpha(1 - t) = 1 - alpha(t) the second is the complement and weighs as it; else it is the mask at time 1 - t."""
    batch = make_batch(150, task="joint_text_image")
    noisy = KernelCorruption(vocabulary, pairs=True)(batch)
    expected = BernoulliMasker(vocabulary.mask_id, pairs=True)(batch)
    assert torch.equal(noisy.noisy, expected.noisy)
    assert_close(noisy.weight, expected.weight)
    cosine = KernelCorruption(OF_TEXT, schedule=Cosine(), pairs=True, times=always(0.3))(tokens_of(OF_TEXT, 300, 32))
    for rows, t in ((slice(0, None, 2), 0.3), (slice(1, None, 2), 0.7)):
        own, rate = cosine.mask[rows][cosine.clean.maskable[rows]], math.cos(math.pi / 2 * (1 - t))
        assert abs(own.double().mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / len(own))
    assert not torch.equal(cosine.mask[::2] ^ cosine.mask[1::2], cosine.clean.maskable[::2])


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_tokens_become_what_may_stand_there(vocabulary, make_batch, kernel):
    """Every id of the position's range is seen, the end token where it may end, and no other; the rest is as it was."""
    for own, batch in (
        (vocabulary, make_batch(150, task="joint_text_image")),
        (vocabulary, make_batch(150, task="text_to_speech")),
        (OF_TEXT, tokens_of(OF_TEXT, 100, 8)),
    ):
        noisy = KernelCorruption(own, kernel, seed=1)(batch)
        assert torch.equal(noisy.mask, batch.maskable)
        assert torch.equal(noisy.noisy[~batch.maskable], batch.tokens[~batch.maskable])
        assert (noisy.weight[~batch.maskable] == 0).all()
        assert (noisy.training[~batch.maskable] == 0).all()
        assert torch.equal(noisy.replaced.token, noisy.noisy)
        changed = batch.maskable & (noisy.noisy != batch.tokens) & (noisy.noisy != own.mask_id)
        for r in batch.id_range[batch.maskable].unique().tolist():
            found = noisy.noisy[changed & (batch.id_range == r)].unique()
            assert torch.equal(found, own.allowed(torch.tensor(r)).nonzero()[:, 0])


@pytest.mark.parametrize("t", [0.2, 0.7])
@pytest.mark.parametrize("kernel", [Mask(), *KERNELS], ids=repr)
def test_how_often_is_what_the_levels_say(kernel, t):
    """Masked, kept, and each of the others: within 5 standard errors sqrt(r (1 - r) / n) of n = 16,000."""
    batch = tokens_of(OF_TEXT, 1000, 16)
    t_max = 1.0 if kernel.masks_only else 1 - 1e-3
    noisy = KernelCorruption(OF_TEXT, kernel, times=always(t, t_max=t_max))(batch)
    levels = kernel.levels(torch.tensor(t, dtype=torch.float64))
    n, ids = batch.tokens.numel(), 8
    shift = (noisy.noisy - batch.tokens)[noisy.noisy != OF_TEXT.mask_id]
    rates = {
        float(levels.mask): (noisy.noisy == OF_TEXT.mask_id).sum(),
        float(levels.alpha + levels.uniform / ids): (shift == 0).sum(),
    }
    for rate, count in rates.items():
        assert abs(count / n - rate) < 5 * math.sqrt(rate * (1 - rate) / n) + 1e-12
    if not kernel.masks_only:
        of_one = batch.tokens == 3
        for other in (0, 8):
            rate, here = float(levels.uniform / ids), int(of_one.sum())
            found = (noisy.noisy[of_one] == other).sum() / here
            assert abs(found - rate) < 5 * math.sqrt(rate * (1 - rate) / here) + 1e-12
        assert_close(noisy.replaced.alpha, torch.full((1000, 16), float(levels.alpha)))
        assert_close(noisy.replaced.uniform, torch.full((1000, 16), float(levels.uniform)))


@pytest.mark.parametrize("options", [{}, {"per_token": True}, {"pairs": True}], ids=str)
def test_noise_depends_on_the_sample_index_alone(vocabulary, make_batch, options):
    """Another row, another batch, a packed row: the same index is the same noise, and another index another."""
    corruption = KernelCorruption(vocabulary, Hybrid(0.3), seed=3, weighting="clipped", clip=1.0, **options)
    batch = make_batch(6, task="joint_text_image")
    whole = corruption(batch)
    length = batch.tokens.shape[1]
    order = torch.tensor([4, 0, 3])
    part = corruption(Batch(*(getattr(batch, f)[order] for f in Batch.__dataclass_fields__)))
    packed = corruption(collate([[row_as_sequence(batch, i) for i in (4, 0, 3)]], [[4, 0, 3]], vocabulary.pad_id, length=90))
    fields = ("noisy", "mask", "weight", "training")
    for name in fields:
        assert torch.equal(getattr(part, name), getattr(whole, name)[order])
        assert torch.equal(getattr(packed, name)[0, : 3 * length].view(3, length), getattr(whole, name)[order])
    for name in ("token", "alpha", "uniform", "tilt"):
        own = getattr(packed.replaced, name)[0, : 3 * length].view(3, length)
        assert torch.equal(own, getattr(whole.replaced, name)[order])
    other = corruption(make_batch(6, task="joint_text_image", first_index=6))
    assert not torch.equal(other.noisy, whole.noisy)
    another_seed = KernelCorruption(vocabulary, Hybrid(0.3), seed=4, **options)(batch)
    assert not torch.equal(another_seed.noisy, whole.noisy)


def test_each_modality_has_its_own_noise(vocabulary, make_batch):
    """Uniform text beside masked images: images are predicted where masked, at the weight of masks, and the text everywhere."""
    batch = make_batch(300, task="joint_text_image")
    kernels = {"text": Uniform(), "image": Mask(), "audio": Hybrid(0.2)}
    noisy = KernelCorruption(vocabulary, kernels, Cosine(), times=always(0.4))(batch)
    text, image = (batch.maskable & (batch.modality == i) for i in (0, 1))
    masked = noisy.noisy == vocabulary.mask_id
    assert noisy.mask[text].all()
    assert not masked[text].any()
    assert torch.equal(noisy.mask[image], masked[image])
    assert (noisy.replaced.uniform[image] == 0).all()
    assert (noisy.replaced.uniform[text] > 0).all()
    t = torch.tensor(0.4, dtype=torch.float64)
    expected = torch.full((int((masked & image).sum()),), float(Cosine().nelbo_weight(t)))
    assert_close(noisy.weight[masked & image], expected)
    assert (noisy.weight[image & ~masked] == 0).all()
    assert {name: noise.kernel for name, noise in KernelCorruption(vocabulary, kernels).noise.items()} == kernels
    alone = KernelCorruption(vocabulary, Uniform(), Cosine(), times=always(0.4))(batch)
    for name in ("noisy", "weight"):
        assert torch.equal(getattr(noisy, name)[text], getattr(alone, name)[text])


@pytest.mark.parametrize("kernel", [Mask(), *KERNELS], ids=repr)
def test_pairs_are_antithetic(vocabulary, make_batch, kernel):
    """Times t and 1 - t, numbers u and 1 - u: a token is noise at least once, but for what is drawn to be itself."""
    corruption = KernelCorruption(vocabulary, kernel, pairs=True)
    batch = make_batch(40)
    t, u, v = corruption._draw(batch)
    own = batch.maskable[::2]
    assert_close(t[::2][own] + t[1::2][own], torch.ones(int(own.sum()), dtype=torch.float64))
    assert_close(u[::2][own] + u[1::2][own], torch.ones(int(own.sum()), dtype=torch.float64))
    assert not torch.equal(v[::2][own], v[1::2][own])
    assert len(t[own.repeat_interleave(2, 0)].unique()) == 40  # one time a document
    large = Vocabulary.build({"text": (5000,)}, ())
    noisy = KernelCorruption(large, kernel, pairs=True)(tokens_of(large, 100, 32))
    same = noisy.noisy == noisy.clean.tokens
    assert (same[::2] & same[1::2]).double().mean() < 2 / 5000 + 5 * math.sqrt(1 / 5000 / (same.numel() / 2))


def test_times_lie_between_t_min_and_t_max(vocabulary, make_batch):
    """To 1, to 1 - t_min in pairs, to 0.999 where tokens become others, or as is said; of each position, where asked for."""
    batch = make_batch(600)
    for kernel, pairs, said, most in (
        (Mask(), False, None, 1.0),
        (Mask(), True, None, 0.8),
        (Hybrid(), False, None, 0.999),
        (Uniform(), True, None, 0.8),
        (Uniform(), False, 0.7, 0.7),
        (Mask(), False, 0.9, 0.9),
    ):
        corruption = KernelCorruption(vocabulary, kernel, t_min=0.2, t_max=said, pairs=pairs)
        t = corruption._draw(batch)[0][batch.document >= 0]
        assert 0.2 <= t.min() < 0.21
        assert most - 0.01 < t.max() <= most
    t = KernelCorruption(vocabulary, Hybrid(), t_min=0.2, t_max=0.8, per_token=True)._draw(batch)[0]
    assert (t.std(dim=1) > 0.05).all()
    assert 0.2 <= t.min() < 0.21
    assert 0.79 < t.max() <= 0.8
    counts = torch.histc(t, 10, 0.2, 0.8) / t.numel()
    assert (counts - 0.1).abs().max() < 5 * math.sqrt(0.09 / t.numel())
    lone = KernelCorruption(vocabulary, Hybrid(), t_min=0.2)._draw(batch)[0]
    assert (lone.std(dim=1) < 1e-12).all()


@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=repr)
@pytest.mark.parametrize("kernel", [Mask(), *KERNELS], ids=repr)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_as_documented(kernel, schedule, weighting):
    """In the bound dtau/dt rate(z)/q(z | x), of D; of masks alone -alpha'/(1 - alpha), of the cross-entropy alpha D."""
    clip = 0.7 if weighting == "clipped" else None
    batch, t = tokens_of(OF_TEXT, 200, 16), torch.tensor(0.3, dtype=torch.float64)
    times = always(0.3, t_max=1.0 if kernel.masks_only else 1 - 1e-3)
    noisy = KernelCorruption(OF_TEXT, kernel, schedule, times, weighting=weighting, clip=clip)(batch)
    tau, speed = 1 - schedule.alpha(t), -schedule.alpha_prime(t)
    levels = kernel.levels(tau)
    for state in ("mask", "clean", "other"):
        masked = noisy.noisy == OF_TEXT.mask_id
        where = masked if state == "mask" else ~masked & ((noisy.noisy == batch.tokens) == (state == "clean"))
        if not bool(where.any()):
            assert kernel.masks_only or isinstance(kernel, Uniform)
            continue
        noise = levels.mask if state == "mask" else levels.uniform / 8
        rate = levels.mask_rate if state == "mask" else levels.uniform_rate / 8
        q = noise + levels.alpha * (state == "clean")
        training = {
            "exact": speed * rate / q,
            "clipped": speed * (rate / q).clamp(max=0.7),
            "low_variance": tau * rate / q,
            "dynamic": torch.tensor({"mask": 2.0, "other": 1.0}[state]) if state != "clean" else noise / q,
            "cross_entropy": torch.tensor(1.0),
        }[weighting]
        bound = speed * rate / q
        if kernel.masks_only:
            bound, training = bound * levels.alpha, training * (1.0 if weighting == "cross_entropy" else levels.alpha)
            training = training * (state == "mask")
        expected = [torch.full((int(where.sum()),), float(v)) for v in (bound, training)]
        assert_close(noisy.weight[where], expected[0], rtol=1e-6, atol=0)
        assert_close(noisy.training[where], expected[1], rtol=1e-6, atol=0)
    if kernel.masks_only:
        assert noisy.replaced is None
    else:
        assert noisy.replaced.cross_entropy == (weighting == "cross_entropy")
        assert (noisy.replaced.tilt is None) == (weighting in LEAVE_ONE_OUT)


def test_low_variance_weighs_masks_by_one(vocabulary, make_batch):
    noisy = KernelCorruption(vocabulary, weighting="low_variance")(make_batch(200))
    assert_close(noisy.training, noisy.mask.float())
    assert noisy.training[noisy.mask].numel()


def test_only_a_complete_schedule_and_one_time_a_document_make_a_bound(vocabulary):
    assert KernelCorruption(vocabulary, Uniform()).complete
    assert KernelCorruption(vocabulary, Uniform(), weighting="dynamic").complete
    assert not KernelCorruption(vocabulary, Uniform(), per_token=True).complete
    assert not KernelCorruption(vocabulary, Uniform(), Truncated(0.2, 0.7)).complete
    assert isinstance(KernelCorruption(vocabulary), Corruption)


# -- what a model learns ------------------------------------------------------------------------------------------------


PRIOR = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)


def learned(noise: Noise, tau: float, z: int) -> torch.Tensor:
    """log p of least training loss at one position that stands at z (-1: the mask), whose others say PRIOR: by L-BFGS."""
    levels = noise.kernel.levels(torch.full((3,), tau, dtype=torch.float64))
    x, place = torch.arange(3), torch.full((3,), z)
    one = torch.tensor([z < 0]).expand(3)
    at, _ = levels.of_token(one, 3)
    weight = PRIOR * (at + levels.alpha * (x == z)) * noise.weight(levels, torch.tensor(tau), one, x == z, 3)
    weight = weight / weight.sum()
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=100, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def loss():
        optimiser.zero_grad()
        if noise.weighting == "cross_entropy":
            d = -logits.log_softmax(0)[x]
        else:
            d = divergence(logits.expand(3, 3), x, place, levels.alpha, levels.uniform, 3)
        total = (weight * d).sum()
        total.backward()
        return total

    optimiser.step(loss)
    return logits.detach().log_softmax(0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_a_model_learns_what_the_others_say_tilted(kernel, weighting):
    """By least training loss; `untilted` is what the others say."""
    clips = (0.05, 0.8) if weighting == "clipped" else (None,)
    for clip, tau, z in itertools.product(clips, (0.15, 0.7), (-1, 1)):
        noise = Noise(kernel, weighting, clip)
        levels = kernel.levels(torch.tensor([tau], dtype=torch.float64))
        if z < 0 and float(levels.mask) == 0:
            continue
        masked = torch.tensor([z < 0])
        tilt = noise.tilt(levels, torch.tensor([tau]), masked, 3)
        found = learned(noise, tau, z)
        back = untilted(found[None], torch.tensor([z]), tilt)[0].softmax(0)
        assert_close(back, PRIOR, rtol=1e-5, atol=1e-6)
        if z < 0 or weighting in LEAVE_ONE_OUT:
            assert float(tilt) == 0
        if weighting == "cross_entropy" and z >= 0:  # E[x | z]
            q = levels.uniform / 3 + levels.alpha * (torch.arange(3) == z)
            assert_close(found.softmax(0), PRIOR * q / (PRIOR * q).sum(), rtol=1e-5, atol=1e-6)
            assert float(tilt) > 0.1


def test_noise_of_each_modality_by_its_index():
    """Levels and tilts are the modality's own; positions of none have the first's. One alone is everybody's."""
    both = Noises.of({"image": Noise(Uniform(), "cross_entropy")}, ["text", "image"])
    modality, tau = torch.tensor([0, 1, -1]), torch.full((3,), 0.3, dtype=torch.float64)
    levels = both.levels(tau, modality)
    assert_close(levels.mask, torch.tensor([0.3, 0.0, 0.3], dtype=torch.float64))
    assert_close(levels.uniform, torch.tensor([0.0, 0.3, 0.0], dtype=torch.float64))
    masked, size = torch.zeros(3, dtype=torch.bool), torch.tensor([4, 7, 4])
    tilt = both.tilt(levels, tau, modality, masked, size)
    assert_close(tilt, torch.tensor([0.0, math.log(1 + 0.7 * 7 / 0.3), 0.0], dtype=torch.float64))
    assert (both.masks_only, Noises().masks_only) == (False, True)
    assert (both.of_modality(1).kernel, both.of_modality(0).kernel) == (Uniform(), Mask())
    alone = Noises([Noise(Uniform(), "cross_entropy")])
    assert alone.of_modality(2).kernel == Uniform()
    logits = torch.zeros(2, 3)
    off = untilted(logits, torch.tensor([-1, 2]), torch.tensor([5.0, 5.0]))  # of the mask there is none
    assert_close(off, torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -5.0]]))
    assert (alone.tilt(alone.levels(tau, modality), tau, modality, masked, size) > 0).all()
    assert Noises([Noise(Uniform())]).tilt(levels, tau, modality, masked, size) is None
    with pytest.raises(ValueError, match="noise of sound: the modalities are text, image"):
        Noises.of({"sound": Noise()}, ["text", "image"])
    with pytest.raises(ValueError, match="at least one modality"):
        Noises([])


@pytest.mark.parametrize(
    "noise",
    [
        Noise(),
        Noise(Uniform(), "dynamic"),
        Noise(Hybrid(0.3, 2.0), "clipped", 2.0),
        Noise(HybridLogSNR(-1.0, 0.5), "cross_entropy"),
    ],
    ids=repr,
)
def test_noise_is_saved_as_plain_values(noise):
    assert Noise.from_dict(noise.to_dict()) == noise


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"kernel": "snow"}, "must name one of the kernels mask, uniform"),
        ("mask", "must name one of the kernels"),
        ({"kernel": ["mask"]}, "must name one of the kernels"),
        ({"kernel": "hybrid", "p_u": "0.1"}, "takes numbers for p_u, gamma"),
        ({"kernel": "hybrid", "p_u": True}, "takes numbers for p_u, gamma"),
        ({"kernel": "hybrid", "shift": 1.0}, "takes numbers for p_u, gamma"),
        ({"kernel": "hybrid", "p_u": 2}, "p_u, the share of uniform noise, must be in"),
        ({"kernel": "mask", "weighting": "heavy"}, "weighting 'heavy' is not one of exact"),
        ({"kernel": "mask", "weighting": "clipped", "clip": ""}, "takes numbers"),
        ({"kernel": "mask", "weighting": "clipped", "clip": 0}, "clip, a positive number"),
        ({"kernel": "mask", "weighting": "clipped", "clip": [1]}, "takes numbers"),
    ],
)
def test_noise_that_is_none_is_named(raw, message):
    with pytest.raises(ValueError, match=message):
        Noise.from_dict(raw)


def test_a_kernel_of_somebody_elses_cannot_be_saved():
    class Own:
        masks_only, ends_masked = False, False

        def levels(self, tau: torch.Tensor) -> Levels:
            return Uniform().levels(tau)

    assert isinstance(Own(), Kernel)
    with pytest.raises(ValueError, match="can name the kernels mask, uniform, hybrid, hybrid_log_snr, not Own"):
        Noise(Own()).to_dict()


# -- the bound ------------------------------------------------------------------------------------------------------------


def model() -> torch.Tensor:
    """Some network's logits for each of 5 ** 3 noisy sequences (4 is the mask), `[5, 5, 5, 3, 4]`."""
    return torch.randn(5, 5, 5, LENGTH, SYMBOLS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def enumerated(kernel: Kernel, t_min: float, noise: Noise | None = None) -> float:
    """The bound of `model` on the tiny joint, over times from (t_min, 1 - t_min), every x and z summed."""
    noise = Noise(kernel) if noise is None else noise
    from numpy.polynomial.legendre import leggauss

    nodes, shares = (torch.from_numpy(v) for v in leggauss(40))
    taus = t_min + (1 - 2 * t_min) * (nodes + 1) / 2
    x, z = all_sequences(), torch.tensor(list(itertools.product(range(5), repeat=LENGTH)))
    logits = model()[tuple(z.T)]
    total = 0.0
    for tau, share in zip(taus, (shares / 2).tolist(), strict=True):
        levels = kernel.levels(tau.expand(1))
        q = torch.cat([levels.alpha * torch.eye(4) + levels.uniform / 4, levels.mask.expand(4, 1)], dim=1).double()
        joint = tiny_joint().flatten()[:, None] * q[x[:, None], z[None]].prod(dim=-1)  # [x, z]
        for i in range(LENGTH):
            at = torch.stack([joint[x[:, i] == v].sum(dim=0) for v in range(4)])  # [x_i, z]
            own, place = (
                torch.arange(4)[:, None].expand(4, 125),
                z[None, :, i].masked_fill(z[None, :, i] == 4, -1).expand(4, 125),
            )
            weight = noise.weight(levels, tau, place < 0, place == own, 4)
            flat = [v.flatten() for v in (own, place)]
            shares_of = [v.expand(500) for v in (levels.alpha, levels.uniform)]
            d = divergence(logits[:, i].expand(4, 125, 4).reshape(500, 4), *flat, *shares_of, 4).view(4, 125)
            total += share * float(torch.where(at > 0, at * weight * d, 0.0).sum())
    return total


@pytest.mark.parametrize(
    ("kernel", "pairs"), [(Uniform(), False), (Hybrid(0.3), False), (HybridLogSNR(), False), (Hybrid(0.3), True)], ids=repr
)
def test_the_loss_is_the_enumerated_bound_on_average(kernel, pairs):
    """Corruption and loss, end to end: 40 batches of 40 rows, 8 samples each; within 4.5 standard errors of their mean."""
    four, triples = Vocabulary.build({"text": (SYMBOLS,)}, ()), 8
    table = torch.zeros(125, LENGTH, four.size, dtype=torch.float64)
    table[..., :SYMBOLS] = model().flatten(0, 2)
    corruption = KernelCorruption(four, kernel, times=UniformTimes(), pairs=pairs, t_min=0.02, t_max=0.98)
    g = torch.Generator().manual_seed(2)
    found = []
    for b in range(40):
        which = torch.multinomial(tiny_joint().flatten(), 40 * triples, replacement=True, generator=g)
        rows = all_sequences()[which].view(40, -1)
        rows = rows[:20].repeat_interleave(2, 0) if pairs else rows
        noisy = corruption(Batch.of(rows, first_index=40 * b))
        seen = noisy.noisy.view(-1, LENGTH)
        assert four.mask_id == 4  # as in the table
        hidden = table[(seen * torch.tensor([25, 5, 1])).sum(dim=1)].view(40, -1, four.size)
        clean = noisy.clean
        where = (clean.tokens, noisy.mask, clean.id_range, coefficients(noisy, reduction="token")[0], noisy.weight, four)
        sums = loss_from_hidden(
            hidden, torch.eye(four.size).double(), positions_by_range(*where, replaced=noisy.replaced), four
        )
        assert_close(sums.loss, sums.nelbo.sum())
        found.append(float(sums.loss) / 40 / triples)
    mean, error = torch.tensor(found).mean(), torch.tensor(found).std() / math.sqrt(len(found))
    exact = enumerated(kernel, 0.02)
    assert error < 0.04 * exact
    assert abs(mean - exact) < 4.5 * error


@pytest.mark.parametrize("schedule", [Polynomial(8.0), Linear()], ids=repr)
@pytest.mark.parametrize(
    "kernel", [*KERNELS, Hybrid(1e-45), HybridLogSNR(-100.0), HybridLogSNR(-800.0), HybridLogSNR(90.0)], ids=repr
)
def test_losses_are_finite_where_noise_is_next_to_none(kernel, schedule):
    """A steep schedule rounds to no noise at all, a far shift to no uniform noise in float32: weights and D are numbers."""
    for drawn in (0.0, 0.5, 1 - 2**-53):
        noisy = KernelCorruption(OF_TEXT, kernel, schedule, lambda seed, index, d=drawn: d, t_min=0.0, pairs=True)(
            tokens_of(OF_TEXT, 4, 9)
        )
        assert noisy.weight.isfinite().all()
        hidden = torch.randn(4, 9, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
        clean = noisy.clean
        where = (clean.tokens, noisy.mask, clean.id_range, coefficients(noisy)[0], noisy.weight, OF_TEXT)
        sums = loss_from_hidden(hidden, torch.eye(9), positions_by_range(*where, replaced=noisy.replaced), OF_TEXT)
        assert sums.nelbo.isfinite().all()
        assert torch.autograd.grad(sums.loss, hidden)[0].isfinite().all()


def test_a_shift_far_below_is_the_loss_of_masks():
    """Where uniform noise is nothing in float32, D is still alpha times the cross-entropy."""
    for shift in (-60.0, -100.0, -800.0):
        noisy = KernelCorruption(OF_TEXT, HybridLogSNR(shift), times=always(0.6))(tokens_of(OF_TEXT, 8, 9))
        hidden, clean = torch.randn(8, 9, 9, generator=torch.Generator().manual_seed(0)), noisy.clean
        where = (clean.tokens, noisy.mask, clean.id_range, coefficients(noisy)[0], noisy.weight, OF_TEXT)
        sums = loss_from_hidden(hidden, torch.eye(9), positions_by_range(*where, replaced=noisy.replaced), OF_TEXT)
        masked = noisy.noisy == 4
        ce = torch.nn.functional.cross_entropy(
            OF_TEXT.restrict(hidden, clean.id_range)[masked], clean.tokens[masked], reduction="sum"
        )
        assert_close(sums.nelbo.sum(), ce / 0.6, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: Hybrid(1.0), r"Hybrid: p_u, the share of uniform noise, must be in \[0, 1\), got 1\.0"),
        (lambda v: Hybrid(-0.1), r"must be in \[0, 1\), got -0\.1"),
        (lambda v: Hybrid(math.nan), r"must be in \[0, 1\), got nan"),
        (lambda v: Hybrid(0.1, 0.0), r"Hybrid: gamma must be in \(0, 2\], got 0\.0"),
        (lambda v: Hybrid(0.1, 2.1), r"gamma must be in \(0, 2\], got 2\.1: beyond, a rate of the noise is negative"),
        (lambda v: HybridLogSNR(0.0, 1.1), r"HybridLogSNR: slope must be in \[-1, 1\], got 1\.1: beyond"),
        (lambda v: HybridLogSNR(0.0, math.nan), r"slope must be in \[-1, 1\], got nan"),
        (lambda v: HybridLogSNR(math.inf), "HybridLogSNR: shift must be a number, got inf"),
        (lambda v: KernelCorruption(v, {"text": Uniform()}), "a kernel for each of text, image, audio, got one for text"),
        (lambda v: KernelCorruption(v, {}), "a kernel for each of text, image, audio, got one for none"),
        (lambda v: KernelCorruption(v, t_min=0.5, pairs=True), r"t_min must be in \[0, 0\.5\) with pairs, .* got 0\.5"),
        (lambda v: KernelCorruption(v, t_min=-0.1), r"t_min must be in \[0, t_max = 1\.0\), .* got -0\.1"),
        (lambda v: KernelCorruption(v, t_min=0.5, t_max=0.4), r"t_min must be in \[0, t_max = 0\.4\)"),
        (lambda v: KernelCorruption(v, t_max=1.5), r"and t_max at most 1"),
        (lambda v: KernelCorruption(v, t_max=0.9, pairs=True), r"pairs are at t and 1 - t, so t_max is 1 - t_min; got 0\.9"),
        (lambda v: KernelCorruption(v, weighting="heavy"), "corruption: weighting 'heavy' is not one of exact, low_variance"),
        (lambda v: KernelCorruption(v, weighting="clipped"), "clip, a positive number, goes with weighting=clipped; got None"),
        (lambda v: KernelCorruption(v, weighting="clipped", clip=0.0), r"goes with weighting=clipped; got 0\.0, clipped"),
        (lambda v: KernelCorruption(v, clip=2.0), r"goes with weighting=clipped; got 2\.0, exact"),
    ],
)
def test_a_bad_setting_is_one_sentence(vocabulary, make, message):
    with pytest.raises(ValueError, match=message) as error:
        make(vocabulary)
    assert "\n" not in str(error.value)
