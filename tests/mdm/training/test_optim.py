"""The average of the weights, and AdamW's settings carried to a run's width, depth, batch and horizon: by hand."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from components.sde import AdamWSettings
from mdm.config import UserError
from mdm.data.settings import BatchSettings
from mdm.models.transformer import ModelConfig
from mdm.training.optim import EMA, OptimizerSettings, ParameterizationSettings, adamw, batch_warnings


def moved(model: nn.Module, to: float) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(to)
    return model


def test_the_average_forgets_by_the_sample_and_not_by_the_step():
    """Towards weights of 1 from 0, k steps leave 1 - decay^k; and one step of kappa = 3 is three of the logical batch."""
    model = moved(nn.Linear(2, 2), 0.0)
    three, one = EMA(model, 0.9), EMA(model, 0.9)
    moved(model, 1.0)
    for _ in range(3):
        three.update(model.named_parameters())
    one.update(model.named_parameters(), kappa=3.0)
    for name in three.average:
        assert_close(three.average[name], torch.full_like(three.average[name], 1 - 0.9**3))
        assert_close(one.average[name], three.average[name])


def test_the_average_stands_in_for_the_weights_and_leaves_again():
    model = moved(nn.Linear(2, 2), 0.0)
    ema = EMA(model, 0.5)
    moved(model, 1.0)
    ema.swap(model)
    assert all((p == 0).all() for p in model.parameters())
    ema.swap(model)
    assert all((p == 1).all() for p in model.parameters())
    assert all((a == 0).all() for a in ema.average.values())
    with pytest.raises(UserError, match=r"ema must be in \(0, 1\)"):
        EMA(model, 1.0)


def test_width_and_depth_are_counted_from_the_model_of_the_tuning():
    config = ModelConfig(vocab_size=9, width=64, num_layers=6, num_heads=4, max_length=8)
    found = ParameterizationSettings(base_width=32, base_depth=2, alpha=0.75).of(config)
    assert (found.width, found.depth, found.alpha) == (2.0, 3.0, 0.75)
    alone = ParameterizationSettings().of(config)
    assert (alone.width, alone.depth) == (1.0, 1.0)


def test_settings_are_carried_from_the_logical_batch_and_the_horizon_of_the_tuning():
    settings = OptimizerSettings(lr=1e-3, base_tokens=1000, gamma=0.5, warmup=0.1, final_lr=0.2)
    scaler = settings.scaler(BatchSettings(logical=8, micro=4), physical=32, tokens=4000)
    assert scaler.kappa == pytest.approx(32 / 8 * (1000 / 4000) ** 0.5)
    assert scaler.lr(400) == pytest.approx(1e-3 * 2**0.5)  # the peak, at the end of the warm-up
    assert scaler.lr(4000) == pytest.approx(0.2e-3 * 2**0.5)
    same = OptimizerSettings(lr=1e-3).scaler(BatchSettings(logical=8, micro=4), physical=8, tokens=4000)
    assert same.kappa == 1.0


def test_a_run_of_fewer_steps_than_the_critical_ones_is_warned():
    scaler = OptimizerSettings().scaler(BatchSettings(logical=8, micro=4), physical=8, tokens=4000)
    assert batch_warnings(scaler, step_tokens=40, critical_steps=100) == []
    (found,) = batch_warnings(scaler, step_tokens=40, critical_steps=200)
    assert "leave 100 of them" in found
    assert found.endswith("the critical batch, 4 sequences")


def test_matrices_decay_and_gains_do_not():
    from mdm.models import builders

    model = builders.pico(vocab_size=9)
    optimizer = adamw(model, AdamWSettings(1e-3, weight_decay=0.1), ParameterizationSettings().of(model.config))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decays[id(p)] for p in model.parameters() if p.ndim > 1} == {0.1}
    assert {decays[id(p)] for p in model.parameters() if p.ndim == 1} == {0.0}
