import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import chi2
from torch.testing import assert_close

from components.samplers import (
    Ancestral,
    Blocks,
    Confidence,
    Editing,
    EntropyBounded,
    Factor,
    FirstHitting,
    Gibbs,
    LeastSureFirst,
    LinearScale,
    PerModality,
    Psi,
    ReMDM,
    SelfCorrect,
    Threshold,
    base,
    deterministic,
    guided,
    sample,
)
from components.samplers.base import POSITION, SamplerState
from components.samplers.drawing import Drawing, gumbel, invert, top_k_filter, top_p_filter
from components.samplers.ranking import rank
from components.schedules import Cosine, Linear
from tests.oracles import LENGTH, MASK, exact_conditionals, tiny_joint

NONE = torch.zeros(1, LENGTH, dtype=torch.bool)
MASKS = torch.full((1, LENGTH), MASK)
JOINT = tiny_joint()
DRAWS = 20_000


class Exact:
    """The joint's conditionals, looked up: of every sequence of symbols and masks, read as digits in base 5."""

    PLACES = torch.tensor([25, 5, 1])
    TABLE = exact_conditionals(JOINT, torch.cartesian_prod(*[torch.arange(MASK + 1)] * LENGTH))

    def __call__(self, tokens):
        return self.TABLE[tokens @ self.PLACES]

    def select(self, rows):
        """The same for any rows: so the finished ones cost nothing."""
        return self


logits_fn = Exact()


def counts(sampler, draws=DRAWS, seed=0):
    start = torch.full((draws, LENGTH), MASK)
    tokens = sample(sampler, logits_fn, start, MASK, seed=seed).tokens
    assert (tokens != MASK).all()
    return torch.bincount(tokens @ torch.tensor([16, 4, 1]), minlength=64).double()


def chi_square_p(observed):
    """p-value of Pearson's chi-square against the joint, cells with an expectation under 5 pooled."""
    expected = JOINT.flatten() * observed.sum()
    small = expected < 5
    o = torch.cat([observed[~small], observed[small].sum()[None]])
    e = torch.cat([expected[~small], expected[small].sum().clamp_min(1e-9)[None]])
    return float(chi2.sf(float(((o - e) ** 2 / e).sum()), len(o) - 1))


def test_first_hitting_matches_the_joint():
    """A right sampler fails at p < 1e-4 once in 10,000 seeds; the seed is fixed."""
    assert chi_square_p(counts(FirstHitting())) > 1e-4
    assert chi_square_p(counts(FirstHitting(Cosine()), seed=1)) > 1e-4


def test_first_hitting_takes_any_masked_position_with_equal_probability():
    """Shares of the first position: within 5 standard errors of 1/3. (By confidence the joint would be met too.)"""
    firsts = []
    start = torch.full((6000, LENGTH), MASK)
    sample(FirstHitting(), logits_fn, start, MASK, on_step=lambda s: firsts.append(~s.masked))
    shares = firsts[0].double().mean(0)
    assert (firsts[0].sum(1) == 1).all()
    assert_close(shares, torch.full((3,), 1 / 3, dtype=torch.float64), atol=5 * math.sqrt(2 / 9 / 6000), rtol=0)


def test_first_hitting_times_fall_as_the_process_says():
    """With n masked under the linear schedule, the next time is t * u^(1/n): E log t = -(1/3 + 1/2 + 1) after three."""
    times = []
    start = torch.full((6000, LENGTH), MASK)
    sample(FirstHitting(), logits_fn, start, MASK, on_step=lambda s: times.append(s.time.log().mean().item()))
    assert times == pytest.approx([-1 / 3, -5 / 6, -11 / 6], abs=5 * math.sqrt(49 / 36 / 6000))


def test_one_token_per_step_at_random_matches_the_joint():
    """Ancestral sampling with a grid so fine that steps unmask one token nearly always."""
    assert chi_square_p(counts(Ancestral(num_steps=300), draws=5000)) > 1e-4


def total_variation(observed):
    return float((observed / observed.sum() - JOINT.flatten()).abs().sum() / 2)


def product_of_marginals():
    marginals = torch.einsum("i,j,k->ijk", JOINT.sum((1, 2)), JOINT.sum((0, 2)), JOINT.sum((0, 1))).flatten()
    return float((marginals - JOINT.flatten()).abs().sum() / 2)


def test_ancestral_approaches_the_joint_as_steps_grow():
    """One step draws the product of marginals; the distance falls with the steps, to the noise of 20,000 draws (0.02)."""
    far, nearer, near = (total_variation(counts(Ancestral(num_steps=n))) for n in (1, 4, 64))
    assert far > 1.5 * nearer > 1.5 * near
    assert far == pytest.approx(product_of_marginals(), abs=0.02)
    assert near < 0.035


