"""The SDE scaler on a problem whose answer is known: many independent coordinates of a quadratic, drowned in noise."""

import math
import warnings

import numpy as np
import pytest
import torch

from components.critical_batch import critical_batch, gradient_noise_scale
from components.sde import AdamWSettings, SDEScaler, rescale_moments, sde_kappa, sde_scale, warmup_cosine

BASE = AdamWSettings(lr=1e-3, beta1=0.9, beta2=0.995, eps=0.3, weight_decay=0.5)
START, NOISE, COORDINATES = 0.05, 1.0, 20_000  # |gradient| <= 0.05, noise >= 0.5 at kappa = 4: ten times the gradient
STEPS = 2000  # at the base batch: about three times 1 / (lr (1 / (NOISE + eps) + weight_decay))


def run(settings, kappa, changes=(), steps=STEPS):
    """x <- AdamW on x^2 / 2 with gradients x + noise / sqrt(batch), batches of kappa; mean and variance after each quarter.

    Every quarter has the same number of tokens whatever kappa is. changes: (after this share of the tokens, work on the
    optimizer and the new kappa).
    """
    generator = torch.Generator().manual_seed(int(1000 * kappa))
    x = torch.nn.Parameter(torch.full((COORDINATES,), START))
    optimizer = torch.optim.AdamW(
        [x], settings.lr, (settings.beta1, settings.beta2), settings.eps, settings.weight_decay, fused=True
    )
    seen, due, quarters, changes = 0.0, 1, [], list(changes)
    while seen < steps - 1e-9:
        if changes and seen >= changes[0][0] * steps:
            kappa = changes.pop(0)[1](optimizer)
        x.grad = x.detach() + torch.randn(COORDINATES, generator=generator) * (NOISE / math.sqrt(kappa))
        optimizer.step()
        seen += kappa
        if seen >= due * steps / 4 - 1e-9:
            quarters.append((x.mean().item(), x.var().item()))
            due += 1
    return np.array(quarters)


@pytest.fixture(scope="module")
def reference():
    return run(BASE, 1.0)


# Standard errors over 20,000 coordinates: 1 % of the variance, and of the mean at half time (0.018) 0.8 %.
@pytest.mark.parametrize("kappa", [1 / 8, 1 / 2, 4])
def test_trajectory_mean_and_stationary_variance_do_not_depend_on_the_batch(reference, kappa):
    scaled = run(sde_scale(BASE, kappa), kappa)
    assert scaled[1][0] == pytest.approx(reference[1][0], rel=0.05)
    assert scaled[-1][1] == pytest.approx(reference[-1][1], rel=0.05)


@pytest.mark.parametrize("kappa", [1 / 8, 4])
def test_with_fixed_settings_they_do(reference, kappa):
    fixed = run(BASE, kappa)
    assert abs(fixed[1][0] / reference[1][0] - 1) > 0.25
    assert abs(fixed[-1][1] / reference[-1][1] - 1) > 0.25


@pytest.mark.parametrize(
    "wrong", [{"lr": 2.0}, {"eps": 2.0}, {"weight_decay": 0.5}, {"weight_decay": 2.0}], ids=lambda w: next(iter(w))
)
def test_the_test_sees_each_rule(reference, wrong):
    """At kappa = 4, with one setting off by the factor 2 that the rule gives it."""
    (name, factor), settings = next(iter(wrong.items())), sde_scale(BASE, 4)
    broken = AdamWSettings(**{**settings.__dict__, name: getattr(settings, name) * factor})
    made = run(broken, 4)
    assert max(abs(made[1][0] / reference[1][0] - 1), abs(made[-1][1] / reference[-1][1] - 1)) > 0.08


def change_at(share, ratio, kappa, rescale=True):
    """A change of batch after a share of the tokens, for `run`."""

    def work(optimizer):
        if rescale:
            rescale_moments(optimizer, ratio)
        SDEScaler(base=BASE, logical=100, physical=round(100 * kappa), tokens=1).configure(optimizer, seen=0)
        return kappa

    return share, work


