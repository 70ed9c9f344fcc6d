import math
import os

import pytest
import torch
from torch.testing import assert_close

from components import range_losses
from components.losses import (
    bits_per_byte,
    bits_per_token,
    coefficients,
    loss_from_hidden,
    loss_from_logits,
    positions_by_range,
    range_cross_entropy,
)
from components.maskers import BernoulliMasker, FixedCountMasker
from components.sequences import collate, task_sequence
from components.vocabulary import IdRange, Vocabulary

WIDTH = 16


def hidden_states(noisy, vocabulary, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*noisy.mask.shape, WIDTH, dtype=torch.float64, generator=g).requires_grad_()
    g.manual_seed(seed + 1)
    unembedding = torch.randn(vocabulary.size, WIDTH, dtype=torch.float64, generator=g).requires_grad_()
    return hidden, unembedding


def from_hidden(noisy, hidden, unembedding, vocabulary, weighting="nelbo", reduction="sequence", **options):
    coefficient, denominator = coefficients(noisy, weighting, reduction)
    bucket = options.pop("bucket", 64)
    clean = noisy.clean
    positions = positions_by_range(clean.tokens, noisy.mask, clean.id_range, coefficient, noisy.weight, vocabulary, bucket)
    return loss_from_hidden(hidden, unembedding, positions, vocabulary, **options), denominator


def slow_loss(noisy, hidden, unembedding, vocabulary, weighting, reduction):
    """The definition, position by position in float64."""
    per_document: dict[int, list[float]] = {}
    counts: dict[int, int] = {}
    for b, i in noisy.clean.maskable.nonzero().tolist():
        document = int(noisy.clean.document[b, i])
        per_document.setdefault(document, [])
        if weighting == "nelbo" or noisy.mask[b, i]:
            counts[document] = counts.get(document, 0) + 1
        if not noisy.mask[b, i]:
            continue
        allowed = vocabulary.allowed(noisy.clean.id_range[b, i])
        logits = torch.where(allowed, unembedding @ hidden[b, i], -torch.inf)
        weight = noisy.weight[b, i].double() if weighting == "nelbo" else 1.0
        per_document[document].append(weight * -logits.log_softmax(0)[noisy.clean.tokens[b, i]])
    if reduction == "token":
        return sum(sum(v) for v in per_document.values()) / sum(counts.values())
    return sum(sum(v) / counts[d] for d, v in per_document.items() if counts.get(d)) / len(counts)


@pytest.mark.parametrize("weighting", ["nelbo", "plain"])
@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_loss_is_its_definition(vocabulary, make_batch, weighting, reduction):
    noisy = BernoulliMasker(vocabulary.mask_id)(make_batch(6, task="joint_text_image"))
    hidden, unembedding = hidden_states(noisy, vocabulary)
    sums, denominator = from_hidden(noisy, hidden, unembedding, vocabulary, weighting, reduction)
    expected = slow_loss(noisy, hidden, unembedding, vocabulary, weighting, reduction)
    assert_close((sums.loss / denominator).double(), expected, rtol=1e-5, atol=0, check_dtype=False)


