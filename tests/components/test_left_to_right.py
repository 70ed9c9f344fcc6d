"""Self-speculation against the autoregressive mode: enumerated, over models that are tables."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from components.block_diffusion.decoding import Task, sample_blocks
from components.samplers.left_to_right import LeftToRight, SelfSpeculation

V, LENGTH, SIZE = 3, 4, 3
MASK = V


class Tables:
    """A model of strings of 4 behind a first token, in blocks of 3: p depends on the tokens before, q on what is seen too."""

    def __init__(self, seed=0, sharp=1.5, agree=False):
        generator = torch.Generator().manual_seed(seed)
        self.p = sharp * torch.randn(LENGTH + 1, V ** (LENGTH + 1), V, generator=generator)
        self.q = self.p if agree else sharp * torch.randn(LENGTH + 1, V ** (LENGTH + 1), V, generator=generator)
        self.passes = 0

    def key(self, tokens):
        return int(sum(t * V**i for i, t in enumerate(tokens)))

    def __call__(self, tokens, start, stop, width):
        self.passes += len(tokens)
        out = torch.zeros(len(tokens), 1 + width, width, V + 1)
        for row, (s, e) in enumerate(zip(start, stop, strict=True)):
            own = tokens[row].tolist()
            for i in range(s, e):
                before = [t if t < V else 0 for t in own[:i]]
                out[row, 0, i - s, :V] = self.p[i, self.key(before)]
                for k in range(width):
                    out[row, 1 + k, i - s, :V] = self.q[i, self.key(before[: s + k])]
        return out

    def select(self, rows):
        pass

    def joint(self, sharpness=1.0):
        """The probability of every string, by the chain rule."""
        strings = list(itertools.product(range(V), repeat=LENGTH))
        found = []
        for string in strings:
            own = [0, *string]
            each = [(self.p[i, self.key(own[:i])] * sharpness).softmax(-1)[own[i]] for i in range(1, LENGTH + 1)]
            found.append(float(torch.stack(each).prod()))
        return strings, np.array(found)


def task(rows):
    tokens = torch.zeros(rows, LENGTH + 1, dtype=torch.long)
    generate = torch.ones_like(tokens, dtype=torch.bool)
    generate[:, 0] = False
    block = torch.tensor([0, 1, 1, 1, 2]).expand(rows, -1)
    zeros = torch.zeros_like(tokens)
    return Task(tokens, generate, block, zeros, zeros, torch.ones(1, V + 1, dtype=torch.bool), torch.arange(V + 1))


@pytest.mark.parametrize(
    "sampler", [LeftToRight(), SelfSpeculation(), SelfSpeculation(temperature=0.7)], ids=["one by one", "drafts", "cool"]
)
def test_samples_are_distributed_as_the_chain_rule(sampler):
    """Chi-square over all 81 strings of 8,000 samples: above its 99.99 % quantile once in 10,000 right codes."""
    model, n = Tables(), 8_000
    strings, p = model.joint(1 / sampler.temperature)
    made = sample_blocks([sampler], model, task(n), seed=1)
    found = np.zeros(len(strings))
    for string, count in zip(*np.unique(made.tokens[:, 1:].numpy(), axis=0, return_counts=True), strict=True):
        found[strings.index(tuple(string.tolist()))] = count
    chi = ((found - n * p) ** 2 / (n * p)).sum()
    assert chi < 80 + 3.72 * (2 * 80) ** 0.5 + 6  # 80 degrees of freedom: normal approximation with its third cumulant


def test_greedy_tokens_are_those_of_one_by_one_whatever_the_drafts():
    for seed in range(10):
        model = Tables(seed)
        one = sample_blocks([LeftToRight(temperature=0.0)], model, task(4))
        drafted = sample_blocks([SelfSpeculation(temperature=0.0)], model, task(4))
        assert torch.equal(one.tokens, drafted.tokens)
        assert one.forwards.tolist() == [4] * 4


def test_drafts_that_agree_are_accepted_whole_and_passes_are_few():
    """q = p on what is seen: a block of 3 takes its first token's pass, and one for the rest or two."""
    model = Tables(agree=True, sharp=50.0)
    made = sample_blocks([SelfSpeculation(temperature=0.0)], model, task(8))
    assert made.forwards.max() <= 4
    assert made.forwards.double().mean() < 4
    alike = Tables(agree=True)
    alike.q = alike.p = alike.p[:, :1].expand(-1, V ** (LENGTH + 1), -1)  # nothing depends on anything: every draft stands
    assert sample_blocks([SelfSpeculation()], alike, task(8)).forwards.tolist() == [3] * 8


def test_what_is_given_behind_a_gap_is_refused():
    own = task(1)
    own.generate[0, 2] = False
    with pytest.raises(ValueError, match="SelfSpeculation goes from left to right"):
        sample_blocks([SelfSpeculation()], Tables(), own)