def test_confidence_is_biased_towards_likely_tokens():
    """Stated bias: choosing the position by its drawn token does not follow the joint, not even one token a step."""
    observed = counts(Confidence(num_steps=LENGTH))
    assert chi_square_p(observed) < 1e-6
    likely = JOINT.flatten().argmax()
    assert observed[likely] / observed.sum() > JOINT.flatten()[likely]


@pytest.mark.parametrize("by", ["random", "margin", "entropy", "probability"])
def test_one_token_a_step_matches_the_joint_where_the_position_depends_on_the_distributions(by):
    """Any such order is a chain rule. p < 1e-4 once in 10,000 seeds, and the seeds are fixed."""
    assert chi_square_p(counts(Confidence(num_steps=LENGTH, rank_by=by))) > 1e-4


def test_adaptive_samplers_match_the_joint_when_they_take_one_token_a_step():
    """A threshold of 1, a factor or a bound of 0: the best position alone. Ranked by the drawn token, the bias is back."""
    assert chi_square_p(counts(Threshold(threshold=1.0, rank_by="probability"))) > 1e-4
    assert chi_square_p(counts(Factor(factor=0.0, rank_by="probability"))) > 1e-4
    assert chi_square_p(counts(EntropyBounded(gamma=0.0))) > 1e-4
    assert chi_square_p(counts(Threshold(threshold=1.0, rank_by="confidence"))) < 1e-6


def test_adaptive_samplers_approach_independent_draws_as_they_take_more():
    """Stated bias: all at once is the product of marginals; between, the distance to the joint grows with the bound."""
    exact, bounded, all_at_once = (total_variation(counts(EntropyBounded(gamma=g))) for g in (0.0, 0.9, 100.0))
    assert exact < 0.02 < bounded < all_at_once == pytest.approx(product_of_marginals(), abs=0.02)
    assert total_variation(counts(Factor(factor=5.0))) == pytest.approx(product_of_marginals(), abs=0.02)
    assert total_variation(counts(Threshold(threshold=0.0))) == pytest.approx(product_of_marginals(), abs=0.02)


def test_scores_by_hand():
    """Of 0.5, 0.3, 0.2 and of a sure id, of which the second was drawn: every score is another number."""
    p = torch.tensor([[0.5, 0.3, 0.2], [0.0, 1.0, 0.0]], dtype=torch.float64)
    drawn, uniform = p[:, 1], torch.tensor([0.25, 0.75], dtype=torch.float64)
    entropy = -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2))
    expected = {
        "confidence": [0.3, 1],
        "probability": [0.5, 1],
        "margin": [0.2, 1],
        "entropy": [-entropy, 0],
        "random": [0.25, 0.75],
    }
    for by, scores in expected.items():
        assert rank(by, p.log(), drawn, uniform).tolist() == pytest.approx(scores)


@pytest.mark.parametrize("sampler", [Threshold(threshold=0.5), Factor(factor=0.9), EntropyBounded(gamma=0.9)], ids=repr)
def test_the_time_of_an_adaptive_sampler_is_the_share_still_masked(sampler):
    seen = []
    sample(sampler, logits_fn, torch.full((50, LENGTH), MASK), MASK, on_step=seen.append)
    assert len({float(t) for t in seen[1].time}) > 1  # some rows are sure of more than others
    for state in seen:
        assert_close(state.time, state.masked.double().mean(dim=1))


def factor_by_hand(confidence, masked, factor):
    """The positions of a row that are unmasked: from the surest on, while (n + 1)(1 - c_n) is below the factor."""
    order = sorted((i for i, m in enumerate(masked) if m), key=lambda i: -confidence[i])
    n = 1
    while n < len(order) and (n + 2) * (1 - confidence[order[n]]) < factor:
        n += 1
    return sorted(order[:n])


@pytest.mark.parametrize("by", ["confidence", "probability"])
@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 2.5])
def test_a_factor_unmasks_what_a_loop_over_the_surest_does(factor, by):
    """Rows of 12 positions, of which some are given, of sure and of unsure models; drawn, so that the two ranks differ."""
    g = torch.Generator().manual_seed(1)
    scale = torch.linspace(1, 14, 60, dtype=torch.float64)[:, None, None]
    logits = scale * torch.randn(60, 12, 6, dtype=torch.float64, generator=g)
    logits[..., 5] = -torch.inf
    state = SamplerState.start(torch.full((60, 12), 5), torch.rand(60, 12, generator=g) < 0.8, 5)
    state = replace(state, uniform=torch.rand(60, 3, 12, dtype=torch.float64, generator=g))
    after = Factor(factor=factor, rank_by=by).step(logits, state)
    p = logits.softmax(-1)
    counts = set()
    for row in range(60):
        drawn = [int((p[row, i].cumsum(0) > state.uniform[row, 0, i]).nonzero()[0]) for i in range(12)]
        score = [float(p[row, i].max() if by == "probability" else p[row, i, drawn[i]]) for i in range(12)]
        chosen = factor_by_hand(score, state.masked[row].tolist(), factor)
        assert (state.masked & ~after.masked)[row].nonzero()[:, 0].tolist() == chosen
        assert [after.tokens[row, i].item() for i in chosen] == [drawn[i] for i in chosen]
        counts.add(len(chosen))
    assert counts == {1} if factor == 0 else len(counts) > 3


