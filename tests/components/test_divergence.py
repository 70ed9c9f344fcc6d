"""The divergence D against its plain formula in float64, from logits and from hidden states, and what of it float32 keeps."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from components.corruption import KernelCorruption
from components.divergence import divergence
from components.kernels import Hybrid, HybridLogSNR, Mask, Uniform
from components.losses import coefficients, loss_from_hidden, loss_from_logits, positions_by_range
from components.range_losses import range_divergence
from components.sequences import collate, task_sequence
from components.types import Batch, Replaced
from components.vocabulary import IdRange, Vocabulary

WIDTH = 6


def plain(logits, target, place, alpha, uniform):
    """KL(q(.|x) || q(.|p)) + rho - log rho - 1, each sum written out. place < 0: z is the mask, of which rho is 1."""
    allowed = (logits > -math.inf).double()
    each = (uniform / allowed.sum(dim=-1))[:, None]
    q_p = alpha[:, None] * logits.softmax(dim=-1) + each * allowed
    q_x = alpha[:, None] * torch.nn.functional.one_hot(target, logits.shape[1]) + each * allowed
    kl = torch.where(allowed > 0, q_x * (q_x.log() - q_p.clamp(min=1e-300).log()), 0.0).sum(dim=-1)
    z = torch.where(place < 0, target, place)[:, None]
    rho = torch.where(place < 0, 1.0, (q_x.gather(1, z) / q_p.gather(1, z))[:, 0])
    return kl + rho - rho.log() - 1


def some(n=60, ids=7, scale=2.0, ruled_out=True):
    """Logits, of which some are -inf, a target of each, and z: the mask, the target and another by turns."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(n, ids, dtype=torch.float64, generator=g) * scale
    target, z = torch.randint(0, ids - 1, (2, n), generator=g)
    if ruled_out:
        logits[::2, ids - 1] = -math.inf
    place = torch.where(torch.arange(n) % 3 == 0, -1, torch.where(torch.arange(n) % 3 == 1, target, z))
    shares = torch.rand(n, 3, dtype=torch.float64, generator=g) + 0.01
    shares = shares / shares.sum(dim=1, keepdim=True)
    return logits.requires_grad_(), target, place, shares[:, 0], shares[:, 1]


def test_the_closed_form_is_the_plain_sum_and_so_is_its_gradient():
    logits, target, place, alpha, uniform = some()
    size = (logits > -math.inf).sum(dim=1)
    found, expected = divergence(logits, target, place, alpha, uniform, size), plain(logits, target, place, alpha, uniform)
    assert_close(found, expected, rtol=1e-11, atol=1e-13)
    assert (found > 0).all()
    c = torch.linspace(0.1, 2, len(found), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((c * d).sum(), logits)[0] for d in (found, expected))
    assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert (ours[::2, -1] == 0).all()


def test_gradients_by_finite_differences():
    logits, target, place, alpha, uniform = some(6, 5, ruled_out=False)
    assert torch.autograd.gradcheck(lambda v: divergence(v, target, place, alpha, uniform, 5), logits)


def test_it_is_zero_where_the_network_is_right():
    _, target, place, alpha, uniform = some(ruled_out=False)
    right = torch.nn.functional.one_hot(target, 7).double() * 1e4
    assert_close(divergence(right, target, place, alpha, uniform, 7), torch.zeros(60, dtype=torch.float64), rtol=0, atol=1e-12)


def test_with_no_uniform_noise_it_is_alpha_times_the_cross_entropy():
    logits, target, _, alpha, _ = some(ruled_out=False)
    found = divergence(logits, target, torch.full_like(target, -1), alpha, torch.full_like(alpha, 1e-13), 7)
    expected = alpha * torch.nn.functional.cross_entropy(logits, target, reduction="none")
    assert_close(found, expected, rtol=1e-9, atol=1e-10)


OF_TEXT = Vocabulary.of_text(9, mask=4, pad=1, end=8)  # mask and end lie inside the range
MASK_FIRST = Vocabulary.of_text(9, mask=0, pad=1, end=8)
NOISES = {
    "uniform": (Uniform(), {}),
    "hybrid": (Hybrid(0.3), {}),
    "log-snr low variance": (HybridLogSNR(), {"weighting": "low_variance"}),
    "dynamic": (Hybrid(0.3), {"weighting": "dynamic"}),
    "clipped": (Hybrid(0.3), {"weighting": "clipped", "clip": 0.5}),
    "cross-entropy": (HybridLogSNR(), {"weighting": "cross_entropy"}),
    "of each modality": ({"text": Uniform(), "image": Mask(), "audio": Hybrid(0.5)}, {}),
    "of each modality, clipped": (
        {"text": HybridLogSNR(), "image": Mask(), "audio": Uniform()},
        {"weighting": "clipped", "clip": 2.0},
    ),
}


