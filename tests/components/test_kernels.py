"""Kernels against enumeration in float64: transitions, Bayes' posterior, and the bound as a sum of KLs over 4000 steps."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from components.divergence import divergence
from components.kernels import MASKED, Hybrid, HybridLogSNR, Kernel, Levels, Mask, Uniform, marginal, posterior, prior
from components.weightings import Noise

OTHERS = [
    Uniform(),
    Hybrid(),
    Hybrid(0.3, 2.0),
    Hybrid(0.2, 0.5),
    HybridLogSNR(),
    HybridLogSNR(0.3, 0.7),
    HybridLogSNR(-2.0, 0.0),
    HybridLogSNR(0.5, -1.0),
]
ALL = [Mask(), Hybrid(0.0), *OTHERS]
N = 3
TAU = torch.linspace(0.001, 0.999, 301, dtype=torch.float64)
DATA = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
GUESS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def at(levels: Levels, index) -> Levels:
    return Levels(*(v[index] for v in vars(levels).values()))


def noise_of(levels: Levels, n: int = N) -> torch.Tensor:
    """What noise is: `[*shape, n + 1]`, the mask last."""
    return torch.cat([(levels.uniform / n)[..., None].expand(*levels.uniform.shape, n), levels.mask[..., None]], dim=-1)


def forward(levels: Levels, n: int = N) -> torch.Tensor:
    """q(z | x), `[*shape, x, z]`."""
    return levels.alpha[..., None, None] * torch.eye(n, n + 1, dtype=torch.float64) + noise_of(levels, n)[..., None, :]


def transition(now: Levels, earlier: Levels, n: int = N) -> torch.Tensor:
    """q(z_t | z_s), `[*shape, z_s, z_t]`: a token is kept with r, and noise adds what is lacking."""
    r = (now.alpha / earlier.alpha)[..., None]
    added = noise_of(now, n) - r * noise_of(earlier, n)
    return r[..., None] * torch.eye(n + 1, dtype=torch.float64) + added[..., None, :]


def rate_by_levels(kernel: Kernel, tau: torch.Tensor, of: str) -> torch.Tensor:
    tau = tau.clone().requires_grad_()
    levels = kernel.levels(tau)
    share = getattr(levels, of) + 0 * tau
    (slope,) = torch.autograd.grad(share.sum(), tau, retain_graph=True)
    (alpha_slope,) = torch.autograd.grad(levels.alpha.sum(), tau)
    return slope - alpha_slope / levels.alpha.detach() * share.detach()


@pytest.mark.parametrize("kernel", ALL, ids=repr)
def test_shares_are_a_distribution_and_rates_their_derivatives(kernel):
    levels = kernel.levels(TAU)
    assert_close(levels.alpha + levels.mask + levels.uniform, torch.ones_like(TAU), rtol=0, atol=1e-15)
    for share in (levels.alpha, levels.mask, levels.uniform, levels.mask_rate, levels.uniform_rate):
        assert (share >= 0).all()
    assert (levels.alpha.diff() < 0).all()
    assert_close(levels.mask_rate, rate_by_levels(kernel, TAU, "mask"), rtol=1e-8, atol=1e-10)
    assert_close(levels.uniform_rate, rate_by_levels(kernel, TAU, "uniform"), rtol=1e-8, atol=1e-10)
    steps = 1e-5
    later = kernel.levels(TAU[1:-1] + steps)
    before = kernel.levels(TAU[1:-1] - steps)
    arises = (transition(later, before)[:, 0, 1:] / (2 * steps)).clamp(min=0)  # of a token that was x = 0
    assert_close(arises[:, -1], levels.mask_rate[1:-1], rtol=2e-2, atol=1e-3)
    assert_close(arises[:, 0], levels.uniform_rate[1:-1] / N, rtol=2e-2, atol=1e-3)
    assert (kernel.masks_only, kernel.ends_masked) == (bool((levels.uniform == 0).all()), ends_masked(kernel))


def ends_masked(kernel: Kernel) -> bool:
    return float(kernel.levels(torch.tensor(1 - 1e-12, dtype=torch.float64)).mask) > 0.99


@pytest.mark.parametrize("kernel", ALL, ids=repr)
def test_levels_are_those_of_one_markov_chain(kernel):
    """Chapman-Kolmogorov, q_{t|s} q_s = q_t, and no transition has a negative probability, near or far."""
    levels = kernel.levels(TAU)
    for apart in (1, 10, 150, 300):
        now, earlier = at(levels, slice(apart, None)), at(levels, slice(None, -apart))
        step = transition(now, earlier)
        assert step.min() > -1e-14
        assert_close(step.sum(dim=-1), torch.ones_like(step[..., 0]), rtol=0, atol=1e-12)
        assert_close(forward(earlier) @ step, forward(now), rtol=0, atol=1e-14)


def bayes(now: Levels, earlier: Levels, n: int = N) -> torch.Tensor:
    """q(z_s | z_t, x) from the joint of all three, `[*shape, x, z_t, z_s]`; 0 where z_t cannot be."""
    joint = forward(earlier, n)[..., :, None, :] * transition(now, earlier, n).transpose(-1, -2)[..., None, :, :]
    total = joint.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, joint / total, 0.0)


def stepped(p: torch.Tensor, now: Levels, earlier: Levels, n: int = N) -> torch.Tensor:
    """`posterior` from each z_t: `[z_t, z_s]`, the mask last in both."""
    z = torch.tensor([*range(n), MASKED])
    many = [Levels(*(v.expand(n + 1) for v in vars(levels).values())) for levels in (now, earlier)]
    ids, mask = posterior(p.expand(n + 1, n), z, *many)
    return torch.cat([ids, mask[:, None]], dim=1)


PAIRS = [(0.5, 0.4), (0.9, 0.1), (0.02, 0.01), (0.999, 0.99), (0.7, 0.699)]


@pytest.mark.parametrize("kernel", ALL, ids=repr)
def test_posterior_is_bayes(kernel):
    """By enumeration over (x, z_s, z_t); for any p it is that of the mixture: p_x q(z_t | x) weighs x."""
    for t, s in PAIRS:
        now, earlier = (kernel.levels(torch.tensor(v, dtype=torch.float64)) for v in (t, s))
        exact, q_t = bayes(now, earlier), forward(now)
        possible = q_t.sum(dim=0) > 0
        for x in range(N):
            found = stepped(torch.eye(N, dtype=torch.float64)[x], now, earlier)
            can_be = q_t[x] > 0
            assert_close(found[can_be], exact[x][can_be], rtol=1e-9, atol=1e-12)
        for p in (DATA, GUESS, torch.tensor([0.0, 1e-6, 1 - 1e-6], dtype=torch.float64)):
            weight = p[:, None] * q_t
            mixture = (weight[..., None] * exact).sum(dim=0) / weight.sum(dim=0)[:, None]
            known = possible & (weight.sum(dim=0) > 0)
            found = stepped(p, now, earlier)
            assert_close(found.sum(dim=1), torch.ones(N + 1, dtype=torch.float64), rtol=0, atol=1e-12)
            assert_close(found[known], mixture[known], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", ALL, ids=repr)
def test_time_may_begin_and_end(kernel, dtype):
    """At tau exactly 1 and 0 shares and steps are numbers: no token is left at 1, no noise at 0."""
    one, half, zero = (kernel.levels(torch.tensor(v, dtype=dtype)) for v in (1.0, 0.5, 0.0))
    assert (one.alpha, zero.alpha, zero.mask, zero.uniform) == (0, 1, 0, 0)
    assert float(one.mask + one.uniform) == pytest.approx(1)
    assert float(one.mask) == pytest.approx(1.0, abs=0.01) or not kernel.ends_masked
    p = GUESS.to(dtype)
    for now, earlier in ((one, half), (half, zero), (one, zero)):
        found = stepped(p, now, earlier)
        assert found.isfinite().all()
        assert_close(found.sum(dim=1), torch.ones(N + 1, dtype=dtype))
        if earlier is zero:
            possible = forward(at(now, ...)).sum(dim=0).double() > 0
            assert (found[possible][:, -1] == 0).all()
        if now is one and earlier is zero:  # nothing is known of the token: a draw from p
            assert_close(found[possible][:, :N], p.expand(int(possible.sum()), N))


def test_what_no_noise_could_be_stays_whatever_the_network_says():
    """Of masks alone a token that is seen is clean: it stays, also where p rules it out, or all tokens (tau = 1)."""
    p = torch.tensor([0.0, 0.6, 0.4], dtype=torch.float64)
    for kernel, tau in ((Mask(), 0.5), (Hybrid(0.0), 0.5), (Mask(), 1.0), (Hybrid(), 1.0)):
        now, earlier = (kernel.levels(torch.tensor(v, dtype=torch.float64)) for v in (tau, 0.3))
        assert_close(stepped(p, now, earlier)[0], torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64), rtol=0, atol=0)


def test_without_uniform_noise_hybrid_is_the_mask_kernel():
    for gamma in (0.5, 1.0, 2.0):
        own, masks = Hybrid(0.0, gamma).levels(TAU), Mask().levels(TAU)
        for a, b in zip(vars(own).values(), vars(masks).values(), strict=True):
            assert torch.equal(a, b)


def test_hybrid_has_its_share_of_uniform_noise_at_its_peak():
    for p_u, gamma in ((0.1, 1.0), (0.4, 2.0), (0.2, 0.5)):
        uniform = Hybrid(p_u, gamma).levels(TAU).uniform
        assert float(uniform.max()) == pytest.approx(p_u, rel=1e-9)
        assert float(TAU[uniform.argmax()]) == pytest.approx(0.5, abs=1e-9)


def test_the_shift_goes_from_masks_to_uniform_noise():
    for kernel, other in ((HybridLogSNR(-40.0), Mask()), (HybridLogSNR(40.0), Uniform())):
        for a, b in zip(vars(kernel.levels(TAU)).values(), vars(other.levels(TAU)).values(), strict=True):
            assert_close(a, b, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize(("shift", "slope"), [(10.0, 1.0), (0.0, 0.01), (0.0, 1.0), (6.0, -1.0)])
def test_at_its_end_the_log_snr_mixture_is_what_training_shows_last(shift, slope):
    """Beyond tau 0.999, the last of training, the share of uniform tokens in the noise stays: it is not masks alone at 1."""
    kernel = HybridLogSNR(shift, slope)
    last, end = (kernel.levels(torch.tensor(v, dtype=torch.float64)) for v in (0.999, 1.0))
    share = float(last.uniform / (last.uniform + last.mask))
    assert float(end.uniform) == pytest.approx(share, abs=0.005)
    assert kernel.ends_masked == (share < 0.01) == ((shift, slope) == (0.0, 1.0))


def test_prior_draws_masks_and_every_id_of_its_range():
    """A quarter masks: within 5 standard errors; two sizes side by side."""
    g = torch.Generator().manual_seed(0)
    levels = HybridLogSNR(-math.log(3), 0.0).levels(torch.ones(40_000, dtype=torch.float64))
    size = torch.tensor([5, 2]).repeat(20_000)
    u, v = torch.rand(2, 40_000, dtype=torch.float64, generator=g)
    drawn = prior(levels, u, v, size)
    assert abs((drawn == MASKED).double().mean() - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 40_000)
    for start, n in ((0, 5), (1, 2)):
        own = drawn[start::2]
        counts = torch.bincount(own[own >= 0], minlength=n) / (own >= 0).sum()
        assert len(counts) == n
        assert (counts - 1 / n).abs().max() < 5 * math.sqrt(0.25 / 5_000)
    assert int(prior(levels, u * 0 + 1, v * 0 + 1, size).max()) == 4  # a number that rounds up to 1


def test_noise_is_uniform_over_the_ids_that_may_stand_there():
    """Those that are ruled out have no share, and each of the others one of as many as there are."""
    levels = Hybrid(0.4).levels(torch.tensor([0.5, 0.5], dtype=torch.float64))
    allowed = torch.tensor([[True, True, True, False], [True, False, False, False]])
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    ids, mask = marginal(p, levels, allowed)
    for row, n in ((0, 3), (1, 1)):
        expected = levels.alpha[0] * p[row] + levels.uniform[0] / n * allowed[row]
        assert_close(ids[row], expected)
        assert float(ids[row].sum() + mask[row]) == pytest.approx(1)
    assert_close(marginal(p[:1, :3], at(levels, slice(1)))[0], ids[:1, :3])


def density(kernel: Kernel, tau: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """q(z | x) weight D for tau `[k]` and p `[k, z, ids]`, or less of it: `[k, x, z]`, the mask last."""
    shape = (len(tau), N, N + 1)
    levels = kernel.levels(tau[:, None, None].expand(shape))
    x = torch.arange(N)[:, None].expand(shape)
    z = torch.tensor([*range(N), MASKED]).expand(shape)
    p = p.expand(len(tau), N + 1, N)[:, None].expand(*shape, N)
    if kernel.masks_only:
        d = -levels.alpha * p.gather(-1, x[..., None])[..., 0].log()
    else:
        flat = [v.flatten() for v in (x, z, levels.alpha, levels.uniform)]
        d = divergence(p.log().flatten(0, 2), *flat, N).view(shape)
    q = forward(kernel.levels(tau))
    weighed = q * Noise(kernel).weight(levels, tau, z < 0, z == x, N) * d
    return torch.where(q > (z == x) * kernel.masks_only, weighed, 0.0)  # what cannot be has no weight


def nodes(k: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Quadrature over tau = sin^4(pi s / 2), in which the roots of tau are smooth, down to tau^(1/4)."""
    x, w = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(k))
    angle = math.pi / 4 * (x + 1)
    return torch.sin(angle) ** 4, w * math.pi * torch.sin(angle) ** 3 * torch.cos(angle)