def test_a_batch_changed_in_the_middle_leaves_the_trajectory(reference):
    """x 4 at a third, / 2 at two thirds."""
    changed = run(BASE, 1.0, changes=[change_at(1 / 3, 4, 4.0), change_at(2 / 3, 1 / 2, 2.0)])
    assert changed[1][0] == pytest.approx(reference[1][0], rel=0.05)
    assert changed[-1][1] == pytest.approx(reference[-1][1], rel=0.05)


@pytest.mark.parametrize(("rescale", "off"), [(True, False), (False, True)])
def test_right_after_a_change_the_steps_have_their_size(rescale, off):
    """From 1/8 to 4: without the rescaled second moment, of a memory of thousands of steps, the mean decays too slowly."""
    small = sde_scale(BASE, 1 / 8)
    unchanged = run(small, 1 / 8, steps=1000)
    changed = run(small, 1 / 8, changes=[change_at(1 / 2, 32, 4.0, rescale)], steps=1000)
    assert (abs((changed[2][0] / changed[1][0]) / (unchanged[2][0] / unchanged[1][0]) - 1) > 0.05) == off


def test_moments_and_steps_follow_a_change_of_batch():
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([x, torch.nn.Parameter(torch.ones(2))], betas=(0.9, 0.98))  # the second is never used
    for _ in range(8):
        x.grad = torch.full((3,), 0.5)
        optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[x].items()}
    rescale_moments(optimizer, 4)
    state = optimizer.state[x]
    assert torch.equal(state["exp_avg"], before["exp_avg"])
    assert torch.equal(state["exp_avg_sq"], before["exp_avg_sq"] / 4)
    assert (0.98**4) ** state["step"].item() == pytest.approx(0.98**8)  # bias correction is a function of tokens
    with pytest.raises(ValueError, match="ratio must be positive"):
        rescale_moments(optimizer, 0)


def test_groups_keep_their_own_multipliers():
    x, y = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    scaled = {"params": [x], "lr_multiplier": 0.5, "eps_multiplier": 2.0, "decay_multiplier": 4.0}
    optimizer = torch.optim.AdamW([scaled, {"params": [y], "decay_multiplier": 0.0}])
    base = AdamWSettings(1e-3, 0.9, 0.98, 1e-8, 0.1)
    SDEScaler(base=base, logical=32, physical=128, tokens=1000).configure(optimizer, seen=0)
    first, second = optimizer.param_groups
    assert (first["lr"], first["eps"], first["weight_decay"]) == pytest.approx((1e-3, 1e-8, 0.8), rel=1e-9)
    assert (second["lr"], second["eps"], second["weight_decay"]) == pytest.approx((2e-3, 5e-9, 0.0), rel=1e-9)
    assert first["betas"] == (0.9**4, 0.98**4)


def test_the_rules():
    scaled = sde_scale(AdamWSettings(1e-3, 0.9, 0.98, 1e-8, 0.1), 4)
    assert scaled == AdamWSettings(2e-3, 0.9**4, 0.98**4, 5e-9, 0.2)
    assert sde_scale(AdamWSettings(1e-3, weight_decay=0.1), 4, "decoupled").weight_decay == 0.4
    assert sde_scale(BASE, 1) == BASE
    assert sde_kappa(128, 64, tokens=4e9, base_tokens=1e9, gamma=0.5) == 1.0
    # batch alone and horizon alone compose
    assert sde_kappa(8, 2, 10, 5, 1.0) == sde_kappa(8, 2) * sde_kappa(1, 1, 10, 5, 1.0)


def test_the_learning_rate_is_a_function_of_tokens():
    base = SDEScaler(base=AdamWSettings(1e-3), logical=32, physical=32, tokens=1000, warmup=0.1, final_lr=0.1)
    large = SDEScaler(base=AdamWSettings(1e-3), logical=32, physical=128, tokens=1000, warmup=0.1, final_lr=0.1)
    for seen in (0, 50, 100, 550, 1000, 1200):
        assert large.lr(seen) == pytest.approx(2 * base.lr(seen))
    assert [base.lr(s) for s in (50, 100, 1000, 5000)] == [pytest.approx(v) for v in (5e-4, 1e-3, 1e-4, 1e-4)]
    assert warmup_cosine(0.55, 0.1) == pytest.approx(0.5)


