"""Greedy decoding in blocks against LLaDA's rule, written from its paper as a slow loop; rows, constraints and groups."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from components.samplers import (
    Ancestral,
    Blocks,
    Confidence,
    FillAfterEnd,
    FirstHitting,
    PerModality,
    SamplerState,
    Threshold,
    guided,
    sample,
)

V, MASK = 12, 11


def tiny_transformer(seed=0):
    """A random bidirectional model of two layers in float64: logits at a position depend on all tokens."""
    torch.manual_seed(seed)
    embed = torch.nn.Embedding(V, 16)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    body, head = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.nn.Linear(16, V)
    place = torch.randn(64, 16, dtype=torch.float64)
    modules = [m.double().eval() for m in (embed, body, head)]

    def fn(tokens):
        with torch.no_grad():
            return 3 * modules[2](modules[1](modules[0](tokens) + place[: tokens.shape[1]]))

    return fn


def random_logits(tokens):
    """Logits drawn anew for every context: a hash of the row seeds them."""
    rows = [torch.Generator().manual_seed(int((row * torch.arange(1, len(row) + 1)).sum())) for row in tokens]
    return torch.stack([torch.randn(tokens.shape[1], V, dtype=torch.float64, generator=g) for g in rows])


def llada_reference(logits_fn, prompt, gen_length, steps, block_length, scale=0.0):
    """Section 2.4 and the appendix of 2502.09992, one prompt, one position at a time: the tokens, and their order."""
    x = torch.cat([prompt, torch.full((gen_length,), MASK)])
    order = []
    blocks = gen_length // block_length
    steps_a_block = steps // blocks
    for b in range(blocks):
        end = len(prompt) + (b + 1) * block_length
        n = int((x[:end] == MASK).sum())
        for step in range(steps_a_block):
            logits = logits_fn(x[None])[0]
            if scale:
                empty = x.clone()
                empty[: len(prompt)] = MASK
                logits = (1 + scale) * logits - scale * logits_fn(empty[None])[0]
            logits[:, MASK] = -torch.inf
            probability = logits.softmax(-1)
            sure = {i: probability[i].max().item() for i in range(end) if x[i] == MASK}
            keep = n // steps_a_block + (step < n % steps_a_block)
            for i in sorted(sure, key=lambda i: -sure[i])[:keep]:
                x[i] = logits[i].argmax()
                order.append((b, step, i - len(prompt)))
    return x[len(prompt) :], order


@pytest.mark.parametrize("logits_fn", [random_logits, tiny_transformer()], ids=["random", "transformer"])
@pytest.mark.parametrize(("steps", "block"), [(12, 12), (12, 4), (8, 4), (5, 12), (3, 4)])
@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_greedy_confidence_in_blocks_is_lladas_decoding(logits_fn, steps, block, scale):
    """The same tokens, unmasked in the same steps of the same blocks."""
    prompt = torch.randint(0, MASK, (5,), generator=torch.Generator().manual_seed(steps))
    tokens = torch.cat([prompt, torch.full((12,), MASK)])[None]
    given = (tokens != MASK) & (torch.arange(17) < 5)
    want, order = llada_reference(logits_fn, prompt, 12, steps, block, scale)
    masks = []
    fn = guided(logits_fn, given, MASK, scale)
    sampler = Blocks(Confidence(num_steps=steps * block // 12, temperature=0.0), block)
    got = sample(sampler, fn, tokens, MASK, on_step=lambda s: masks.append(s.masked[0, 5:]))
    assert torch.equal(got.tokens[0, 5:], want)
    previous, groups = torch.ones(12, dtype=torch.bool), []
    for masked in masks:
        groups.append(sorted((previous & ~masked).nonzero()[:, 0].tolist()))
        previous = masked
    expected = {}
    for b, step, i in order:
        expected.setdefault((b, step), []).append(i)
    assert groups == [sorted(g) for g in expected.values()]


class Rows:
    """A logits function that can leave rows out, and counts the rows it is asked for."""

    def __init__(self, fn, rows=0):
        self.fn, self.rows = fn, [rows]

    def __call__(self, tokens):
        self.rows[0] += len(tokens)
        return self.fn(tokens)

    def select(self, rows):
        return self


def test_a_finished_row_costs_no_more_forwards():
    tokens = torch.full((3, 12), MASK)
    tokens[1, 3:] = 0  # three to fill
    tokens[2] = 0  # nothing
    fn = Rows(tiny_transformer())
    out = sample(Confidence(num_steps=12, temperature=0.0), fn, tokens, MASK)
    assert out.forwards.tolist() == [12, 3, 0]
    assert fn.rows == [15]
    plain = sample(Confidence(num_steps=12, temperature=0.0), tiny_transformer(), tokens, MASK)
    assert torch.equal(plain.tokens, out.tokens)  # a plain function gets the whole batch each time


def test_rows_of_an_adaptive_sampler_go_through_blocks_at_their_own_pace():
    fn = tiny_transformer()
    tokens = torch.full((6, 12), MASK)
    tokens[:, :4] = torch.randint(0, MASK, (6, 4), generator=torch.Generator().manual_seed(0))
    sampler = Blocks(Threshold(threshold=0.5, temperature=0.0), 4)
    together = sample(sampler, Rows(fn), tokens, MASK)
    alone = [sample(sampler, fn, tokens[i : i + 1], MASK) for i in range(6)]
    assert torch.equal(together.tokens, torch.cat([a.tokens for a in alone]))
    assert together.forwards.tolist() == [a.forwards.item() for a in alone]
    assert len(set(together.forwards.tolist())) > 1


def test_blocks_are_filled_from_left_to_right():
    seen = []
    sampler = Blocks(FirstHitting(), 3)
    sample(sampler, tiny_transformer(), torch.full((4, 12), MASK), MASK, on_step=lambda s: seen.append(s.masked))
    for step, masked in enumerate(seen, 1):
        assert (~masked[:, : step // 3 * 3]).all()
        assert masked[:, (step - 1) // 3 * 3 + 3 :].all()


def masked_after_each_step(sampler, rows, length):
    """Masked tokens after each step, a list for each row, and the rows' times."""
    left, times = [], []

    def watch(state):
        left.append(state.masked.sum(1).tolist())
        times.append(state.time.tolist())

    sample(sampler, lambda t: torch.zeros(*t.shape, V), torch.full((rows, length), MASK), MASK, on_step=watch)
    return left, times


