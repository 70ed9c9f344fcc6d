"""Open models in our model, and back: of masked diffusion, in blocks too, and autoregressive ones as a start for adaptation.

    model, processor = load_open("path/to/LLaDA-8B-Instruct")          or "hub:GSAI-ML/LLaDA-8B-Instruct"
    save_open("mine", model, processor, FORMATS["llada"])

A format is a table: which key of their config is which of ours, what else must hold, and their names of our tensors. Two things
differ in substance. They rotate the halves of a head (channels i and i + d/2), torchtune rotates neighbours (2i and 2i + 1):
the rows of the query and key projections, their biases and their norms' gains are permuted, as far as a head is rotated. And
the hidden states of Dream and of autoregressive models predict the next position: `ModelConfig.predicts_next` moves them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from components.files import short
from components.tokenizers.text import JsonTokenizer
from components.vocabulary import Vocabulary
from mdm.config import UserError, one_line, read_json
from mdm.data.processor import Processor
from mdm.models.format import Format
from mdm.models.open_formats import find_format
from mdm.models.transformer import MaskedDiffusionModel, ModelConfig
from mdm.models.weights import BIAS, listed, one_precision, read_weights

HUB = "hub:"
MASK_NAMES = ("<|mdm_mask|>", "<|mask|>", "<|MASK|>", "<MASK>", "[MASK]")
SPARE_NAMES = ("<|reserved_special_token_0|>", "<|reserved_special_token_1|>")
EMBEDDING, UNEMBEDDING = "embedding.weight", "unembedding.weight"


@dataclass(frozen=True)
class Entry:
    """Tensors of ours and theirs that hold the same: one each; or ours stacks theirs (of experts); or theirs has our rows."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    stacked: bool


def entries(form: Format, config: ModelConfig) -> Iterator[Entry]:
    """Every tensor of a model of that shape."""
    for ours, theirs in form.names.items():
        for i in range(config.num_layers if "{i}" in ours else 1):
            if _has(config, i, ours):
                stacked = "{e}" in theirs
                names = tuple(theirs.format(i=i, e=e) for e in range(config.num_experts or 1 if stacked else 1))
                yield Entry(tuple(ours.format(i=i).split(" + ")), names, stacked)


def _has(config: ModelConfig, layer: int, ours: str) -> bool:
    """Whether a model of that shape has that tensor, in that layer."""
    if ours == UNEMBEDDING:
        return not config.tied_embeddings
    if ".mlp." not in ours:
        return True
    if config.experts_of(layer) is None or ".mlp.w" in ours:
        return config.experts_of(layer) is None and ".mlp.w" in ours
    return bool(config.num_shared_experts) or ".shared." not in ours


def our_shapes(form: Format, config: ModelConfig, where: str) -> dict[str, torch.Size]:
    """Our tensors and their shapes. Raises UserError for a model of more numbers than can be counted."""
    try:
        with torch.device("meta"):
            return {name: value.shape for name, value in MaskedDiffusionModel(config).state_dict().items()}
    except RuntimeError as error:
        raise UserError(f"{where}: config.json describes a {form.architecture} larger than any") from error


def their_shape(entry: Entry, shapes: Mapping[str, torch.Size]) -> tuple[int, ...]:
    """The shape of each of their tensors of an entry, by the shapes of ours."""
    first = shapes[entry.ours[0]][1 if entry.stacked else 0 :]
    return (sum(shapes[name][0] for name in entry.ours), *first[1:]) if len(entry.ours) > 1 else tuple(first)


