"""Samplers for noise of any kind, against everything enumerated: 2 positions of 3 symbols, and the mask."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import chi2
from torch.testing import assert_close

from components.kernels import MASKED, Hybrid, HybridLogSNR, Mask, Uniform, marginal, posterior
from components.samplers import (
    Ancestral,
    Blocks,
    Confidence,
    Editing,
    FillAfterEnd,
    FirstHitting,
    Gibbs,
    LeastSureFirst,
    PerModality,
    Psi,
    ReMDM,
    SamplerState,
    SelfCorrect,
    Threshold,
    base,
    sample,
)
from components.samplers.any_noise.reverse import denoised
from components.schedules import Truncated
from components.weightings import Noise, Noises

K, MASK = 3, 3
JOINT = torch.tensor([[0.30, 0.02, 0.08], [0.03, 0.25, 0.02], [0.10, 0.05, 0.15]], dtype=torch.float64)
STATES = torch.cartesian_prod(torch.arange(K + 1), torch.arange(K + 1))  # 16: symbols and the mask at two positions
PLACES = torch.tensor([K + 1, 1])
KERNELS = [Uniform(), Hybrid(p_u=0.3), HybridLogSNR(shift=0.5)]
EVERY_KERNEL = [Mask(), *KERNELS]
DRAWS, ROWS = 20_000, 4000  # of one step; of whole samples, whose rows have generators of their own


def at(kernel, tau):
    return kernel.levels(torch.tensor(tau, dtype=torch.float64))


def forward_matrix(kernel, tau):
    """q(z | x), `[3, 4]`."""
    levels = at(kernel, tau)
    ids = levels.alpha * torch.eye(K, dtype=torch.float64) + levels.uniform / K
    return torch.cat([ids, levels.mask.expand(K, 1)], dim=1)


def leave_one_out(kernel, tau, states=STATES):
    """P(x_i | z without i) at a noise level, `[16, 2, 3]`: from the joint and Bayes' rule."""
    q = forward_matrix(kernel, tau)
    first = (JOINT[None] * q[:, states[:, 1]].T[:, None, :]).sum(2)
    second = (JOINT[None] * q[:, states[:, 0]].T[:, :, None]).sum(1)
    both = torch.stack([first, second], dim=1)
    return (both / both.sum(-1, keepdim=True)).nan_to_num(1 / K)  # anything, where the other token cannot be


def logits_of(p):
    """With a column for the mask, that is never drawn."""
    return torch.cat([p.log(), torch.full_like(p[..., :1], -torch.inf)], dim=-1)


def levels_like(kernel, tau, p):
    return kernel.levels(torch.full(p.shape[:-1], tau, dtype=torch.float64))


def with_mask(ids, mask):
    return torch.cat([ids, mask[..., None]], dim=-1)


def product(p):
    """Of each state's two distributions `[16, 2, 4]`, the matrix `[16, 16]` of drawing both independently."""
    return torch.einsum("sa,sb->sab", p[:, 0], p[:, 1]).reshape(len(p), 16)


def ancestral_outcomes(kernel, t, s, p=None):
    """q(z_s | z_t, p) of each position, `[16, 2, 4]`."""
    p = leave_one_out(kernel, t) if p is None else p
    places = STATES.masked_fill(STATES == MASK, MASKED)
    return with_mask(*posterior(p, places, levels_like(kernel, t, p), levels_like(kernel, s, p)))


def psi_outcomes(kernel, t, s, eta):
    """kappa q(z_s | z_t, p) + (1 - kappa) q_s(. | E[x | z_t])."""
    p = leave_one_out(kernel, t)
    known = p * forward_matrix(kernel, t)[:, STATES].permute(1, 2, 0)  # times q(z | x)
    known = torch.where(known.sum(-1, keepdim=True) > 0, known, p)
    now, earlier = at(kernel, t), at(kernel, s)
    sigma = min(eta, float((1 - earlier.alpha) / now.alpha.clamp(min=1e-12)))
    kappa = max(0.0, 1 - sigma / max(float(1 - earlier.alpha), 1e-12))
    noised = with_mask(*marginal(known / known.sum(-1, keepdim=True), levels_like(kernel, s, p)))
    return kappa * ancestral_outcomes(kernel, t, s, p) + (1 - kappa) * noised


def gibbs_matrix(kernel, tau):
    """One of the two tokens, each as often as the other, is drawn from q(. | p)."""
    p = leave_one_out(kernel, tau)
    drawn = with_mask(*marginal(p, levels_like(kernel, tau, p)))
    stays = torch.nn.functional.one_hot(STATES, K + 1).double()
    first, second = torch.stack([drawn[:, 0], stays[:, 1]], 1), torch.stack([stays[:, 0], drawn[:, 1]], 1)
    return (product(first) + product(second)) / 2


def noisy_joint(kernel, tau):
    q = forward_matrix(kernel, tau)
    return (q.T @ JOINT @ q).flatten()


