"""CompleteP: the table, rules for any module, and what it is for: activations and gradients that do not change with size."""

import math

import pytest
import torch
from torch import nn

from components.coordinate_check import coordinate_check
from components.parameterization import CompleteP, initialize, param_groups, roles
from mdm.models import builders
from mdm.models.transformer import RULES

TABLE = {  # m_N = 4, m_L = 8, alpha = 0.5: init, lr, eps, weight decay
    "embedding": (1, 1, 1 / 4, 1),
    "hidden": (1 / 2, 1 / 4 * 8**-0.5, 1 / 4 * 8**-0.5, 4),
    "vector": (1, 8**-0.5, 1 / 4 * 8**-0.5, 1),
    "qk_gain": (1, 8**-0.5, 8**-0.5, 1),
    "final_norm": (1, 1, 1 / 4, 1),
    "unembedding": (1 / 4, 1 / 4, 1, 4),
}


@pytest.mark.parametrize("role", TABLE)
def test_the_table(role):
    by = CompleteP(width=4, depth=8, alpha=0.5).multipliers(role)
    assert (by.init, by.lr, by.eps, by.weight_decay) == pytest.approx(TABLE[role])
    at_base = CompleteP().multipliers(role)
    assert (at_base.init, at_base.lr, at_base.eps, at_base.weight_decay) == (1, 1, 1, 1)


def test_the_residual_multiplier():
    assert CompleteP(depth=8, alpha=1.0).residual_multiplier == 1 / 8
    assert CompleteP(depth=4, alpha=0.5).residual_multiplier == 1 / 2


def make(width, layers=2, base_width=32, base_layers=2, alpha=1.0, seed=0, standard=False):
    by = CompleteP() if standard else CompleteP(width / base_width, layers / base_layers, alpha)
    model = builders.model(61, 32, width, layers, width // 16, ffn_width=3 * width, residual_multiplier=by.residual_multiplier)
    model.init_weights(torch.Generator().manual_seed(seed), by)
    return model, by


def test_every_tensor_of_our_model_has_its_role():
    model, by = make(32)
    found = roles(dict(model.named_parameters()), RULES)
    assert found["embedding.weight"] == "embedding"
    assert found["unembedding.weight"] == "unembedding"
    assert found["norm.scale"] == "final_norm"
    assert found["blocks.1.attn.q_norm.scale"] == found["blocks.0.attn.k_norm.scale"] == "qk_gain"
    assert found["blocks.1.sa_norm.scale"] == found["blocks.0.mlp_norm.scale"] == "vector"
    assert {r for n, r in found.items() if n.endswith("weight") and "blocks" in n} == {"hidden"}
    groups = param_groups(model, RULES, by, 1e-3, 1e-8, 0.1)
    assert sorted(p.numel() for g in groups for p in g["params"]) == sorted(p.numel() for p in model.parameters())


def test_initial_spread_follows_the_table():
    """4 x the width and 4 x the depth: the embedding as before, matrices 1/2, the unembedding 1/4; in depth nothing."""
    (small, _), (large, _) = make(32), make(128, layers=8)
    for name, ratio in (("embedding.weight", 1), ("blocks.1.attn.q_proj.weight", 1 / 2), ("unembedding.weight", 1 / 4)):
        a, b = (dict(m.named_parameters())[name].std().item() for m in (small, large))
        assert b / a == pytest.approx(ratio, rel=0.1)  # 32 x 32 normal numbers: their spread is known to 2 %
    a, b = (dict(m.named_parameters())["blocks.1.mlp.w2.weight"].std().item() for m in (small, large))
    assert b / a == pytest.approx(1 / 2, rel=0.1)


class Plain(nn.Module):
    """Somebody's own model: other names, biases."""

    def __init__(self, width=8):
        super().__init__()
        self.token_table = nn.Embedding(5, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, 5, bias=False)


PLAIN = {"token_table": "embedding", r"layers\..*weight": "hidden", r"layers\..*bias": "vector", "head": "unembedding"}


def test_rules_fit_any_module():
    model, by = Plain(), CompleteP(width=2, depth=3)
    initialize(model, PLAIN, by, lambda name, p: 0.02)
    assert all((layer.bias == 0).all() for layer in model.layers)
    groups = {id(p): g for g in param_groups(model, PLAIN, by, lr=1e-2, eps=1e-8, weight_decay=0.1) for p in g["params"]}
    hidden, bias, head = (groups[id(p)] for p in (model.layers[0].weight, model.layers[0].bias, model.head.weight))
    assert (hidden["lr"], hidden["eps"], hidden["weight_decay"]) == pytest.approx((5e-3, 1e-8 / 6, 0.2))
    assert (bias["lr"], bias["weight_decay"]) == pytest.approx((1e-2, 0.0))
    assert (head["lr"], head["eps"], head["weight_decay"]) == pytest.approx((5e-3, 1e-8, 0.2))
    (bias,) = (g for g in param_groups(model, PLAIN, by, 1e-2, 1e-8, 0.1, decay_vectors=True) if g["params"][0].ndim == 1)
    assert bias["weight_decay"] == pytest.approx(0.1)
    torch.optim.AdamW(param_groups(model, PLAIN, by, 1e-2, 1e-8, 0.1)).step()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"no rule matches layers\.0\.bias, layers\.1\.bias; add a pattern"):
        roles(dict(Plain().named_parameters()), {k: v for k, v in PLAIN.items() if "bias" not in k})
    with pytest.raises(ValueError, match=r"role 'matrix' of rule 'head' is not one of embedding, hidden"):
        roles(["head"], {"head": "matrix"})
    with pytest.raises(ValueError, match=r"alpha must be in \[0\.5, 1\], got 0\.2"):
        CompleteP(alpha=0.2)
    with pytest.raises(ValueError, match="width must be positive"):
        CompleteP(width=0)
    with pytest.raises(ValueError, match="at least two sizes"):
        coordinate_check(lambda n, s: nn.Identity(), lambda m: None, lambda m: None, lambda m: {}, [4])
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        coordinate_check(lambda n, s: nn.Identity(), lambda m: None, lambda m: None, lambda m: {}, [4, 8], steps=0)


