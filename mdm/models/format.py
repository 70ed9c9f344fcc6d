"""How a family of open models writes its config and its tensors, as a table, and how its config becomes ours."""

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
PLAIN = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}  # of a table of rotations: not scaled


PER_LAYER = ("layer_types", "moe_layer_freq")  # may be a list, of a value for each layer


@dataclass(frozen=True)
class Format:
    """How a family of models writes its config and its tensors. A key of theirs that is in none of these tables is refused.

    architecture, model_type: its names in config.json
    keys:     our config key -> theirs
    requires: their keys whose other values our model does not compute
    stated:   those of them that mean another value where they are absent
    instead:  a key of `keys` that may be null -> the key whose value it then has
    absent:   a key of `keys` that may be null or left out -> what our config then has
    ignores:  further keys without substance (beside `WITHOUT_SUBSTANCE`), separated by spaces
    fixed:    what our config has for all of the family
    blocks:   of a family that generates in blocks: its key of their size, and the size where it is absent
    names:    our tensor names -> theirs; `{i}` is the layer, `{e}` the expert (ours has all of them in one tensor); several of
              ours with " + " between are the rows of one of theirs
    """

    architecture: str
    model_type: str
    keys: Mapping[str, str]
    requires: Mapping[str, Any]
    names: Mapping[str, str]
    instead: Mapping[str, str]
    stated: tuple[str, ...] = ()
    absent: Mapping[str, Any] = field(default_factory=dict)
    ignores: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    blocks: tuple[str, int] | None = None

    def config(self, theirs: Mapping[str, Any], where: str) -> ModelConfig:
        """Our config of theirs. Raises UserError, naming the key, for what is absent, not supported or not known."""
        merged = {**theirs, **self._rotations(theirs, where)}
        ours = {key: self._value(merged, key, where) for key in self.keys}
        if self.blocks is not None:
            ours |= {"blocks": {"text": self._block_size(theirs, *self.blocks, where)}, "blocks_from_start": True}
        try:
            config = ModelConfig(**{**ours, **self.fixed})
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        read = {*self.keys.values(), *(self.blocks or ())[:1]}
        for key, value in {**NEUTRAL, **self.requires}.items():
            if key in read:
                continue
            if key not in theirs and key in self.stated:
                raise UserError(
                    f"{where}: config.json has no {key}, which then is not {value!r}, as {self.architecture} needs it"
                )
            found = theirs.get(key, value)
            whole = isinstance(found, list) and key in PER_LAYER and len(found) == config.num_layers
            if not all(_same(one, value) for one in (found if whole else [found])):
                raise UserError(f"{where}: {key} is {short(found)}; of {self.architecture} only {value!r} is supported")
        head = theirs.get("head_dim")
        if "head_dim" not in read and head is not None and head != config.head_size:
            raise UserError(f"{where}: head_dim is {short(head)}; only width / heads = {config.head_size} is")
        known = {*read, *self.requires, *self.instead.values(), *NEUTRAL, *ROPE, "head_dim"}
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
        if name in self.absent and theirs.get(name) is None:
            return self.absent[name]
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

    def _block_size(self, theirs: Mapping[str, Any], name: str, default: int, where: str) -> int:
        """Positions of a block."""
        value = default if theirs.get(name) is None else theirs[name]
        complaint = ModelConfig.complaint("max_length", value)
        if complaint is not None:
            raise UserError(f"{where}: config.json's {name} {complaint}")
        return value

    def _rotations(self, theirs: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Their keys of rotations, wherever they stand: transformers 5 has them in a table. Raises UserError for a scaling."""
        names = {theirs: ours for ours, theirs in self.keys.items() if ours in ("rope_base", "rotary_share")}
        found = {name: {name: theirs[name]} if theirs.get(name) is not None else {} for name in names}
        for key in ("rope_parameters", "rope_scaling"):
            table = theirs.get(key)
            if table is None:
                continue
            if not isinstance(table, dict):
                raise UserError(f"{where}: {key} is {short(table)}, and not a table of rotations")
            for name, value in table.items():
                if name in names and value is not None:
                    found[name][f"{key}.{name}"] = value
                elif value is not None and not (name in PLAIN and _same(value, PLAIN[name])):
                    raise UserError(
                        f"{where}: {key}.{name} is {short(value)}; only rotations that are not scaled are supported"
                    )
        for name, values in found.items():
            for place, value in values.items():
                complaint = ModelConfig.complaint(names[name], value)
                if complaint is not None:
                    raise UserError(f"{where}: config.json's {place} {complaint}")
            if len(set(values.values())) > 1:
                said = ", ".join(f"{place} = {value!r}" for place, value in values.items())
                raise UserError(f"{where}: config.json names two values of {name}: {said}")
        if not found["rope_theta"] and "rope_theta" not in self.absent:
            raise UserError(f"{where}: config.json has no rope_theta, and no rope_parameters.rope_theta")
        return {name: next(iter(values.values())) for name, values in found.items() if values}

    def to_config(self, config: ModelConfig, vocabulary: Vocabulary) -> dict[str, Any]:
        """Their config of ours, with the special tokens. Raises UserError where ours computes something else."""
        own = asdict(config) | {"ffn_width": config.hidden_ffn, "num_kv_heads": config.num_kv_heads or config.num_heads}
        own |= {"head_dim": config.head_size} if "head_dim" in self.keys else {}
        own |= {"dense_ffn_width": config.ffn_of(0)} if "dense_ffn_width" in self.keys else {}
        if config.blocks and self.blocks is None:
            raise UserError(
                f"{self.architecture} sees the whole row; this model was trained in blocks of {config.blocks['text']}"
            )
        fixed = {"blocks_from_start": self.blocks is not None, **self.fixed}
        for key in sorted(set(own) - set(self.keys) - {"noise", "blocks"}):
            value = fixed.get(key, ModelConfig.__dataclass_fields__[key].default)
            if own[key] != value:
                raise UserError(
                    f"a model with {key} = {own[key]!r} cannot be written as {self.architecture}, whose is {value!r}"
                )
        for key, name in self.keys.items():
            if own[key] is None:
                raise UserError(f"a model with {key} = None cannot be written as {self.architecture}, which has a {name}")
        theirs = {"architectures": [self.architecture], "model_type": self.model_type, **self.requires}
        theirs |= {name: own[key] for key, name in self.keys.items()}
        theirs |= {self.blocks[0]: config.blocks["text"]} if self.blocks is not None else {}
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