def error_after(kernel, steps, outcomes, between=None):
    """Total variation between the joint and what `steps` steps make of pure noise, with `between` behind all but the last."""
    now = noisy_joint(kernel, 1.0)
    for k in range(steps):
        t, s = 1 - k / steps, 1 - (k + 1) / steps
        now = now @ product(outcomes(kernel, t, s))
        if between is not None and s > 0:
            now = now @ between(kernel, s)
    return float((now - noisy_joint(kernel, 0.0)).abs().sum() / 2)


def fits(observed, expected):
    """Pearson's chi-square does not refute it: a right sampler fails at p < 1e-4 once in 10,000 seeds; the seed is fixed."""
    expected = expected * observed.sum()
    assert observed[expected < 1e-9].sum() == 0  # what cannot be is never drawn
    small = expected < 5
    o = torch.cat([observed[~small], observed[small].sum()[None]])
    e = torch.cat([expected[~small], expected[small].sum().clamp_min(1e-9)[None]])
    return float(chi2.sf(float(((o - e) ** 2 / e).sum()), max(len(o) - 1, 1))) > 1e-4


def at_state(state, kernel, time, step, seed, weighting="exact"):
    """DRAWS rows that stand at one state, with random numbers of their own."""
    rows = torch.tensor(state).expand(DRAWS, 2)
    began = SamplerState.start(rows, torch.ones(DRAWS, 2, dtype=torch.bool), MASK, noise=Noises([Noise(kernel, weighting)]))
    uniform = torch.rand(DRAWS, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    times = torch.full((DRAWS,), time, dtype=torch.float64)
    return replace(
        began, tokens=rows.clone(), masked=rows == MASK, uniform=uniform, time=times, step=torch.full_like(began.step, step)
    )


def outcomes_of(sampler, kernel, state, time, step, seed=0):
    """How often each of the 16 states follows."""
    logits = logits_of(leave_one_out(kernel, time, torch.tensor([state]))).expand(DRAWS, 2, K + 1)
    after = sampler.step(logits, at_state(state, kernel, time, step, seed))
    return torch.bincount(after.tokens @ PLACES, minlength=16).double()


def reached(kernel):
    """A state of two symbols, and one with a mask where noise has masks."""
    return [(0, 1), (2, 2)] if isinstance(kernel, Uniform) else [(0, 1), (MASK, 2)]


@pytest.mark.parametrize("kernel", [*EVERY_KERNEL, Hybrid(p_u=0.3, gamma=2.0)], ids=repr)
def test_ancestral_steps_go_to_the_joint_as_one_over_their_number(kernel):
    """Exact matrices. Two tokens change in one step with a probability of (rate dt)^2, whose sum goes as dt; where the rate is
    that of the square root of tau (Hybrid, gamma 1), as dt log(1/dt). Found to 5 %."""
    steps = (32, 64, 128)
    errors = [error_after(kernel, n, ancestral_outcomes) for n in steps]
    slow = isinstance(kernel, Hybrid) and kernel.gamma == 1
    rates = [(math.log(n) if slow else 1) / n for n in steps]
    assert errors[0] > 1e-3
    fallen, wanted = ([a / b for a, b in itertools.pairwise(x)] for x in (errors, rates))
    assert fallen == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("kernel", EVERY_KERNEL, ids=repr)
def test_an_ancestral_step_has_the_exact_transition_matrix(kernel):
    for state in reached(kernel):
        row = int(torch.tensor(state) @ PLACES)
        observed = outcomes_of(Ancestral(num_steps=4), kernel, state, time=0.75, step=1)
        assert fits(observed, product(ancestral_outcomes(kernel, 0.75, 0.5))[row])


@pytest.mark.parametrize("sampler", [Ancestral(num_steps=3), Psi(num_steps=3, eta=0.3)], ids=lambda s: s.name)
@pytest.mark.parametrize("kernel", EVERY_KERNEL, ids=repr)
def test_at_one_position_any_number_of_steps_is_exact(kernel, sampler):
    """The other positions say nothing, so that p is the prior at every level: by matrices, and drawn."""
    prior = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    p = prior.expand(K + 1, K)
    places = torch.tensor([0, 1, 2, MASKED])
    for steps in (1, 2, 5):
        now = prior @ forward_matrix(kernel, 1.0)
        for k in range(steps):
            t, s = 1 - k / steps, 1 - (k + 1) / steps
            now = now @ with_mask(*posterior(p, places, levels_like(kernel, t, p), levels_like(kernel, s, p)))
        assert_close(now, torch.cat([prior, torch.zeros(1, dtype=torch.float64)]))

    def model(tokens):
        return logits_of(prior).expand(*tokens.shape, K + 1)

    made = sample(sampler, model, torch.full((ROWS, 1), MASK), MASK, noise=Noises([Noise(kernel)]))
    assert fits(torch.bincount(made.tokens[:, 0], minlength=K).double(), prior)


@pytest.mark.parametrize("kernel", EVERY_KERNEL, ids=repr)
def test_a_gibbs_pass_of_one_token_leaves_the_noisy_joint_as_it_is(kernel):
    """By its exact matrix; the sampler's pass has that matrix. Both tokens at once do not."""
    for tau in (0.2, 0.5, 0.9):
        before = noisy_joint(kernel, tau)
        assert_close(before @ gibbs_matrix(kernel, tau), before)
    for state in reached(kernel):
        row = int(torch.tensor(state) @ PLACES)
        observed = outcomes_of(Gibbs(Ancestral(num_steps=4)), kernel, state, time=0.5, step=3)
        assert fits(observed, gibbs_matrix(kernel, 0.5)[row])
    p = leave_one_out(kernel, 0.5)
    both = product(with_mask(*marginal(p, levels_like(kernel, 0.5, p))))
    assert (noisy_joint(kernel, 0.5) @ both - noisy_joint(kernel, 0.5)).abs().max() > 1e-3
    observed = outcomes_of(Gibbs(Ancestral(num_steps=4), positions=2), kernel, reached(kernel)[1], time=0.5, step=3)
    assert fits(observed, both[int(torch.tensor(reached(kernel)[1]) @ PLACES)])


@pytest.mark.parametrize("kernel", EVERY_KERNEL, ids=repr)
def test_a_gibbs_pass_mends_steps_that_are_too_large(kernel):
    """One token's marginal is right at every time, so that of two one pass makes the joint: the last step's error stays."""
    last = noisy_joint(kernel, 0.25) @ product(ancestral_outcomes(kernel, 0.25, 0.0))
    last = float((last - noisy_joint(kernel, 0.0)).abs().sum() / 2)
    mended = error_after(kernel, 4, ancestral_outcomes, gibbs_matrix)
    assert mended == pytest.approx(last, rel=1e-9)
    assert error_after(kernel, 4, ancestral_outcomes) > 1.1 * mended


@pytest.mark.parametrize("inner", [Ancestral(num_steps=4), Psi(num_steps=4), ReMDM(num_steps=4)], ids=lambda s: s.name)
def test_gibbs_passes_stand_between_the_steps_of_the_grid(inner):
    seen = []
    noise = Noises([Noise(Hybrid())])
    sampler = Gibbs(inner, correctors=2)
    made = sample(sampler, equal_logits, torch.full((50, 6), MASK), MASK, on_step=seen.append, noise=noise)
    assert [state.time[0].item() for state in seen] == [0.75, 0.75, 0.75, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.0]
    assert made.forwards.tolist() == [10] * 50
    assert (made.tokens != MASK).all()
    changes = [(a.tokens != b.tokens).sum(1).max().item() for a, b in itertools.pairwise(seen)]
    assert [n <= 1 for n in changes[:8]] == [True, True, False] * 2 + [True, True]  # a token a pass, where it is a corrector


def test_whole_runs_of_gibbs_meet_the_joint_where_its_matrices_say_so():
    """4 steps, 4 passes behind each, with exact leave-one-out logits of the level: against the exact distribution."""
    kernel, sampler = Uniform(), Gibbs(Ancestral(num_steps=4), correctors=4)
    now = noisy_joint(kernel, 1.0)
    for k in range(4):
        t, s = 1 - k / 4, 0.75 - k / 4
        now = now @ product(ancestral_outcomes(kernel, t, s))
        now = now @ torch.linalg.matrix_power(gibbs_matrix(kernel, s), 4) if s > 0 else now
    level = [1.0]

    def model(tokens):
        return logits_of(leave_one_out(kernel, level[0]))[tokens @ PLACES]

    made = sample(
        sampler,
        model,
        torch.full((ROWS, 2), MASK),
        MASK,
        noise=Noises([Noise(kernel)]),
        on_step=lambda state: level.append(level.pop() * 0 + state.time[0].item()),
    )
    assert fits(torch.bincount(made.tokens @ PLACES, minlength=16).double(), now)


def test_gibbs_needs_a_grid_of_times_with_a_schedule():
    for inner in (FirstHitting(), Confidence(), Threshold(), Blocks(Ancestral()), LeastSureFirst()):
        with pytest.raises(ValueError, match=f"Gibbs: {type(inner).__name__} has no grid of times with a schedule"):
            Gibbs(inner)
    for wrong in ({"correctors": 0}, {"positions": 0}):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            Gibbs(Ancestral(), **wrong)


def mask_probabilities(observed):
    """Of the first position being the mask afterwards."""
    return float(observed.view(4, 4)[MASK].sum() / observed.sum())


@pytest.mark.parametrize(("t", "s", "eta"), [(0.75, 0.5, 0.1), (0.75, 0.5, 0.5), (0.25, 0.0, 0.3)])
def test_psi_is_remdm_for_masks(t, s, eta):
    """Exactly, where sigma <= 1 - alpha_s: a mask stays with ReMDM's probability, a token becomes one again with sigma."""
    alpha_t, alpha_s = 1 - t, 1 - s
    sigma = min(eta, (1 - alpha_s) / alpha_t, 1.0)
    stays = 1 - (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
    exact = psi_outcomes(Mask(), t, s, eta)
    masked = STATES == MASK
    assert_close(exact[..., MASK][masked], torch.full_like(exact[..., MASK][masked], stays))
    assert_close(exact[..., MASK][~masked], torch.full_like(exact[..., MASK][~masked], sigma))
    step = round((1 - t) * 4)
    for state in ((0, 1), (MASK, 2), (MASK, MASK)):
        row = product(exact)[int(torch.tensor(state) @ PLACES)]
        for seed, sampler in enumerate((Psi(num_steps=4, eta=eta), ReMDM(num_steps=4, eta=eta))):
            assert fits(outcomes_of(sampler, Mask(), state, t, step, seed), row)


def test_psi_masks_less_than_remdm_where_kappa_would_be_negative():
    """alpha_t = 1/2, alpha_s = 3/4, eta 1: sigma = 1/2 > 1 - alpha_s = 1/4. All is noised again: 1/4 are masked, not 1/2."""
    exact = psi_outcomes(Mask(), 0.5, 0.25, 1.0)
    assert_close(exact[..., MASK], torch.full((16, 2), 0.25, dtype=torch.float64))
    for state in ((0, 1), (MASK, 2)):
        row = product(exact)[int(torch.tensor(state) @ PLACES)]
        observed = outcomes_of(Psi(num_steps=4, eta=1.0), Mask(), state, 0.5, 2)
        assert fits(observed, row)
    again = mask_probabilities(outcomes_of(ReMDM(num_steps=4, eta=1.0), Mask(), (0, 1), 0.5, 2))
    assert again == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(DRAWS))


@pytest.mark.parametrize("kernel", EVERY_KERNEL, ids=repr)
def test_psi_steps_have_their_matrix_and_go_to_the_joint(kernel):
    errors = [error_after(kernel, steps, lambda *at: psi_outcomes(*at, eta=0.05)) for steps in (4, 16, 64)]
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.5 * errors[2]
    for state in reached(kernel):
        row = int(torch.tensor(state) @ PLACES)
        observed = outcomes_of(Psi(num_steps=4, eta=0.3), kernel, state, time=0.75, step=1)
        assert fits(observed, product(psi_outcomes(kernel, 0.75, 0.5, 0.3))[row])


@pytest.mark.parametrize(
    "sampler", [Ancestral(num_steps=4), Psi(num_steps=4, eta=0.3), Gibbs(Ancestral(num_steps=4))], ids=repr
)
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_a_model_that_says_what_z_says_steps_like_one_that_leaves_it_out(kernel, sampler):
    """E[x | z] is p times q(z | x). Its tilt taken off, the distributions are equal, and so are the tokens drawn."""
    for state in reached(kernel):
        p = leave_one_out(kernel, 0.75, torch.tensor([state]))
        known = p * forward_matrix(kernel, 0.75)[:, torch.tensor([state])].permute(1, 2, 0)
        logits = [logits_of(x).expand(DRAWS, 2, K + 1) for x in (p, known / known.sum(-1, keepdim=True))]
        began = [at_state(state, kernel, 0.75, 1, 0, weighting) for weighting in ("exact", "cross_entropy")]
        tau = torch.full((DRAWS,), 0.75, dtype=torch.float64)
        said = [denoised(x, own, tau, Ancestral()).p for x, own in zip(logits, began, strict=True)]
        assert_close(said[0], said[1])
        assert_close(said[0][0, :, :K], p[0])
        a, b = (sampler.step(x, own).tokens for x, own in zip(logits, began, strict=True))
        assert torch.equal(a, b)


def equal_logits(tokens):
    return torch.zeros(*tokens.shape, K + 1)


def hashed_logits(tokens):
    """Logits drawn anew for every context: a hash of the row seeds them."""
    rows = [torch.Generator().manual_seed(int((row * torch.arange(1, len(row) + 1)).sum())) for row in tokens]
    return torch.stack([2 * torch.randn(tokens.shape[1], 8, dtype=torch.float64, generator=g) for g in rows])


NOISES = [Noises([Noise(kernel)]) for kernel in EVERY_KERNEL]
ANY = [
    Ancestral(num_steps=4),
    Psi(num_steps=4, eta=0.2),
    Gibbs(Ancestral(num_steps=3)),
    LeastSureFirst(num_steps=4),
    SelfCorrect(Ancestral(num_steps=2), passes=3, temperature=1.0),
    Blocks(Gibbs(Psi(num_steps=2)), 3),
    Blocks(LeastSureFirst(num_steps=2), 3),
    SelfCorrect(Blocks(Ancestral(num_steps=2), 3), passes=2, temperature=1.0),
    PerModality([SelfCorrect(Psi(num_steps=2), passes=3, temperature=1.0), Gibbs(Ancestral(num_steps=2))]),
    SelfCorrect(PerModality([Ancestral(num_steps=2), LeastSureFirst(num_steps=5)]), temperature=1.0),
]
MASKS_ALONE = [
    Editing(threshold=0.3, edit_threshold=0.3),
    Blocks(Editing(threshold=0.3, edit_threshold=0.3, extra_steps=2), 3),
    SelfCorrect(Blocks(Confidence(num_steps=2), 3), temperature=1.0),
    PerModality([Editing(threshold=0.5, edit_threshold=0.3), SelfCorrect(FirstHitting(), temperature=1.0)]),
]
MIXED = Noises([Noise(Hybrid()), Noise(Uniform())])
RUNS = [(s, n) for s in ANY for n in (*NOISES, MIXED)] + [(s, n) for s in MASKS_ALONE for n in (NOISES[0], NOISES[2])]


@pytest.mark.parametrize(("sampler", "noise"), RUNS)
def test_given_tokens_stay_no_mask_is_left_and_a_sample_does_not_depend_on_its_batch(sampler, noise):
    """Whole batches are stepped until the last row is done: a finished row's tokens are not touched any more."""
    start = torch.full((4, 8), 7)
    start[:, :2] = torch.tensor([3, 5])
    modality = (torch.arange(8) >= 5).long().expand(4, 8)
    options = {"mask_id": 7, "modality": modality, "noise": noise, "seed": 2}
    states = []
    made = sample(sampler, hashed_logits, start, **options, on_step=states.append)
    assert all(torch.equal(state.tokens[:, :2], start[:, :2]) for state in states)
    assert (made.tokens != 7).all()
    assert made.tokens.unique(dim=0).shape[0] > 1
    options["modality"] = modality[:1]
    for i in range(4):
        alone = sample(sampler, hashed_logits, start[:1], **options, index=[i])
        assert torch.equal(alone.tokens[0], made.tokens[i])
        assert alone.forwards[0] == made.forwards[i]


def test_a_sampler_for_masks_is_refused_where_noise_ends_in_none():
    uniform, start = Noises([Noise(Uniform())]), torch.full((2, 4), MASK)
    inside = [
        Confidence(),
        Editing(),
        Blocks(Confidence(), 2),
        SelfCorrect(Threshold()),
        SelfCorrect(Blocks(Threshold(), 2)),
        PerModality([Psi(), Threshold()]),
        SelfCorrect(PerModality([Psi(), Threshold()])),
    ]
    names = ["Confidence", "Editing", "Confidence", *["Threshold"] * 4]
    for sampler, name in zip(inside, names, strict=True):
        with pytest.raises(ValueError, match=rf"sample: {name} fills in masks, and the noise .* Uniform\(\), ends in none"):
            sample(sampler, equal_logits, start, MASK, noise=uniform)
        sample(replace(sampler), equal_logits, start, MASK, noise=Noises([Noise(Hybrid())]))  # ends in masks
    mixed, modality = Noises([Noise(Uniform()), Noise(Mask())]), (torch.arange(4) > 1).long().expand(2, 4)
    sample(SelfCorrect(PerModality([Psi(), Threshold()])), equal_logits, start, MASK, modality=modality, noise=mixed)
    with pytest.raises(ValueError, match="Threshold fills in masks"):
        sample(PerModality([Threshold(), Psi()]), equal_logits, start, MASK, modality=modality, noise=mixed)


def test_each_modality_has_its_own_noise_in_one_sample():
    """Independent positions, so that any step is exact: marginals of masked text and of uniform noise, by chi-square."""
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.2, 0.6, 0.2], [0.7, 0.2, 0.1]], dtype=torch.float64)
    noise, modality = Noises([Noise(Mask()), Noise(Uniform())]), torch.tensor([0, 0, 1, 1]).expand(ROWS, 4)

    def model(tokens):
        return logits_of(p).expand(len(tokens), 4, K + 1)

    for sampler in (
        Ancestral(num_steps=3),
        PerModality([Confidence(num_steps=2, rank_by="random"), Psi(num_steps=3, eta=0.3)]),
    ):
        states = []
        start = torch.full((ROWS, 4), MASK)
        made = sample(sampler, model, start, MASK, modality=modality, noise=noise, on_step=states.append)
        for i in range(4):
            assert fits(torch.bincount(made.tokens[:, i], minlength=K).double(), p[i])
        assert not (states[0].tokens[:, 2:] == MASK).any()
        assert (states[0].tokens[:, :2] == MASK).any()


