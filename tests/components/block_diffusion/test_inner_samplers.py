"""Samplers inside blocks: those that revise, that judge drafts, and whose noise is no mask, in rows of several modalities."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from components.block_diffusion.decoding import Task, sample_blocks
from components.kernels import Uniform
from components.samplers import Ancestral, Confidence, FirstHitting, LeftToRight, SelfCorrect, SelfSpeculation
from components.weightings import Noise, Noises

V, SIZE, LENGTH = 5, 3, 7
MASK = V


class Table:
    """Logits of a position, its row's first token and how many tokens of its block are seen: the copies disagree."""

    def __init__(self, copies=False):
        self.table = 2 * torch.randn(V, SIZE + 1, LENGTH + SIZE, V + 1, generator=torch.Generator().manual_seed(0))
        self.copies, self.seen = copies, []

    def __call__(self, tokens, start, stop, width):
        self.seen.append((tokens.clone(), list(start), list(stop)))
        at = torch.tensor(start)[:, None] + torch.arange(width)
        rows = self.table[tokens[:, 0]]  # [rows, seen, positions, vocab]
        each = range(width + 1) if self.copies else [0]
        out = torch.stack([rows[torch.arange(len(tokens))[:, None], k, at] for k in each], dim=1)
        return out if self.copies else out[:, 0]

    def select(self, rows):
        pass


def task(modality=(0, 0, 0)):
    """A given token, then two blocks of 3, in rows of these modalities."""
    rows = len(modality)
    tokens = torch.arange(rows)[:, None].expand(-1, LENGTH).clone() % V
    generate = torch.ones_like(tokens, dtype=torch.bool)
    generate[:, 0] = False
    block = torch.tensor([0, 1, 1, 1, 2, 2, 2]).expand(rows, -1)
    kind = torch.tensor(modality)[:, None].expand(-1, LENGTH)
    return Task(tokens, generate, block, kind, torch.zeros_like(tokens), torch.ones(1, V + 1).bool(), torch.arange(V + 1))


def one_row(whole, row):
    some = {name: getattr(whole, name)[row : row + 1] for name in ("tokens", "generate", "block", "modality", "kind")}
    return dataclasses.replace(whole, **some)


def test_a_block_begins_with_noise_that_the_model_sees():
    """Noise that is any token: the first pass of a block is given it, not masks; a row's noise is that of its index."""
    noise, model = Noises.of({"text": Noise(Uniform())}, ["text"]), Table()
    made = sample_blocks([Ancestral(num_steps=2)], model, task(), noise=noise, index=[4, 5, 6])
    for tokens, start, stop in model.seen:
        assert not bool((tokens[:, start[0] : stop[0]] == MASK).any())
        assert bool((tokens[:, stop[0] : LENGTH] == MASK).all())
    first = model.seen[0][0][:, 1:4]
    assert len(first.unique(dim=0)) == 3
    alone = Table()
    sample_blocks([Ancestral(num_steps=2)], alone, one_row(task(), 1), noise=noise, index=[5])
    assert torch.equal(alone.seen[0][0][0, 1:4], first[1])
    assert made.forwards.tolist() == [4] * 3


def test_every_step_is_shown_and_what_is_before_the_first():
    shown = []
    sample_blocks([FirstHitting()], Table(), task(), on_step=lambda tokens, _: shown.append(tokens.clone()))
    assert [int((tokens == MASK).sum()) for tokens in shown] == [18, 15, 12, 9, 6, 3, 0]


@pytest.mark.parametrize("modality", [(0, 0, 0), (0, 1, 0), (1, 0, 1)])
def test_a_sampler_that_corrects_does_so_in_its_blocks_beside_one_that_does_not(modality):
    """Two passes a block, and in those of modality 1 up to three that correct: to the most probable tokens, one a pass."""
    samplers = [Confidence(num_steps=2), SelfCorrect(Confidence(num_steps=2, temperature=50.0), passes=8, temperature=0.0)]
    model = Table()
    made = sample_blocks(samplers, model, task(modality))
    for row, kind in enumerate(modality):
        assert not bool((made.tokens[row] == MASK).any())
        if kind == 0:
            assert int(made.forwards[row]) == 4
        else:
            assert torch.equal(made.tokens[row, 1:], model.table[row, 0, 1:LENGTH, :V].argmax(dim=-1))
            assert int(made.forwards[row]) >= 6


@pytest.mark.parametrize("modality", [(0, 0, 0), (0, 1, 0)])
def test_drafts_are_judged_in_rows_of_every_modality(modality):
    """Drafts that differ from what the finished copy says: greedy tokens are those of one by one all the same."""
    one = sample_blocks([LeftToRight(temperature=0.0)] * 2, Table(True), task(modality))
    drafted = sample_blocks([SelfSpeculation(temperature=0.0)] * 2, Table(True), task(modality))
    assert torch.equal(one.tokens, drafted.tokens)
    both = sample_blocks([LeftToRight(temperature=0.0), SelfSpeculation(temperature=0.0)], Table(True), task(modality))
    assert torch.equal(one.tokens, both.tokens)


def test_logits_of_a_draft_that_are_broken_are_said():
    model = Table(True)
    model.table[:, 2, 2] = float("nan")
    with pytest.raises(ValueError, match="nothing can be drawn at position 2 of row 0"):
        sample_blocks([SelfSpeculation()], model, task())
