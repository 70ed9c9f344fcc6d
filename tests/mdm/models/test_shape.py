"""What block models and autoregressive ones have beside: heads of any size, ties, routers, blocks as config.json has them."""

import json

import pytest
import safetensors.torch
import torch
from torch.testing import assert_close

from components.blocks import transformer_block
from components.samplers import Confidence
from mdm.config import UserError
from mdm.generation.editing import infill
from mdm.generation.generate import generate
from mdm.hardware.mesh import check_split
from mdm.models.folder import load_config, load_model
from mdm.models.open_formats import FORMATS
from mdm.models.open_models import load_open, save_open
from mdm.models.quantization import places, quantize, weights
from mdm.models.transformer import MaskedDiffusionModel, ModelConfig
from tests.mdm.models.test_open_models import CONFIGS, LLADA2, LLAMA3, QWEN3, SDAR, VOCAB, read, write
from tests.mdm.models.test_weights import ours

TOKENS = torch.randint(0, VOCAB, (2, 13), generator=torch.Generator().manual_seed(1))
SIZES = {"vocab_size": 61, "width": 32, "num_layers": 2, "num_heads": 4, "max_length": 64}


@pytest.mark.parametrize(
    ("kind", "changes"), [("qwen3", {}), ("llama", {}), ("llama", {"head_dim": 12, "tie_word_embeddings": True})]
)
def test_an_autoregressive_model_is_the_one_of_transformers(kind, changes, tmp_path):
    transformers = pytest.importorskip("transformers")
    write(tmp_path, CONFIGS[kind], **changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    model, processor = load_model(tmp_path)
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        assert_close(model(TOKENS)[:, 1:], expected[:, :-1], rtol=0, atol=1e-4)
        save_open(tmp_path / "again", model, processor, FORMATS[kind])
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
        assert torch.equal(again(TOKENS).logits, expected)


def test_a_tie_is_one_parameter_and_stays_one(tmp_path):
    state = write(tmp_path / "open", QWEN3)
    assert "lm_head.weight" not in state
    model, _ = load_model(tmp_path / "open")
    assert model.unembedding.weight is model.embedding.weight
    assert model.num_parameters() - model.num_parameters(embeddings=False) == VOCAB * 32
    model.grow(VOCAB + 3, generator=torch.Generator().manual_seed(0))
    assert model.unembedding.weight is model.embedding.weight
    assert model(TOKENS).shape[-1] == VOCAB + 3
    plain = ours(tmp_path / "ours", tied_embeddings=True)
    assert "unembedding.weight" not in safetensors.torch.load_file(tmp_path / "ours" / "model.safetensors")
    again = load_model(tmp_path / "ours")[0]
    assert again.unembedding.weight is again.embedding.weight
    assert torch.equal(again(TOKENS), plain(TOKENS))
    with pytest.raises(UserError, match=r"mesh\.tensor: 2 copies embedding and unembedding, and this model's are tied"):
        check_split(plain, 2)


def test_a_file_may_hold_the_tied_matrix_twice_but_not_another(tmp_path):
    state = write(tmp_path, QWEN3)
    expected = load_model(tmp_path)[0](TOKENS)
    copy = state["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file({**state, "lm_head.weight": copy}, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path)[0](TOKENS), expected)
    safetensors.torch.save_file({**state, "lm_head.weight": copy + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight is not model\.embed_tokens\.weight, and config\.json says"):
        load_model(tmp_path)


def test_a_checkpoint_in_bfloat16_keeps_its_routers_biases_in_float32_to_the_bit(tmp_path):
    state = write(tmp_path / "in", LLADA2)
    state = {k: v if k.endswith("expert_bias") else v.bfloat16() for k, v in state.items()}
    safetensors.torch.save_file(state, tmp_path / "in" / "model.safetensors")
    model, processor = load_open(tmp_path / "in")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.blocks[1].mlp.expert_bias.dtype == torch.float32
    save_open(tmp_path / "out", model, processor, FORMATS["llada2"])
    back = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in state.items())
    assert load_open(tmp_path / "in", dtype=torch.bfloat16)[0].blocks[1].mlp.expert_bias.dtype == torch.float32


def test_every_expert_is_quantized_and_no_router(tmp_path):
    write(tmp_path, LLADA2)
    model, _ = load_model(tmp_path)
    expected = model(TOKENS)
    found = set(places(model))
    assert {"blocks.0.mlp.w1.weight", "blocks.1.mlp.shared.w2.weight", "blocks.1.mlp.gate"} <= found
    assert not any("router" in name or "expert_bias" in name for name in found)
    quantize(model, "int8_weight_only")
    assert sum(name.startswith("blocks.1.mlp.gate.") for name in weights(model)) == 8
    with torch.no_grad():
        assert (model(TOKENS) - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.parametrize(("kind", "size"), [("llada2", 32), ("sdar", 4)])
def test_a_block_models_size_of_blocks_is_read_and_written(kind, size, tmp_path):
    config = read(CONFIGS[kind])
    assert (config.blocks, config.blocks_from_start, config.predicts_next) == ({"text": size}, True, False)
    assert read({**CONFIGS[kind], "block_size": 8}).blocks == {"text": 8}
    for value in (0, -4, "32", True, 2.5, [4]):
        with pytest.raises(UserError, match=r"config\.json's block_size must be"):
            read({**CONFIGS[kind], "block_size": value})
    write(tmp_path / "in", CONFIGS[kind], block_size=8)
    model, processor = load_model(tmp_path / "in")
    save_open(tmp_path / "out", model, processor, FORMATS[kind])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["block_size"] == 8
    assert load_config(tmp_path / "out") == model.config
    with pytest.raises(UserError, match="sees the whole row; this model was trained in blocks of 8"):
        save_open(tmp_path / "other", model, processor, FORMATS["llada"])


def test_a_model_whose_blocks_are_counted_otherwise_is_none_of_theirs(tmp_path):
    write(tmp_path / "in", SDAR)
    model, processor = load_model(tmp_path / "in")
    model.change(ModelConfig(**{**vars(model.config), "blocks_from_start": False}))
    with pytest.raises(UserError, match="blocks_from_start = False cannot be written as SDARForCausalLM, whose is True"):
        save_open(tmp_path / "out", model, processor, FORMATS["sdar"])


@pytest.mark.parametrize("kind", ["llada2", "sdar"])
def test_block_models_write_the_same_with_and_without_their_exact_cache(kind, tmp_path):
    write(tmp_path, CONFIGS[kind], block_size=4)
    model, processor = load_model(tmp_path)
    prompts = [{"text": infill(processor, "w1 w2 w3 w4 w5 [mask:9]")}]
    made = [
        generate(model, processor, "text", prompts, Confidence(num_steps=4, temperature=0.0), 0.0, cache=cache).tokens
        for cache in ("exact", "off")
    ]
    assert torch.equal(*made)
    assert not (made[0] == processor.vocabulary.mask_id).any()


def test_without_a_token_to_spare_an_autoregressive_model_asks_for_a_mask(tmp_path):
    write(tmp_path, {**LLAMA3, "vocab_size": 57, "pad_token_id": 5})
    with pytest.raises(UserError, match="all 57 ids are tokens, and none is left for a mask; set mask_token_id in config"):
        load_model(tmp_path)
    write(tmp_path, {**LLAMA3, "vocab_size": 57, "pad_token_id": 5, "mask_token_id": 6})
    assert load_model(tmp_path)[1].vocabulary.mask_id == 6


def test_what_is_not_rotated_does_not_know_its_place():
    """With one rotated pair of zero weight, attention is the same wherever the tokens stand."""
    torch.manual_seed(0)
    block = transformer_block(width=16, num_heads=2, ffn_width=16, max_length=64, head_dim=12, rotary_share=0.5).eval()
    x, places_ = torch.randn(1, 5, 16), torch.arange(5)[None]
    with torch.no_grad():
        moved = block(x, input_pos=places_ * 7)
        assert not torch.allclose(moved, block(x, input_pos=places_), atol=1e-4)
        for projection in (block.attn.q_proj, block.attn.k_proj):
            projection.weight.unflatten(0, (-1, 12))[:, :6] = 0
        assert_close(block(x, input_pos=places_ * 7), block(x, input_pos=places_), rtol=0, atol=1e-6)


def test_flops_count_the_channels_of_all_heads_and_the_shared_expert():
    wide, narrow = (MaskedDiffusionModel(ModelConfig(**SIZES, ffn_width=64, head_dim=d)) for d in (16, 8))
    assert wide.flops(0, 1, 0) == 2 * narrow.flops(0, 1, 0) == 12 * 2 * 64
    experts = {"num_experts": 8, "experts_per_token": 2, "ffn_width": 16}
    alone, shared = (MaskedDiffusionModel(ModelConfig(**SIZES, **experts, num_shared_experts=n)) for n in (0, 3))
    assert shared.flops(1, 0, 0) - alone.flops(1, 0, 0) == 6 * 2 * 3 * 32 * 3 * 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 0}, r"model\.head_dim must be at least 1, got 0"),
        ({"head_dim": 7}, r"model\.rotary_share 1.0 of 7 channels \(head_dim\) is not an even number of them"),
        ({"rotary_share": 0.4}, r"model\.rotary_share 0.4 of 8 channels \(head_dim\) is not an even number"),
        ({"rotary_share": 1.5}, r"model\.rotary_share 1.5 of 8 channels"),
        ({"head_dim": 2**25}, r"model\.max_length 64 is more than any model's"),
        ({"num_heads": 2**39, "head_dim": 8}, r"model\.head_dim 8 x num_heads = \d+ is more than any model's"),
        ({"num_shared_experts": 1}, r"model\.num_shared_experts must be 0 where model\.num_experts is null, got 1"),
        ({"router": "sigmoid"}, r"model\.router must be 'softmax' where model\.num_experts is null"),
        ({"router": "argmax"}, r"model\.router must be one of softmax, sigmoid, got 'argmax'"),
        ({"num_experts": 4, "first_dense_layers": 3}, r"model\.first_dense_layers 3 is more than num_layers = 2"),
        ({"num_experts": 4, "num_shared_experts": 2**20}, r"model\.num_layers 2 \(x \d+ experts\) is more than any model's"),
        ({"num_experts": 4, "routing_scale": 2.5}, r"model\.routing_scale must be 1 where model\.router is softmax, got 2.5"),
        ({"num_experts": 4, "router": "sigmoid", "expert_groups": 3}, r"model\.expert_groups.*: 4 experts do not lie in 3"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**SIZES, **change})


@pytest.mark.parametrize("kind", ["llada2", "qwen3"])
def test_a_quantized_folder_has_the_routers_biases_and_the_tie(kind, tmp_path):
    from tests.recipes.conftest import in_process

    write(tmp_path / "open", CONFIGS[kind])
    model, _ = load_model(tmp_path / "open")
    words = [f"checkpoint={tmp_path / 'open'}", f"output_dir={tmp_path / 'out'}", "dtype=fp32", "device=cpu"]
    in_process("quantize", "recipes/configs/quantize.yaml", *words)
    packed, _ = load_model(tmp_path / "out")
    assert packed.config == model.config
    quantize(model, "int8_weight_only")
    with torch.no_grad():
        assert_close(packed(TOKENS), model(TOKENS), rtol=0, atol=1e-5)
    assert (packed.unembedding.weight is packed.embedding.weight) is model.config.tied_embeddings
