from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from components.blocks import attention, transformer_block
from components.sequences import collate, task_sequence
from components.visibility import Places, attention_mask, same_document
from mdm.config import UserError
from mdm.data.processor import Processor
from mdm.generation.generate import generate
from mdm.hardware import Hardware
from mdm.models import builders
from mdm.models.folder import export, load_model
from mdm.models.transformer import ModelConfig

HERE = Hardware(torch.device("cpu"), 0, 1, False)


def tiny(vocab_size, **options):
    model = builders.model(vocab_size, 64, width=32, num_layers=2, num_heads=4, **options)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


@pytest.fixture(scope="module")
def processor():
    from components.tokenizers.audio import Codec2Tokenizer
    from components.tokenizers.image import GreyPatchTokenizer
    from components.tokenizers.text import TextTokenizer

    tokenizers = {
        "text": TextTokenizer.train(["a handwritten seven"] * 50, 270),
        "image": GreyPatchTokenizer(8, 2, 3),
        "audio": Codec2Tokenizer(),
    }
    return Processor.build(tokenizers, {"text": 8, "image": 16, "audio": 16})


def test_documents_in_a_pack_do_not_influence_each_other(vocabulary):
    """Perturb one document: the logits of the others stay the same, to the bit."""
    texts = [torch.tensor(t) for t in ([1, 2, 3], [4, 5, 6, 0], [2])]
    model = tiny(vocabulary.size)

    def logits(changed):
        sequences = [task_sequence(vocabulary, "text", {"text": t}, {}) for t in changed]
        batch = collate([sequences], [[0, 1, 2]], vocabulary.pad_id, length=24)
        return model(batch.tokens, batch.document, batch.position)[0], batch.document[0]

    before, document = logits(texts)
    after, _ = logits([texts[0], torch.tensor([0, 0, 1, 1]), texts[2]])
    same = document != 1
    assert torch.equal(before[same], after[same])
    assert not torch.allclose(before[~same], after[~same])


def test_a_packed_document_equals_the_same_document_alone(vocabulary):
    sequences = [task_sequence(vocabulary, "text", {"text": torch.tensor(t)}, {}) for t in ([1, 2, 3], [4, 5])]
    model = tiny(vocabulary.size)
    packed = collate([sequences], [[0, 1]], vocabulary.pad_id, length=16)
    alone = collate([[sequences[1]]], [[0]], vocabulary.pad_id)
    there = model(packed.tokens, packed.document, packed.position)[0, len(sequences[0]) : len(sequences[0]) + len(sequences[1])]
    assert_close(there, model(alone.tokens)[0], atol=1e-5, rtol=1e-5)


def test_attention_is_bidirectional_and_padding_is_not_seen():
    model = tiny(20)
    tokens = torch.tensor([[1, 2, 3, 4]])
    changed = torch.tensor([[1, 2, 3, 5]])
    assert not torch.allclose(model(tokens)[0, 0], model(changed)[0, 0])
    document = torch.tensor([[0, 0, 0, -1]])
    assert torch.equal(model(tokens, document)[0, :3], model(changed, document)[0, :3])
    assert torch.isfinite(model(tokens, document)).all()


def test_a_block_is_its_formula():
    """Attention and SwiGLU written out in float64, with grouped-query attention, QK-norm and a residual multiplier."""
    torch.manual_seed(0)
    block = transformer_block(32, 4, 64, 16, num_kv_heads=2, residual_multiplier=0.5).double()
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    a, f = block.attn, block.mlp

    def norm(v):
        return v / (v.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def rotate(v):  # [b, t, heads, 8], interleaved pairs
        angle = torch.arange(6, dtype=torch.float64)[:, None] * 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
        even, odd = v[..., 0::2], v[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

    h = norm(x)
    q = norm(rotate(a.q_proj(h).view(2, 6, 4, 8)))
    k = norm(rotate(a.k_proj(h).view(2, 6, 2, 8))).repeat_interleave(2, dim=2)
    v = a.v_proj(h).view(2, 6, 2, 8).repeat_interleave(2, dim=2)
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(8**0.5).softmax(-1)
    x1 = x + 0.5 * a.output_proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2))
    h = norm(x1)
    expected = x1 + 0.5 * f.w2(torch.nn.functional.silu(f.w1(h)) * f.w3(h))
    # torchtune's RoPE and norms compute in float32
    assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