def corrupted(noise, vocabulary, batch, **options):
    """In float64, so that nothing but rounding parts the ways of computing."""
    kernel, settings = NOISES[noise]
    if isinstance(kernel, dict) and len(vocabulary.modalities) == 1:
        kernel = kernel["text"]
    noisy = KernelCorruption(vocabulary, kernel, **settings, **options)(batch)
    own = noisy.replaced
    tilt = None if own.tilt is None else own.tilt.double()
    exact = replace(own, alpha=own.alpha.double(), uniform=own.uniform.double(), tilt=tilt)
    return replace(noisy, replaced=exact)


def hidden_states(noisy, vocabulary):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(*noisy.mask.shape, WIDTH, dtype=torch.float64, generator=g).requires_grad_()
    return hidden, torch.randn(vocabulary.size, WIDTH, dtype=torch.float64, generator=g).requires_grad_()


def from_hidden(noisy, hidden, unembedding, vocabulary, bucket=64, **options):
    coefficient, denominator = coefficients(noisy)
    clean = noisy.clean
    positions = positions_by_range(
        clean.tokens, noisy.mask, clean.id_range, coefficient, noisy.weight, vocabulary, bucket, noisy.replaced
    )
    return loss_from_hidden(hidden, unembedding, positions, vocabulary, **options), denominator


def by_definition(noisy, hidden, unembedding, vocabulary):
    """The training loss, and the bound of each id range, from full logits by the plain formula."""
    clean, own = noisy.clean, noisy.replaced
    where = noisy.mask
    logits = vocabulary.restrict(hidden @ unembedding.T, clean.id_range)[where]
    target, token, ids = clean.tokens[where], own.token[where], clean.id_range[where]
    place = token.masked_fill(token == vocabulary.mask_id, -1)
    alpha, uniform = own.alpha[where], own.uniform[where]
    ce = torch.nn.functional.cross_entropy(logits, target, reduction="none")

    def d(logits):
        return torch.where(uniform > 0, plain(logits, target, place, alpha, uniform.clamp(min=1e-9)), ce)

    trained = ce if own.cross_entropy else d(logits)
    tilted = logits
    if own.tilt is not None:
        off = torch.where(place < 0, 0.0, -own.tilt[where])
        tilted = logits.scatter_add(1, place.clamp(min=0)[:, None], off[:, None])
    bound = noisy.weight[where] * d(tilted).detach()
    nelbo = torch.stack([bound[ids == r].sum() for r in range(len(vocabulary.ranges))])
    return (coefficients(noisy)[0][where] * trained).sum(), nelbo


def batch_of(vocabulary, make_batch):
    if len(vocabulary.modalities) > 1:
        return make_batch(5, task="joint_text_image")
    g = torch.Generator().manual_seed(0)
    known = torch.tensor([i for i in range(vocabulary.size) if i != vocabulary.mask_id])
    return Batch.of(known[torch.randint(0, len(known), (4, 7), generator=g)], first_index=0)


@pytest.mark.parametrize("which", ["three modalities", "mask in the range", "mask first"])
@pytest.mark.parametrize("noise", NOISES)
def test_losses_from_hidden_states_are_their_definition(vocabulary, make_batch, noise, which):
    """Loss, bound and gradients; also in pieces of 1, 2 and 3 ids, and whatever the bucket."""
    own = {"three modalities": vocabulary, "mask in the range": OF_TEXT, "mask first": MASK_FIRST}[which]
    noisy = corrupted(noise, own, batch_of(own, make_batch))
    hidden, unembedding = hidden_states(noisy, own)
    loss, nelbo = by_definition(noisy, hidden, unembedding, own)
    expected = torch.autograd.grad(loss, (hidden, unembedding))
    assert all(v.isfinite().all() for v in expected)
    for max_logits, bucket in ((10**9, 1), (1, 64), (130, 64), (200, 64), (30, 7)):
        sums, _ = from_hidden(noisy, hidden, unembedding, own, bucket, max_logits=max_logits)
        assert_close(sums.loss, loss, rtol=1e-10, atol=0)
        assert_close(sums.nelbo, nelbo, rtol=1e-10, atol=1e-12)
        for a, b in zip(torch.autograd.grad(sums.loss, (hidden, unembedding)), expected, strict=True):
            assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("noise", NOISES)
