"""Open masked diffusion models in our model, and back: LLaDA (2502.09992), Dream (2508.15487), LLaDA-MoE.

    model, processor = load_open("path/to/LLaDA-8B-Instruct")          or "hub:GSAI-ML/LLaDA-8B-Instruct"
    save_open("mine", model, processor, FORMATS["llada"])

A format is a table: which key of their config is which of ours, what else must hold, and their names of our tensors. Two things
differ in substance. They rotate the halves of a head (channels i and i + d/2), torchtune rotates neighbours (2i and 2i + 1):
the rows of the query and key projections, their biases and their norms' gains are permuted. And Dream's hidden states predict
the next position: `ModelConfig.predicts_next` moves them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from components.tokenizers.text import JsonTokenizer
from components.vocabulary import Vocabulary
from mdm.config import UserError
from mdm.model import MaskedDiffusionModel, ModelConfig
from mdm.processor import Processor
from mdm.weights import listed, one_line, one_precision, read_json, read_weights, short

HUB = "hub:"
MASK_NAMES = ("<|mdm_mask|>", "<|mask|>", "[MASK]")


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
        for key in sorted(set(own) - set(self.keys)):
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


@dataclass(frozen=True)
class Entry:
    """One of our tensors: their names of it, whether it stacks those (of experts), the head size if its rows are rotated."""

    ours: str
    theirs: tuple[str, ...]
    stacked: bool
    head_dim: int | None


def entries(form: Format, config: ModelConfig) -> Iterator[Entry]:
    """Every tensor of a model of that shape."""
    for ours, theirs in form.names.items():
        rotated = ".q_proj." in ours or ".k_proj." in ours
        for i in range(config.num_layers if "{i}" in ours else 1):
            stacked = "{e}" in theirs
            names = tuple(theirs.format(i=i, e=e) for e in range(config.num_experts if stacked else 1))
            yield Entry(ours.format(i=i), names, stacked, config.width // config.num_heads if rotated else None)


def from_open(form: Format, config: ModelConfig, state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Our state dict of theirs. Raises UserError, naming them, for tensors that are missing, extra, or of another shape."""
    if config.num_layers * (config.num_experts or 1) > len(state):  # before as many are listed
        raise UserError(f"{where} has {len(state)} tensors; config.json describes a {form.architecture} of more")
    wanted = list(entries(form, config))
    names = {name for entry in wanted for name in entry.theirs}
    for what, some in (("lacks", names - set(state)), ("has extra", set(state) - names)):
        if some:
            raise UserError(f"{where} {what} tensors: {listed(some)}; config.json describes a {form.architecture} without that")
    try:
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in MaskedDiffusionModel(config).named_parameters()}
    except RuntimeError as error:  # a tensor of more numbers than can be counted
        raise UserError(f"{where}: config.json describes a {form.architecture} larger than any") from error
    ours = {}
    for entry in wanted:
        parts = [state[name] for name in entry.theirs]
        expected = shapes[entry.ours][1:] if entry.stacked else shapes[entry.ours]
        for name, part in zip(entry.theirs, parts, strict=True):
            if part.shape != expected:
                raise UserError(f"{where}: {name} is of shape {tuple(part.shape)}, and config.json says {tuple(expected)}")
        value = torch.stack(parts) if entry.stacked else parts[0]
        ours[entry.ours] = value if entry.head_dim is None else interleaved(value, entry.head_dim)
    return ours