def test_attention_of_short_rows_is_the_fused_kernels():
    """With and without a mask; gradients too; and a longer row goes to the fused kernel."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, generator=g, requires_grad=True) for _ in range(3))
    for mask in (None, attention_mask(same_document, Places(torch.tensor([[0, 0, 1, 1, -1], [0, 1, 1, 1, 1]])))):
        fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None])
        ours = attention(q, k, v, mask)
        assert_close(ours, fused, atol=1e-6, rtol=1e-5)
        for a, b in zip(
            torch.autograd.grad(ours.square().sum(), (q, k, v)),
            torch.autograd.grad(fused.square().sum(), (q, k, v)),
            strict=True,
        ):
            assert_close(a, b, atol=1e-5, rtol=1e-4)
    long = torch.randn(1, 1, 600, 8)
    assert_close(attention(long, long, long), torch.nn.functional.scaled_dot_product_attention(long, long, long))


def test_document_mask_is_the_same_document():
    mask = attention_mask(same_document, Places(torch.tensor([[0, 0, 1, -1]])))[0]
    assert mask.tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [False, False, True, False],
        [False, False, False, True],
    ]


@pytest.mark.parametrize(
    ("build", "billions", "ratio"), [(builders.small, 0.10, 128), (builders.base, 0.81, 128), (builders.mdm_3b, 2.7, 128)]
)
def test_named_sizes_have_the_papers_shapes(build, billions, ratio):
    with torch.device("meta"):
        model = build(vocab_size=1000)
    assert model.num_parameters(embeddings=False) / 1e9 == pytest.approx(billions, rel=0.02)
    assert model.config.width / model.config.num_layers == ratio


def test_flops_count_the_weights_multiplied():
    """Against torch's own counter over a forward pass; the backward is twice that."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny(100)
    tokens = torch.zeros(1, 16, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not see into the fused kernel
        model(tokens)
    assert 3 * counter.get_total_flops() / 16 == pytest.approx(model.flops_per_token(16, unembedded=1.0), rel=0.01)


def test_the_mask_token_is_never_generated_and_every_canvas_decodes(processor):
    model = tiny(processor.vocabulary.size)
    for task, prompt in (
        ("text", {}),
        ("text_to_image", {"text": "a handwritten seven"}),
        ("text_to_speech", {"text": "a seven"}),
        ("joint_text_image", {}),
    ):
        made = generate(model, processor, task, [prompt] * 3, guidance_scale=1.0 if prompt else 0.0)
        assert not (made.tokens == processor.vocabulary.mask_id)[made.batch.maskable].any()
        assert set(made.outputs[0]) == {"text": {"text"}, "joint_text_image": {"text", "image"}}.get(
            task, {"image"} if "image" in task else {"audio"}
        )
    read = generate(model, processor, "image_to_text", [{"image": made.outputs[0]["image"]}])
    assert isinstance(read.outputs[0]["text"], str)


def test_a_learned_tokenizer_gives_the_same_codes_beside_a_model_in_bfloat16():
    from components.tokenizers.fsq import FSQAutoencoder, FSQConfig, FSQImageTokenizer

    torch.manual_seed(0)
    own = FSQImageTokenizer(FSQAutoencoder(FSQConfig(kind="image", patch=2, levels=(64, 64), width=16)).eval())
    processor = Processor.build({"image": own}, {"image": 16})
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)) for i in range(20)]
    codes = [processor.encode("image", image) for image in images]
    with torch.autocast("cpu", torch.bfloat16):
        beside = [processor.encode("image", image) for image in images]
        decoded = [processor.decode("image", c) for c in codes]
    assert all(torch.equal(a, b) for a, b in zip(codes, beside, strict=True))
    assert [d.tobytes() for d in decoded] == [processor.decode("image", c).tobytes() for c in codes]


