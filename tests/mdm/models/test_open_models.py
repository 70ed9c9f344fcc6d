"""Open models in ours: their logits by a slow float64 transcription of their architecture, their tensors back to the bit.

The adapters were also run beside the models' own modelling code, outside the project; what is here needs no other package.
"""

import json
import math
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch.testing import assert_close

from components.samplers import Blocks, Confidence
from components.templates import fill
from mdm.config import UserError
from mdm.data.processor import Processor
from mdm.generation.editing import infill
from mdm.generation.generate import generate
from mdm.models.folder import load_model
from mdm.models.open_formats import FORMATS, find_format
from mdm.models.open_models import (
    UNEMBEDDING,
    build_on_meta,
    entries,
    halves,
    interleaved,
    load_open,
    our_shapes,
    save_open,
    their_shape,
    to_open,
)
from mdm.models.transformer import ModelConfig

VOCAB, WIDTH, HEADS, KV, FFN, LAYERS = 61, 32, 4, 2, 48, 2

LLADA = {
    "architectures": ["LLaDAModelLM"], "model_type": "llada", "activation_type": "silu", "block_type": "llama", "alibi": False,
    "rope": True, "layer_norm_type": "rms", "include_bias": False, "include_qkv_bias": None, "weight_tying": False,
    "d_model": WIDTH, "n_heads": HEADS, "n_kv_heads": KV, "n_layers": LAYERS, "mlp_hidden_size": FFN, "embedding_size": VOCAB,
    "vocab_size": VOCAB, "max_sequence_length": 64, "rope_theta": 5e5, "rms_norm_eps": 1e-5, "mask_token_id": 58,
    "eos_token_id": 57, "pad_token_id": 57,
}  # fmt: skip
LLAMA = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV, "max_position_embeddings": 64, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "tie_word_embeddings": False, "mask_token_id": 58, "pad_token_id": 57,
}  # fmt: skip
DREAM = {**LLAMA, "architectures": ["DreamModel"], "model_type": "Dream", "intermediate_size": FFN}
MOE = {
    **LLAMA, "architectures": ["LLaDAMoEModelLM"], "model_type": "lladamoe", "expert_intermediate_size": 24, "num_experts": 5,
    "num_experts_per_tok": 2, "qk_layernorm": True, "moe_layer_freq": [1] * LAYERS,
}  # fmt: skip
LLADA2 = {
    **LLAMA, "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "num_hidden_layers": 2, "head_dim": 12,
    "partial_rotary_factor": 0.5, "intermediate_size": FFN, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
    "num_experts": 8, "num_experts_per_tok": 3, "num_shared_experts": 2, "n_group": 4, "topk_group": 2,
    "routed_scaling_factor": 2.5, "use_bias": False,
}  # fmt: skip
SDAR = {
    **LLAMA, "architectures": ["SDARForCausalLM"], "model_type": "sdar", "intermediate_size": FFN, "head_dim": 12,
}  # fmt: skip
QWEN3 = {
    **SDAR, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True, "mask_token_id": None,
    "eos_token_id": 57,
}  # fmt: skip
LLAMA3 = {
    **LLAMA, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "intermediate_size": FFN, "mask_token_id": None,
}  # fmt: skip
CONFIGS = {
    "llada": LLADA, "dream": DREAM, "llada_moe": MOE, "llada2": LLADA2, "sdar": SDAR, "qwen3": QWEN3, "llama": LLAMA3,
}  # fmt: skip


