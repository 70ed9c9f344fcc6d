"""Decoding with a perfect denoiser of strings of four: what several tokens a pass cost falls as blocks shrink."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from components.block_diffusion import decoding
from components.block_diffusion.decoding import Task, sample_blocks
from components.samplers import Ancestral, FirstHitting
from tests.components.block_diffusion.test_training import MASK, STRINGS, L, P, V, posterior

N = 10_000


class Perfect:
    """log p(x_i | what is before the block's end and no mask), by enumeration."""

    def __init__(self):
        self.known = {}
        self.rows = []

    def __call__(self, tokens, start, stop, width):
        self.rows.append(len(tokens))
        out = torch.zeros(len(tokens), width, V + 1, dtype=torch.float64)
        for row, (s, e) in enumerate(zip(start, stop, strict=True)):
            key = (*tokens[row, :e].tolist(), *[MASK] * (L - e))
            if key not in self.known:
                self.known[key] = posterior(torch.tensor(key)).clamp(min=-1e9)
            out[row, : e - s, :V] = self.known[key][s:e]
        return out

    def select(self, rows):
        pass


def task(rows, size):
    zeros = torch.zeros(rows, L, dtype=torch.long)
    block = (torch.arange(L) // size).expand(rows, -1)
    return Task(zeros, zeros == 0, block, zeros, zeros, torch.ones(1, V + 1, dtype=torch.bool), torch.arange(V + 1))


def distance(made):
    """Total variation between what was drawn and the truth."""
    key = (made.tokens * V ** torch.arange(L)).sum(dim=1)
    found = torch.bincount(key, minlength=V**L).double() / N
    return float((found[(STRINGS * V ** torch.arange(L)).sum(dim=1)] - P).abs().sum() / 2)


NOISE = 0.5 * float((2 * P * (1 - P) / (torch.pi * N)).sqrt().sum())  # of N exact draws: half the sum of E|error|


def test_with_two_steps_a_block_the_samples_come_nearer_to_the_truth_as_blocks_shrink():
    """A block of one is exact however many steps it has; each larger one errs by more, beyond the noise of N draws."""
    far = {size: distance(sample_blocks([Ancestral(num_steps=2)], Perfect(), task(N, size))) for size in (1, 2, 4)}
    assert far[1] < 2 * NOISE
    assert far[1] + 2 * NOISE < far[2]
    assert far[2] + 2 * NOISE < far[4]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_one_token_a_pass_is_exact_at_every_block_size(size):
    made = sample_blocks([FirstHitting()], Perfect(), task(N, size))
    assert distance(made) < 2 * NOISE
    assert made.forwards.tolist() == [L] * N


def test_an_end_closes_its_canvas_and_what_is_closed_is_not_computed():
    """Rows whose first block holds an end are done; the others' batch is smaller from there on."""
    model = Perfect()
    made = sample_blocks([FirstHitting()], model, dataclasses.replace(task(400, 2), end_id=0), seed=3)
    ended = (made.tokens[:, :2] == 0).any(dim=1)
    assert 0 < int(ended.sum()) < 400
    assert bool((made.tokens[ended, 2:] == 0).all())
    assert bool((made.confidence[ended, 2:] == 1).all())
    assert made.forwards[ended].max() == 2
    assert model.rows == [int((made.forwards >= k).sum()) for k in range(1, 5)]
    assert model.rows[2] == int((~ended).sum())


def test_a_row_draws_numbers_for_its_own_positions_whatever_widths_are_beside_it():
    both = dataclasses.replace(task(2, 2), block=torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]]))
    alone = dataclasses.replace(task(1, 2), block=both.block[:1])
    together = sample_blocks([Ancestral(num_steps=3)], Perfect(), both, index=[7, 8])
    assert torch.equal(together.tokens[:1], sample_blocks([Ancestral(num_steps=3)], Perfect(), alone, index=[7]).tokens)


def test_patience_begins_anew_with_each_block(monkeypatch):
    """Two passes for nothing in each of four blocks: more than three in all, and never in one."""

    class Slow:
        def __init__(self):
            self.passes = 0

        def step(self, logits, state):
            self.passes += 1
            return FirstHitting().step(logits, state) if self.passes % 3 == 0 else state

    monkeypatch.setattr(decoding, "PATIENCE", 3)
    assert sample_blocks([Slow()], Perfect(), task(1, 1)).forwards.tolist() == [12]
