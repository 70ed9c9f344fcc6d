"""The doubled rows of a model of blocks against a pass for each block: loss, gradients, packing, and the next-token loss."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from components.block_diffusion import BlockMasker, Layout, doubled_rows
from components.maskers import FixedCountMasker
from components.sequences import TokenSequence, collate
from components.types import Batch
from components.visibility import FINISHED, NOISY, Places
from components.vocabulary import Vocabulary
from mdm.data.pipeline import micro_batch
from mdm.data.settings import LossSettings
from mdm.evaluation.nelbo import forward_loss, weighted_nats
from mdm.hardware import hardware
from mdm.models import builders

VOCABULARY = Vocabulary.build({"text": (9,), "image": (7,)}, may_end=("text",), tasks=["text"])
LAYOUT = Layout({"text": 3}, VOCABULARY.modalities)


def sequences():
    """Documents as recipes have them: given and generated text, then a whole image; of unlike lengths."""
    generator, found = torch.Generator().manual_seed(4), []
    for given, text, image in ((2, 7, 4), (5, 3, 0), (1, 8, 2)):
        length = 1 + given + text + image
        modality = torch.tensor([-1] + [0] * (given + text) + [1] * image)
        maskable = torch.tensor([False] * (1 + given) + [True] * (text + image))
        ranges = torch.where(modality == 1, VOCABULARY.ranges_of("image")[0], VOCABULARY.ranges_of("text")[0])
        start = torch.tensor([VOCABULARY.ranges[r].start for r in ranges])
        tokens = start + torch.randint(7, (length,), generator=generator)
        found.append(TokenSequence(tokens, modality, torch.where(modality < 0, -1, ranges), maskable, ~maskable))
    return found


def model_of(causal):
    model = builders.model(VOCABULARY.size, 64, 32, 3, 2, blocks={"text": 3}, causal=causal)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


def rows(packing, masker):
    """The same documents and noise, in rows of one or of several."""
    own = sequences()
    return micro_batch(
        collate([[own[i] for i in row] for row in packing], packing, VOCABULARY.pad_id),
        masker,
        LossSettings(),
        VOCABULARY,
        packed=True,
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packing", [[[0], [1], [2]], [[0, 1, 2]], [[1, 0], [2]]], ids=["padded", "packed", "both"])
def test_the_doubled_row_gives_the_loss_and_gradient_of_a_pass_for_each_block(causal, packing):
    """The reference: for each block a row of its own, of the finished positions before it and its noisy ones."""
    model, masker = model_of(causal), BlockMasker(FixedCountMasker(VOCABULARY.mask_id), LAYOUT)
    with hardware("cpu", "fp32") as hw:
        micro = rows(packing, masker)
        sums = forward_loss(model, micro, VOCABULARY, hw)
        sums.loss.backward()
        got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        apart = rows([[0], [1], [2]], masker).noisy
        total = torch.zeros(())
        for row in range(3):
            for b in range(int(apart.block[row].max()) + 1):
                here = (apart.block[row] == b) & apart.clean.maskable[row]
                if not bool(here.any()):
                    continue
                start, stop = int((apart.block[row] == b).nonzero()[0]), int(here.nonzero()[-1]) + 1
                index = torch.arange(stop)[None]
                z = torch.where(index[0] < start, apart.clean.tokens[row, :stop], apart.noisy[row, :stop])
                places = Places(
                    torch.zeros_like(index),
                    index,
                    apart.block[row : row + 1, :stop],
                    torch.where(index < start, FINISHED, NOISY),
                )
                logits = model.unembedding(model.hidden(z[None], model.sees(places), index))[0]
                logits = VOCABULARY.restrict(logits, apart.clean.id_range[row, :stop]).log_softmax(-1)
                nats = -logits.gather(1, apart.clean.tokens[row, :stop, None])[:, 0]
                weight = torch.where(apart.mask[row, :stop] & here[:stop], apart.weight[row, :stop], 0.0)
                total = total + (weight * nats.nan_to_num(posinf=0.0)).sum() / apart.clean.maskable[row].sum()
        total.backward()
    assert_close(sums.loss, total, rtol=1e-6, atol=1e-6)
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_no_position_is_computed_that_nobody_needs():
    """A document of one block after its prompt is as long as without blocks; of several, the last has no finished copy."""
    masker = BlockMasker(FixedCountMasker(VOCABULARY.mask_id), Layout({"text": 100}, VOCABULARY.modalities))
    noisy = masker(collate([[sequences()[1]]], [[1]], VOCABULARY.pad_id))
    made = doubled_rows(noisy)
    assert int((made.places.document >= 0).sum()) == 9
    three = BlockMasker(FixedCountMasker(VOCABULARY.mask_id), Layout({"text": 1}, VOCABULARY.modalities))
    assert int((doubled_rows(three(noisy.clean)).places.document >= 0).sum()) == 9 + 2
    assert int((doubled_rows(three(noisy.clean), next_token=True).places.document >= 0).sum()) == 9 + 3


def test_the_next_token_loss_is_the_autoregressive_models_on_the_same_weights():
    """Beside the diffusion loss, with its weight: one pass over the finished row, causal, each position the one behind it."""
    model = model_of(causal=True)
    masker = BlockMasker(FixedCountMasker(VOCABULARY.mask_id), LAYOUT)
    own = sequences()
    batch = collate([[s] for s in own], [[0], [1], [2]], VOCABULARY.pad_id)
    with hardware("cpu", "fp32") as hw, torch.no_grad():
        alone, joint = (
            forward_loss(model, micro_batch(batch, masker, LossSettings(next_token=w), VOCABULARY), VOCABULARY, hw)
            for w in (0.0, 0.3)
        )
    plain = builders.model(VOCABULARY.size, 64, 32, 3, 2, autoregressive=True)
    plain.load_state_dict(model.state_dict())
    want = 0.0
    for s in own:
        logits = VOCABULARY.restrict(plain.eval()(s.tokens[None])[0], s.id_range).log_softmax(-1)
        nats = -logits.gather(1, s.tokens[:, None])[:, 0]
        want = want + float(nats[s.maskable].sum() / s.maskable.sum())
    assert_close(float(joint.loss - alone.loss), 0.3 * want, rtol=1e-5, atol=1e-5)
    assert_close(joint.nelbo, alone.nelbo)


def test_a_document_that_begins_with_what_is_generated_has_its_first_token_predicted_by_nothing():
    """No finished token is before it: the next-token loss leaves it out."""
    vocabulary = Vocabulary.of_text(12, mask=9, pad=10, end=11)
    masker = BlockMasker(FixedCountMasker(9), Layout({"text": 2}, vocabulary.modalities))
    micro = micro_batch(Batch.of(torch.zeros(1, 4, dtype=torch.long), 0), masker, LossSettings(next_token=1.0), vocabulary)
    assert int((micro.positions[-1].coefficient > 0).sum()) == 3
    assert micro.noisy.block is not None
    assert micro.noisy.block.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("blocks", [True, False])
def test_what_each_position_adds_to_the_bound_is_the_bound_and_stands_where_it_is_masked(blocks):
    fixed = FixedCountMasker(VOCABULARY.mask_id, seed=2)
    model = model_of(False) if blocks else builders.model(VOCABULARY.size, 64, 32, 3, 2)
    if not blocks:
        model.init_weights(torch.Generator().manual_seed(0))
    micro = rows([[0, 1], [2]], BlockMasker(fixed, LAYOUT) if blocks else fixed)
    with hardware("cpu", "fp32") as hw:
        nats = weighted_nats(model, micro, VOCABULARY, hw)
        whole = forward_loss(model, micro, VOCABULARY, hw).nelbo.sum()
    assert nats.shape == micro.noisy.mask.shape
    assert torch.equal(nats > 0, micro.noisy.mask)
    assert_close(nats.sum(), whole)
