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
from mdm.models.open_formats import Format, find_format
from mdm.models.transformer import MaskedDiffusionModel, ModelConfig
from mdm.models.weights import listed, one_precision, read_weights

HUB = "hub:"
MASK_NAMES = ("<|mdm_mask|>", "<|mask|>", "[MASK]")


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
            names = tuple(theirs.format(i=i, e=e) for e in range(config.num_experts or 1 if stacked else 1))
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
        tokenizer.reserve(vocabulary.special_ids or ())
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
    if noise := model.config.noise.get("text"):
        raise UserError(f"{form.architecture} is a masked model; this one was trained with {noise.kernel}")
    if model.config.blocks:
        raise UserError(
            f"{form.architecture} sees the whole row; this model was trained in blocks of {model.config.blocks['text']}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    processor.tokenizers["text"].save(folder)
    save_torch_state_dict(to_open(form, model.config, model.state_dict()), folder)