@pytest.mark.parametrize("kernel", EVERY_KERNEL, ids=repr)
@pytest.mark.parametrize("sampler", [Ancestral(num_steps=3), Psi(num_steps=3), Gibbs(Psi(num_steps=3))], ids=repr)
def test_a_schedule_that_stops_short_leaves_no_noise_behind(kernel, sampler):
    """A sure model's token everywhere: at time 0 every token is clean, whatever the schedule."""
    schedule = Truncated(0.3, 0.9)
    sampler = (
        replace(sampler, sampler=Psi(num_steps=3, schedule=schedule))
        if isinstance(sampler, Gibbs)
        else replace(sampler, schedule=schedule)
    )
    sure = torch.tensor([0.0, 50.0, 0.0, -torch.inf])
    noise = Noises([Noise(kernel)])
    made = sample(sampler, lambda t: sure.expand(*t.shape, 4).clone(), torch.full((200, 3), MASK), MASK, noise=noise)
    assert (made.tokens == 1).all()


def test_self_correction_changes_nothing_where_the_model_is_perfect():
    """Deterministic positions: a finished sample is what the model says, and one pass sees that."""
    truth = torch.tensor([2, 0, 1, 1])

    def perfect(tokens):
        return 60.0 * torch.nn.functional.one_hot(truth, 4).double().expand(len(tokens), 4, 4)

    plain = sample(Threshold(), perfect, torch.full((3, 4), MASK), MASK)
    made = sample(SelfCorrect(Threshold()), perfect, torch.full((3, 4), MASK), MASK)
    assert torch.equal(made.tokens, plain.tokens)
    assert torch.equal(made.confidence, plain.confidence)
    assert made.forwards.tolist() == (plain.forwards + 1).tolist()


