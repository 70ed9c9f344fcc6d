"""Quantized weights are what rounding gives, their checkpoints come back to the bit, and mistakes are named."""

import copy

import pytest
import torch
from torch.testing import assert_close

from mdm import builders
from mdm.checkpoint import load_model
from mdm.config import UserError
from mdm.quantization import SCHEMES, dequantize, flattened, in_dtype, linears, load_quantized, num_bytes, quantize

ON_CPU = [scheme for scheme in SCHEMES if scheme != "float8_dynamic"]


def tiny(width=64):
    model = builders.nano(vocab_size=50, max_length=32, width=width, num_layers=2, num_heads=2)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


def test_int8_is_rounding_to_a_scale_for_each_row():
    model = tiny()
    weights = {name: m.weight.detach().clone() for name, m in linears(model).items()}
    quantize(model, "int8_weight_only")
    for name, linear in linears(model).items():
        scale = weights[name].abs().amax(dim=1, keepdim=True) / 127.5
        found = linear.weight.dequantize()
        assert_close(found / scale, (found / scale).round(), rtol=0, atol=1e-3)  # whole multiples of the scale
        assert bool(((found - weights[name]).abs() <= 0.501 * scale).all())  # and the nearest ones


@pytest.mark.parametrize(("scheme", "most"), [("int8_weight_only", 0.54), ("int8_dynamic", 0.54), ("int4_weight_only", 0.32)])
def test_memory_is_that_of_the_integers_and_their_scales(scheme, most):
    """Against bfloat16. A row of 64 int8 has a scale of 2 bytes: 0.5 + 1/64; 32 int4 have a scale and a zero: 0.25 + 4/64."""
    model = in_dtype(tiny(), torch.bfloat16)
    before = num_bytes(model)
    assert before == 2 * sum(m.weight.numel() for m in linears(model).values())
    quantize(model, scheme)
    assert 0.25 < num_bytes(model) / before <= most


@pytest.mark.parametrize("scheme", ON_CPU)
def test_a_quantized_model_computes_nearly_the_same_and_its_checkpoint_exactly(scheme, run, untrained, tmp_path):
    from tests.recipes.conftest import in_process

    out = tmp_path / "quantized"
    in_process("quantize", "recipes/configs/quantize.yaml", f"checkpoint={untrained}", f"scheme={scheme}", f"output_dir={out}")
    whole, processor = load_model(untrained)
    model, _ = load_model(out)
    tokens = torch.randint(0, processor.vocabulary.size, (4, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = whole(tokens), model(tokens).float()
        error = (found - expected).norm() / expected.norm()
        assert 0 < error < (0.12 if "int4" in scheme else 0.06)
        again = in_dtype(copy.deepcopy(whole), torch.bfloat16)
        quantize(again, scheme)
        assert_close(model(tokens), again(tokens), rtol=0, atol=0)
    for name, part in flattened(again.state_dict()).items():
        assert torch.equal(part, flattened(model.state_dict())[name]), name
    if scheme != "int8_dynamic":  # its activations are rounded too
        dequantize(again)
        with torch.no_grad():
            assert_close(model(tokens), again(tokens), rtol=0.05, atol=0.1)  # in bfloat16, in another order of sums


def test_mistakes_are_named(untrained, tmp_path):
    from tests.recipes.conftest import in_process

    def attempt(*changes):
        in_process(
            "quantize", "recipes/configs/quantize.yaml", f"checkpoint={untrained}", f"output_dir={tmp_path / 'q'}", *changes
        )

    with pytest.raises(UserError, match="scheme: 'int3' is not one of int8_weight_only"):
        attempt("scheme=int3")
    with pytest.raises(UserError, match="float8_dynamic needs a GPU"):
        attempt("scheme=float8_dynamic", "device=cpu")
    with pytest.raises(UserError, match="would replace the one it is made from"):
        attempt(f"output_dir={untrained}")
    attempt()
    with pytest.raises(UserError, match="is quantized already"):
        attempt(f"checkpoint={tmp_path / 'q'}", f"output_dir={tmp_path / 'r'}")
    with pytest.raises(UserError, match=r"int4_weight_only needs inputs in groups of 32; blocks\.0\.attn\.q_proj has 48"):
        quantize(tiny(48), "int4_weight_only")


def test_a_packed_tensor_that_is_missing_is_named():
    model = tiny()
    quantize(model, "int8_weight_only")
    state = flattened(model.state_dict())
    key = "blocks.1.attn.q_proj.weight.scale"
    less, more = {k: v for k, v in state.items() if k != key}, {**state, "more": state["norm.scale"]}
    for changed, message in ((less, f"{key} is missing"), (more, "unexpected more")):
        with torch.device("meta"):
            empty = builders.nano(vocab_size=50, max_length=32, width=64, num_layers=2, num_heads=2)
        with pytest.raises(ValueError, match=message):
            load_quantized(empty, "int8_weight_only", changed, torch.float32)