def from_open(form: Format, config: ModelConfig, state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Our state dict of theirs. Raises UserError, naming them, for tensors that are missing, extra, or of another shape."""
    layers = config.num_layers - config.first_dense_layers
    if config.num_layers + layers * (config.num_experts or 0) > len(state):  # before as many are listed
        raise UserError(f"{where} has {len(state)} tensors; config.json describes a {form.architecture} of more")
    wanted = list(entries(form, config))
    state = _without_tied(form, config, state, where)
    names = {name for entry in wanted for name in entry.theirs}
    for what, some in (("lacks", names - set(state)), ("has extra", set(state) - names)):
        if some:
            raise UserError(f"{where} {what} tensors: {listed(some)}; config.json describes a {form.architecture} without that")
    shapes = our_shapes(form, config, where)
    ours: dict[str, Tensor] = {}
    for entry in wanted:
        parts, expected = [state[name] for name in entry.theirs], their_shape(entry, shapes)
        for name, part in zip(entry.theirs, parts, strict=True):
            if part.shape != expected:
                raise UserError(f"{where}: {name} is of shape {tuple(part.shape)}, and config.json says {expected}")
        value = torch.stack(parts) if entry.stacked else parts[0]
        rows = value.split([shapes[name][0] for name in entry.ours]) if len(entry.ours) > 1 else [value]
        for name, own in zip(entry.ours, rows, strict=True):
            own = interleaved(own, config.head_size, config.rotated) if _is_rotated(name) else own
            ours[name] = own.clone() if len(rows) > 1 else own  # a storage for each, to be saved
    return ours | ({UNEMBEDDING: ours[EMBEDDING]} if config.tied_embeddings else {})


def _is_rotated(ours: str) -> bool:
    """Whether the rows of a tensor are the channels of heads that are rotated."""
    return ".q_proj." in ours or ".k_proj." in ours


def _without_tied(form: Format, config: ModelConfig, state: Mapping[str, Tensor], where: str) -> Mapping[str, Tensor]:
    """Their tensors without the copy of the embedding that some files hold. Raises UserError where it is none."""
    theirs, embedding = form.names[UNEMBEDDING], form.names[EMBEDDING]
    if not config.tied_embeddings or theirs not in state or embedding not in state:
        return state
    if not torch.equal(state[theirs], state[embedding]):
        raise UserError(f"{where}: {theirs} is not {embedding}, and config.json says that the two are tied")
    return {name: value for name, value in state.items() if name != theirs}


def to_open(form: Format, config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict of ours: the inverse of `from_open`."""
    theirs = {}
    for entry in entries(form, config):
        rows = [
            halves(state[name], config.head_size, config.rotated) if _is_rotated(name) else state[name] for name in entry.ours
        ]
        value = torch.cat(rows) if len(rows) > 1 else rows[0]
        parts = [p.clone() for p in value] if entry.stacked else [value]  # a storage for each, to be saved
        theirs |= {name: part.contiguous() for name, part in zip(entry.theirs, parts, strict=True)}
    return theirs


def interleaved(rows: Float[Tensor, "rows ..."], head_dim: int, rotated: int | None = None) -> Float[Tensor, "rows ..."]:
    """Rows of heads whose halves are rotated together (i, i + d/2), so that neighbours are (2i, 2i + 1).

    rotated: of each head the first channels, which alone are; None is all
    """
    return _heads_reordered(rows, head_dim, rotated, lambda own: own.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))


def halves(rows: Float[Tensor, "rows ..."], head_dim: int, rotated: int | None = None) -> Float[Tensor, "rows ..."]:
    """The inverse of `interleaved`."""
    return _heads_reordered(rows, head_dim, rotated, lambda own: own.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2))


def _heads_reordered(rows: Tensor, head_dim: int, rotated: int | None, order: Callable[[Tensor], Tensor]) -> Tensor:
    """The first channels of each head in another order."""
    heads, rotated = rows.unflatten(0, (-1, head_dim)), head_dim if rotated is None else rotated
    return torch.cat([order(heads[:, :rotated]), heads[:, rotated:]], dim=1).flatten(0, 1)


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
    model.load_state_dict({k: v if dtype is None or k.endswith(BIAS) else v.to(dtype) for k, v in weights.items()}, assign=True)
    model.restore_buffers()
    return model.to(device).eval(), open_processor(folder)


def open_processor(folder: Path) -> Processor:
    """The tokenizer and the ids of an open model's folder, without its weights. Raises UserError as `load_open` does."""
    theirs = read_json(folder / "config.json")
    config = find_format(theirs, str(folder)).config(theirs, str(folder))
    with one_line(f"checkpoint {folder}"):
        tokenizer = JsonTokenizer(str(folder / "tokenizer.json"), config.vocab_size)
        vocabulary = _vocabulary(theirs, tokenizer, str(folder), config.causal)
        tokenizer.reserve(vocabulary.special_ids or ())
    return Processor(vocabulary, {"text": tokenizer}, {})


def _vocabulary(theirs: Mapping[str, Any], tokenizer: JsonTokenizer, where: str, causal: bool) -> Vocabulary:
    """The ids that config.json names; a mask token that it does not name is looked for in the tokenizer.

    An autoregressive model has none: it becomes the first id that the tokenizer has no token for, or a reserved one.

    Of several end tokens ours is the one that also fills (`pad_token_id`), as it does in these models' training; else the
    first, which transformers fills with.
    """
    ends = theirs.get("eos_token_id")
    ends = [_id(one, "eos_token_id", where) for one in ends] if isinstance(ends, list) else [_id(ends, "eos_token_id", where)]
    mask, pad = (_id(theirs.get(key), key, where) for key in ("mask_token_id", "pad_token_id"))
    if mask is None:
        mask = next((i for i in map(tokenizer.id_of, MASK_NAMES) if i is not None), None)
    if mask is None and causal:
        spare = itertools.chain(range(tokenizer.named, tokenizer.size), map(tokenizer.id_of, SPARE_NAMES))
        mask = next((i for i in spare if i not in (None, *ends, pad)), None)
        if mask is None:
            raise UserError(
                f"{where}: all {tokenizer.size} ids are tokens, and none is left for a mask; set mask_token_id in config.json"
            )
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
    if noise := model.config.noise.get("text"):
        raise UserError(f"{form.architecture} is a masked model; this one was trained with {noise.kernel}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    processor.tokenizers["text"].save(folder)
    save_torch_state_dict(to_open(form, model.config, model.state_dict()), folder)