def test_logits_and_hidden_states_give_the_same_loss_and_gradient(vocabulary, make_batch, noise):
    for own in (vocabulary, OF_TEXT):
        noisy = corrupted(noise, own, batch_of(own, make_batch))
        hidden, unembedding = hidden_states(noisy, own)
        sums, _ = from_hidden(noisy, hidden, unembedding, own)
        ours = torch.autograd.grad(sums.loss, (hidden, unembedding))
        logits = own.restrict(hidden @ unembedding.T, noisy.clean.id_range)
        other = loss_from_logits(logits, noisy.clean.tokens, noisy.mask, coefficients(noisy)[0], noisy.replaced, own.mask_id)
        assert_close(sums.loss, other, rtol=1e-10, atol=0)
        for a, b in zip(ours, torch.autograd.grad(other, (hidden, unembedding)), strict=True):
            assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("noise", ["hybrid", "clipped", "cross-entropy"])
def test_padding_packing_and_micro_batches_change_nothing(vocabulary, noise):
    """The same documents alone, padded, packed into one row, and one at a time."""
    g = torch.Generator().manual_seed(0)
    sequences = [
        task_sequence(vocabulary, "text", {"text": torch.randint(0, 7, (n,), generator=g)}, {"text": 7}) for n in (3, 5, 2)
    ]
    table = torch.randn(3, 12, WIDTH, dtype=torch.float64, generator=g)
    unembedding = torch.randn(vocabulary.size, WIDTH, dtype=torch.float64, generator=g).requires_grad_()
    cuts = [
        [collate([[s] for s in sequences], [[0], [1], [2]], vocabulary.pad_id, length=20)],
        [collate([sequences], [[0, 1, 2]], vocabulary.pad_id, length=40)],
        [collate([[s]], [[i]], vocabulary.pad_id) for i, s in enumerate(sequences)],
    ]
    results = []
    for parts in cuts:
        loss, nelbo, total = 0.0, 0.0, 0.0
        for batch in parts:
            noisy = corrupted(noise, vocabulary, batch, seed=1)
            sums, denominator = from_hidden(noisy, table[batch.document.clamp(min=0), batch.position], unembedding, vocabulary)
            loss, nelbo, total = loss + sums.loss, nelbo + sums.nelbo, total + denominator
        results.append((loss / total, nelbo / total, torch.autograd.grad(loss / total, unembedding)[0]))
    for a, b in itertools.pairwise(results):
        for one, other in zip(a, b, strict=True):
            assert_close(one, other, rtol=1e-6, atol=1e-9)  # coefficients are float32


def test_the_bound_is_another_distributions_than_the_model_learns(vocabulary, make_batch):
    """Under cross-entropy a model that says E[x | z] has the bound of the leave-one-out one that trains by the bound itself."""
    noisy = corrupted("cross-entropy", vocabulary, batch_of(vocabulary, make_batch))
    exact = replace(noisy, training=None, replaced=replace(noisy.replaced, tilt=None, cross_entropy=False))
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(*noisy.mask.shape, vocabulary.size, dtype=torch.float64, generator=g)
    shown = noisy.mask & (noisy.noisy != vocabulary.mask_id)
    up = torch.where(shown, noisy.replaced.tilt, 0.0)
    tilted = logits.scatter_add(-1, noisy.noisy[..., None], up[..., None])
    every = torch.eye(vocabulary.size, dtype=torch.float64)
    learned, _ = from_hidden(noisy, tilted, every, vocabulary)
    bound, _ = from_hidden(exact, logits, every, vocabulary)
    assert_close(learned.nelbo, bound.nelbo, rtol=1e-10, atol=1e-12)
    assert_close(bound.loss, from_hidden(exact, logits, every, vocabulary)[0].loss)