def test_every_block_begins_its_counts_anew():
    """4 tokens in 3 steps are 2, 1, 1 in each of three blocks: counted on, they would be 1, 1, 1, and the block not done."""
    left, _ = masked_after_each_step(Blocks(Confidence(num_steps=3), 4), 2, 12)
    assert left == [[n, n] for n in (10, 9, 8, 6, 5, 4, 2, 1, 0)]


def test_every_block_begins_at_time_one():
    """In each block of 64, 3/4, 1/2 and 1/4 stay masked after the steps. 5 standard errors of the mean of 40 rows."""
    left, times = masked_after_each_step(Blocks(Ancestral(num_steps=4), 64), 40, 128)
    assert times == [[t] * 40 for t in (0.75, 0.5, 0.25, 0.0)] * 2
    means = [sum(rows) / 40 for rows in left]
    assert means == pytest.approx([112, 96, 80, 64, 48, 32, 16, 0], abs=5 * (64 * 0.25 / 40) ** 0.5)


def test_each_modality_leaves_alone_what_a_constraint_has_filled():
    """An end at position 1 fills the rest of its span: its sampler is done then, and never writes there again."""
    end, states = 0, []
    modality = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])

    def fn(tokens):
        logits = torch.zeros(1, 8, V)
        logits[:, :, 5] = 2.0
        logits[:, 1, end] = 9.0
        return logits

    sampler = PerModality([Confidence(num_steps=4, temperature=0.0), Confidence(num_steps=4, temperature=0.0)])
    start = torch.full((1, 8), MASK)
    out = sample(sampler, fn, start, MASK, modality=modality, constraint=FillAfterEnd(end), on_step=states.append)
    assert [int(s.masked[0, :4].sum()) for s in states] == [1, 0, 0, 0]
    assert out.tokens[0].tolist() == [5, end, end, end, 5, 5, 5, 5]
    assert all(s.confidence[0, 2:4].tolist() == [1.0, 1.0] for s in states)  # a constraint's own, which stays
    assert out.confidence[0, 2:4].tolist() == [1.0, 1.0]


def test_everything_behind_an_end_token_of_its_span_is_filled_at_once():
    end, states = 0, []
    modality = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])

    def fn(tokens):  # an end at position 1 of both spans is the surest, then other tokens
        logits = torch.zeros(1, 8, V)
        logits[:, :, 5] = 2.0
        logits[:, [1, 5], end] = 9.0
        return logits

    sampler = Confidence(num_steps=8, temperature=0.0)
    out = sample(
        sampler, fn, torch.full((1, 8), MASK), MASK, modality=modality, constraint=FillAfterEnd(end), on_step=states.append
    )
    assert states[0].tokens[0].tolist() == [MASK, end, end, end, MASK, MASK, MASK, MASK]
    assert out.tokens[0].tolist() == [5, end, end, end, 5, end, end, end]
    assert out.forwards.item() == 4


def test_what_an_end_fills_up_is_certain():
    """Nothing else has ever stood there: a confidence of 1, and a row that is full is finished."""
    tokens = torch.tensor([[2, 5, 9, 9], [2, 9, 9, 9]])
    state = SamplerState.start(torch.full((2, 4), 9), torch.ones(2, 4, dtype=torch.bool), 9)
    state = state.unmask(tokens != 9, tokens, torch.full((2, 4), 0.5, dtype=torch.float64))
    filled = FillAfterEnd(5)(state)
    assert filled.tokens.tolist() == [[2, 5, 5, 5], [2, 9, 9, 9]]
    assert filled.confidence.tolist() == [[0.5, 0.5, 1, 1], [0.5, 0, 0, 0]]
    assert filled.finished.tolist() == [True, False]