def write(folder, config, seed=0, **changes):
    """A checkpoint of that config with random weights, in its own names and layout; returns its tensors."""
    config = {**config, **changes}
    form, g = find_format(config), torch.Generator().manual_seed(seed)
    ours = form.config(config, "it")
    shapes = our_shapes(form, ours, "it")
    state = {}
    for entry in entries(form, ours):
        shape = their_shape(entry, shapes)
        for name in entry.theirs:
            state[name] = torch.randn(shape, generator=g) * 0.3 + (0.8 if "norm" in name or "ln_f" in name else 0.0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(state, folder / "model.safetensors")
    words = {f"w{i}": i for i in range(57)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return state


def slow_experts(kind, c, s, p, x):
    """A mixture, a token and an expert at a time."""
    names = ("gate", "up", "down")

    def swiglu(x, which):
        gate, up, down = (s[f"{p}mlp.{which}.{n}_proj.weight"] for n in names)
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    count, k, scores = c["num_experts"], c["num_experts_per_tok"], x @ s[p + "mlp.gate.weight"].T
    out = []
    for t in range(len(x)):
        if kind == "llada_moe":
            weight, may = scores[t].softmax(-1).tolist(), range(count)
            best = sorted(may, key=lambda e, w=weight: -w[e])[:k]
        else:
            own = [1 / (1 + math.exp(-v)) for v in scores[t].tolist()]
            ranked = [v + b for v, b in zip(own, s[p + "mlp.gate.expert_bias"].tolist(), strict=True)]
            size = count // c["n_group"]
            groups = [range(i * size, i * size + size) for i in range(c["n_group"])]
            groups.sort(key=lambda group, r=ranked: -sum(sorted(r[e] for e in group)[-2:]))
            may = [e for group in groups[: c["topk_group"]] for e in group]
            best = sorted(may, key=lambda e, r=ranked: -r[e])[:k]
            weight = {e: c["routed_scaling_factor"] * own[e] / sum(own[b] for b in best) for e in best}
        out.append(sum(weight[e] * swiglu(x[t], f"experts.{e}") for e in best))
    return torch.stack(out) + (swiglu(x, "shared_experts") if kind == "llada2" else 0)


def slow_logits(kind, state, tokens):
    """A Llama-like decoder, without its causal mask where it is none, in float64, a head and a position pair at a time."""
    s, c = {k: v.double() for k, v in state.items()}, CONFIGS[kind]
    llada, llada2, causal = kind == "llada", kind == "llada2", kind in ("qwen3", "llama")
    eps, base = (1e-5, 5e5) if llada else (1e-6, 1e4)
    d = c.get("head_dim", WIDTH // HEADS)
    turned = int(d * c.get("partial_rotary_factor", 1))

    def norm(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain

    def rotate(x):  # halves: channel i with channel i + turned/2; what is behind them stays
        angle = torch.arange(x.shape[0]).double()[:, None] * base ** (-torch.arange(turned // 2).double() * 2 / turned)
        a, b = x[:, : turned // 2], x[:, turned // 2 : turned]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), x[:, turned:]], dim=1)

    def swiglu(x, gate, up, down):
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    embedding = next(
        s[n] for n in ("model.transformer.wte.weight", "model.embed_tokens.weight", "model.word_embeddings.weight") if n in s
    )
    out = []
    for row in tokens:
        h = embedding[row]
        for i in range(LAYERS):
            p = f"model.transformer.blocks.{i}." if llada else f"model.layers.{i}."
            a = p if llada else p + ("attention." if llada2 else "self_attn.")
            x = norm(h, s[p + ("attn_norm.weight" if llada else "input_layernorm.weight")])
            if llada2:
                q, k, v = (x @ s[a + "query_key_value.weight"].T).split([HEADS * d, KV * d, KV * d], dim=1)
            else:
                q, k, v = (x @ s[f"{a}{n}_proj.weight"].T + s.get(f"{a}{n}_proj.bias", 0) for n in "qkv")
            heads = []
            for j in range(HEADS):
                own, shared = slice(j * d, j * d + d), slice(j // (HEADS // KV) * d, j // (HEADS // KV) * d + d)
                qj, kj = q[:, own], k[:, shared]
                if llada2:
                    qj, kj = norm(qj, s[a + "query_layernorm.weight"]), norm(kj, s[a + "key_layernorm.weight"])
                elif a + "q_norm.weight" in s:
                    qj, kj = norm(qj, s[a + "q_norm.weight"]), norm(kj, s[a + "k_norm.weight"])
                scores = rotate(qj) @ rotate(kj).T / d**0.5
                if causal:
                    scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
                heads.append(scores.softmax(-1) @ v[:, shared])
            h = (
                h
                + torch.cat(heads, 1) @ s[a + ("attn_out.weight" if llada else "dense.weight" if llada2 else "o_proj.weight")].T
            )
            x = norm(h, s[p + ("ff_norm.weight" if llada else "post_attention_layernorm.weight")])
            if llada:
                h = h + swiglu(x, s[p + "ff_proj.weight"], s[p + "up_proj.weight"], s[p + "ff_out.weight"])
            elif p + "mlp.gate.weight" in s:
                h = h + slow_experts(kind, c, s, p, x)
            else:
                h = h + swiglu(x, *(s[f"{p}mlp.{n}_proj.weight"] for n in ("gate", "up", "down")))
        logits = norm(h, s["model.transformer.ln_f.weight" if llada else "model.norm.weight"])
        logits = logits @ s.get("model.transformer.ff_out.weight" if llada else "lm_head.weight", embedding).T
        out.append(torch.cat([logits[:1], logits[:-1]]) if kind == "dream" or causal else logits)
    return torch.stack(out)


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_theirs_and_the_way_back_is_exact(kind, tmp_path):
    state = write(tmp_path / "in", CONFIGS[kind])
    model, processor = load_model(tmp_path / "in")
    tokens = torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))
    assert_close(model(tokens).double(), slow_logits(kind, state, tokens), rtol=0, atol=1e-4)
    save_open(tmp_path / "out", model, processor, FORMATS[kind])
    back = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    again, _ = load_open(tmp_path / "out")
    assert torch.equal(again(tokens), model(tokens))


def test_rows_of_heads_are_permuted_and_back():
    rows = torch.arange(8.0)  # a head of 8 channels: halves 0..3 and 4..7
    assert interleaved(rows, 8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    two_heads = torch.randn(16, 3)
    assert torch.equal(halves(interleaved(two_heads, 8), 8), two_heads)
    assert torch.equal(interleaved(two_heads, 8)[8:], interleaved(two_heads[8:], 8))


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (
            {
                **LLADA, "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288,
                "embedding_size": 126464, "vocab_size": 126464, "max_sequence_length": 4096,
            },
            8_015_581_184,
        ),  # LLaDA 8B, base and instruct
        (
            {
                **DREAM, "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131072, "rope_theta": 1e6,
            },
            7_615_616_512,
        ),  # Dream 7B, of Qwen2.5 7B's shape
        (
            {
                **MOE, "vocab_size": 157184, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
                "num_key_value_heads": 16, "expert_intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8,
                "moe_layer_freq": [1] * 16,
            },
            7_356_880_896,
        ),  # LLaDA-MoE 7B-A1B
        (
            {
                **LLADA2, "vocab_size": 157184, "hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16,
                "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 5120, "moe_intermediate_size": 512,
                "num_experts": 256, "num_experts_per_tok": 8, "num_shared_experts": 1, "n_group": 8, "topk_group": 4,
            },
            16_255_638_528,
        ),  # LLaDA2-mini
        (
            {
                **SDAR, "vocab_size": 151936, "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32,
                "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 9728, "max_position_embeddings": 32768,
            },
            4_411_424_256,
        ),  # SDAR 4B, whose index says twice as many bytes
        (
            {
                **QWEN3, "vocab_size": 151936, "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
                "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "max_position_embeddings": 40960,
            },
            596_049_920,
        ),  # Qwen3 0.6B, its embedding counted once
        (
            {
                **LLAMA3, "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "intermediate_size": 1536, "tie_word_embeddings": True,
            },
            134_515_008,
        ),  # SmolLM2 135M
    ],
    ids=["llada", "dream", "llada_moe", "llada2", "sdar", "qwen3", "llama"],
)  # fmt: skip
def test_the_published_shapes_have_their_parameter_counts(config, parameters):
    assert build_on_meta(config).num_parameters() == parameters


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_an_autoregressive_model_writes_the_likeliest_token_after_token(kind, tmp_path):
    """Of a mask it sees nothing, so that what it writes is its greedy continuation; no id of its own is lost to the mask."""
    write(tmp_path, CONFIGS[kind])
    model, processor = load_model(tmp_path)
    assert processor.vocabulary.mask_id == 58  # the first id that is no token, nor the end
    prompt, sampler = {"text": infill(processor, "w1 w2 w3 [mask:5]")}, Blocks(Confidence(num_steps=1, temperature=0.0), 1)
    tokens = generate(model, processor, "text", [prompt], sampler, 0.0).tokens
    with torch.no_grad():
        for i in range(3, 8):
            logits = model(torch.cat([tokens[:, :i], tokens[:, :1]], dim=1))[0, i]
            logits[58] = -torch.inf
            assert logits.argmax() == tokens[0, i]
    for cache in ("prefix", "dual"):
        with pytest.raises(
            ValueError, match=f"cache '{cache}' is for a model that sees the whole row, and an autoregressive one"
        ):
            generate(model, processor, "text", [prompt], sampler, 0.0, cache=cache)


@pytest.mark.parametrize("kind", ["llada", "dream", "llada_moe"])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_they_generate_and_a_cache_refreshed_at_each_step_changes_nothing(kind, cache, tmp_path):
    write(tmp_path, CONFIGS[kind])
    model, processor = load_model(tmp_path)
    prompt = {"text": infill(processor, "w1 w2 w3 [mask:8]")}
    settings = {"sampler": Blocks(Confidence(num_steps=4, temperature=0.0), 4), "guidance_scale": 0.0}
    plain = generate(model, processor, "text", [prompt], **settings)
    assert plain.tokens.shape[1] == 11  # three words and eight positions: no task or boundary token of ours
    assert (plain.tokens[:, :3] == torch.tensor([1, 2, 3])).all()
    assert not (plain.tokens == processor.vocabulary.mask_id).any()
    cached = generate(model, processor, "text", [prompt], cache=cache, refresh_every=1, **settings)
    assert torch.equal(cached.tokens, plain.tokens)
    kept = generate(model, processor, "text", [prompt], cache=cache, **settings)
    assert not (kept.tokens == processor.vocabulary.mask_id).any()


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_block_of_a_model_that_predicts_the_next_position_is_computed_right(cache, tmp_path):
    """A row that is not refreshed, nothing having changed outside its block: the logits of a pass over everything."""
    from mdm.generation.canvas import CachedSlotLogits, Canvas, SlotLogits

    write(tmp_path, DREAM)
    model, processor = load_model(tmp_path)
    mask = processor.vocabulary.mask_id
    tokens = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    generated = torch.arange(12).expand(2, 12) >= 4
    canvas = Canvas.of(tokens, generated, torch.cat([torch.arange(50), torch.tensor([mask])]))
    plain = SlotLogits(model, canvas, None, model.hidden, lambda: model.unembedding.weight[canvas.ids])
    noisy = tokens.masked_fill(generated, mask)
    cached = CachedSlotLogits.around(plain, cache, 4, None)
    with torch.no_grad():
        cached(noisy)
        assert_close(cached(noisy)[:, :4], plain(noisy)[:, :4], rtol=0, atol=1e-5)


def test_the_mask_token_is_never_predicted_though_it_lies_in_the_text_range(tmp_path):
    from components.losses import loss_from_hidden, positions_by_range

    write(tmp_path, LLADA)
    _, processor = load_model(tmp_path)
    vocabulary = processor.vocabulary
    assert (vocabulary.size, vocabulary.mask_id, vocabulary.end_id) == (VOCAB, 58, 57)
    torch.manual_seed(0)
    hidden, unembedding = torch.randn(1, 6, 8), torch.randn(VOCAB, 8)
    target, every = torch.randint(0, 57, (1, 6)), torch.ones(1, 6)
    target[0, 2] = 57  # an end token is an ordinary id of the range
    text = torch.zeros(1, 6, dtype=torch.long)
    positions = positions_by_range(target, every.bool(), text, every, every, vocabulary, bucket=1)
    logits = (hidden @ unembedding.T)[0].double()
    logits[:, 58] = -torch.inf
    expected = torch.nn.functional.cross_entropy(logits, target[0], reduction="sum")
    for max_logits in (10**9, 6, 60):  # chunks of 1 and 10 ids
        assert_close(loss_from_hidden(hidden, unembedding, positions, vocabulary, max_logits).loss.double(), expected)


def test_no_text_holds_the_mask_or_the_end_of_an_open_model(tmp_path):
    """Neither what config.json calls so and the tokenizer does not, nor after the model was saved on in either format."""
    write(tmp_path / "open", LLADA)
    file = tmp_path / "open" / "tokenizer.json"
    words = Tokenizer.from_file(str(file))
    words.add_tokens([AddedToken("<|end|>", special=True), AddedToken("<|mdm_mask|>", special=False)])
    words.save(str(file))
    (tmp_path / "open" / "chat_template.jinja").write_text("{{ messages[0].content }}<|end|>")
    model, processor = load_open(tmp_path / "open")
    save_open(tmp_path / "again", model, processor, FORMATS["llada"])
    processor.save(tmp_path / "ours")
    for own in (processor, load_open(tmp_path / "again")[1], Processor.load(tmp_path / "ours")):
        literal = "w1 <|mdm_mask|> <|end|> w2"
        vocabulary, ids = own.vocabulary, own.text_document({"text": literal})
        assert ids.tolist() == [1, 0, 0, 2, vocabulary.end_id]  # of these words the tokenizer knows none: w0 is unknown
        response = own.response({"prompt": fill("{} <|end|>", literal), "text": literal})
        assert response.tokens[response.prompt].tolist() == [1, 0, 0, 2, 57]
        assert response.tokens[response.maskable].tolist() == [1, 0, 0, 2, 57]
        chat = own.tokenizers["text"].chat([{"role": "user", "content": "w5 <|end|> w6"}])
        assert own.encode("text", chat).tolist() == [5, 0, 6, 57]
        assert infill(own, "w1 <|mdm_mask|> [mask:2]").tokens.tolist() == [1, 0, 58, 58]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_type": "sequential"}, "block_type is 'sequential'; of LLaDAModelLM only 'llama' is supported"),
        ({"weight_tying": True}, "weight_tying is True; of LLaDAModelLM only False"),
        ({"architectures": ["GPT2LMHeadModel"]}, "is not one of LLaDAModelLM, DreamModel, LLaDAMoEModelLM"),
    ],
)
def test_what_is_not_supported_is_named(change, message):
    with pytest.raises(UserError, match=message):
        build_on_meta({**LLADA, **change})


PUBLISHED = {
    "GSAI-ML/LLaDA-8B": {
        "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
        "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig"}, "bias_for_layer_norm": False, "block_group_size": 1,
        "block_type": "llama", "d_model": 4096, "embedding_dropout": 0.0, "embedding_size": 126464, "eos_token_id": 126081,
        "flash_attention": False, "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None,
        "init_device": "meta", "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
        "layer_norm_with_affine": True, "mask_token_id": 126336, "max_sequence_length": 4096, "mlp_hidden_size": 12288,
        "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32,
        "pad_token_id": 126081, "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05, "rope": True,
        "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False, "transformers_version": "4.46.3",
        "use_cache": False, "vocab_size": 126464, "weight_tying": False,
    },
    "Dream-org/Dream-v0-7B": {
        "architectures": ["DreamModel"], "attention_dropout": 0.0, "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
        "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
        "intermediate_size": 18944, "mask_token_id": 151666, "max_position_embeddings": 131072, "max_window_layers": 28,
        "model_type": "Dream", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "pad_token_id": 151643, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.46.2", "use_cache": True,
        "use_mrope": False, "use_sliding_window": False, "vocab_size": 152064,
    },
    "inclusionAI/LLaDA-MoE-7B-A1B": {
        "architectures": ["LLaDAMoEModelLM"], "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_lladamoe.LLaDAConfig"}, "clip_qkv": None, "dense_intermediate_size": 8192,
        "eos_token_id": 156892, "expert_intermediate_size": 1024, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "max_position_embeddings": 8192, "model_type": "llada", "moe_layer_freq": [1] * 16,
        "moe_router_enable_expert_bias": False, "moe_router_score_function": "softmax", "norm_topk_prob": None,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 156892, "partial_rotary_factor": 1,
        "qk_layernorm": True, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 50000, "routed_scaling_factor": 1.0,
        "router_aux_loss_coef": 0.01, "router_num_group": None, "router_topk_group": None,
        "shared_expert_intermediate_size": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.53.2", "use_cache": False, "vocab_size": 157184,
    },
    "inclusionAI/LLaDA2.0-mini": {
        "architectures": ["LLaDA2MoeModelLM"], "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig"}, "embedding_dropout": 0.0,
        "first_k_dense_replace": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 5120, "max_position_embeddings": 16384, "max_window_layers": 28, "model_type": "llada2_moe",
        "moe_intermediate_size": 512, "moe_router_enable_expert_bias": True, "n_group": 8, "norm_head": False,
        "norm_softmax": False, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 256,
        "num_experts_per_tok": 8, "num_hidden_layers": 20, "num_key_value_heads": 4, "num_shared_experts": 1,
        "output_dropout": 0.0, "output_router_logits": False, "pad_token_id": 156892, "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 600000, "rotary_dim": 64, "routed_scaling_factor": 2.5,
        "router_dtype": "fp32", "score_function": "sigmoid", "tie_word_embeddings": False, "topk_group": 4,
        "torch_dtype": "bfloat16", "transformers_version": "4.52.3", "use_bias": False, "use_cache": False,
        "use_qkv_bias": False, "use_rmsnorm": True, "use_sliding_window": False, "using_split_qkv_in_self_attention": False,
        "vocab_size": 157184,
    },
    "JetLM/SDAR-4B-Chat": {
        "architectures": ["SDARForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_implementation": "flex_attention", "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig"},
        "block_size": 4, "bos_token_id": 151643, "debug": False, "eos_token_id": 151643, "ep_size": 1,
        "fuse_cross_entropy": True, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02,
        "intermediate_size": 9728, "mask_token_id": 151669, "max_position_embeddings": 32768, "max_window_layers": 36,
        "micro_forward": False, "model_type": "sdar", "num_attention_heads": 32, "num_hidden_layers": 36,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "skip_checkpoint": False, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.52.4", "use_cache": False, "use_deepep": False, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen/Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "HuggingFaceTB/SmolLM2-135M": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
        "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "model_type": "llama",
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
        "vocab_size": 49152,
    },
}  # fmt: skip
"""The keys of the configs that these models are published with."""