def test_a_factor_by_hand_at_its_border():
    """Doubts of 0, 0, 1/4, 1/2: (n + 1) times them is 0, 0, 1, 5/2. What equals the factor stays masked, but for the first."""
    p = torch.tensor([0.75, 1.0, 0.5, 1.0], dtype=torch.float64)
    logits = torch.stack([p.log(), (1 - p).log(), torch.full_like(p, -torch.inf)], dim=-1)[None]
    for factor, first in (
        (0.0, [1]),
        (0.01, [1, 3]),
        (0.99, [1, 3]),
        (1.01, [0, 1, 3]),
        (2.49, [0, 1, 3]),
        (2.51, [0, 1, 2, 3]),
    ):
        states = []
        greedy = Factor(factor=factor, temperature=0.0)
        sample(greedy, lambda t: logits.clone(), torch.full((1, 4), 2), 2, on_step=states.append)
        assert (~states[0].masked[0]).nonzero()[:, 0].tolist() == first


def test_entropy_bound_counts_by_hand():
    """Entropies 0.1, 0.3, 0.2, 0.6: sums without the largest are 0, 0.1, 0.3, 0.6 for the k surest."""

    def two_ids(h):  # the p in (0.5, 1) of entropy h
        p = torch.linspace(0.5, 1 - 1e-9, 200_001, dtype=torch.float64)
        entropy = -(p * p.log() + (1 - p) * (1 - p).log())
        return p[(entropy - h).abs().argmin()]

    p = torch.stack([two_ids(h) for h in (0.1, 0.3, 0.2, 0.6)])
    logits = torch.stack([p.log(), (1 - p).log(), torch.full_like(p, -torch.inf)], dim=-1)[None]
    for gamma, first in ((0.05, [0]), (0.11, [0, 2]), (0.31, [0, 1, 2]), (0.61, [0, 1, 2, 3])):
        states = []
        sample(EntropyBounded(gamma=gamma), lambda t: logits.clone(), torch.full((1, 4), 2), 2, on_step=states.append)
        assert (~states[0].masked[0]).nonzero()[:, 0].tolist() == first


def test_remasking_of_zero_is_ancestral_to_the_bit():
    start = torch.full((500, LENGTH), MASK)
    for variant in ("cap", "rescale", "confidence"):
        a = sample(Ancestral(num_steps=6), logits_fn, start, MASK, seed=3).tokens
        b = sample(ReMDM(num_steps=6, variant=variant, eta=0.0), logits_fn, start, MASK, seed=3).tokens
        assert torch.equal(a, b)


@pytest.mark.parametrize(("variant", "eta"), [("cap", 0.4), ("rescale", 0.7)])
def test_remasking_keeps_the_marginals_of_every_time(variant, eta):
    """After each step the share of masked tokens is 1 - alpha(s), whatever sigma; 5 standard errors of 20,000 x 3 tokens."""
    shares, again = [], []
    previous = torch.ones(DRAWS, LENGTH, dtype=torch.bool)

    def watch(state):
        nonlocal previous
        shares.append(state.masked.double().mean().item())
        again.append((state.masked & ~previous).double().mean().item())
        previous = state.masked

    sample(ReMDM(num_steps=4, variant=variant, eta=eta), logits_fn, torch.full((DRAWS, LENGTH), MASK), MASK, on_step=watch)
    assert shares == pytest.approx([0.75, 0.5, 0.25, 0.0], abs=5 * 0.5 / math.sqrt(DRAWS))
    largest = [min(1.0, (1 - alpha_s) / alpha_t) for alpha_t, alpha_s in ((0.25, 0.5), (0.5, 0.75))]
    sigma = [min(eta, m) if variant == "cap" else eta * m for m in largest]
    assert again == pytest.approx([0.0, 0.25 * sigma[0], 0.5 * sigma[1], 0.0], abs=5 * 0.5 / math.sqrt(DRAWS))