def test_the_nelbo_is_weighed_by_the_schedule_however_the_loss_is(vocabulary, make_batch):
    """What is logged beside a plain loss, or one averaged per sequence, is the bound, per id range."""
    noisy = BernoulliMasker(vocabulary.mask_id)(make_batch(6, task="joint_text_image"))
    hidden, unembedding = hidden_states(noisy, vocabulary)
    found = from_hidden(noisy, hidden, unembedding, vocabulary, "plain", "sequence")[0].nelbo
    logits = vocabulary.restrict(hidden @ unembedding.T, noisy.clean.id_range)
    for r in range(len(vocabulary.ranges)):
        own = noisy.mask & (noisy.clean.id_range == r)
        expected = loss_from_logits(logits, noisy.clean.tokens, own, noisy.weight)
        assert_close(found[r], expected, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_logits_and_hidden_states_give_the_same_loss_and_gradient(vocabulary, make_batch):
    noisy = FixedCountMasker(vocabulary.mask_id)(make_batch(6, task="text_to_speech"))
    hidden, unembedding = hidden_states(noisy, vocabulary)
    sums, _ = from_hidden(noisy, hidden, unembedding, vocabulary)
    ours = torch.autograd.grad(sums.loss, (hidden, unembedding))
    logits = vocabulary.restrict(hidden @ unembedding.T, noisy.clean.id_range)
    other = loss_from_logits(logits, noisy.clean.tokens, noisy.mask, coefficients(noisy)[0])
    assert_close(sums.loss, other, rtol=1e-5, atol=1e-6, check_dtype=False)
    for a, b in zip(ours, torch.autograd.grad(other, (hidden, unembedding)), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("max_logits", [1, 130, 200, 10_000])  # chunks of 1, 2 and 3 ids, and none, at 64 positions
@pytest.mark.parametrize("bucket", [1, 64])
def test_chunks_and_buckets_change_nothing(vocabulary, make_batch, max_logits, bucket):
    noisy = BernoulliMasker(vocabulary.mask_id)(make_batch(5, task="joint_text_image"))
    hidden, unembedding = hidden_states(noisy, vocabulary)
    reference, _ = from_hidden(noisy, hidden, unembedding, vocabulary, max_logits=10**9, bucket=7)
    expected = torch.autograd.grad(reference.loss, (hidden, unembedding))
    sums, _ = from_hidden(noisy, hidden, unembedding, vocabulary, max_logits=max_logits, bucket=bucket)
    assert_close(sums.loss, reference.loss, rtol=1e-6, atol=0)
    assert_close(sums.nelbo, reference.nelbo, rtol=1e-6, atol=0)
    for a, b in zip(torch.autograd.grad(sums.loss, (hidden, unembedding)), expected, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)  # log-probabilities are float32


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs liger-kernel, and TRITON_INTERPRET=1 off a GPU")
@pytest.mark.parametrize("mask_id", [5, 14], ids=["mask inside the range", "mask outside"])
def test_the_fused_kernels_change_nothing(mask_id):
    pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    hidden, unembedding = torch.randn(64, 8, requires_grad=True), torch.randn(15, 8, requires_grad=True)
    target = torch.tensor([3, 4, 6, 7, 13]).repeat(13)[:64]  # ids 3 to 12, and the end token
    coefficient, own = torch.rand(64), IdRange("text", "text", 3, 10, may_end=True)

    def gradients(max_logits):
        ce = range_cross_entropy(hidden, unembedding, target, own, 13, mask_id, max_logits)
        return ce, *torch.autograd.grad((ce * coefficient).sum(), (hidden, unembedding))

    for fused, plain in zip(gradients(1), gradients(10_000), strict=True):
        assert_close(fused, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("max_logits", [2**27, 1, 40])
def test_the_mask_token_has_no_share_of_the_probability(monkeypatch, max_logits, fused):
    """Where it lies inside the range, as in a model from elsewhere: cross-entropy over the other ids alone."""
    if fused and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs liger-kernel, and TRITON_INTERPRET=1 off a GPU")
    monkeypatch.setattr(range_losses, "_liger", range_losses._liger if fused else lambda device: None)
    vocabulary = Vocabulary.of_text(9, mask=4, pad=0, end=8)
    g = torch.Generator().manual_seed(0)
    hidden, unembedding = torch.randn(1, 5, WIDTH, generator=g), torch.randn(9, WIDTH, generator=g)
    target, every, text = torch.tensor([[1, 8, 3, 5, 7]]), torch.ones(1, 5), torch.zeros(1, 5, dtype=torch.long)
    positions = positions_by_range(target, every.bool(), text, every, every, vocabulary, bucket=1)
    kept = [v for v in range(9) if v != 4]
    logits = (hidden[0] @ unembedding.T)[:, kept]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([kept.index(v) for v in target[0]]), reduction="sum")
    assert_close(loss_from_hidden(hidden, unembedding, positions, vocabulary, max_logits).loss, expected)


@pytest.mark.parametrize(
    ("position", "target", "message"),
    [
        (7, 0, "is 0, which cannot stand in the range 'image': ids 7 to 11, and not the mask token"),
        (3, 12, "is 12, which cannot stand in the range 'text': ids 0 to 6, or the end token 21, and not the mask token 19"),
        (3, 19, "is 19, which cannot stand in the range 'text'"),
        (7, 21, "is 21, which cannot stand in the range 'image'"),
        (3, -1, "is -1, which cannot stand in the range 'text'"),
        (7, 10_000, "is 10000, which cannot stand in the range 'image'"),
    ],
)
def test_a_forbidden_target_is_named(vocabulary, make_batch, position, target, message):
    clean = make_batch(3, task="joint_text_image")
    tokens, every = clean.tokens.clone(), clean.maskable.float()
    tokens[1, position] = target
    with pytest.raises(ValueError, match=f"loss: the target at row 1, position {position} {message}"):
        positions_by_range(tokens, clean.maskable, clean.id_range, every, every, vocabulary)
    unmasked = clean.maskable.clone()
    unmasked[1, position] = False
    positions_by_range(tokens, unmasked, clean.id_range, every, every, vocabulary)  # what is not predicted is no target


def test_the_mask_token_is_no_target_where_it_lies_in_the_range():
    every, text = torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="row 0, position 2 is 4, which cannot stand in the range 'text': ids 0 to 8"):
        positions_by_range(torch.tensor([[1, 8, 4]]), every.bool(), text, every, every, Vocabulary.of_text(9, 4, 0, 8))


@pytest.mark.parametrize(
    ("target", "message"),
    [(3, "the target 3 is ruled out where it stands"), (5, "5 is none of the 5 ids"), (-100, "-100 is none of the 5 ids")],
)
def test_a_target_that_logits_rule_out_is_named(target, message):
    logits, every, targets = torch.zeros(1, 2, 5), torch.ones(1, 2), torch.tensor([[0, target]])
    logits[0, 1, 3] = -math.inf
    with pytest.raises(ValueError, match=message):
        loss_from_logits(logits, targets, every.bool(), every)
    loss = loss_from_logits(logits, targets, torch.tensor([[True, False]]), every)
    assert loss.item() == pytest.approx(math.log(5))  # what is not predicted is no target


@pytest.mark.parametrize("target", [-1, 10, 99])
def test_a_target_outside_a_range_in_chunks_is_an_infinite_loss(target):
    """Not the plausible number that the nearest id of a chunk has."""
    own = IdRange("text", "text", 0, 10, may_end=False)
    ce = range_cross_entropy(torch.randn(2, 8), torch.randn(12, 8), torch.tensor([3, target]), own, 11, 10, max_logits=6)
    assert ce[0].isfinite()
    assert ce[1] == math.inf


def test_a_batch_without_a_masked_token_has_a_loss_and_a_gradient_of_zero(vocabulary):
    """Of every weight, or ranks that had some would wait for one that had none."""
    hidden = torch.randn(1, 4, WIDTH, requires_grad=True)
    unembedding = torch.randn(vocabulary.size, WIDTH, requires_grad=True)
    sums = loss_from_hidden(hidden, unembedding, [], vocabulary)
    sums.loss.backward()
    assert sums.loss.item() == 0
    assert (hidden.grad == 0).all()
    assert (unembedding.grad == 0).all()


def test_no_masked_token_is_dropped(vocabulary, make_batch):
    noisy = BernoulliMasker(vocabulary.mask_id)(make_batch(64, task="joint_text_image"))
    clean = noisy.clean
    positions = positions_by_range(clean.tokens, noisy.mask, clean.id_range, noisy.weight, noisy.weight, vocabulary, bucket=32)
    found = torch.cat([p.index[p.weight > 0] for p in positions]).sort().values
    assert_close(found, noisy.mask.flatten().nonzero()[:, 0])
    assert all(len(p.index) % 32 == 0 for p in positions)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_padding_and_packing_change_nothing(vocabulary, make_batch, reduction):
    """The same documents alone, padded, and packed into one row: the same loss and gradients per token."""
    g = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 7, (n,), generator=g) for n in (3, 5, 2)]
    sequences = [task_sequence(vocabulary, "text", {"text": t}, {}) for t in texts]
    padded = collate([[s] for s in sequences], [[0], [1], [2]], vocabulary.pad_id, length=20)
    packed = collate([sequences], [[0, 1, 2]], vocabulary.pad_id, length=24)
    masker = BernoulliMasker(vocabulary.mask_id, seed=1)
    results = []
    table = torch.randn(3, 8, WIDTH, dtype=torch.float64, generator=g)
    for batch in (padded, packed):
        noisy = masker(batch)
        _, unembedding = hidden_states(noisy, vocabulary)
        hidden = table[batch.document.clamp(min=0), batch.position].requires_grad_()
        sums, denominator = from_hidden(noisy, hidden, unembedding, vocabulary, "nelbo", reduction)
        gradient, rows = torch.autograd.grad(sums.loss / denominator, (hidden, unembedding))
        order = batch.document.flatten() * 100 + batch.position.flatten()
        real = batch.document.flatten() >= 0
        by_token = gradient.flatten(0, 1)[real][order[real].argsort()]
        results.append((sums.loss / denominator, by_token, rows))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_micro_batches_add_up(vocabulary, make_batch):
    """Numerators and denominators are summed before the division: two halves are the whole."""
    masker = BernoulliMasker(vocabulary.mask_id)
    whole = masker(make_batch(8))
    hidden, unembedding = hidden_states(whole, vocabulary)
    sums, denominator = from_hidden(whole, hidden, unembedding, vocabulary)
    halves, total = 0.0, 0.0
    for part in (slice(0, 3), slice(3, 8)):
        clean = type(whole.clean)(*(getattr(whole.clean, f)[part] for f in whole.clean.__dataclass_fields__))
        noisy = type(whole)(clean, whole.noisy[part], whole.mask[part], whole.weight[part])
        s, d = from_hidden(noisy, hidden[part], unembedding, vocabulary)
        halves, total = halves + s.loss, total + d
    assert_close(halves / total, sums.loss / denominator)