def read(theirs):
    """Our config of theirs."""
    return find_format(theirs).config(theirs, "it")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_of_a_published_config_is_known(name):
    config = read(PUBLISHED[name])
    assert config.rope_base == PUBLISHED[name]["rope_theta"]
    assert config.vocab_size == PUBLISHED[name]["vocab_size"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_means_the_same_as_transformers_5_writes_it(name):
    """Its generic keys, the base of the rotations inside `rope_parameters`, a type for each layer."""
    theirs = PUBLISHED[name]
    config = read(theirs)
    theta = theirs["rope_theta"]
    generic = {
        "dtype": "bfloat16", "output_hidden_states": False, "return_dict": True, "chunk_size_feed_forward": 0,
        "is_encoder_decoder": False, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": None,
        "_name_or_path": "", "output_attentions": False, "layer_types": ["full_attention"] * config.num_layers,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"}, "head_dim": config.head_size,
    }  # fmt: skip
    without = {k: v for k, v in theirs.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert replace(read({**without, **generic}), head_dim=config.head_dim) == config
    assert read({**theirs, "rope_scaling": {"rope_type": "default"}}) == config
    assert read({**theirs, "rope_scaling": {"type": "default", "rope_theta": theta}}) == config


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_theta": 1e6, "rope_type": "llama3"}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.25}),
        ("rope_parameters", {"rope_theta": 123.0, "rope_type": "default"}),
        ("rope_parameters", [1]),
        ("partial_rotary_factor", 0.5),
        ("sliding_window_pattern", 6),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", ["full_attention"]),
        ("quantization_config", {"quant_method": "fp8"}),
        ("attention_multiplier", 0.5),
        ("logits_scaling", 8.0),
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("head_dim", 16),
        ("mlp_bias", True),
        ("tie_word_embeddings", True),
        ("use_rmsnorm", False),
    ],
)
def test_a_key_that_would_change_what_is_computed_is_refused_by_its_name(kind, key, value):
    read(CONFIGS[kind])
    if key in FORMATS[kind].keys.values():  # of which some families have several values: they are read
        ours = next(ours for ours, theirs in FORMATS[kind].keys.items() if theirs == key)
        assert getattr(read({**CONFIGS[kind], key: value}), ours) == value
        return
    with pytest.raises(UserError, match=f"{key}[ .]") as caught:
        read({**CONFIGS[kind], key: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_key_that_is_read_is_ever_replaced_by_a_default(kind):
    """Left out, null, text, true, a fraction, nothing, endless: refused by the key's name, or what null means there."""
    form = FORMATS[kind]
    for ours, name in form.keys.items():
        for value in ("64", True, [4], -1, 0, 1e999, None, {}, 10**400):
            changed = {**CONFIGS[kind], name: value}
            if value is None and name in form.instead:
                assert getattr(read(changed), ours) == CONFIGS[kind][form.instead[name]]
            elif value is None and name in form.absent:
                assert getattr(read(changed), ours) == form.absent[name]
            elif value is not None and ModelConfig.complaint(ours, value) is None:  # it may be so: no layer of a kind, a tie
                assert getattr(read(changed), ours) == value
            else:
                with pytest.raises(UserError, match=name):
                    read(changed)
        without = {k: v for k, v in CONFIGS[kind].items() if k != name}
        if name in form.absent:
            assert getattr(read(without), ours) == form.absent[name]
        else:
            with pytest.raises(UserError, match=name):
                read(without)
    for name in form.stated:  # their own default is another value
        with pytest.raises(UserError, match=f"config.json has no {name}, which then is not {form.requires[name]!r}"):
            read({k: v for k, v in CONFIGS[kind].items() if k != name})
    for name, value in form.requires.items():
        for other in (not value, "other", 7, [value, value, value]):
            if (other, value) != (False, None):
                with pytest.raises(UserError, match=f"{name} is"):
                    read({**CONFIGS[kind], name: other})


def test_an_unpadded_embedding_has_the_vocabularys_size(tmp_path):
    write(tmp_path, {**LLADA, "embedding_size": VOCAB})
    raw = {**LLADA, "embedding_size": None, "n_kv_heads": KV}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert load_model(tmp_path)[0].config.vocab_size == VOCAB


@pytest.mark.parametrize(
    ("ids", "end", "pad"),
    [
        ({"eos_token_id": [56, 57], "pad_token_id": 57}, 57, 57),  # the one that fills
        ({"eos_token_id": [57, 56], "pad_token_id": 55}, 57, 55),  # else the first
        ({"eos_token_id": [56, 57], "pad_token_id": None}, 56, 56),
        ({"eos_token_id": [], "pad_token_id": 55}, 55, 55),
        ({"eos_token_id": 56, "pad_token_id": 57}, 56, 57),
    ],
)
def test_of_several_end_tokens_ours_is_the_one_that_fills(ids, end, pad, tmp_path):
    write(tmp_path, {**LLADA, **ids})
    vocabulary = load_model(tmp_path)[1].vocabulary
    assert (vocabulary.end_id, vocabulary.pad_id) == (end, pad)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token's id, got '</s>'"),
        ({"eos_token_id": [57, None, 1.5]}, "eos_token_id must be a token's id, got 1.5"),
        ({"mask_token_id": True}, "mask_token_id must be a token's id, got True"),
        ({"mask_token_id": [58]}, "mask_token_id must be a token's id"),
        ({"mask_token_id": 57}, "mask_token_id is 57, and so is eos_token_id"),
        ({"pad_token_id": -1}, "the pad token -1 is not one of the 61 ids"),
        ({"eos_token_id": 10**30}, "is not one of the 61 ids"),
    ],
)
def test_an_id_that_is_none_is_named(ids, message, tmp_path):
    write(tmp_path, {**LLADA, **ids})
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        load_model(tmp_path)


