"""The gradient's variance against its closed form, and the order that anti-masking is for."""

import pytest
import torch

from components.gradient_variance import GradientVariance


def test_variance_and_mean_are_unbiased():
    """Gaussian draws with trace 2^2 * 3 + 0.5^2 * 4 = 13 and |mu|^2 = 3 + 4 * 0.25 = 4.

    Over R repeats of K draws, the mean of the variance has the standard deviation sqrt(2 tr(Sigma^2) / ((K - 1) R)).
    """
    torch.manual_seed(0)
    repeats, draws = 400, 8
    variances, means = [], []
    for _ in range(repeats):
        moments = GradientVariance()
        for _ in range(draws):
            moments.add([1 + 2 * torch.randn(3), None, -0.5 + 0.5 * torch.randn(2, 2)])
        variances.append(moments.variance)
        means.append(moments.squared_mean)
    spread = (2 * (16 * 3 + 0.0625 * 4) / ((draws - 1) * repeats)) ** 0.5
    assert sum(variances) / repeats == pytest.approx(13, abs=4 * spread)
    error = torch.tensor(means).std().item() / repeats**0.5
    assert sum(means) / repeats == pytest.approx(4, abs=4 * error)


def test_one_draw_has_no_variance():
    moments = GradientVariance()
    moments.add([torch.ones(2)])
    with pytest.raises(ValueError, match="at least 2 draws, got 1"):
        _ = moments.variance