def test_remasking_by_confidence_masks_the_least_sure_again():
    """Two tokens drawn at 0.9 and 0.5: softmax(-0.9, -0.5) of the remasking."""
    p = torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64)
    seen = []

    def watch(state):
        seen.append((state.masked.clone(), state.confidence.clone()))

    n = 20_000
    sampler = ReMDM(num_steps=3, variant="confidence", eta=1.0, temperature=0.0)
    sample(sampler, lambda t: p.log().expand(len(t), 2, 3).clone(), torch.full((n, 2), 2), 2, on_step=watch)
    both = ~seen[0][0].any(1)  # rows whose two tokens were unmasked in the first step
    share = (seen[1][0][both]).double().mean(0)
    largest = 1.0  # alpha_t = 1/3, alpha_s = 2/3: (1 - alpha_s) / alpha_t
    expected = torch.tensor([-0.9, -0.5], dtype=torch.float64).softmax(0) * largest
    assert_close(share, expected, atol=5 * 0.5 / math.sqrt(int(both.sum())), rtol=0)


def test_remasking_by_confidence_masks_sigma_max_tokens_again_unless_told_otherwise():
    """8 steps, 6 tokens: sigma_max of a row a step, once any is decoded. 5 standard errors of a count of variance 1 at most."""
    again, rows = [], 4000
    previous = torch.ones(rows, 6, dtype=torch.bool)

    def watch(state):
        nonlocal previous
        some = (~previous).any(1)
        again.append((state.masked & ~previous)[some].sum(1).double().mean().nan_to_num(0.0).item())
        previous = state.masked

    start = torch.full((rows, 6), 3)
    sample(ReMDM(num_steps=8, variant="confidence"), equal_logits, start, 3, on_step=watch)
    expected = [0.0, *(min(1.0, (1 - (k + 1) / 8) / (k / 8)) for k in range(1, 7)), 0.0]
    assert again == pytest.approx(expected, abs=5 / math.sqrt(rows * (1 - (7 / 8) ** 6)))
    for variant in ("cap", "rescale"):
        made = [sample(ReMDM(num_steps=8, variant=variant, eta=eta), equal_logits, start[:50], 3) for eta in (None, 0.02)]
        assert torch.equal(made[0].tokens, made[1].tokens)


def equal_logits(tokens):
    """Of four ids."""
    return torch.zeros(*tokens.shape, 4)


EVERY = [
    Ancestral(num_steps=8),
    FirstHitting(),
    Confidence(num_steps=2),
    Confidence(num_steps=2, schedule=Cosine(), choice_temperature=2.0),
    Confidence(num_steps=3, rank_by="margin", top_k=2),
    Threshold(threshold=0.5),
    Factor(factor=0.9),
    EntropyBounded(gamma=0.5),
    ReMDM(num_steps=8, variant="rescale", eta=0.5),
    ReMDM(num_steps=8, variant="confidence", eta=1.0),
    Blocks(Confidence(num_steps=1), 1),
    PerModality([Ancestral(num_steps=3)]),
    PerModality([Blocks(Threshold(threshold=0.3), 1)]),
    Psi(num_steps=4, eta=0.3),
    Gibbs(Ancestral(num_steps=3)),
    LeastSureFirst(num_steps=3),
    Editing(threshold=0.5, edit_threshold=0.5),
    SelfCorrect(Confidence(num_steps=2), temperature=1.0),
]


@pytest.mark.parametrize("sampler", EVERY, ids=repr)
def test_given_positions_stay_and_all_others_are_filled(sampler):
    tokens = torch.tensor([[2, MASK, MASK], [MASK, 1, MASK], [0, 1, 2]])
    out = sample(sampler, logits_fn, tokens, MASK)
    given = tokens != MASK
    assert_close(out.tokens[given], tokens[given])
    assert (out.tokens != MASK).all()
    assert (out.confidence[~given] > 0).all()
    assert (out.confidence[given] == 0).all()
    assert out.forwards[2] == 0  # nothing to do


@pytest.mark.parametrize("sampler", EVERY, ids=repr)
def test_a_sample_does_not_depend_on_its_batch(sampler):
    start = torch.full((7, LENGTH), MASK)
    together = sample(sampler, logits_fn, start, MASK, seed=5).tokens
    alone = [sample(sampler, logits_fn, start[:1], MASK, seed=5, index=[i]).tokens[0] for i in range(7)]
    assert torch.equal(together, torch.stack(alone))
    assert not torch.equal(together, sample(sampler, logits_fn, start, MASK, seed=6).tokens)


@pytest.mark.parametrize("sampler", EVERY, ids=repr)
def test_logits_that_are_nan_end_in_one_line_after_one_pass(sampler):
    passes = []

    def broken(tokens):
        passes.append(tokens)
        logits = torch.zeros(2, LENGTH, MASK + 1)
        logits[1, 1, 2] = math.nan
        return logits

    with pytest.raises(ValueError, match="nothing can be drawn at position 1 of row 1: the largest of its logits is nan"):
        sample(sampler, broken, torch.full((2, LENGTH), MASK), MASK)
    assert len(passes) == 1
    with pytest.raises(ValueError, match="at position 1 of row 107:"):  # of a later batch
        sample(sampler, broken, torch.full((2, LENGTH), MASK), MASK, index=(106, 107))


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_logits_that_overflow_or_rule_out_every_id_are_named_like_nan(value):
    with pytest.raises(ValueError, match=f"position 2 of row 0: the largest of its logits is {value}"):
        sample(FirstHitting(), lambda t: torch.tensor([0.0, 0.0, value])[:, None].expand(1, 3, 5).clone(), MASKS, MASK)