@pytest.mark.parametrize("may_end", [False, True])
@pytest.mark.parametrize(("end_id", "mask_id"), [(14, 15), (12, 14), (14, 3), (3, 6), (0, 12)], ids=str)
@pytest.mark.parametrize("tilted", [False, True])
def test_of_one_range_wherever_end_and_mask_lie(may_end, end_id, mask_id, tilted):
    """Ids 3 to 12 of 16: each of them and the end token is x, and z, and the mask is z. N counts what may stand there."""
    own = IdRange("text", "text", 3, 10, may_end)
    known = [i for i in range(16) if (3 <= i < 13 or (may_end and i == end_id)) and i != mask_id]
    target, token = (torch.tensor(v) for v in zip(*itertools.product(known, [*known, mask_id]), strict=True))
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(target), WIDTH, dtype=torch.float64, generator=g).requires_grad_()
    unembedding = torch.randn(16, WIDTH, dtype=torch.float64, generator=g).requires_grad_()
    alpha, uniform, c, tilt = torch.rand(4, len(target), dtype=torch.float64, generator=g) * 0.5 + 0.01
    place = torch.tensor([known.index(i) if i in known else -1 for i in token.tolist()])
    logits = (hidden @ unembedding.T)[:, known]
    if tilted:
        logits = logits.scatter_add(1, place.clamp(min=0)[:, None], torch.where(place < 0, 0.0, -tilt)[:, None])
    expected = plain(logits, torch.tensor([known.index(i) for i in target.tolist()]), place, alpha, uniform)
    gradients = torch.autograd.grad((c * expected).sum(), (hidden, unembedding))
    replaced = Replaced(token, alpha, uniform, tilt if tilted else None)
    for max_logits in (10**6, 4 * len(target), 1):
        found = range_divergence(hidden, unembedding, target, replaced, own, end_id, mask_id, max_logits)
        assert_close(found, expected, rtol=1e-10, atol=1e-12)
        for a, b in zip(torch.autograd.grad((c * found).sum(), (hidden, unembedding)), gradients, strict=True):
            assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("uniform", [1e-6, 1e-3])
@pytest.mark.parametrize("alpha", [1e-3, 0.5, 1 - 2e-3])
def test_float32_keeps_the_digits_at_the_extremes(alpha, uniform):
    """Of 50,000 ids, with networks that are sure and right, sure and wrong, and not sure; whole and in pieces.

    D is off by at most 4e-6, or 4e-6 of itself (measured: 3e-6 and 1.1e-6), as a cross-entropy in float32 is by 3e-6; of a D
    that is smaller than 1e-6, of a network that is sure and right, no digit is left. Gradients: 4e-6 of 1 + their norm.
    """
    n, g = 50_000, torch.Generator().manual_seed(0)
    base = torch.randn(12, n, dtype=torch.float64, generator=g)
    base[:, 7] += torch.tensor([25.0, 12.0, -15.0, -30.0]).repeat_interleave(3)
    target, place = torch.full((12,), 7), torch.tensor([-1, 7, 9]).repeat(4)
    shares = torch.full((12,), alpha), torch.full((12,), uniform)

    def both(dtype):
        logits = base.float().to(dtype).requires_grad_()
        d = divergence(logits, target, place, *(v.to(dtype) for v in shares), n)
        return d.double().detach(), torch.autograd.grad(d.sum(), logits)[0].double()

    (exact, slope), (found, other) = both(torch.float64), both(torch.float32)
    assert_close(found, exact, rtol=4e-6, atol=4e-6)
    assert ((other - slope).norm(dim=1) < 4e-6 * (1 + slope.norm(dim=1))).all()
    replaced = Replaced(place.masked_fill(place < 0, n), *shares)
    own = IdRange("text", "text", 0, n, may_end=False)
    pieces = range_divergence(torch.eye(12), base.float().T.contiguous(), target, replaced, own, n + 1, n, 12 * 9_000)
    assert_close(pieces.double(), exact, rtol=6e-6, atol=6e-6)


@pytest.mark.parametrize("max_logits", [10**6, 40])
def test_hidden_states_in_bfloat16_give_a_loss_in_float32(max_logits):
    """The logits come in bfloat16; all that follows is float32."""
    g = torch.Generator().manual_seed(0)
    hidden, unembedding = torch.randn(12, 8, generator=g).bfloat16(), torch.randn(30, 8, generator=g).bfloat16()
    target, token = torch.randint(0, 29, (2, 12), generator=g)
    own, replaced = IdRange("text", "text", 0, 29, False), Replaced(token, torch.full((12,), 0.6), torch.full((12,), 0.1))
    found = range_divergence(hidden, unembedding, target, replaced, own, 40, 29, max_logits)
    assert found.dtype == torch.float32
    logits = (hidden @ unembedding.T)[:, :29].double()
    assert_close(
        found.double(), plain(logits, target, token, replaced.alpha.double(), replaced.uniform.double()), rtol=1e-5, atol=1e-6
    )
