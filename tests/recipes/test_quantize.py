"""Quantized weights are what rounding gives, their checkpoints come back to the bit, and mistakes are named."""

import copy

import pytest
import torch
from torch.testing import assert_close

from mdm.config import UserError
from mdm.models import builders
from mdm.models.folder import load_model
from mdm.models.quantization import SCHEMES, dequantize, flattened, in_dtype, load_quantized, num_bytes, quantize, weights

ON_CPU = [scheme for scheme in SCHEMES if scheme != "float8_dynamic"]


def tiny(width=64):
    model = builders.nano(vocab_size=50, max_length=32, width=width, num_layers=2, num_heads=2)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


def test_int8_is_rounding_to_a_scale_for_each_row():
    model = tiny()
    before = {name: weight.detach().clone() for name, weight in weights(model).items()}
    quantize(model, "int8_weight_only")
    for name, weight in weights(model).items():
        scale = before[name].abs().amax(dim=1, keepdim=True) / 127.5
        found = weight.dequantize()
        assert_close(found / scale, (found / scale).round(), rtol=0, atol=1e-3)  # whole multiples of the scale
        assert bool(((found - before[name]).abs() <= 0.501 * scale).all())  # and the nearest ones


@pytest.mark.parametrize(("scheme", "most"), [("int8_weight_only", 0.54), ("int8_dynamic", 0.54), ("int4_weight_only", 0.32)])
def test_memory_is_that_of_the_integers_and_their_scales(scheme, most):
    """Against bfloat16. A row of 64 int8 has a scale of 2 bytes: 0.5 + 1/64; 32 int4 have a scale and a zero: 0.25 + 4/64."""
    model = in_dtype(tiny(), torch.bfloat16)
    before = num_bytes(model)
    assert before == 2 * sum(weight.numel() for weight in weights(model).values())
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
    both = r"inputs in groups of 32 and outputs in groups of 16; blocks\.0\.attn\.q_proj\.weight has 48 and 48"
    with pytest.raises(UserError, match=both):
        quantize(tiny(48), "int4_weight_only")


def mixture(scheme, folder):
    """A mixture of five experts before and after `mdm run quantize`, and what it printed."""
    import contextlib
    import io

    from tests.mdm.models.test_weights import ours
    from tests.recipes.conftest import in_process

    whole = ours(folder / "whole" / "model", num_experts=5, experts_per_token=2, ffn_width=64)
    base, out = f"checkpoint={folder / 'whole'}", f"output_dir={folder / scheme}"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        in_process("quantize", "recipes/configs/quantize.yaml", base, f"scheme={scheme}", out, "dtype=fp32")
    return whole, load_model(folder / scheme)[0], said.getvalue()


@pytest.mark.parametrize("scheme", ON_CPU)
def test_the_experts_of_a_mixture_are_rounded_as_layers_of_their_own_and_its_router_is_not(scheme, tmp_path):
    whole, model, said = mixture(scheme, tmp_path)
    for i, block in enumerate(whole.blocks):
        assert torch.equal(model.blocks[i].mlp.router.weight, block.mlp.router.weight)
        for part in ("gate", "up", "down"):
            for e, weight in enumerate(getattr(block.mlp, part).detach()):
                layer = torch.nn.Linear(*weight.shape[::-1], bias=False)
                layer.weight = torch.nn.Parameter(weight.clone())
                quantize(torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([layer])}), scheme)
                found = getattr(model.blocks[i].mlp, part)[e]
                assert torch.equal(found.dequantize(), layer.weight.dequantize()), (i, part, e)
    experts, attention = 5 * 3 * 32 * 64, 4 * 32 * 32
    assert f"{2 * (experts + attention):,} of {whole.num_parameters():,} weights" in said
    ordinary = in_dtype(copy.deepcopy(whole), torch.bfloat16)
    assert num_bytes(ordinary) == 2 * 2 * (experts + attention)
    assert num_bytes(model) < 0.75 * num_bytes(ordinary)  # a row of 32 with a scale of 4 bytes is the worst case
    tokens = torch.randint(0, whole.config.vocab_size, (3, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = whole(tokens), model(tokens)
        assert 0 < (found - expected).norm() / expected.norm() < (0.3 if "int4" in scheme else 0.1)
        assert model(tokens[:1, :1]).isfinite().all()  # three experts have no token


def test_experts_of_their_own_compute_what_one_tensor_of_them_does():
    from components.moe import MixtureOfExperts

    torch.manual_seed(0)
    one = MixtureOfExperts(8, 16, 3, 2)
    two, x = copy.deepcopy(one), torch.randn(2, 5, 8)
    two.split()
    two.split()  # again changes nothing
    assert sorted(n for n, _ in two.named_parameters() if "gate" in n) == ["gate.0", "gate.1", "gate.2"]
    assert torch.equal(one(x), two(x))
    assert torch.equal(one(x[:1, :1]), two(x[:1, :1]))  # an expert without a token


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