def test_a_seed_gives_the_same_samples(processor):
    model = tiny(processor.vocabulary.size)
    a, b, c = (generate(model, processor, "text", [{}] * 2, seed=s).tokens for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_export_and_load_give_the_same_logits(processor, tmp_path):
    model = tiny(processor.vocabulary.size)
    export(tmp_path / "model", model, processor, HERE)
    again, loaded = load_model(tmp_path)
    tokens = torch.arange(12)[None]
    assert torch.equal(model(tokens), again(tokens))
    assert loaded.vocabulary == processor.vocabulary
    assert loaded.encode("text", "a handwritten seven").tolist() == processor.encode("text", "a handwritten seven").tolist()


def test_a_vocabulary_of_another_run_is_refused(processor, vocabulary, tmp_path):
    export(tmp_path / "model", tiny(processor.vocabulary.size), processor, HERE)
    vocabulary.save(tmp_path / "model" / "vocabulary.json")
    with pytest.raises(UserError, match=r"the text tokenizer has codebooks of"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="no model there"):
        load_model(tmp_path / "absent")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30, "num_heads": 4}, "width 30 does not divide into"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_heads": 8, "num_kv_heads": 3}, "not a multiple of num_kv_heads = 3"),
    ],
)
def test_impossible_shapes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{"vocab_size": 10, "width": 32, "num_layers": 2, "num_heads": 4, "max_length": 8, **options})


def test_a_vocabulary_of_the_same_size_and_another_meaning_is_refused(processor, tmp_path):
    export(tmp_path / "model", tiny(processor.vocabulary.size), processor, HERE)
    swapped = replace(processor.vocabulary, specials=processor.vocabulary.specials[::-1])
    swapped.save(tmp_path / "model" / "vocabulary.json")
    with pytest.raises(UserError, match="is not the one the model was trained with"):
        load_model(tmp_path)


def test_the_baseline_sees_none_behind_it_in_a_pack_either():
    model = builders.model(20, 32, 32, 2, 2, autoregressive=True)
    model.init_weights(torch.Generator().manual_seed(0))
    tokens, document = torch.arange(8)[None], torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    position = torch.arange(4).repeat(2)[None]
    packed = model(tokens, document, position)[0]
    for own in (slice(0, 4), slice(4, 8)):
        assert_close(packed[own], model(tokens[:, own], None, position[:, own])[0], atol=1e-5, rtol=1e-5)
    changed = tokens.clone()
    changed[0, 6] = 19  # it predicts the next position, and those behind
    assert torch.equal(model(changed, document, position)[0, :7], packed[:7])
    assert not torch.equal(model(changed, document, position)[0, 7], packed[7])


def test_the_autoregressive_baseline_scores_each_token_given_those_before_it(vocabulary, make_batch):
    """Its loss is -log p(x_i | x_<i): the same as from logits of growing prefixes, one at a time."""
    from components.losses import loss_from_hidden
    from components.maskers import NextToken
    from mdm.data.pipeline import micro_batch
    from mdm.data.settings import LossSettings

    model = builders.model(vocabulary.size, 32, 32, 2, 2, autoregressive=True)
    model.init_weights(torch.Generator().manual_seed(0))
    batch = make_batch(rows=2)
    micro = micro_batch(batch, NextToken(), LossSettings(reduction="token"), vocabulary)
    with torch.no_grad():
        hidden = model.hidden(micro.noisy.noisy, None, batch.position)
        found = loss_from_hidden(hidden, model.unembedding.weight, micro.positions, vocabulary).nelbo.sum()
        expected = 0.0
        for row in range(2):
            for place in batch.maskable[row].nonzero()[:, 0].tolist():
                prefix = model.hidden(torch.cat([batch.tokens[row : row + 1, :place], batch.tokens[row : row + 1, :1]], dim=1))
                logits = model.unembedding(prefix[0, place]).masked_fill(
                    ~vocabulary.allowed(batch.id_range[row, place]), float("-inf")
                )
                expected -= logits.log_softmax(-1)[batch.tokens[row, place]]
    assert_close(found, torch.as_tensor(expected), rtol=1e-4, atol=1e-4)