def to_open(form: Format, config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict of ours: the inverse of `from_open`."""
    theirs = {}
    for entry in entries(form, config):
        value = state[entry.ours]
        value = value if entry.head_dim is None else halves(value, entry.head_dim)
        parts = [p.clone() for p in value] if entry.stacked else [value]  # a storage for each, to be saved
        theirs |= {name: part.contiguous() for name, part in zip(entry.theirs, parts, strict=True)}
    return theirs


def interleaved(rows: Float[Tensor, "rows ..."], head_dim: int) -> Float[Tensor, "rows ..."]:
    """Rows of heads whose halves are rotated together (i, i + d/2), so that neighbours are (2i, 2i + 1)."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def halves(rows: Float[Tensor, "rows ..."], head_dim: int) -> Float[Tensor, "rows ..."]:
    """The inverse of `interleaved`."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


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


def open_folder(checkpoint: str | Path) -> Path:
    """The folder of a checkpoint; `hub:OWNER/NAME` is fetched from the Hugging Face hub first. Raises UserError."""
    if not str(checkpoint).startswith(HUB):
        return Path(checkpoint)
    from huggingface_hub import snapshot_download

    name = str(checkpoint).removeprefix(HUB)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.tiktoken", "*.yaml", "*.jinja"]))
    except Exception as error:  # offline, unknown, gated: the hub has an exception for each
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"checkpoint={checkpoint}: cannot be fetched from the hub ({reason}); or give a folder") from error


def build_on_meta(theirs: Mapping[str, Any], where: str = "config.json") -> MaskedDiffusionModel:
    """The model of their config without weights: to count parameters, or to be filled. Raises UserError."""
    config = find_format(theirs, where).config(theirs, where)
    with torch.device("meta"):
        return MaskedDiffusionModel(config)


def load_open(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[MaskedDiffusionModel, Processor]:
    """Model and processor from a folder in an open model's format. dtype: None is the checkpoint's own.

    Raises UserError where files are absent or do not fit each other.
    """
    folder = open_folder(folder)
    theirs = read_json(folder / "config.json")
    form = find_format(theirs, str(folder))
    config = form.config(theirs, str(folder))
    weights = one_precision(from_open(form, config, read_weights(folder)[0], str(folder)), str(folder))
    with torch.device("meta"):
        model = MaskedDiffusionModel(config)
    model.load_state_dict({k: v if dtype is None else v.to(dtype) for k, v in weights.items()}, assign=True)
    model.restore_buffers()
    return model.to(device).eval(), open_processor(folder)


def open_processor(folder: Path) -> Processor:
    """The tokenizer and the ids of an open model's folder, without its weights. Raises UserError as `load_open` does."""
    theirs = read_json(folder / "config.json")
    config = find_format(theirs, str(folder)).config(theirs, str(folder))
    with one_line(f"checkpoint {folder}"):
        tokenizer = JsonTokenizer(str(folder / "tokenizer.json"), config.vocab_size)
        vocabulary = _vocabulary(theirs, tokenizer, str(folder))
        tokenizer.reserve(vocabulary.special_ids)
    return Processor(vocabulary, {"text": tokenizer}, {})


def _vocabulary(theirs: Mapping[str, Any], tokenizer: JsonTokenizer, where: str) -> Vocabulary:
    """The ids that config.json names; a mask token that it does not name is looked for in the tokenizer.

    Of several end tokens ours is the one that also fills (`pad_token_id`), as it does in these models' training; else the
    first, which transformers fills with.
    """
    ends = theirs.get("eos_token_id")
    ends = [_id(one, "eos_token_id", where) for one in ends] if isinstance(ends, list) else [_id(ends, "eos_token_id", where)]
    mask, pad = (_id(theirs.get(key), key, where) for key in ("mask_token_id", "pad_token_id"))
    if mask is None:
        mask = next((i for i in map(tokenizer.id_of, MASK_NAMES) if i is not None), None)
    if mask is None:
        raise UserError(f"{where}: config.json has no mask_token_id, and tokenizer.json none of {', '.join(MASK_NAMES)}")
    known = [one for one in ends if one is not None]
    end = pad if pad in known or not known else known[0]
    if end is None:
        raise UserError(f"{where}: config.json has neither eos_token_id nor pad_token_id")
    pad = end if pad is None else pad
    if mask in (end, pad):
        raise UserError(f"{where}: mask_token_id is {mask}, and so is {'eos' if mask == end else 'pad'}_token_id")
    try:
        return Vocabulary.of_text(tokenizer.size, mask, pad, end)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _id(value: Any, key: str, where: str) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise UserError(f"{where}: config.json's {key} must be a token's id, got {short(value)}")
    return value


def save_open(folder: str | Path, model: MaskedDiffusionModel, processor: Processor, form: Format) -> None:
    """Writes a text model in an open model's format: config.json, safetensors (in shards of 5 GB), tokenizer.json.

    Raises UserError where the model is none of that format.
    """
    from huggingface_hub import save_torch_state_dict

    folder = Path(folder)
    config = form.to_config(model.config, processor.vocabulary)
    if set(processor.tokenizers) != {"text"}:
        raise UserError(f"{form.architecture} is a text model; this one has {', '.join(processor.tokenizers)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    processor.tokenizers["text"].save(folder)
    save_torch_state_dict(to_open(form, model.config, model.state_dict()), folder)