def test_anti_masking_lowers_the_gradient_variance(vocabulary):
    """Against two independent masks of the same sequence, over 400 draws each, for fixed-count and Bernoulli masks.

    A linear model's gradient on one sequence: the pair's variance must be under 0.9 of the independent one's (measured:
    0.61 for fixed counts, 0.65 for Bernoulli masks); an independent second mask in place of the complement gives 1.
    """
    g = torch.Generator().manual_seed(0)
    sequence = task_sequence(vocabulary, "text", {"text": torch.randint(0, 7, (12,), generator=g)}, {})
    unembedding = torch.randn(vocabulary.size, WIDTH, dtype=torch.float64, generator=g).requires_grad_()
    table = torch.randn(1, len(sequence), WIDTH, dtype=torch.float64, generator=g)

    def variance(masker, independent: bool) -> float:
        gradients = []
        for j in range(400):
            indices = [2 * j, 2 * (j + 400)] if independent else [2 * j, 2 * j + 1]
            noisy = masker(collate([[sequence]] * 2, [[i] for i in indices], vocabulary.pad_id))
            sums, denominator = from_hidden(noisy, table.expand(2, -1, -1), unembedding, vocabulary)
            gradients.append(torch.autograd.grad(sums.loss / denominator, unembedding)[0].flatten())
        return torch.stack(gradients).var(0).sum().item()

    for make in (FixedCountMasker, lambda m, pairs: BernoulliMasker(m, pairs=pairs, t_min=0.05)):
        paired = variance(make(vocabulary.mask_id, pairs=True), independent=False)
        assert paired < 0.9 * variance(make(vocabulary.mask_id, pairs=False), independent=True)


def test_units():
    assert bits_per_token(math.log(2) * 30, 10) == pytest.approx(3.0)
    assert bits_per_byte(math.log(2) * 30, 60) == pytest.approx(0.5)