def corrected_by_hand(model, tokens, generate, passes, count):
    """2503.04482's loop at temperature 0, a row at a time: the tokens, and the passes taken."""
    tokens = tokens.clone()
    for n in range(1, passes + 1):
        p = model(tokens[None])[0].double()
        p[:, 7] = -torch.inf
        p = p.softmax(-1)
        wrong = {i: p[i].max().item() for i in range(len(tokens)) if generate[i] and p[i].argmax() != tokens[i]}
        for i in sorted(wrong, key=lambda i: -wrong[i])[:count]:
            tokens[i] = p[i].argmax()
        if not wrong:
            return tokens, n
    return tokens, passes


@pytest.mark.parametrize(("passes", "count"), [(1, 1), (3, 2), (30, 2)])
def test_self_correction_is_the_authors_loop(passes, count):
    """A model that agrees with a third of what stands there: rows end after as many passes as in a slow loop."""

    def model(tokens):
        here = torch.nn.functional.one_hot(tokens, 8) * (tokens[..., None] % 3 == 0)
        return hashed_logits(tokens) + 6.0 * here

    start = torch.full((12, 6), 7)
    start[:, 0] = 4
    plain = sample(Confidence(num_steps=2), model, start, 7)
    sampler = SelfCorrect(Confidence(num_steps=2), passes=passes, tokens=count, temperature=0.0)
    made = sample(sampler, model, start, 7)
    for i in range(12):
        tokens, taken = corrected_by_hand(model, plain.tokens[i], start[i] == 7, passes, count)
        assert torch.equal(made.tokens[i], tokens)
        assert made.forwards[i] == plain.forwards[i] + taken
    assert not torch.equal(made.tokens, plain.tokens)
    assert passes < 30 or len(set(made.forwards.tolist())) > 1  # some are done earlier than others