def guess_at(tau: torch.Tensor, z_matters: bool = True) -> torch.Tensor:
    """Some network's p, of time and of z: `[k, z, ids]`."""
    g = torch.Generator().manual_seed(0)
    table, slope = torch.randn(2, N + 1, N, dtype=torch.float64, generator=g)
    return (table + tau[:, None, None] * slope).softmax(dim=-1) if z_matters else GUESS.expand(len(tau), N + 1, N)


def continuous(kernel: Kernel, z_matters: bool = True) -> float:
    tau, w = nodes()
    return float((w[:, None, None] * DATA[:, None] * density(kernel, tau, guess_at(tau, z_matters))).sum())


def discrete(kernel: Kernel, steps: int = 4000) -> float:
    """sum over steps of KL(q(z_s | z_t, x) || q(z_s | z_t, p)), everything enumerated; the KL at tau = 1 is 0."""
    tau = torch.sin(math.pi / 2 * torch.linspace(0, 1, steps + 1, dtype=torch.float64)) ** 4
    levels = kernel.levels(tau)
    now, earlier = at(levels, slice(1, None)), at(levels, slice(None, -1))
    exact, q_t = bayes(now, earlier), forward(now)
    weight = guess_at(tau[1:]).transpose(-1, -2) * q_t  # [steps, x, z_t]
    guess = (weight[..., None] * exact).sum(dim=1, keepdim=True) / weight.sum(dim=1)[:, None, :, None]
    kl = torch.where(exact > 0, exact * (exact / guess.clamp(min=1e-300)).log(), 0.0).sum(dim=-1)
    return float((DATA[:, None] * torch.where(q_t > 0, q_t * kl, 0.0)).sum())