def test_each_modality_has_its_own_sampler_in_the_same_forwards():
    modality = torch.arange(12).expand(5, 12) // 6
    samplers = [Confidence(num_steps=2, temperature=0.0), Blocks(FirstHitting(), 3)]
    left = []
    start = torch.full((5, 12), MASK)
    out = sample(
        PerModality(samplers), tiny_transformer(), start, MASK, modality=modality, on_step=lambda s: left.append(s.masked)
    )
    assert [[int(m[0, :6].sum()), int(m[0, 6:].sum())] for m in left] == [[3, 5], [0, 4], [0, 3], [0, 2], [0, 1], [0, 0]]
    assert (out.tokens != MASK).all()


def test_ancestral_steps_that_unmask_nothing_do_not_end_a_row():
    out = sample(Ancestral(num_steps=50), tiny_transformer(), torch.full((2, 3), MASK), MASK)
    assert (out.forwards > 3).all()  # 50 steps for 3 tokens: most unmask none


COMPILED = """
import torch
from components.kernels import Hybrid, Uniform
from components.block_diffusion.decoding import Task, sample_blocks
from components.samplers import *
from components.samplers.base import revises
from components.schedules import Cosine
from components.weightings import Noise, Noises
modality = torch.arange(8).expand(4, 8) // 4
samplers = [
    Ancestral(num_steps=4, top_p=0.9), ReMDM(num_steps=5, variant="confidence", eta=1.0), FirstHitting(top_k=3),
    Confidence(num_steps=4, choice_temperature=1.0, schedule=Cosine()), Confidence(num_steps=3, rank_by="entropy"),
    Threshold(threshold=0.5), Factor(), EntropyBounded(gamma=1.0), Blocks(Confidence(num_steps=2), 4),
    PerModality([Ancestral(num_steps=3), Blocks(Threshold(threshold=0.1), 2)]),
    Blocks(Editing(threshold=0.5, edit_threshold=0.2), 4), SelfCorrect(Confidence(num_steps=2), temperature=1.0),
]
any_noise = [
    Ancestral(num_steps=3), Psi(num_steps=3), Gibbs(Psi(num_steps=3)), LeastSureFirst(num_steps=4),
    SelfCorrect(PerModality([Psi(num_steps=3), LeastSureFirst(num_steps=2)]), temperature=1.0),
]
other = Noises([Noise(Hybrid(), "cross_entropy"), Noise(Uniform())])
def fn(tokens):
    return torch.nn.functional.one_hot(tokens.roll(1, 1), 11).float() * torch.linspace(0, 2, 11)
class Compiled:
    def __init__(self, sampler):
        self.step = torch.compile(sampler.step, fullgraph=True, backend="eager")
        self.start = getattr(sampler, "start", lambda state: state)
        self.any_noise, self.revises = True, revises(sampler)
for s, noise in [(s, Noises()) for s in samplers] + [(s, other) for s in any_noise]:
    torch._dynamo.reset(), torch._dynamo.utils.counters.clear()
    start = torch.full((4, 8), 10)
    options = {"modality": modality, "constraint": FillAfterEnd(3), "seed": 1, "noise": noise}
    a, b = (sample(x, fn, start, 10, **options).tokens for x in (s, Compiled(s)))
    assert torch.equal(a, b), s
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, (s, torch._dynamo.utils.counters["stats"])
class Copies:
    def __call__(self, tokens, start, stop, width):
        near = fn(torch.stack([row[b : b + width] for row, b in zip(tokens, start, strict=True)]))
        return torch.stack([near.roll(k, 1) for k in range(1 + width)], dim=1)
    def select(self, rows):
        pass
zeros = torch.zeros(1, 9, dtype=torch.long)  # of several rows, those that are done leave the batch: another size
block, allowed = torch.arange(9).view(1, 9) // 3, torch.ones(1, 11, dtype=torch.bool)
task = Task(zeros, zeros == 0, block, zeros, zeros, allowed, torch.arange(11))
for s in (LeftToRight(), SelfSpeculation()):
    torch._dynamo.reset(), torch._dynamo.utils.counters.clear()
    own = Compiled(s)
    own.drafts = s.drafts
    a, b = (sample_blocks([x], Copies(), task, seed=1).tokens for x in (s, own))
    assert torch.equal(a, b), s
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, (s, torch._dynamo.utils.counters["stats"])
print("compiled", len(samplers) + len(any_noise) + 2)
"""


def test_every_step_is_one_graph_without_breaks():
    """fullgraph=True raises at a graph break, and reading a tensor on the host is one; counts and times do not recompile."""
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, cwd=root, env=without_checks())
    assert "compiled 19" in done.stdout, done.stderr[-2000:]


def without_checks():
    import os

    return {k: v for k, v in os.environ.items() if k != "MDM_TYPECHECK"}