def test_self_correction_draws_from_tempered_distributions():
    """Of one position that holds the least likely token, one pass, T = 1/2: p squared, normalised; by chi-square."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

    def model(tokens):
        return logits_of(p).expand(*tokens.shape, K + 1)

    sampler = SelfCorrect(Confidence(num_steps=1), passes=1, temperature=0.5)
    made = sample(sampler, model, torch.full((ROWS, 1), MASK), MASK)
    assert fits(torch.bincount(made.tokens[:, 0], minlength=K).double(), p**2 / (p**2).sum())


def test_a_row_that_a_constraint_has_filled_is_corrected_and_edited_all_the_same():
    """An end at position 1 fills the rest in the first pass; then the model would have another token at position 0."""
    end = 2

    def model(tokens):
        logits = torch.zeros(*tokens.shape, K + 1, dtype=torch.float64)
        logits[..., 1, end] = 20.0
        logits[..., 0, 0] = 5.0
        logits[:, 0, 1] += 10.0 * (tokens[:, 1] == end)
        logits[:, 2:, end] += 10.0 * (tokens[:, 2:] == end)
        return logits

    start = torch.full((2, 4), MASK)
    fill = FillAfterEnd(end)
    plain = sample(Threshold(temperature=0.0), model, start, MASK, constraint=fill)
    assert plain.tokens.tolist() == [[0, end, end, end]] * 2
    assert plain.forwards.tolist() == [1, 1]
    for sampler in (
        Editing(temperature=0.0),
        SelfCorrect(Threshold(temperature=0.0)),
        PerModality([Editing(temperature=0.0)]),
        Blocks(Editing(temperature=0.0), 4),
    ):
        made = sample(sampler, model, start, MASK, constraint=fill)
        assert made.tokens.tolist() == [[1, end, end, end]] * 2, sampler


def test_self_correction_and_gibbs_are_given_the_passes_that_they_may_take(monkeypatch):
    """No new token is settled in them: without, `sample` would think that nothing comes of a row."""
    monkeypatch.setattr(base, "PATIENCE", 3)
    noise = Noises([Noise(Uniform())])

    def never(tokens):  # always another
        return 9.0 * torch.nn.functional.one_hot((tokens + 1) % 3, 4).double()

    for sampler, forwards in ((SelfCorrect(Psi(num_steps=5), passes=8), 13), (Gibbs(Psi(num_steps=5), correctors=3), 17)):
        made = sample(sampler, never, torch.full((2, 4), MASK), MASK, noise=noise)
        assert made.forwards.tolist() == [forwards] * 2


def test_blocks_do_not_hold_a_sampler_with_a_state_of_its_own():
    with pytest.raises(ValueError, match="Blocks: SelfCorrect cannot be inside; it may hold blocks"):
        sample(Blocks(SelfCorrect(Psi()), 2), equal_logits, torch.full((1, 4), MASK), MASK)
    for wrong in ({"passes": 0}, {"tokens": 0}):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            SelfCorrect(Psi(), **wrong)


def least_sure_by_hand(model, tokens, steps, share):
    """2512.10858's sampler at temperature 0, a position at a time: the states after each step."""
    tokens, total, seen = tokens.clone(), len(tokens), []
    for step in range(steps):
        p = model(tokens[None])[0].double()
        p[:, 7] = -torch.inf
        p = p.softmax(-1)
        gap = {i: float(p[i].max() - p[i, tokens[i]]) * share(tokens[i] == 7) for i in range(total)}
        chosen = sorted((i for i in gap if gap[i] > 0), key=lambda i: -gap[i])[: math.ceil(total / steps)]
        if step == steps - 1:
            chosen += [i for i in range(total) if tokens[i] == 7]
        for i in chosen:
            tokens[i] = p[i].argmax()
        seen.append(tokens.clone())
        if not chosen:
            break
    return seen