def test_a_config_of_another_family_is_named(tmp_path):
    for change, message in (
        ({"architectures": "LLaDAModelLM"}, "architectures 'LLaDAModelLM' is not one of"),
        ({"architectures": ["DreamModel", "LLaDAModelLM"]}, "is not one of"),
        ({"architectures": None, "model_type": "gpt2"}, "model_type 'gpt2' is not one of"),
    ):
        write(tmp_path, LLADA)
        (tmp_path / "config.json").write_text(json.dumps({**LLADA, **change}))
        with pytest.raises(UserError, match=message):
            load_model(tmp_path)


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    state = write(tmp_path, LLADA)
    gone = "model.transformer.blocks.1.ff_norm.weight"
    safetensors.torch.save_file({k: v for k, v in state.items() if k != gone}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"lacks tensors: {gone}"):
        load_model(tmp_path)
    safetensors.torch.save_file({**state, "model.transformer.wpe.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"has extra tensors: model\.transformer\.wpe\.weight"):
        load_model(tmp_path)
    safetensors.torch.save_file({**state, gone: torch.zeros(7)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"ff_norm\.weight is of shape \(7,\), and config\.json says \(32,\)"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="is the download complete"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        load_model(tmp_path)


def test_a_mask_token_that_nobody_names_is_an_error(tmp_path):
    write(tmp_path, {k: v for k, v in LLADA.items() if k != "mask_token_id"})
    with pytest.raises(UserError, match=r"config\.json has no mask_token_id, and tokenizer.json none of"):
        load_model(tmp_path)


def test_a_model_of_another_kind_cannot_be_written_in_a_format(tmp_path):
    write(tmp_path, DREAM)
    model, processor = load_model(tmp_path)
    with pytest.raises(UserError, match="predicts_next = True cannot be written as LLaDAModelLM"):
        save_open(tmp_path / "out", model, processor, FORMATS["llada"])


def test_every_tensor_goes_over_exactly_once():
    for kind, config in CONFIGS.items():
        model = build_on_meta(config)
        ours = [name for e in entries(FORMATS[kind], model.config) for name in e.ours]
        assert len(ours) == len(set(ours))
        assert set(ours) | {UNEMBEDDING} == set(model.state_dict())
        assert (UNEMBEDDING in ours) is not model.config.tied_embeddings
        theirs = to_open(FORMATS[kind], model.config, model.state_dict())
        assert sum(value.numel() for value in theirs.values()) == model.num_parameters() + sum(
            value.numel() for value in model.buffers() if value.ndim == 1 and len(value) == model.config.num_experts
        )


def test_a_text_is_continued_from_the_command_line(tmp_path, capsys):
    from mdm.recipe import load_recipe

    write(tmp_path / "open", LLADA)
    recipe = load_recipe("generate")
    cfg = recipe.Settings(
        checkpoint=str(tmp_path / "open"), task="text", output_dir=str(tmp_path / "out"), prompt="w1 w2", length=5, count=2
    )
    recipe.validate(cfg)
    recipe.main(cfg)
    lines = [json.loads(line) for line in (tmp_path / "out" / "outputs.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(line["text"].startswith("w1 w2") for line in lines)


def test_a_name_on_the_hub_without_a_network_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match="checkpoint=hub:nobody/nothing: cannot be fetched from the hub"):
        load_model("hub:nobody/nothing")


@pytest.mark.parametrize("kind", CONFIGS)
def test_documents_that_share_a_row_are_predicted_as_if_alone(kind, tmp_path):
    """A model that predicts the next position must not carry it from one document into the next."""
    write(tmp_path, CONFIGS[kind])
    model, _ = load_model(tmp_path)
    first, second = (torch.randint(0, VOCAB, (1, n), generator=torch.Generator().manual_seed(n)) for n in (5, 7))
    document = torch.tensor([[0] * 5 + [1] * 7])
    position = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = model(torch.cat([first, second], dim=1), document, position)
    assert_close(packed, torch.cat([model(first), model(second)], dim=1), rtol=0, atol=1e-5)
