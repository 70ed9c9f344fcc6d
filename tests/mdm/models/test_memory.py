"""What saves memory computes the same: gradients with recomputed blocks, float8 near bfloat16, moments in 8 bits."""

import copy

import pytest
import torch
from torch.testing import assert_close

from components.parameterization import CompleteP
from components.sde import AdamWSettings, SDEScaler, rescale_moments
from mdm.config import UserError
from mdm.hardware import can_compile
from mdm.models import builders
from mdm.models.memory import check_memory, checkpoint_blocks, to_float8
from mdm.training.optim import OptimizerSettings, adamw


def tiny():
    model = builders.nano(vocab_size=50, max_length=32, width=64, num_layers=2, num_heads=2)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def gradients(model):
    tokens = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(1))
    saved = []

    def keep(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    loss.backward()
    return [p.grad for p in model.parameters()], sum(saved)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_blocks_give_the_same_gradients_from_less(mode):
    model = tiny()
    other = copy.deepcopy(model)
    checkpoint_blocks(other.blocks, mode)
    expected, held = gradients(model)
    found, held_less = gradients(other)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=0, atol=0)
    assert held_less < 0.6 * held


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_float8_layers_keep_float32_weights_and_nearly_the_gradients(recipe):
    """e4m3 has 3 bits of mantissa, e5m2 (tensorwise gradients) 2: relative errors of some percent, as emulated here."""
    model = tiny()
    other = copy.deepcopy(model)
    to_float8(other.blocks, recipe, emulate=True)
    assert sum(type(m).__name__ == "Float8Linear" for m in other.modules()) == 14
    assert all(p.dtype == torch.float32 for p in other.parameters())
    assert set(other.state_dict()) == set(model.state_dict())
    for a, b in zip(gradients(other)[0], gradients(model)[0], strict=True):
        assert 0 < (a - b).norm() / b.norm() < 0.15


def test_moments_in_8_bits_train_alike_and_follow_a_change_of_batch():
    """Eagerly: torchao compiles a step for every shape of a tensor, which takes longer than all else and computes the same."""
    pytest.importorskip("torchao.optim")
    scaler = SDEScaler(base=AdamWSettings(lr=1e-2, beta1=0.9, beta2=0.98), logical=8, physical=8, tokens=1000)
    losses = {}
    for state in ("float32", "int8"):
        model, torch_seed = tiny(), torch.Generator().manual_seed(2)
        optimizer = adamw(model, scaler.base, CompleteP(), state)
        for step in range(8):
            scaler.configure(optimizer, 100 * step + 100)
            tokens = torch.randint(0, 50, (8, 16), generator=torch_seed)
            loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            loss.backward()
            with torch.compiler.set_stance("force_eager"):
                optimizer.step()
            optimizer.zero_grad()
        losses[state] = loss.item()
        second = next(
            s["exp_avg_sq"] for s in optimizer.state.values() if hasattr(s["exp_avg_sq"], "codes") == (state == "int8")
        )
        before = second.dequantize() if state == "int8" else second.clone()
        rescale_moments(optimizer, 4.0)
        assert_close(second.dequantize() if state == "int8" else second, before / 4, rtol=0.05, atol=1e-12)
    assert losses["float32"] < 3.0  # from log 50 = 3.9
    assert losses["int8"] == pytest.approx(losses["float32"], rel=0.03)


def test_a_compiled_step_in_8_bits_is_the_eager_one_and_compiled_once():
    """Of one tensor. Its learning rate is a tensor that the scaler fills, so that another one is no other program."""
    optim = pytest.importorskip("torchao.optim")
    if not can_compile(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    scaler = SDEScaler(base=AdamWSettings(lr=1e-2), logical=8, physical=8, tokens=1000)

    def trained(stance):
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64, bias=False)
        optimizer = optim.AdamW8bit([{"params": [model.weight], "lr": 1e-2}])
        for step in range(4):
            scaler.configure(optimizer, 100 * step + 100)
            model(torch.full((2, 64), step + 1.0)).square().sum().backward()
            with torch.compiler.set_stance(stance), torch._dynamo.config.patch(error_on_recompile=step > 0):
                optimizer.step()
            optimizer.zero_grad()
        return model.weight

    assert_close(trained("default"), trained("force_eager"), rtol=0, atol=1e-6)


def test_in_another_precision_gains_and_rotations_stay_in_float32():
    from torchtune.modules import RMSNorm

    from mdm.models.quantization import in_dtype

    model = in_dtype(tiny(), torch.bfloat16)
    norms = [m for m in model.modules() if isinstance(m, RMSNorm)]
    assert {m.scale.dtype for m in norms} == {torch.float32}
    assert model.blocks[0].attn.pos_embeddings.cache.dtype == torch.float32
    assert {p.dtype for name, p in model.named_parameters() if p.ndim > 1} == {torch.bfloat16}


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU refuses")
def test_settings_that_the_device_cannot_run_are_refused():
    with pytest.raises(UserError, match="activation_checkpointing: 'some' is not one of null, full, selective"):
        check_memory("some", False, None, "cpu")
    with pytest.raises(UserError, match="there is no GPU"):
        check_memory(None, True, None, "auto")
    with pytest.raises(UserError, match=r"float8: rowwise needs a GPU of compute capability 8\.9"):
        check_memory(None, False, "rowwise", "auto")
    with pytest.raises(UserError, match="float8: 'blockwise' is not one of null, tensorwise, rowwise"):
        check_memory(None, False, "blockwise", "auto")
    with pytest.raises(UserError, match=r"optimizer\.state: 'int4' is not one of float32, int8, float8"):
        OptimizerSettings(state="int4").validate()
    with pytest.raises(UserError, match=r"optimizer\.state: float8 needs a GPU"):
        OptimizerSettings(state="float8").validate()
