"""What open masked diffusion models call our settings and our tensors: LLaDA (2502.09992), Dream (2508.15487), LLaDA-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from components.files import short
from components.vocabulary import Vocabulary
from mdm.config import UserError
from mdm.models.transformer import ModelConfig

WITHOUT_SUBSTANCE = (
    "architectures model_type auto_map transformers_version torch_dtype dtype attn_implementation use_cache "
    "output_hidden_states output_attentions return_dict problem_type id2label label2id chunk_size_feed_forward "
    "initializer_range attention_dropout bos_token_id eos_token_id pad_token_id mask_token_id"
)
"""Keys that change nothing of what is computed here. Dropout acts in training alone; ours has none, whoever trained before."""


NEUTRAL = {
    "partial_rotary_factor": 1,
    "mlp_bias": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "layer_types": "full_attention",
    "is_encoder_decoder": False,
    "tie_word_embeddings": False,
}
"""Keys that a family need not have, with the one value that leaves the model as it is without them."""


ROPE = ("rope_theta", "rope_parameters", "rope_scaling")


PER_LAYER = ("layer_types", "moe_layer_freq")  # may be a list, of a value for each layer


@dataclass(frozen=True)
class Format:
    """How a family of models writes its config and its tensors. A key of theirs that is in none of these tables is refused.

    architecture, model_type: its names in config.json
    keys:     our config key -> theirs
    requires: their keys whose other values our model does not compute
    stated:   those of them that mean another value where they are absent
    instead:  a key of `keys` that may be null -> the key whose value it then has
    ignores:  further keys without substance (beside `WITHOUT_SUBSTANCE`), separated by spaces
    fixed:    what our config has for all of the family
    names:    our tensor names -> theirs; `{i}` is the layer, `{e}` the expert (ours has all of them in one tensor)
    """

    architecture: str
    model_type: str
    keys: Mapping[str, str]
    requires: Mapping[str, Any]
    names: Mapping[str, str]
    instead: Mapping[str, str]
    stated: tuple[str, ...] = ()
    ignores: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def config(self, theirs: Mapping[str, Any], where: str) -> ModelConfig:
        """Our config of theirs. Raises UserError, naming the key, for what is absent, not supported or not known."""
        ours = {key: self._value(theirs, key, where) for key in self.keys if key != "rope_base"}
        ours["rope_base"] = rope_base(theirs, where)
        try:
            config = ModelConfig(**{**ours, **self.fixed})
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        for key, value in {**NEUTRAL, **self.requires}.items():
            if key not in theirs and key in self.stated:
                raise UserError(
                    f"{where}: config.json has no {key}, which then is not {value!r}, as {self.architecture} needs it"
                )
            found = theirs.get(key, value)
            whole = isinstance(found, list) and key in PER_LAYER and len(found) == config.num_layers
            if not all(_same(one, value) for one in (found if whole else [found])):
                raise UserError(f"{where}: {key} is {short(found)}; of {self.architecture} only {value!r} is supported")
        head = theirs.get("head_dim")
        if head is not None and head != config.width // config.num_heads:
            raise UserError(f"{where}: head_dim is {short(head)}; only width / heads = {config.width // config.num_heads} is")
        known = {*self.keys.values(), *self.requires, *self.instead.values(), *NEUTRAL, *ROPE, "head_dim"}
        known |= {*self.ignores.split(), *WITHOUT_SUBSTANCE.split()}
        for key, value in theirs.items():
            if key not in known and not key.startswith("_") and value is not None:
                raise UserError(
                    f"{where}: config.json has {key} = {short(value)}, which is not known of a {self.architecture}; what it "
                    "changes would be left out"
                )
        return config

    def _value(self, theirs: Mapping[str, Any], key: str, where: str) -> Any:
        """The value of one of our keys, of the type that it has to be."""
        name = self.keys[key]
        if name not in theirs:
            raise UserError(f"{where}: config.json has no {name}; is it a {self.architecture}?")
        value = theirs[name]
        if value is None and name in self.instead:
            value = theirs.get(self.instead[name])
        complaint = (
            f"is null, and {self.architecture} has no value for that" if value is None else ModelConfig.complaint(key, value)
        )
        if complaint is not None:
            raise UserError(f"{where}: config.json's {name} {complaint}")
        return value

    def to_config(self, config: ModelConfig, vocabulary: Vocabulary) -> dict[str, Any]:
        """Their config of ours, with the special tokens. Raises UserError where ours computes something else."""
        own = asdict(config) | {"ffn_width": config.hidden_ffn, "num_kv_heads": config.num_kv_heads or config.num_heads}
        for key in sorted(set(own) - set(self.keys) - {"noise", "blocks"}):
            value = self.fixed.get(key, ModelConfig.__dataclass_fields__[key].default)
            if own[key] != value:
                raise UserError(
                    f"a model with {key} = {own[key]!r} cannot be written as {self.architecture}, whose is {value!r}"
                )
        theirs = {"architectures": [self.architecture], "model_type": self.model_type, **self.requires}
        theirs |= {name: own[key] for key, name in self.keys.items()}
        theirs |= {"vocab_size": config.vocab_size, "mask_token_id": vocabulary.mask_id}
        theirs |= {"pad_token_id": vocabulary.pad_id, "eos_token_id": vocabulary.end_id}
        if "moe_layer_freq" in theirs:
            theirs["moe_layer_freq"] = [theirs["moe_layer_freq"]] * config.num_layers
        return theirs


def _same(found: Any, value: Any) -> bool:
    """Whether a value of config.json is that one; null and false are the same, true and 1 are not."""
    if value is None or value is False:
        return found is None or found is False
    return found == value and isinstance(found, bool) == isinstance(value, bool)


def rope_base(theirs: Mapping[str, Any], where: str) -> float:
    """The base of the rotations: `rope_theta`, or where transformers 5 writes it. Raises UserError for a scaling beside it."""
    bases = {"rope_theta": theirs["rope_theta"]} if theirs.get("rope_theta") is not None else {}
    for key in ("rope_parameters", "rope_scaling"):
        table = theirs.get(key)
        if table is None:
            continue
        if not isinstance(table, dict):
            raise UserError(f"{where}: {key} is {short(table)}, and not a table of rotations")
        for name, value in table.items():
            plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}
            if name == "rope_theta" and value is not None:
                bases[f"{key}.rope_theta"] = value
            elif value is not None and not (name in plain and _same(value, plain[name])):
                raise UserError(f"{where}: {key}.{name} is {short(value)}; only rotations that are not scaled are supported")
    if not bases:
        raise UserError(f"{where}: config.json has no rope_theta, and no rope_parameters.rope_theta")
    for name, value in bases.items():
        complaint = ModelConfig.complaint("rope_base", value)
        if complaint is not None:
            raise UserError(f"{where}: config.json's {name} {complaint}")
    if len(set(bases.values())) > 1:
        raise UserError(f"{where}: config.json names two bases: {', '.join(f'{k} = {v!r}' for k, v in bases.items())}")
    return next(iter(bases.values()))


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


_LLAMA_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "unembedding.weight": "lm_head.weight",
    "blocks.{i}.sa_norm.scale": "model.layers.{i}.input_layernorm.weight",
    "blocks.{i}.mlp_norm.scale": "model.layers.{i}.post_attention_layernorm.weight",
    "blocks.{i}.attn.output_proj.weight": "model.layers.{i}.self_attn.o_proj.weight",
    **{f"blocks.{{i}}.{ours}": f"model.layers.{{i}}.self_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
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
            "blocks.{i}.mlp.w1.weight": "model.layers.{i}.mlp.gate_proj.weight",
            "blocks.{i}.mlp.w2.weight": "model.layers.{i}.mlp.down_proj.weight",
            "blocks.{i}.mlp.w3.weight": "model.layers.{i}.mlp.up_proj.weight",
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
            "blocks.{i}.mlp.router.weight": "model.layers.{i}.mlp.gate.weight",
            **{
                f"blocks.{{i}}.mlp.{p}": f"model.layers.{{i}}.mlp.experts.{{e}}.{p}_proj.weight" for p in ("gate", "up", "down")
            },
        },
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
