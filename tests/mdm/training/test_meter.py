"""What a line of the history says of time and memory."""

import time
from dataclasses import replace

import pytest
import torch

from components.block_diffusion import BlockMasker
from components.block_diffusion.layout import Layout
from components.maskers import BernoulliMasker
from components.visibility import attention_mask, doubled
from mdm.data.pipeline import micro_batch
from mdm.data.settings import LossSettings
from mdm.hardware import Hardware
from mdm.models import builders
from mdm.training import meter
from mdm.training.meter import Meter, work

HERE = Hardware(torch.device("cpu"), 0, 1, False)


@pytest.fixture
def micro(vocabulary, make_batch):
    return micro_batch(make_batch(first_index=7), BernoulliMasker(vocabulary.mask_id), LossSettings(), vocabulary)


def test_work_counts_tokens_of_documents_and_the_logits_of_masked_positions(vocabulary, micro):
    document, rows = micro.noisy.clean.document, 0
    expected = sum(int((document[r] == d).sum()) ** 2 for r in range(len(document)) for d in document[r].unique() if d >= 0)
    tokens, pairs, logits = work(micro, vocabulary)
    assert tokens == micro.num_tokens
    assert pairs == expected > 0
    rows = sum(len(p.index) * vocabulary.ranges[p.range_index].size for p in micro.positions)
    assert logits == rows > 0


def test_flops_are_six_a_weight_and_what_attention_and_the_vocabulary_take():
    model = builders.nano(vocab_size=100, max_length=16, width=32, num_layers=2, num_heads=2)
    matrices = sum(p.numel() for b in model.blocks for p in b.parameters() if p.ndim > 1)
    assert model.flops(10, 50, 70) == 6 * matrices * 10 + 12 * 2 * 32 * 50 + 6 * 32 * 70
    assert model.flops_per_token(16, 0.5) == model.flops(1, 16, 50)
    for p in model.blocks.parameters():
        p.requires_grad_(False)
    assert model.flops(10, 0, 0) == 4 * matrices * 10


def test_mfu_is_the_models_flops_over_the_peak_and_null_where_that_is_not_known(monkeypatch, vocabulary, micro):
    def flops(*done):
        return 1e9 * sum(done)

    assert Meter(HERE, vocabulary, flops).line(2.0)["mfu"] is None
    monkeypatch.setattr(meter, "peak_tflops", lambda: 4.0)
    known = Meter(HERE, vocabulary, flops)
    known.count(micro)
    known.count(micro)
    assert known.line(2.0)["mfu"] == pytest.approx(2 * 1e9 * sum(work(micro, vocabulary)) / 2.0 / 4e12)
    assert known.line(2.0)["mfu"] == 0.0  # since the last line


def test_waits_are_those_of_the_slowest_process(monkeypatch):
    class Two(Hardware):
        def gather(self, values):
            return [*values, [0.25, 7.0, 0.0]]

    def steps():
        for i in range(3):
            time.sleep(0.05)
            yield i

    own = Meter(Two(torch.device("cpu"), 0, 1, False))
    assert list(own.waits(steps())) == [0, 1, 2]
    assert 0.15 < own.waited["data_seconds"] < 1
    with own.waiting("checkpoint_seconds"):
        time.sleep(0.05)
    line = own.line(1.0)
    assert line["data_seconds"] == 7.0
    assert 0.05 <= line["checkpoint_seconds"] < 0.5
    assert line["memory_gib"] >= meter.memory_gib(HERE) * 0.99 > 0.1
    assert own.waited == {"data_seconds": 0.0, "checkpoint_seconds": 0.0}


def test_all_processes_work_is_held_against_all_their_peaks(monkeypatch):
    class Two(Hardware):
        def gather(self, values):
            return values

        def sum(self, values):
            return values + 4

    monkeypatch.setattr(meter, "peak_tflops", lambda: 1.0)
    own = Meter(Two(torch.device("cpu"), 0, 2, False), flops=lambda *done: 1e12 * sum(done))
    assert own.line(3.0)["mfu"] == pytest.approx(3 * 4 / 3 / 2)


def test_padding_attends_to_nothing(vocabulary, make_batch):
    micro = micro_batch(make_batch(), BernoulliMasker(vocabulary.mask_id), LossSettings(), vocabulary)
    micro, document = replace(micro, whole_rows=False), micro.noisy.clean.document
    before, seen = work(micro, vocabulary)[1], int((document[0] == document[0, 0]).sum())
    document[0] = -1  # PAD_DOCUMENT
    assert work(micro, vocabulary)[1] == before - seen**2


def test_of_blocks_both_copies_are_counted_and_whom_they_see(vocabulary, make_batch):
    masker = BlockMasker(BernoulliMasker(vocabulary.mask_id), Layout({"audio": 4}, vocabulary.modalities))
    micro = micro_batch(make_batch(task="text_to_speech"), masker, LossSettings(), vocabulary)
    tokens, pairs, _ = work(micro, vocabulary)
    here = micro.rows.places.document >= 0
    assert tokens == int(here.sum()) > micro.num_tokens
    assert pairs == int((attention_mask(doubled, micro.rows.places) & here[:, :, None]).sum())