@pytest.mark.parametrize("kernel", EVERY_KERNEL, ids=repr)
def test_the_least_sure_first_is_the_authors_rule(kernel):
    levels = at(kernel, 1 / (1 + math.exp(-9)))

    def share(masked):
        return float(levels.mask if masked else levels.uniform / 7)

    states = []
    sampler = LeastSureFirst(num_steps=4, temperature=0.0)
    start, noise = torch.full((5, 6), 7), Noises([Noise(kernel)])
    began = torch.full((5, 6), 7) if kernel.ends_masked else None

    def model(tokens):
        nonlocal began
        began = tokens.clone() if began is None else began
        return hashed_logits(tokens)

    sample(sampler, model, start, 7, noise=noise, on_step=states.append)
    revised = 0
    for row in range(5):
        wanted = least_sure_by_hand(hashed_logits, began[row], 4, share)
        got = [state.tokens[row] for state in states[: len(wanted)]]
        assert torch.equal(torch.stack(got), torch.stack(wanted))
        for a, b in itertools.pairwise(got):
            revised += int(((a != 7) & (a != b)).sum())
    assert (states[-1].tokens != 7).all()
    assert (revised > 0) == (not kernel.masks_only)


def test_the_least_sure_first_ends_where_nothing_is_left_to_change():
    """Masks, 3 tokens of 16 steps: one each, and a pass that sees that all are the most probable."""

    def sure(tokens):
        return torch.tensor([0.0, 3.0, 0.0, 0.0]).expand(*tokens.shape, 4).clone()

    made = sample(LeastSureFirst(temperature=0.0), sure, torch.full((2, 3), MASK), MASK)
    assert made.tokens.tolist() == [[1, 1, 1]] * 2
    assert made.forwards.tolist() == [4, 4]
    drawn = sample(LeastSureFirst(num_steps=1), equal_logits, torch.full((ROWS, 1), MASK), MASK)
    assert fits(torch.bincount(drawn.tokens[:, 0], minlength=K).double(), torch.full((K,), 1 / 3, dtype=torch.float64))


