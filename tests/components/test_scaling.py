"""The fit recovers known constants, its intervals cover them as often as they say, and it does not follow outliers."""

from dataclasses import replace

import numpy as np
import pytest

from components.scaling import NAMES, Fit, ScalingLaw, fit, iso_flop

TRUE = ScalingLaw(E=1.8, A=60.0, B=900.0, a=0.4, b=0.45)
SIZES, HORIZONS = np.array([3e4, 1e5, 3e5, 1e6]), np.array([1e6, 3e6, 1e7, 3e7])
N, D = (g.flatten() for g in np.meshgrid(SIZES, HORIZONS))


def test_exact_losses_give_the_constants_back():
    found = fit(N, D, TRUE.loss(N, D), draws=5)
    for name in NAMES:
        assert getattr(found.law, name) == pytest.approx(getattr(TRUE, name), rel=0.02), name
    for law in found.draws:  # without noise every draw of the runs gives the same
        assert pytest.approx(TRUE.A, rel=0.1) == law.A
        assert pytest.approx(TRUE.B, rel=0.1) == law.B
    assert found.error < 1e-4
    assert found.law.exponent == pytest.approx(TRUE.a / TRUE.b, rel=0.02)


def test_optimal_tokens_have_the_least_loss_at_their_compute():
    n = 2e5
    d = TRUE.optimal_tokens(n)
    around = [TRUE.loss(n * k, d / k) for k in (0.9, 1.0, 1.1)]
    assert around[1] < min(around[0], around[2])


def test_intervals_cover_the_truth_as_often_as_they_say():
    """25 draws of 1 % noise. A 90 % interval covers 22.5 +- 1.5 of 25; the bootstrap of 16 runs is known to be short: >= 17."""
    rng = np.random.default_rng(0)
    covered = dict.fromkeys(("E", "a", "b", "exponent"), 0)
    for draw in range(25):
        noisy = TRUE.loss(N, D) * np.exp(0.01 * rng.normal(size=len(N)))
        found = fit(N, D, noisy, draws=20, seed=draw)
        for name in covered:
            low, high = found.interval(name)
            covered[name] += low <= getattr(TRUE, name) <= high
    assert min(covered.values()) >= 17, covered


def test_an_interval_of_90_percent_leaves_out_5_at_each_end():
    drawn = Fit(TRUE, [replace(TRUE, E=e, a=1.0, b=1 / (1 + e)) for e in np.linspace(0, 100, 201)], 0.0)
    assert drawn.interval("E") == pytest.approx((5, 95))
    assert drawn.interval("exponent") == pytest.approx((6, 96))
    assert drawn.interval("E", 0.8) == pytest.approx((10, 90))


def test_a_run_that_went_wrong_counts_little_and_one_that_diverged_not_at_all():
    losses = TRUE.loss(N, D)
    losses[5] *= 1.5
    losses[6] = np.inf
    losses[7] = np.nan
    found = fit(N, D, losses, draws=2)
    assert found.law.a == pytest.approx(TRUE.a, rel=0.1)
    assert pytest.approx(TRUE.E, rel=0.05) == found.law.E
    assert found.error == pytest.approx(np.log(1.5) / np.sqrt(14), rel=0.1)  # one of 14 runs is off


def test_a_profile_has_its_minimum_at_the_vertex():
    sizes = np.array([1e4, 1e5, 1e6])
    losses = 2 + 0.1 * (np.log(sizes) - np.log(2e5)) ** 2
    size, least = iso_flop(sizes, losses)
    assert (size, least) == (pytest.approx(2e5), pytest.approx(2.0))
    far = [*sizes, 1e8], [*losses, 7.0]  # a size far from the best one, where the profile is no parabola, has no say
    assert iso_flop(*far) == (pytest.approx(2e5), pytest.approx(2.0))
    twice = [*sizes, *sizes], [*(losses + 0.1), *(losses - 0.1)]  # two seeds
    assert iso_flop(*twice) == (pytest.approx(2e5), pytest.approx(2.0))
    with pytest.raises(ValueError, match="not bracketed"):
        iso_flop(sizes, -losses)
    with pytest.raises(ValueError, match="not bracketed"):
        iso_flop(sizes, 2 + 0.1 * (np.log(sizes) - np.log(1e3)) ** 2)  # it lies below them


def test_too_few_runs_are_refused():
    with pytest.raises(ValueError, match="at least 6 runs that finished, 3 sizes and 3 horizons; there are 4 of 2 sizes"):
        fit([1e5, 1e5, 1e6, 1e6], [1e6, 1e7, 1e6, 1e7], [3, 2, 2.5, 1.5])
    with pytest.raises(ValueError, match="at least 3 sizes, got 2"):
        iso_flop([1e4, 1e5], [1, 2])
    with pytest.raises(ValueError, match="one of each for every run"):
        fit([1.0], [1.0, 2.0], [1.0])