@pytest.mark.parametrize("kernel", [Mask(), *OTHERS], ids=repr)
def test_the_bound_is_the_limit_of_discrete_steps(kernel):
    assert continuous(kernel) == pytest.approx(discrete(kernel), abs=1e-3)


@pytest.mark.parametrize("kernel", [Mask(), *OTHERS], ids=repr)
def test_of_one_token_and_one_guess_the_bound_is_the_cross_entropy(kernel):
    """Whatever the noise: both processes are the same but for the token that they begin with."""
    assert continuous(kernel, z_matters=False) == pytest.approx(-float((DATA * GUESS.log()).sum()), abs=3e-5)


@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_with_less_and_less_uniform_noise_the_bound_is_that_of_masks(gamma):
    masks = continuous(Mask())
    apart = [abs(continuous(Hybrid(p_u, gamma)) - masks) for p_u in (1e-2, 1e-4, 1e-6, 1e-8)]
    assert apart == sorted(apart, reverse=True)
    assert apart[-1] < 1e-5


def joint_of(length: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    logits = torch.randn((N,) * length, dtype=torch.float64, generator=g) * 1.5
    return logits.flatten().softmax(0).view(logits.shape)


WITHOUT_ONE = {1: "a->a", 2: "ba,kby->kya", 3: "bca,kby,kcz->kyza"}
"""P(x_i, noisy others) from a joint whose last axis is x_i, and q(z | x) of each other position."""


def bound_of(kernel: Kernel, joint: torch.Tensor, leave_one_out: bool) -> float:
    """The bound of a joint, with what the other positions say of a token for p, or with E[x_i | z]; all z enumerated."""
    tau, w = nodes(200)
    q = forward(kernel.levels(tau))
    total, length = 0.0, joint.dim()
    for i in range(length):
        seen = torch.einsum(WITHOUT_ONE[length], joint.movedim(i, -1), *[q] * (length - 1))
        seen = seen.expand(len(tau), *seen.shape[-length:]).reshape(len(tau), -1, 1, N)
        p = seen if leave_one_out else seen * q.transpose(-1, -2)[:, None]
        p = p.expand(-1, -1, N + 1, N)
        mass = p.sum(dim=-1, keepdim=True)
        p = torch.where(mass > 0, p / mass, 1 / N)  # where nothing is possible, anything
        contexts = seen.shape[1]
        each = density(kernel, tau.repeat_interleave(contexts), p.flatten(0, 1)).view(-1, contexts, N, N + 1).sum(dim=-1)
        total += float((w[:, None, None] * seen[:, :, 0] * each).sum())
    return total


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("kernel", [Mask(), *OTHERS], ids=repr)
def test_with_what_the_others_say_the_bound_is_the_entropy(kernel, length):
    """And with E[x | z], which knows z_i already, it is larger. For masks the two are one."""
    joint = joint_of(length)
    entropy = -float((joint * joint.log()).sum())
    fine = 1e-4 if isinstance(kernel, HybridLogSNR) else 3e-5  # whose rates jump at HELD: with 3,000 nodes it is 4e-7
    assert bound_of(kernel, joint, leave_one_out=True) == pytest.approx(entropy, abs=fine)
    with_own = bound_of(kernel, joint, leave_one_out=False)
    if kernel.masks_only:
        assert with_own == pytest.approx(entropy, abs=3e-5)
    else:
        assert with_own > 1.01 * entropy