class Some:
    """A logits function that can leave rows out; NaN from the second pass on in whichever row is asked for."""

    def __init__(self, passes=None):
        self.passes = [0] if passes is None else passes

    def __call__(self, tokens):
        self.passes[0] += 1
        return torch.full((*tokens.shape, MASK + 1), math.nan if self.passes[0] > 1 else 0.0)

    def select(self, rows):
        return Some(self.passes)


def test_a_broken_row_keeps_its_number_where_finished_rows_are_left_out():
    tokens = torch.tensor([[0, 0, 0], [MASK, 0, 0], [MASK, MASK, 0]])
    with pytest.raises(ValueError, match=r"position [01] of row 2"):
        sample(FirstHitting(), Some(), tokens, MASK)


def test_what_is_given_or_finished_may_have_any_logits():
    def fn(tokens):
        logits = torch.zeros(2, LENGTH, MASK + 1)
        logits[tokens != MASK] = math.nan
        return logits

    tokens = torch.tensor([[MASK, 1, 1], [MASK, MASK, MASK]])
    assert (sample(Confidence(num_steps=3), fn, tokens, MASK).tokens != MASK).all()


class Idle:
    """A sampler of a user that unmasks nothing."""

    def step(self, logits, state):
        return state


def test_a_sampler_that_unmasks_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(base, "PATIENCE", 5)
    with pytest.raises(ValueError, match="Idle has unmasked nothing of row 0 in 5 passes; 3 are left"):
        sample(Idle(), logits_fn, MASKS, MASK)


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: Blocks(s, 1), lambda s: PerModality([s])], ids=["", "blocks", "modality"]
)
@pytest.mark.parametrize("sampler", [Ancestral(num_steps=80), ReMDM(num_steps=80, variant="rescale", eta=1.0)], ids=repr)
def test_a_sampler_has_all_the_passes_of_its_settings(monkeypatch, sampler, wrap):
    monkeypatch.setattr(base, "PATIENCE", 2)
    made = sample(wrap(sampler), logits_fn, MASKS, MASK, seed=1)
    assert (made.tokens != MASK).all()
    assert made.forwards.item() > 20


def test_the_callers_logits_are_not_written_to():
    own = torch.randn(1, LENGTH, MASK + 1, generator=torch.Generator().manual_seed(0))
    before = own.clone()
    for allowed in (None, torch.ones(1, 1, MASK + 1, dtype=torch.bool)):
        sample(FirstHitting(), lambda t: own, MASKS, MASK, allowed=allowed)
    assert torch.equal(own, before)


def test_a_sample_does_not_depend_on_what_is_given_around_it():
    """Where logits do not: a row draws its numbers for the positions that it generates, so padding changes nothing."""

    def flat(tokens):
        return torch.zeros(*tokens.shape, MASK + 1)

    alone = sample(Ancestral(num_steps=4), flat, torch.full((4, 6), MASK), MASK, seed=1).tokens
    around = torch.nn.functional.pad(torch.full((4, 6), MASK), (2, 3), value=0)
    assert torch.equal(sample(Ancestral(num_steps=4), flat, around, MASK, seed=1).tokens[:, 2:-3], alone)


def test_allowed_ids_and_positions_to_generate_are_obeyed():
    allowed = torch.ones(50, LENGTH, MASK + 1, dtype=torch.bool)
    allowed[:, 1, 2:] = False
    tokens = torch.full((50, LENGTH), MASK)
    generate = torch.tensor([True, True, False]).expand(50, -1)
    out = sample(FirstHitting(), logits_fn, tokens, MASK, generate, allowed).tokens
    assert (out[:, 1] < 2).all()
    assert (out[:, 2] == MASK).all()


def test_llada_counts_of_confidence():
    """5 masked tokens in 3 steps: 2, 2, 1 (one more in the first 5 % 3 steps)."""
    left = []
    logits = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    sample(
        Confidence(num_steps=3),
        lambda t: logits.clone(),
        torch.full((1, 5), 3),
        3,
        on_step=lambda s: left.append(int(s.masked.sum())),
    )
    assert left == [3, 1, 0]


