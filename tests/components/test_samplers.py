import math

import pytest
import torch
from scipy.stats import chi2
from torch.testing import assert_close

from components.samplers import Ancestral, Confidence, FirstHitting, guided, sample
from components.samplers.categorical import draw, gumbel, top_p_filter
from components.schedules import Cosine
from tests.oracles import LENGTH, MASK, exact_conditionals, tiny_joint

JOINT = tiny_joint()
DRAWS = 20_000


def logits_fn(tokens):
    return exact_conditionals(JOINT, tokens)


def counts(sampler, draws=DRAWS, seed=0):
    start = torch.full((draws, LENGTH), MASK)
    tokens = sample(sampler, logits_fn, start, MASK, generator=torch.Generator().manual_seed(seed))
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
    g = torch.Generator().manual_seed(0)
    sample(FirstHitting(), logits_fn, start, MASK, generator=g, on_step=lambda s: firsts.append(~s.masked))
    shares = firsts[0].double().mean(0)
    assert (firsts[0].sum(1) == 1).all()
    assert_close(shares, torch.full((3,), 1 / 3, dtype=torch.float64), atol=5 * math.sqrt(2 / 9 / 6000), rtol=0)


def test_first_hitting_times_fall_as_the_process_says():
    """With n masked under the linear schedule, the next time is t * u^(1/n): E log t = -(1/3 + 1/2 + 1) after three."""
    times = []
    start = torch.full((6000, LENGTH), MASK)
    g = torch.Generator().manual_seed(0)
    sample(FirstHitting(), logits_fn, start, MASK, generator=g, on_step=lambda s: times.append(s.time.log().mean().item()))
    assert times == pytest.approx([-1 / 3, -5 / 6, -11 / 6], abs=5 * math.sqrt(49 / 36 / 6000))


def test_one_token_per_step_at_random_matches_the_joint():
    """Ancestral sampling with a grid so fine that steps unmask one token nearly always."""
    assert chi_square_p(counts(Ancestral(num_steps=600), draws=5000)) > 1e-4


def total_variation(observed):
    return float((observed / observed.sum() - JOINT.flatten()).abs().sum() / 2)


def test_ancestral_approaches_the_joint_as_steps_grow():
    """One step draws the product of marginals; the distance falls with the steps, to the noise of 20,000 draws (0.02)."""
    far, nearer, near = (total_variation(counts(Ancestral(num_steps=n))) for n in (1, 4, 64))
    assert far > 1.5 * nearer > 1.5 * near
    marginals = torch.einsum("i,j,k->ijk", JOINT.sum((1, 2)), JOINT.sum((0, 2)), JOINT.sum((0, 1))).flatten()
    assert far == pytest.approx(float((marginals - JOINT.flatten()).abs().sum() / 2), abs=0.02)
    assert near < 0.035


def test_confidence_is_biased_towards_likely_tokens():
    """Stated bias: choosing the position by its drawn token does not follow the joint, not even one token a step."""
    observed = counts(Confidence(num_steps=LENGTH))
    assert chi_square_p(observed) < 1e-6
    likely = JOINT.flatten().argmax()
    assert observed[likely] / observed.sum() > JOINT.flatten()[likely]


@pytest.mark.parametrize("sampler", [Ancestral(8), FirstHitting(), Confidence(2), Confidence(2, schedule=Cosine())], ids=repr)
def test_given_positions_stay_and_all_others_are_filled(sampler):
    tokens = torch.tensor([[2, MASK, MASK], [MASK, 1, MASK], [0, 1, 2]])
    out = sample(sampler, logits_fn, tokens, MASK, generator=torch.Generator().manual_seed(0))
    given = tokens != MASK
    assert_close(out[given], tokens[given])
    assert (out != MASK).all()


def test_allowed_ids_and_positions_to_generate_are_obeyed():
    allowed = torch.ones(50, LENGTH, MASK + 1, dtype=torch.bool)
    allowed[:, 1, 2:] = False
    tokens = torch.full((50, LENGTH), MASK)
    generate = torch.tensor([True, True, False]).expand(50, -1)
    out = sample(FirstHitting(), logits_fn, tokens, MASK, generate, allowed)
    assert (out[:, 1] < 2).all()
    assert (out[:, 2] == MASK).all()


def test_llada_counts_of_confidence():
    """5 masked tokens in 3 steps: 2, 2, 1 (one more in the first 5 % 3 steps)."""
    left = []
    logits = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    sample(
        Confidence(3), lambda t: logits.clone(), torch.full((1, 5), 3), 3, on_step=lambda s: left.append(int(s.masked.sum()))
    )
    assert left == [3, 1, 0]


def test_maskgit_schedule_of_confidence():
    """MaskGIT keeps floor(cos(pi/2 * step/steps) * L) masked after each step."""
    left = []
    logits = torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(0))
    sampler = Confidence(5, schedule=Cosine(), choice_temperature=4.5)
    sample(sampler, lambda t: logits.clone(), torch.full((1, 20), 3), 3, on_step=lambda s: left.append(int(s.masked.sum())))
    assert left == [math.floor(math.cos(math.pi / 2 * k / 5) * 20) for k in range(1, 5)] + [0]


def test_greedy_confidence_takes_the_surest_first():
    logits = torch.tensor([[[5.0, 0, 0], [0, 1.0, 0], [0, 9.0, 0]]])
    order = []
    start = torch.full((1, 3), 2)
    sample(Confidence(3, temperature=0.0), lambda t: logits.clone(), start, 2, on_step=lambda s: order.append(s.tokens.clone()))
    assert [o[0].tolist() for o in order] == [[2, 2, 1], [0, 2, 1], [0, 1, 1]]


def test_gumbel_noise_is_float64_and_standard():
    """Mean 0.5772, variance pi^2 / 6; 5 standard errors at n = 200,000. float64 reaches beyond float32's largest, 16.6."""
    noise = gumbel((200_000,), torch.device("cpu"), torch.Generator().manual_seed(0))
    assert noise.dtype == torch.float64
    assert noise.mean().item() == pytest.approx(0.57722, abs=5 * math.sqrt(math.pi**2 / 6 / 200_000))
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.03)


def test_temperature_and_top_p_change_the_draws_as_they_say():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(40_000, -1)
    for temperature in (0.5, 1.0, 2.0):
        token, probability = draw(logits, temperature, 1.0, torch.Generator().manual_seed(0))
        share = torch.bincount(token, minlength=4) / 40_000
        assert_close(share, (logits[0] / temperature).softmax(0), atol=5 * 0.5 / 200, rtol=0)
        assert_close(probability, logits[0].double().softmax(0)[token])
    assert torch.isfinite(top_p_filter(logits[:1], 0.7)).sum() == 2  # 0.64 alone does not reach 0.7
    assert draw(logits, 1.0, 0.7, torch.Generator().manual_seed(0))[0].max() == 1
    assert (draw(logits, 0.0, 1.0, None)[0] == 0).all()


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ancestral(0), "num_steps must be at least 1, got 0"),
        (lambda: Confidence(temperature=-1.0), "temperature must be at least 0"),
        (lambda: FirstHitting(top_p=0.0), r"top_p must be in \(0, 1\], got 0"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