def test_a_kappa_past_the_regime_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sde_scale(AdamWSettings(1e-3), 6.5)  # 0.9^6.5 = 0.504
    with pytest.warns(UserWarning, match=r"kappa = 7 makes beta1 0\.9 -> 0\.48, under 0\.5"):
        sde_scale(AdamWSettings(1e-3), 7)


def test_bad_settings_are_named():
    for kappa in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="kappa must be positive and finite"):
            sde_scale(BASE, kappa)
    with pytest.raises(ValueError, match="base_batch must be positive, got 0"):
        sde_kappa(1, 0)
    with pytest.raises(ValueError, match="not one of coupled, decoupled"):
        sde_scale(BASE, 1, "both")
    with pytest.raises(ValueError, match=r"horizon of 100 tokens is shorter than the warm-up.*got 1\.5"):
        SDEScaler(base=BASE, logical=1, physical=1, tokens=100, warmup=1.5)
    with pytest.raises(ValueError, match="physical must be at least 1, got 0"):
        SDEScaler(base=BASE, logical=1, physical=0, tokens=100)
    with pytest.raises(ValueError, match="lr must be positive"):
        AdamWSettings(0.0)


def sweep(floor=2.0, a=30.0, power=1.0, noise=0.002, seeds=3, seed=1):
    rng = np.random.default_rng(seed)
    batches = np.repeat([4, 8, 16, 32, 64, 128, 256], seeds)
    steps = 100_000 / batches
    return batches, steps, floor + a * steps**-power + noise * rng.standard_normal(len(batches))


def test_the_critical_batch_of_a_known_curve_is_found():
    exact = 100_000 / (30.0 / (0.01 * 2.0))  # at 1500 steps 30 / S is 1 % of the floor
    found = critical_batch(*sweep())
    assert found.reached
    assert found.batch == pytest.approx(exact, rel=0.15)
    assert found.floor == pytest.approx(2.0, rel=0.002)


def test_its_interval_covers_the_truth_as_often_as_it_says():
    exact = 100_000 / (30.0 / (0.01 * 2.0))
    found = [critical_batch(*sweep(seed=k), draws=100) for k in range(60)]
    covered = sum(f.low <= exact <= f.high for f in found)
    assert covered >= 45  # of 60 at 90 %: 54 are expected, and fewer than 46 come with probability 0.1 %


def test_its_interval_is_as_wide_as_the_estimates_scatter():
    """120 sweeps of six runs each, of which three constants are fitted. A 90 % interval is 3.29 standard deviations wide.

    The deviation of 120 estimates is known to 1 / sqrt(240) = 6.5 %, so the ratio lies within 0.85 to 1.15 (2.3 of it).
    Residuals that the fit has made too small give 0.71 of it (sqrt(3 / 6)), and an interval of 80 % gives 0.78.
    """
    found = [critical_batch(*(v[::2] for v in sweep(noise=0.001, seeds=2, seed=k)), draws=100) for k in range(120)]
    scatter = np.log([f.batch for f in found]).std(ddof=1)
    width = np.sqrt(np.mean([np.log(f.high / f.low) ** 2 for f in found]))
    assert width / (3.29 * scatter) == pytest.approx(1.0, abs=0.15)


def test_a_flat_sweep_has_not_reached_its_critical_batch():
    found = critical_batch(*sweep(a=0.0))
    assert not found.reached
    assert found.batch > 256


def test_too_short_a_sweep_is_an_error():
    with pytest.raises(ValueError, match="at least four batch sizes are needed, got 1"):
        critical_batch([1, 1], [1, 1], [1, 1])


def test_the_gradient_noise_scale_of_known_gradients():
    rng, signal, noise, batches = np.random.default_rng(0), 0.1, 3.0, [4, 16, 64]
    norms = [
        ((signal + noise / math.sqrt(b) * rng.standard_normal((200, 2000))) ** 2).sum(1).mean() for b in batches
    ]  # tr(Sigma) = 2000 * 9, |G|^2 = 2000 * 0.01
    assert gradient_noise_scale(batches, norms) == pytest.approx(900, rel=0.1)
    with pytest.raises(ValueError, match="two batch sizes"):
        gradient_noise_scale([4], [1.0])
