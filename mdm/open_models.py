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

import safetensors
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from components.tokenizers.text import JsonTokenizer
from components.vocabulary import Vocabulary
from mdm.config import UserError
from mdm.model import MaskedDiffusionModel, ModelConfig
from mdm.processor import Processor

HUB = "hub:"
MASK_NAMES = ("<|mdm_mask|>", "<|mask|>", "[MASK]")


@dataclass(frozen=True)
class Format:
    """How a family of models writes its config and its tensors.

    architecture, model_type: its names in config.json
    keys:     our config key -> theirs
    requires: their keys whose other values our model does not compute
    fixed:    what our config has for all of the family
    names:    our tensor names -> theirs; `{i}` is the layer, `{e}` the expert (ours has all of them in one tensor)
    """

    architecture: str
    model_type: str
    keys: Mapping[str, str]
    requires: Mapping[str, Any]
    names: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def config(self, theirs: Mapping[str, Any], where: str) -> ModelConfig:
        """Our config of theirs. Raises UserError, naming the key, for what is absent or not supported."""
        for key, value in self.requires.items():
            found = theirs.get(key, value)
            every = found if isinstance(found, list) else [found]
            if any(v != value and not (v is None and value is False) for v in every):
                raise UserError(f"{where}: {key} is {found!r}; of {self.architecture} only {value!r} is supported")
        ours = {}
        for key, name in self.keys.items():
            if name not in theirs:
                raise UserError(f"{where}: config.json has no {name}; is it a {self.architecture}?")
            ours[key] = theirs[name]
        return ModelConfig(**{**ours, **self.fixed})

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
        },
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
        requires={"hidden_act": "silu", "rope_scaling": None, "tie_word_embeddings": False, "use_sliding_window": False},
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
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "clip_qkv": None,
            "qk_layernorm": True,
            "partial_rotary_factor": 1,
            "shared_expert_intermediate_size": None,
            "moe_layer_freq": 1,
            "moe_router_enable_expert_bias": False,
            "routed_scaling_factor": 1,
        },
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
    wanted = list(entries(form, config))
    names = {name for entry in wanted for name in entry.theirs}
    for what, some in (("lacks", names - set(state)), ("has extra", set(state) - names)):
        if some:
            shown = ", ".join(sorted(some)[:20]) + (f" and {len(some) - 20} more" if len(some) > 20 else "")
            raise UserError(f"{where} {what} tensors: {shown}; config.json describes a {form.architecture} without that")
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in MaskedDiffusionModel(config).named_parameters()}
    ours = {}
    for entry in wanted:
        parts = [state[name] for name in entry.theirs]
        value = torch.stack(parts) if entry.stacked else parts[0]
        if value.shape != shapes[entry.ours]:
            raise UserError(
                f"{where}: {entry.theirs[0]} is of shape {tuple(parts[0].shape)}, and config.json says "
                f"{tuple(shapes[entry.ours][-parts[0].ndim :])}"
            )
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


def find_format(config: Mapping[str, Any]) -> Format | None:
    """The format of a config.json; None where it is not of an open model that is known here."""
    architectures = config.get("architectures") or []
    for form in FORMATS.values():
        if form.architecture in architectures:
            return form
    return next((f for f in FORMATS.values() if not architectures and config.get("model_type") == f.model_type), None)


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
    form = find_format(theirs)
    if form is None:
        known = ", ".join(f.architecture for f in FORMATS.values())
        raise UserError(f"{where}: architectures {theirs.get('architectures')} is not one of {known}")
    with torch.device("meta"):
        return MaskedDiffusionModel(form.config(theirs, where))


def load_open(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[MaskedDiffusionModel, Processor]:
    """Model and processor from a folder in an open model's format. dtype: None is the checkpoint's own.

    Raises UserError where files are absent or do not fit each other.
    """
    folder = open_folder(folder)
    theirs = json.loads((folder / "config.json").read_text())
    model = build_on_meta(theirs, str(folder))
    form, config = find_format(theirs), model.config
    weights = from_open(form, config, dict(_tensors(folder)), str(folder))
    model.load_state_dict({k: v if dtype is None else v.to(dtype) for k, v in weights.items()}, assign=True)
    model.restore_buffers()
    return model.to(device).eval(), open_processor(folder)


def open_processor(folder: Path) -> Processor:
    """The tokenizer and the ids of an open model's folder, without its weights. Raises UserError as `load_open` does."""
    theirs = json.loads((folder / "config.json").read_text())
    size = build_on_meta(theirs, str(folder)).config.vocab_size
    try:
        tokenizer = JsonTokenizer(str(folder / "tokenizer.json"), size)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"checkpoint {folder}: {error}") from error
    vocabulary = _vocabulary(theirs, tokenizer, str(folder))
    tokenizer.reserve(vocabulary.special_ids)
    return Processor(vocabulary, {"text": tokenizer}, {})


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder's safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"checkpoint {folder}: no .safetensors file there")
    for path in files:
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"checkpoint {path}: {error}; is the download complete?") from error


def _vocabulary(theirs: Mapping[str, Any], tokenizer: JsonTokenizer, where: str) -> Vocabulary:
    """The ids that config.json names; a mask token that it does not name is looked for in the tokenizer."""
    mask = theirs.get("mask_token_id")
    if mask is None:
        mask = next((i for i in map(tokenizer.id_of, MASK_NAMES) if i is not None), None)
    if mask is None:
        raise UserError(f"{where}: config.json has no mask_token_id, and tokenizer.json none of {', '.join(MASK_NAMES)}")
    end = theirs.get("eos_token_id")
    pad = theirs.get("pad_token_id")
    end, pad = (pad if end is None else end), (end if pad is None else pad)
    if end is None:
        raise UserError(f"{where}: config.json has neither eos_token_id nor pad_token_id")
    try:
        return Vocabulary.of_text(tokenizer.size, mask, pad, end)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


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