def edited_by_hand(model, length, fill, edit, extra_steps):
    """LLaDA2.1's rule, a position at a time: the tokens, and the passes taken."""
    tokens, passes, extra = torch.full((length,), 7), 0, 0
    while True:
        p = model(tokens[None])[0].double()
        p[:, 7] = -torch.inf
        p = p.softmax(-1)
        best = p.argmax(-1)
        empty = [i for i in range(length) if tokens[i] == 7]
        wrong = [i for i in range(length) if tokens[i] != 7 and best[i] != tokens[i] and p[i].max() > edit]
        sure = [i for i in empty if p[i].max() > fill] or sorted(empty, key=lambda i: -p[i].max())[:1]
        for i in [*sure, *wrong]:
            tokens[i] = best[i]
        passes, extra = passes + 1, extra + (not empty)
        if (tokens != 7).all() and ((not empty and not wrong) or extra >= extra_steps):
            return tokens, passes


@pytest.mark.parametrize("extra_steps", [0, 1, 8])
def test_editing_is_the_rule_of_its_authors(extra_steps):
    def model(tokens):
        return hashed_logits(tokens) + 3.0 * torch.nn.functional.one_hot(tokens, 8)

    sampler = Editing(threshold=0.5, temperature=0.0, edit_threshold=0.6, extra_steps=extra_steps)
    start, passes, edits = torch.full((1, 8), 7), set(), 0
    for row in range(8):

        def own(tokens, row=row):
            return model(torch.cat([torch.full((len(tokens), 1), row), tokens], dim=1))[:, 1:]

        tokens, taken = edited_by_hand(own, 8, 0.5, 0.6, extra_steps)
        states = []
        made = sample(sampler, own, start, 7, on_step=states.append)
        assert torch.equal(made.tokens[0], tokens)
        assert made.forwards[0] == taken
        edits += sum(int(((a.tokens != 7) & (a.tokens != b.tokens)).sum()) for a, b in itertools.pairwise(states))
        passes.add(taken)
    assert edits > 0
    assert len(passes) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_edit_threshold_of_one_is_the_plain_threshold(temperature):
    start = torch.full((6, 8), 7)
    for wrap in (lambda s: s, lambda s: Blocks(s, 4)):
        plain = sample(wrap(Threshold(threshold=0.4, temperature=temperature)), hashed_logits, start, 7)
        editing = Editing(threshold=0.4, temperature=temperature, edit_threshold=1.0)
        made = sample(wrap(editing), hashed_logits, start, 7)
        assert torch.equal(made.tokens, plain.tokens)
        assert torch.equal(made.forwards, plain.forwards)
        assert torch.equal(made.confidence, plain.confidence)


