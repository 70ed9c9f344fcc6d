"""What open models call our settings and our tensors.

Masked: LLaDA (2502.09992), Dream (2508.15487), LLaDA-MoE. In blocks: LLaDA2 (2512.15745, 2602.08676), SDAR (2510.06303).
Autoregressive, as a start for adaptation: Qwen3 (2505.09388), Llama (2307.09288).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from components.files import short
from mdm.config import UserError
from mdm.models.format import Format

_ATTENTION = {
    "attn.q_proj.weight": "q_proj.weight",
    "attn.k_proj.weight": "k_proj.weight",
    "attn.v_proj.weight": "v_proj.weight",
}


_LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_length": "max_position_embeddings",
    "rope_base": "rope_theta",
    "norm_eps": "rms_norm_eps",
}


_QWEN3_KEYS = {
    **_LLAMA_KEYS,
    "ffn_width": "intermediate_size",
    "head_dim": "head_dim",
    "tied_embeddings": "tie_word_embeddings",
}


_LLAMA_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "unembedding.weight": "lm_head.weight",
    "blocks.{i}.sa_norm.scale": "model.layers.{i}.input_layernorm.weight",
    "blocks.{i}.mlp_norm.scale": "model.layers.{i}.post_attention_layernorm.weight",
    "blocks.{i}.attn.output_proj.weight": "model.layers.{i}.self_attn.o_proj.weight",
    **{f"blocks.{{i}}.{ours}": f"model.layers.{{i}}.self_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
}


_SWIGLU = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_FFN_NAMES = {f"blocks.{{i}}.mlp.{ours}.weight": f"model.layers.{{i}}.mlp.{theirs}.weight" for ours, theirs in _SWIGLU.items()}
_EXPERT_NAMES = {
    "blocks.{i}.mlp.router.weight": "model.layers.{i}.mlp.gate.weight",
    **{f"blocks.{{i}}.mlp.{p}": f"model.layers.{{i}}.mlp.experts.{{e}}.{p}_proj.weight" for p in ("gate", "up", "down")},
}
_QWEN3_NAMES = {
    **_LLAMA_NAMES,
    **_FFN_NAMES,
    **{f"blocks.{{i}}.attn.{p}_proj.norm.scale": f"model.layers.{{i}}.self_attn.{p}_norm.weight" for p in "qk"},
}


FORMATS = {
    "llada": Format(
        architecture="LLaDAModelLM",
        model_type="llada",
        keys={
            "vocab_size": "embedding_size",
            "width": "d_model",
            "num_layers": "n_layers",
            "num_heads": "n_heads",
            "num_kv_heads": "n_kv_heads",
            "ffn_width": "mlp_hidden_size",
            "max_length": "max_sequence_length",
            "rope_base": "rope_theta",
            "norm_eps": "rms_norm_eps",
        },
        requires={
            "block_type": "llama",
            "activation_type": "silu",
            "layer_norm_type": "rms",
            "layer_norm_with_affine": True,
            "rope": True,
            "alibi": False,
            "include_bias": False,
            "include_qkv_bias": False,
            "attention_layer_norm": False,
            "input_emb_norm": False,
            "scale_logits": False,
            "weight_tying": False,
            "block_group_size": 1,
            "bias_for_layer_norm": False,
            "multi_query_attention": None,
            "rope_full_precision": True,
        },
        stated=("block_type", "activation_type", "layer_norm_type", "rope", "include_bias", "weight_tying"),
        instead={"embedding_size": "vocab_size", "n_kv_heads": "n_heads"},
        ignores="alibi_bias_max attention_layer_norm_with_affine mlp_ratio residual_dropout embedding_dropout flash_attention "
        "init_cutoff_factor init_device init_fn init_std precision",
        fixed={"qk_norm": False},
        names={
            "embedding.weight": "model.transformer.wte.weight",
            "norm.scale": "model.transformer.ln_f.weight",
            "unembedding.weight": "model.transformer.ff_out.weight",
            "blocks.{i}.sa_norm.scale": "model.transformer.blocks.{i}.attn_norm.weight",
            "blocks.{i}.mlp_norm.scale": "model.transformer.blocks.{i}.ff_norm.weight",
            "blocks.{i}.attn.output_proj.weight": "model.transformer.blocks.{i}.attn_out.weight",
            "blocks.{i}.mlp.w1.weight": "model.transformer.blocks.{i}.ff_proj.weight",
            "blocks.{i}.mlp.w2.weight": "model.transformer.blocks.{i}.ff_out.weight",
            "blocks.{i}.mlp.w3.weight": "model.transformer.blocks.{i}.up_proj.weight",
            **{f"blocks.{{i}}.{ours}": f"model.transformer.blocks.{{i}}.{theirs}" for ours, theirs in _ATTENTION.items()},
        },
    ),
    "dream": Format(
        architecture="DreamModel",
        model_type="Dream",
        keys={**_LLAMA_KEYS, "ffn_width": "intermediate_size"},
        requires={"hidden_act": "silu", "tie_word_embeddings": False, "use_sliding_window": False},
        instead={"num_key_value_heads": "num_attention_heads"},
        ignores="sliding_window max_window_layers",  # which layers a window would be for, were there one
        fixed={"qk_norm": False, "qkv_bias": True, "predicts_next": True},
        names={
            **_LLAMA_NAMES,
            **{f"blocks.{{i}}.attn.{p}_proj.bias": f"model.layers.{{i}}.self_attn.{p}_proj.bias" for p in "qkv"},
            **_FFN_NAMES,
        },
    ),
    "llada_moe": Format(
        architecture="LLaDAMoEModelLM",
        model_type="lladamoe",
        keys={
            **_LLAMA_KEYS,
            "ffn_width": "expert_intermediate_size",
            "num_experts": "num_experts",
            "experts_per_token": "num_experts_per_tok",
        },
        requires={
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "attention_bias": False,
            "clip_qkv": None,
            "qk_layernorm": True,
            "partial_rotary_factor": 1,
            "shared_expert_intermediate_size": None,
            "moe_layer_freq": 1,
            "moe_router_enable_expert_bias": False,
            "moe_router_score_function": "softmax",
            "norm_topk_prob": False,
            "router_num_group": None,
            "router_topk_group": None,
            "routed_scaling_factor": 1,
        },
        stated=("qk_layernorm",),
        instead={"num_key_value_heads": "num_attention_heads"},
        ignores="dense_intermediate_size intermediate_size output_router_logits router_aux_loss_coef",
        fixed={"qk_norm": True, "norm_before_rope": True},
        names={
            **_LLAMA_NAMES,
            **{f"blocks.{{i}}.attn.{p}_proj.norm.scale": f"model.layers.{{i}}.self_attn.{p}_norm.weight" for p in "qk"},
            **_EXPERT_NAMES,
        },
    ),
    "llada2": Format(
        architecture="LLaDA2MoeModelLM",
        model_type="llada2_moe",
        keys={
            **_LLAMA_KEYS,
            "ffn_width": "moe_intermediate_size",
            "dense_ffn_width": "intermediate_size",
            "first_dense_layers": "first_k_dense_replace",
            "num_experts": "num_experts",
            "experts_per_token": "num_experts_per_tok",
            "num_shared_experts": "num_shared_experts",
            "expert_groups": "n_group",
            "groups_per_token": "topk_group",
            "routing_scale": "routed_scaling_factor",
            "head_dim": "head_dim",
            "rotary_share": "partial_rotary_factor",
            "tied_embeddings": "tie_word_embeddings",
        },
        requires={
            "hidden_act": "silu",
            "use_bias": False,
            "use_qkv_bias": False,
            "use_qk_norm": True,
            "use_rmsnorm": True,
            "using_split_qkv_in_self_attention": False,
            "norm_head": False,
            "norm_softmax": False,
            "norm_topk_prob": True,
            "score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "router_dtype": "fp32",
        },
        stated=("use_bias",),
        instead={},
        absent={"head_dim": None, "num_shared_experts": 0, "tie_word_embeddings": False},
        ignores="embedding_dropout output_dropout output_router_logits sliding_window max_window_layers "
        "rotary_dim",  # which partial_rotary_factor says too
        fixed={"qk_norm": True, "norm_before_rope": True, "router": "sigmoid"},
        blocks=("block_size", 32),
        names={
            "embedding.weight": "model.word_embeddings.weight",
            **{ours: theirs for ours, theirs in _LLAMA_NAMES.items() if ".attn." not in ours and ours != "embedding.weight"},
            " + ".join(
                f"blocks.{{i}}.attn.{p}_proj.weight" for p in "qkv"
            ): "model.layers.{i}.attention.query_key_value.weight",
            "blocks.{i}.attn.output_proj.weight": "model.layers.{i}.attention.dense.weight",
            "blocks.{i}.attn.q_proj.norm.scale": "model.layers.{i}.attention.query_layernorm.weight",
            "blocks.{i}.attn.k_proj.norm.scale": "model.layers.{i}.attention.key_layernorm.weight",
            **_FFN_NAMES,
            **_EXPERT_NAMES,
            "blocks.{i}.mlp.expert_bias": "model.layers.{i}.mlp.gate.expert_bias",
            **{
                f"blocks.{{i}}.mlp.shared.{ours}.weight": f"model.layers.{{i}}.mlp.shared_experts.{theirs}.weight"
                for ours, theirs in _SWIGLU.items()
            },
        },
    ),
    "sdar": Format(
        architecture="SDARForCausalLM",
        model_type="sdar",
        keys=_QWEN3_KEYS,
        requires={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
        instead={"num_key_value_heads": "num_attention_heads"},
        absent={"tie_word_embeddings": False},
        # how it is trained, and on how many cards
        ignores="sliding_window max_window_layers debug ep_size fuse_cross_entropy micro_forward skip_checkpoint use_deepep",
        fixed={"qk_norm": True, "norm_before_rope": True},
        blocks=("block_size", 4),
        names=_QWEN3_NAMES,
    ),
    "qwen3": Format(
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        keys=_QWEN3_KEYS,
        requires={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
        instead={"num_key_value_heads": "num_attention_heads"},
        absent={"tie_word_embeddings": False},
        ignores="sliding_window max_window_layers",
        fixed={"qk_norm": True, "norm_before_rope": True, "causal": True, "predicts_next": True},
        names=_QWEN3_NAMES,
    ),
    "llama": Format(
        architecture="LlamaForCausalLM",
        model_type="llama",
        keys=_QWEN3_KEYS,
        requires={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_interleaved": False},
        instead={"num_key_value_heads": "num_attention_heads"},
        absent={"rope_theta": 10_000.0, "head_dim": None, "tie_word_embeddings": False},
        ignores="is_llama_config pretraining_tp",  # the latter: the same products, in parts
        fixed={"qk_norm": False, "causal": True, "predicts_next": True},
        names={**_LLAMA_NAMES, **_FFN_NAMES},
    ),
}


def is_open(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of an open model (of any family): ours names no architecture."""
    return bool({"architectures", "model_type"} & set(config))


def find_format(config: Mapping[str, Any], where: str = "config.json") -> Format:
    """The format of an open model's config.json. Raises UserError where it is of none that is known here."""
    architectures = config.get("architectures")
    if architectures is None:
        found = [form for form in FORMATS.values() if config.get("model_type") == form.model_type]
    else:
        named = architectures if isinstance(architectures, list) else []
        found = [form for form in FORMATS.values() if named == [form.architecture]]
    if not found:
        known = ", ".join(f.architecture for f in FORMATS.values())
        named = (
            f"model_type {short(config.get('model_type'))}"
            if architectures is None
            else f"architectures {short(architectures)}"
        )
        raise UserError(f"{where}: {named} is not one of {known}")
    return found[0]
