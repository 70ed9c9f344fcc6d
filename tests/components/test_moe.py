"""Mixtures of experts: routers by slow references in float64, what a bias and a shared expert do, and what is refused."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from components.moe import MixtureOfExperts, SigmoidRouting


def slow_routing(logits, bias, k, routing):
    """Weights by expert, of one token: sorted lists, no tensors."""
    own = [1 / (1 + math.exp(-v)) for v in logits]
    ranked = [v + b for v, b in zip(own, bias, strict=True)]
    size = len(own) // routing.groups
    groups = sorted(
        (range(i * size, i * size + size) for i in range(routing.groups)),
        key=lambda group: -sum(sorted(ranked[e] for e in group)[-2:]),
    )
    may = [e for group in groups[: routing.groups_per_token] for e in group]
    best = sorted(may, key=lambda e: -ranked[e])[:k]
    total = sum(own[e] for e in best) if k > 1 else 1.0
    return {e: routing.scale * own[e] / total for e in best}


@pytest.mark.parametrize(("groups", "of"), [(1, 1), (2, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_experts_are_chosen_in_groups_by_score_and_bias_and_weighed_by_score(groups, of, k):
    g = torch.Generator().manual_seed(groups + k)
    logits, bias = torch.randn(50, 12, generator=g), torch.randn(12, generator=g) * 0.5
    routing = SigmoidRouting(groups, of, 2.5)
    weight, expert = routing(logits, bias, k)
    for t in range(50):
        expected = slow_routing(logits[t].tolist(), bias.tolist(), k, routing)
        assert set(expert[t].tolist()) == set(expected)
        for e, w in zip(expert[t].tolist(), weight[t].tolist(), strict=True):
            assert w == pytest.approx(expected[e], rel=1e-5)
    unbiased = routing(logits, torch.zeros(12), k)[1]
    assert (unbiased.sort(dim=1).values != expert.sort(dim=1).values).any()  # the bias does decide


def test_a_mixture_is_the_sum_of_its_parts_and_of_the_shared_expert():
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    mixture = MixtureOfExperts(8, 6, 6, 2, SigmoidRouting(3, 2, 1.5), shared).double()
    mixture.expert_bias.normal_()
    x = torch.randn(2, 5, 8, dtype=torch.double)
    with torch.no_grad():
        y = mixture(x).flatten(0, 1)
        for t, own in enumerate(x.flatten(0, 1)):
            weights = slow_routing((own @ mixture.router.weight.T).tolist(), mixture.expert_bias.tolist(), 2, mixture.routing)
            parts = [
                w * (mixture.down[e] @ (nn.functional.silu(mixture.gate[e] @ own) * (mixture.up[e] @ own)))
                for e, w in weights.items()
            ]
            assert_close(y[t], sum(parts) + shared(own), rtol=0, atol=1e-6)  # the router's scores are of float32


def test_a_router_in_bfloat16_chooses_as_in_float32():
    """Its weights are rounded, its scores are not: beside rounded scores many choices of 256 experts would be others."""
    torch.manual_seed(0)
    mixture = MixtureOfExperts(64, 4, 256, 8, SigmoidRouting(8, 4)).bfloat16()
    x = torch.randn(1, 64, 64, dtype=torch.bfloat16)
    whole = x[0].float() @ mixture.router.weight.float().T
    with torch.no_grad():
        assert torch.equal(mixture._logits(x[0]), whole)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(mixture._logits(x[0]), whole)
    zero = torch.zeros(256)
    rounded = mixture.routing(whole.bfloat16().float(), zero, 8)[1].sort(dim=1).values
    assert (rounded != mixture.routing(whole, zero, 8)[1].sort(dim=1).values).any()


def test_the_bias_is_kept_with_the_weights_and_no_parameter():
    mixture = MixtureOfExperts(8, 6, 4, 2, SigmoidRouting())
    assert "expert_bias" in mixture.state_dict()
    assert "expert_bias" not in dict(mixture.named_parameters())
    assert "expert_bias" not in MixtureOfExperts(8, 6, 4, 2).state_dict()


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (SigmoidRouting(groups=5), "8 experts do not lie in 5 groups"),
        (SigmoidRouting(groups=8), "8 experts do not lie in 8 groups of one size, of two or more"),
        (SigmoidRouting(groups=4, groups_per_token=5), "groups_per_token must be in 1..groups = 4, got 5"),
        (SigmoidRouting(groups=4, groups_per_token=1), "experts_per_token 3 is more than the 2 experts of the chosen groups"),
    ],
)
def test_groups_that_do_not_fit_are_refused(routing, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfExperts(8, 6, 8, 3, routing)
