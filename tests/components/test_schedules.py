import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from components.schedules import Cosine, Geometric, Linear, LogLinear, MDLMCosine, Polynomial, Schedule, Truncated
from tests.oracles import MASK, all_masks, all_sequences, exact_conditionals, exact_nelbo, perturbed_model, tiny_joint

COMPLETE = [Linear(), Cosine(), MDLMCosine(), Polynomial(2.0), Polynomial(0.5), Geometric(), Geometric(1e-3, 8.0)]
ALL = [*COMPLETE, Truncated(0.2, 0.7), Truncated(0.1, 1.0, Cosine())]
T = torch.linspace(0.001, 0.999, 997, dtype=torch.float64)


@pytest.mark.parametrize("schedule", COMPLETE, ids=repr)
def test_complete_schedules_meet_both_ends(schedule):
    ends = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert_close(ends, torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-12, rtol=0)
    assert schedule.complete


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_alpha_prime_is_the_derivative(schedule):
    t = T.clone().requires_grad_()
    (slope,) = torch.autograd.grad(schedule.alpha(t).sum(), t)
    assert_close(schedule.alpha_prime(T), slope, rtol=1e-8, atol=1e-10)
    assert (schedule.alpha_prime(T) <= 0).all()


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_nelbo_weight_is_its_definition(schedule):
    assert_close(schedule.nelbo_weight(T), -schedule.alpha_prime(T) / (1 - schedule.alpha(T)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_inverse_undoes_alpha(schedule):
    inner = T[(schedule.alpha(T) > 1e-6) & (schedule.alpha(T) < 1 - 1e-4)]
    assert_close(schedule.inverse(schedule.alpha(inner)), inner, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("schedule", COMPLETE, ids=repr)
def test_nelbo_is_the_same_under_every_complete_schedule(schedule):
    """Such a bound depends on alpha only through the mask rate, so integrating over t gives one number (MD4, 2406.04329)."""
    joint = tiny_joint()
    cross_entropy = perturbed_model(joint)
    nodes, weights = gauss_legendre(200)
    total = 0.0
    for mask in all_masks():
        k = int(mask.sum())
        rate = 1 - schedule.alpha(nodes)
        probability = rate**k * (1 - rate) ** (3 - k)
        integral = (weights * schedule.nelbo_weight(nodes) * probability).sum() if k else 0.0
        total += integral * (joint.flatten() * cross_entropy[tuple(mask.tolist())].sum(-1)).sum()
    assert float(total) == pytest.approx(exact_nelbo(joint, cross_entropy), rel=1e-6)


def test_with_exact_conditionals_the_nelbo_is_the_entropy():
    """The chain rule, in any order: nothing is lost where the model is right (an oracle of its own for the bound)."""
    joint = tiny_joint()
    sequences = all_sequences()
    cross_entropy = {}
    for mask in all_masks():
        log_p = exact_conditionals(joint, torch.where(mask, MASK, sequences))
        cross_entropy[tuple(mask.tolist())] = -log_p.gather(-1, sequences[..., None])[..., 0] * mask
    entropy = -(joint * joint.log()).sum().item()
    assert exact_nelbo(joint, cross_entropy) == pytest.approx(entropy, rel=1e-9)


def gauss_legendre(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights on [0, 1] after t = s^4, which makes t^(1/2) a polynomial too."""
    x, w = np.polynomial.legendre.leggauss(n)
    s = (x + 1) / 2
    return torch.from_numpy(s**4), torch.from_numpy(w / 2 * 4 * s**3)


def test_truncated_linear_draws_its_rate_uniformly():
    rate = 1 - Truncated(0.3, 0.8).alpha(T)
    assert_close(rate, 0.3 + 0.5 * T, rtol=0, atol=1e-12)
    assert not Truncated(0.3, 0.8).complete


def test_log_linear_is_an_alias_and_schedules_are_structural():
    assert LogLinear is Linear
    assert all(isinstance(s, Schedule) for s in ALL)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Polynomial(-1.0), "power must be positive, got -1"),
        (lambda: Geometric(2.0, 1.0), "beta_min < beta_max"),
        (lambda: Truncated(0.8, 0.2), "lo = 0.8 and hi = 0.2"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_weights_stay_finite_and_accurate_near_zero():
    t = torch.tensor([1e-9], dtype=torch.float64)
    assert Cosine().nelbo_weight(t).item() == pytest.approx(1e9, rel=1e-6)
    assert math.isfinite(Geometric().nelbo_weight(t).item())