def tokens(seed, rows=16, length=24):
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model, x):
    """Predicts each token's square, modulo the vocabulary: something to learn from the first step on."""
    return nn.functional.cross_entropy(model(x).flatten(0, 1), (x * x % 61).flatten())


def adamw(model, by, lr):
    return torch.optim.AdamW(param_groups(model, RULES, by, lr, 1e-12, 0.0), betas=(0.9, 0.95))


def check(sizes, depth=False, alpha=1.0, standard=False, steps=4, lr=3e-3):
    data, optimizer = None, None

    def build(size, seed):
        nonlocal data, optimizer
        width, layers = (32, size) if depth else (size, 2)
        model, by = make(width, layers, alpha=alpha, seed=seed, standard=standard)
        data, optimizer = (tokens(k) for k in range(steps)), adamw(model, by, lr)
        return model

    def step(model):
        optimizer.zero_grad()
        loss_of(model, next(data)).backward()
        optimizer.step()

    def watch(model):
        return {"embedding": model.embedding, "last block": model.blocks[-1]}

    return coordinate_check(build, step, lambda m: {"logits": m(tokens(99))}, watch, sizes, range(2), steps)


def test_activations_change_alike_at_any_width_and_depth_and_otherwise_do_not():
    """The recipe `coordinate_check` measures the slopes of larger models; here small ones must tell the two apart.

    What is left in the logits' slope over width comes from the unembedding's random start, whose part falls as m_N^-1/2.
    """
    wide = check([32, 64, 128, 256]).slopes()
    assert max(abs(wide["embedding"]), abs(wide["last block"])) < 0.1
    assert -0.3 < wide["logits"] < 0.1
    assert check([32, 64, 128, 256], standard=True).slopes()["logits"] > 0.4
    deep = check([2, 4, 8, 16], depth=True).slopes()
    assert all(abs(slope) < 0.1 for slope in deep.values()), deep
    assert check([2, 4, 8, 16], depth=True, standard=True).slopes()["last block"] > 0.25


def test_eps_falls_as_the_gradient_does():
    """eps is a floor under the gradient's size, so over 8 x the width both must scale alike (2512.22382's correction).

    All gradients share a factor, how far the model has learned; so exponents are taken relative to the unembedding's. They
    are measured within 0.3; a wrong entry of the table would be off by 1.
    """
    sizes = {}
    for width in (32, 256):
        model, by = make(width)
        optimizer = adamw(model, by, 3e-3)
        for step in range(30):
            optimizer.zero_grad()
            loss_of(model, tokens(step)).backward()
            optimizer.step()
        named = dict(model.named_parameters())
        of_role = {role: [named[n].grad.flatten() for n, r in roles(named, RULES).items() if r == role] for role in TABLE}
        sizes[width] = {role: torch.cat(g).square().mean().sqrt().item() for role, g in of_role.items()}
    exponent = {role: math.log(sizes[256][role] / sizes[32][role]) / math.log(8) for role in TABLE}
    for role in TABLE:
        expected = math.log(CompleteP(width=8).multipliers(role).eps) / math.log(8)
        assert exponent[role] - exponent["unembedding"] == pytest.approx(expected, abs=0.3), role