def test_editing_in_blocks_leaves_the_other_blocks_alone():
    """Every block is given its own passes without masks, and edits itself only."""
    sampler, seen = Blocks(Editing(threshold=0.9, temperature=0.0, edit_threshold=0.2, extra_steps=2), 4), []
    sample(sampler, hashed_logits, torch.full((6, 8), 7), 7, on_step=seen.append)
    edited = [0, 0]
    for before, after in itertools.pairwise(seen):
        changed = (before.tokens != after.tokens) & (before.tokens != 7)
        for row in range(6):
            block = int(before.block[row])
            assert not changed[row, 4 * (1 - block) : 4 * (2 - block)].any()
            edited[block] += int(changed[row].sum())
        assert (after.extra <= 1).all()
    assert min(edited) > 0
    assert max(int(state.extra.max()) for state in seen) == 1


def test_what_editing_may_be_told():
    for wrong in ({"edit_threshold": 1.5}, {"extra_steps": -1}, {"extra_steps": 1001}):
        with pytest.raises(ValueError, match=f"Editing: {next(iter(wrong))} must be"):
            Editing(**wrong)


def test_sampling_begins_where_training_ended_also_where_masks_come_last_of_all():
    """Log-SNR noise far on the uniform side is nearly uniform at tau 0.999, and goes to masks only behind it."""
    kernel, seen = HybridLogSNR(shift=10.0), []
    noise = Noises([Noise(kernel)])

    def model(tokens):
        seen.append(tokens.clone())
        return equal_logits(tokens)

    sample(Ancestral(num_steps=2), model, torch.full((200, 20), MASK), MASK, noise=noise)
    share = float(kernel.levels(torch.tensor(0.999, dtype=torch.float64)).mask) / 0.999
    assert share < 0.05
    assert float((seen[0] == MASK).double().mean()) == pytest.approx(share, abs=5 * math.sqrt(share / 4000))
    with pytest.raises(ValueError, match=r"Confidence fills in masks, and the noise .* ends in none"):
        sample(Confidence(), model, torch.full((1, 4), MASK), MASK, noise=noise)
    seen.clear()
    sample(Confidence(), model, torch.full((200, 20), MASK), MASK, noise=Noises([Noise(HybridLogSNR(shift=2.0))]))
    assert (seen[0] == MASK).all()  # 0.7 % of others, as good as none


def test_noise_that_nothing_says_is_refused():
    """Of a modality beyond those that have one; and where no id lies below the mask token, and none are named."""
    noise, start = Noises([Noise(), Noise(Uniform())]), torch.full((1, 4), MASK)
    for wrong in (2, -1):
        modality = torch.tensor([[0, 1, 1, wrong]])
        with pytest.raises(ValueError, match=f"noise of 2 modalities, and positions of modality {wrong} to generate"):
            sample(Ancestral(), equal_logits, start, MASK, modality=modality, noise=noise)
        given = torch.tensor([[True, True, True, False]])
        made = sample(Ancestral(), equal_logits, start.clone(), MASK, given, modality=modality, noise=noise)
        assert (made.tokens[0, :3] < MASK).all()
    with pytest.raises(ValueError, match="the mask token is the first of all ids, so that noise needs `allowed`"):
        sample(Ancestral(), equal_logits, torch.zeros(1, 4, dtype=torch.long), 0, noise=Noises([Noise(Uniform())]))


def test_noise_over_ids_that_are_no_tokens_needs_to_be_told_which_may_stand_where():
    """A vocabulary's other special tokens lie behind its mask: without `allowed` they would be drawn, and start the canvas."""
    masks, uniform = torch.full((1, 2), 3), Noises([Noise(Uniform())])
    with pytest.raises(ValueError, match=r"sample: noise may be any of 6 ids, of which some are no tokens .* `allowed`"):
        sample(Ancestral(num_steps=2), lambda z: torch.zeros(*z.shape, 6), masks, mask_id=3, noise=uniform)
    allowed = torch.arange(6)[None, None] < 3
    made = sample(Ancestral(num_steps=2), lambda z: torch.zeros(*z.shape, 6), masks, 3, allowed=allowed, noise=uniform)
    assert bool((made.tokens < 3).all())


def test_gibbs_changes_nothing_once_its_time_is_over():
    """Beside a sampler of another modality that takes longer."""
    modality = torch.tensor([[0, 0, 0, 1, 1, 1]]).expand(20, -1)
    sampler, seen = PerModality([Gibbs(Ancestral(num_steps=2)), Ancestral(num_steps=12)]), []
    noise = Noises([Noise(Uniform()), Noise(Uniform())])
    masks = torch.full((20, 6), 3)
    sample(
        sampler, lambda z: torch.zeros(*z.shape, 4), masks, 3, modality=modality, noise=noise,
        on_step=lambda state: seen.append(state.tokens[:, :3].clone()),
    )  # fmt: skip
    assert len(seen) == 12
    assert all(torch.equal(tokens, seen[2]) for tokens in seen[3:])  # a step, a correction, a step
    assert not torch.equal(seen[2], seen[1])