def test_maskgit_schedule_of_confidence():
    """MaskGIT keeps floor(cos(pi/2 * step/steps) * L) masked after each step."""
    left = []
    logits = torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(0))
    sampler = Confidence(num_steps=5, schedule=Cosine(), choice_temperature=4.5)
    sample(sampler, lambda t: logits.clone(), torch.full((1, 20), 3), 3, on_step=lambda s: left.append(int(s.masked.sum())))
    assert left == [math.floor(math.cos(math.pi / 2 * k / 5) * 20) for k in range(1, 5)] + [0]


def masked_after_each_step(sampler, tokens, mask_id):
    """Masked tokens of each row after each step, whatever is drawn."""
    left = []
    sample(sampler, equal_logits, tokens, mask_id, on_step=lambda s: left.append(s.masked.sum(1).tolist()))
    return left


@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=repr)
def test_a_step_of_a_schedule_unmasks_one_token_at_least(schedule):
    """Of 3 tokens in 16 steps, most steps would leave as many masked as there are: passes for nothing."""
    assert masked_after_each_step(Confidence(num_steps=16, schedule=schedule), torch.full((1, 3), 3), 3) == [[2], [1], [0]]


@pytest.mark.parametrize("num_steps", [3, 7, 10, 25, 49, 55, 60])
def test_counts_of_a_linear_schedule_are_those_of_whole_numbers(num_steps):
    """floor(n (N - k) / N) of n stay masked after step k of N; in floating point, 1 - (1 - 3/10) of 10 is 2.999..."""
    n = torch.arange(1, 65)
    start = torch.where(torch.arange(64) < n[:, None], 3, 0)
    left = masked_after_each_step(Confidence(num_steps=num_steps, schedule=Linear()), start, 3)
    before = n.tolist()
    for k, found in enumerate(left, 1):
        stay = [length * (num_steps - k) // num_steps for length in n.tolist()]
        before = [max(min(m - 1, s), 0) for m, s in zip(before, stay, strict=True)]
        assert found == before
    assert not any(before)


def test_choice_noise_is_gumbels_on_the_log_probability_and_falls_with_the_steps():
    """MaskGIT's, in the second of four steps: half of the steps are left, so half of the temperature."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 8, 5, dtype=torch.float64, generator=g)
    logits[..., MASK] = -torch.inf
    uniform = torch.rand(200, 3, 8, dtype=torch.float64, generator=g)
    state = SamplerState.start(torch.full((200, 8), MASK), torch.ones(200, 8, dtype=torch.bool), MASK)
    state = replace(state, uniform=uniform, step=torch.ones(200, dtype=torch.long))
    sampler = Confidence(num_steps=4, temperature=0.0, rank_by="probability", choice_temperature=3.0)
    score = logits.log_softmax(-1).amax(-1) + 3.0 / 2 * -(-uniform[:, POSITION].log()).log()
    chosen = (~sampler.step(logits, state).masked).nonzero()[:, 1].view(200, 2)
    assert torch.equal(chosen, score.topk(2).indices.sort(dim=1).values)


GREEDY = [
    Confidence(num_steps=2, temperature=0.0),
    Confidence(num_steps=2, temperature=0.0, rank_by="margin", schedule=Cosine()),
    Threshold(threshold=0.5, temperature=0.0),
    Factor(temperature=0.0),
    EntropyBounded(gamma=0.5, temperature=0.0),
    Blocks(Confidence(num_steps=1, temperature=0.0), 1),
    PerModality([Confidence(num_steps=2, temperature=0.0)]),
]
LEFT_TO_CHANCE = [
    Confidence(num_steps=2),
    Confidence(num_steps=3, temperature=0.0, rank_by="random"),
    Confidence(num_steps=3, temperature=0.0, choice_temperature=9.0),
    FirstHitting(temperature=0.0),  # the order is drawn
    Ancestral(num_steps=3, temperature=0.0),
    ReMDM(num_steps=3, temperature=0.0),
    Threshold(threshold=0.9),
    Factor(),
    EntropyBounded(gamma=0.5),
    Blocks(FirstHitting(temperature=0.0), 3),
    PerModality([FirstHitting(temperature=0.0), Confidence(temperature=0.0)]),
]


@pytest.mark.parametrize("sampler", [*GREEDY, *LEFT_TO_CHANCE], ids=repr)
def test_a_sampler_says_whether_its_samples_are_all_alike(sampler):
    """Those that say so give one sequence in 400 draws; of the others each gives several, the greedy ones by their order."""
    table = torch.randn(125, LENGTH, MASK + 1, generator=torch.Generator().manual_seed(0))  # what is best depends on the order
    start = torch.full((400, LENGTH), MASK)
    drawn = sample(sampler, lambda tokens: table[tokens @ Exact.PLACES], start, MASK).tokens
    different = len(drawn.unique(dim=0))
    assert (different == 1) == deterministic(sampler) == (sampler in GREEDY)


def test_greedy_confidence_takes_the_surest_first():
    logits = torch.tensor([[[5.0, 0, 0], [0, 1.0, 0], [0, 9.0, 0]]])
    order = []
    start = torch.full((1, 3), 2)
    sample(
        Confidence(num_steps=3, temperature=0.0),
        lambda t: logits.clone(),
        start,
        2,
        on_step=lambda s: order.append(s.tokens.clone()),
    )
    assert [o[0].tolist() for o in order] == [[2, 2, 1], [0, 2, 1], [0, 1, 1]]


def dreams_score(by, logits, token, temperature=1.0, top_p=1.0, top_k=None):
    """Dream's `sample_tokens` at one position: logits over the temperature, what lies outside top-p or top-k left out."""
    p = (logits / (temperature or 1)).softmax(0)
    order = p.argsort(descending=True)
    before = p[order].cumsum(0) - p[order]
    p[order[before > top_p]] = p[order[top_k or len(p) :]] = 0
    p = p / p.sum()
    if by == "confidence":
        return p[token].item()
    best = p.sort(descending=True).values
    return (best[0] - best[1]).item() if by == "margin" else sum(q * math.log(q) for q in p.tolist() if q)


DREAMS = [{"temperature": 0.4}, {"top_p": 0.7}, {"top_k": 2}, {"temperature": 0.0, "top_k": 2}]


@pytest.mark.parametrize("by", ["confidence", "margin", "entropy"])
@pytest.mark.parametrize("settings", DREAMS, ids=repr)
def test_dream_ranks_on_what_it_draws_from(by, settings):
    logits = 2 * torch.randn(1, 12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    start, seen = torch.full((1, 12), 8), []
    sampler = Confidence(num_steps=12, rank_by=by, rank_tempered=True, **settings)
    made = sample(sampler, lambda t: logits, start, 8, on_step=lambda s: seen.append(s.tokens[0]))
    drawn = sample(Confidence(num_steps=1, **settings), lambda t: logits, start, 8).tokens[0]  # in one step, by the same noise
    logits[..., 8] = -torch.inf
    scores = [dreams_score(by, row, token, **settings) for row, token in zip(logits[0], drawn, strict=True)]
    assert (seen[0] != 8).nonzero().item() == max(range(12), key=scores.__getitem__)
    own = logits[0].softmax(-1).gather(1, made.tokens[0][:, None])[:, 0]
    assert_close(made.confidence[0], own)  # what is reported stays the model's own probability


def test_the_inverse_distribution_function_by_hand():
    """Cumulative 0.1, 0.1, 0.4, 1.0: an id of probability 0 is never drawn, not even at the ends."""
    logits = torch.tensor([0.1, 0.0, 0.3, 0.6]).log()
    u = torch.tensor([0.0, 0.0999, 0.1001, 0.399, 0.401, 1 - 2**-53], dtype=torch.float64)
    assert invert(logits.expand(6, -1), u).tolist() == [0, 0, 2, 2, 3, 3]
    assert invert(torch.tensor([[0.0, -torch.inf]]), u[-1:]).tolist() == [0]
    assert invert(torch.tensor([[-torch.inf, 0.0]]), u[:1]).tolist() == [1]


def test_cumulative_sums_keep_a_hundred_thousand_ids_apart():
    """Each of n equally likely ids is drawn for u in its own n-th, up to its borders: sums in float32, to 2^-25, blur those."""
    n = 2**17 - 1  # 1 / n is no float32
    for k in torch.arange(0, n, n // 40).tolist():
        for inside in (0.0005, 0.9995):
            u = torch.tensor([(k + inside) / n], dtype=torch.float64)
            assert invert(torch.zeros(1, n), u).item() == k


def test_drawing_reaches_ids_that_float32_noise_does_not():
    """An id of probability 2e-12, last of three, is drawn for u in the last 2e-12 of [0, 1): float32 has no such u."""
    logits = torch.tensor([[0.0, -1.0, -27.0]], dtype=torch.float64)
    p = logits.softmax(-1)[0, 2].item()
    assert invert(logits, torch.tensor([1 - p / 2], dtype=torch.float64)).item() == 2
    assert invert(logits, torch.tensor([1 - 2 * p], dtype=torch.float64)).item() == 1


def test_gumbel_noise_is_standard_and_float64():
    """Mean 0.5772, variance pi^2 / 6; 5 standard errors at n = 200,000."""
    noise = gumbel(torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert noise.dtype == torch.float64
    assert noise.mean().item() == pytest.approx(0.57722, abs=5 * math.sqrt(math.pi**2 / 6 / 200_000))
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.03)


def test_temperature_top_k_and_top_p_change_the_draws_as_they_say():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(40_000, -1)
    u = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for temperature in (0.5, 1.0, 2.0):
        token, probability = Drawing(temperature=temperature).draw(logits, u)
        share = torch.bincount(token, minlength=4) / 40_000
        assert_close(share, (logits[0] / temperature).softmax(0), atol=5 * 0.5 / 200, rtol=0)
        assert_close(probability, logits[0].softmax(0)[token].double())
    assert torch.isfinite(top_p_filter(logits[:1], 0.7)).sum() == 2  # 0.64 alone does not reach 0.7
    assert torch.isfinite(top_k_filter(logits[:1], 3)).sum() == 3
    assert torch.isfinite(top_k_filter(logits[:1], 9)).sum() == 4
    assert Drawing(top_p=0.7).draw(logits, u)[0].max() == 1
    assert Drawing(top_k=2).draw(logits, u)[0].max() == 1
    assert (Drawing(temperature=0.0).draw(logits, u)[0] == 0).all()


def test_guidance_is_one_batched_forward_of_the_formula():
    calls = []

    def fn(tokens):
        calls.append(tokens)
        return torch.nn.functional.one_hot(tokens, 5).float() * 3

    tokens = torch.tensor([[1, 4, 2]])
    prompt = torch.tensor([[True, False, False]])
    out = guided(fn, prompt, 4, 1.5)(tokens)
    conditional, unconditional = fn(tokens), fn(torch.tensor([[4, 4, 2]]))
    assert_close(out, 2.5 * conditional - 1.5 * unconditional)
    assert calls[0].shape == (2, 3)
    assert guided(fn, prompt, 4, 0.0) is fn


def test_a_guidance_scale_may_change_with_the_share_still_masked():
    def fn(tokens):
        return torch.nn.functional.one_hot(tokens, 5).float() * 3

    prompt = torch.tensor([[True, False, False]])
    generate = ~prompt
    out = guided(fn, prompt, 4, LinearScale(start=1.0, end=3.0), generate)
    half = torch.tensor([[1, 4, 2]])
    assert_close(out(half), guided(fn, prompt, 4, 2.0)(half))
    assert_close(out(torch.tensor([[1, 4, 4]])), guided(fn, prompt, 4, 1.0)(torch.tensor([[1, 4, 4]])))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ancestral(num_steps=0), "Ancestral: num_steps must be at least 1, got 0"),
        (lambda: ReMDM(num_steps=0), "ReMDM: num_steps must be at least 1, got 0"),
        (lambda: Confidence(temperature=-1.0), "temperature must be at least 0"),
        (lambda: FirstHitting(top_p=0.0), r"top_p must be in \(0, 1\], got 0"),
        (lambda: FirstHitting(top_k=0), "top_k must be at least 1"),
        (lambda: Confidence(rank_by="luck"), "rank_by 'luck' is not one of confidence, probability"),
        (lambda: Confidence(rank_by="margin", choice_temperature=1.0), "choice_temperature is noise on a log-probability"),
        (lambda: Threshold(threshold=1.5), r"threshold must be in \[0, 1\], got 1.5"),
        (lambda: Threshold(rank_by="random"), "not rank_by 'random'"),
        (lambda: Factor(factor=-1.0), "Factor: factor must be at least 0, got -1.0"),
        (lambda: Factor(rank_by="margin"), "Factor: a factor is for confidence or probability, not rank_by 'margin'"),
        (lambda: EntropyBounded(gamma=-1.0), "gamma must be at least 0"),
        (lambda: ReMDM(variant="more"), "variant 'more' is not one of cap, rescale, confidence"),
        (lambda: ReMDM(eta=2.0), "eta must be in"),
        (lambda: Blocks(FirstHitting(), 0), "block_length must be at least 1, got 0"),
        (lambda: sample(Blocks(FirstHitting(), 2), logits_fn, MASKS, MASK), "block_length 2 does not divide the 3 positions"),
        (lambda: sample(Blocks(PerModality([FirstHitting()]), 1), logits_fn, MASKS, MASK), "PerModality cannot be inside"),
        (
            lambda: sample(PerModality([FirstHitting()]), logits_fn, MASKS, MASK, modality=torch.ones_like(MASKS)),
            "1 samplers, and positions of modality 1",
        ),
        (lambda: sample(FirstHitting(), logits_fn, MASKS[:0], MASK), "the batch is empty"),
        (
            lambda: sample(FirstHitting(), logits_fn, MASKS, MASK, allowed=torch.arange(5).expand(1, 1, 5) == MASK),
            "no id is allowed at position 0 of row 0",
        ),
        (lambda: guided(logits_fn, NONE, MASK, 1.5), "guidance_scale 1.5: there is no prompt"),
        (lambda: guided(logits_fn, ~NONE, MASK, -1.0), "guidance_scale must be at least 0"),
        (lambda: guided(logits_fn, ~NONE, MASK, LinearScale()), "`generate` has to say"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
