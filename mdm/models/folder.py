"""A model's folder: written for sharing (safetensors, config, tokenizers), and opened again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)

from components.files import in_one_line, short
from components.weightings import Noise, Noises
from mdm.config import UserError, check, one_line, read_json, reason
from mdm.data.processor import Processor
from mdm.hardware import Hardware
from mdm.models.builtin import PREFIX, builtin_folder
from mdm.models.open_formats import find_format, is_open
from mdm.models.open_models import EMBEDDING, UNEMBEDDING, load_open, open_folder, open_processor
from mdm.models.quantization import SCHEMES, check_scheme, load_quantized
from mdm.models.transformer import MaskedDiffusionModel, ModelConfig
from mdm.models.weights import digests, one_precision, read_weights

QUANTIZED = "quantization.json"
"""Beside a quantized model: its scheme, the type of what is not quantized, and the kind of device it is packed for."""


def export(
    folder: Path,
    model: MaskedDiffusionModel,
    processor: Processor,
    hw: Hardware,
    weights: dict[str, Any] | None = None,
    quantization: dict[str, str] | None = None,
) -> None:
    """Writes the model for sharing. All ranks take part; the main one writes.

    weights: others than the model's own;  quantization: how they are packed (see mdm/models/quantization.py)
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full: dict[str, Any] = get_model_state_dict(model, options=options) if weights is None else weights
    if not hw.main:
        return
    try:
        processor.save(folder)
        (folder / "config.json").write_text(json.dumps(model.config_dict(), indent=1))
        (folder / QUANTIZED).unlink(missing_ok=True)  # of another model that lay here
        if quantization is not None:
            (folder / QUANTIZED).write_text(json.dumps(quantization))
        partial = folder / "model.safetensors.partial"
        tag = {"vocabulary": processor.vocabulary.digest(), "files": json.dumps(digests(folder, _files(folder)))}
        own = {k: v.contiguous() for k, v in full.items() if k != UNEMBEDDING or not model.config.tied_embeddings}
        safetensors.torch.save_file(own, partial, metadata=tag)
        os.replace(partial, folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the model to {folder} ({reason(error)})") from error


def model_folder(checkpoint: str | Path) -> Path:
    """The `model/` of a recipe's output_dir, or the folder itself; `hub:OWNER/NAME` is fetched. Raises UserError.

    `builtin:quickstart` comes with the library.
    """
    if str(checkpoint).startswith(PREFIX):
        return builtin_folder(str(checkpoint))
    checkpoint = open_folder(checkpoint)
    for folder in (checkpoint / "model", checkpoint):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(
        f"checkpoint={checkpoint}: no model there; give a recipe's output_dir or its model/ folder, or builtin:quickstart"
    )


def check_sizes(config: ModelConfig, shapes: dict[str, list[int]], where: str) -> None:
    """Raises UserError where config.json says more than the weights hold, before any memory is taken for it."""
    layers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    embedding = shapes.get("embedding.weight")
    if config.num_layers != len(layers):
        raise UserError(
            f"{where}: weights and config.json do not match: {len(layers)} layers, num_layers = {config.num_layers}"
        )
    if embedding != [config.vocab_size, config.width]:
        raise UserError(
            f"{where}: weights and config.json do not match: the embedding is of shape {embedding}, vocab_size = "
            f"{config.vocab_size}, width = {config.width}"
        )


def load_processor(checkpoint: str | Path, trust: bool = False) -> Processor:
    """The tokenizers and the vocabulary of a model, without its weights. Raises UserError as `load_model` does."""
    folder = model_folder(checkpoint)
    if is_open(read_json(folder / "config.json")):
        return open_processor(folder)
    with one_line(f"checkpoint {folder}"):
        return Processor.load(folder, trust)


def load_config(checkpoint: str | Path) -> ModelConfig:
    """The shape of a model, without its weights. Raises UserError."""
    folder = model_folder(checkpoint)
    raw = read_json(folder / "config.json")
    if is_open(raw):
        return find_format(raw, str(folder)).config(raw, str(folder))
    noise, blocks = raw.pop("noise", {}), raw.pop("blocks", {})
    for name, value in raw.items():  # `check` would import what a table in it names
        if isinstance(value, (dict, list)):
            raise UserError(f"checkpoint {folder}: config.json: {name} must be a number or a word, got {short(value)}")
    check({**raw, "_component_": "mdm.models.transformer.ModelConfig"}, f"checkpoint {folder}: config.json")
    try:
        if not isinstance(noise, dict):
            raise ValueError(f"noise must name modalities, got {short(noise)}")
        if not isinstance(blocks, dict):
            raise ValueError(f"blocks must name modalities, got {short(blocks)}")
        return ModelConfig(**raw, blocks=blocks, noise={modality: Noise.from_dict(own) for modality, own in noise.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: {in_one_line(error)}") from error


def load_model(
    checkpoint: str | Path, device: str | torch.device = "cpu", trust: bool = False
) -> tuple[MaskedDiffusionModel, Processor]:
    """Model and processor from what `export` wrote, or from an open model's folder (see mdm/models/open_models.py).

    trust: build whatever tokenizers the folder names; otherwise the library's own alone (see mdm/config/trust.py)

    Raises UserError where the folder is no model, or vocabulary, config and weights do not match.
    """
    folder = model_folder(checkpoint)
    if is_open(read_json(folder / "config.json")):
        return load_open(folder, device)
    config = load_config(folder)
    weights, about = read_weights(folder)
    if config.tied_embeddings and EMBEDDING in weights:
        weights[UNEMBEDDING] = weights[EMBEDDING]
    check_sizes(config, {name: list(w.shape) for name, w in weights.items()}, f"checkpoint {folder}")
    with one_line(f"checkpoint {folder}"):
        processor = Processor.load(folder, trust)
        _check_processor(processor, config, about, folder)
    is_packed = (folder / QUANTIZED).is_file()
    packed = check_packed(read_json(folder / QUANTIZED), torch.device(device), folder) if is_packed else None
    try:
        with torch.device("meta"):
            model = MaskedDiffusionModel(config)
        if packed is None:
            model.load_state_dict(one_precision(weights, f"checkpoint {folder}"), assign=True)
        else:
            load_quantized(model, packed[0], {name: w.to(device) for name, w in weights.items()}, packed[1])
    except (RuntimeError, ValueError) as error:
        raise UserError(f"checkpoint {folder}: weights and config.json do not match: {in_one_line(error)}") from error
    _check_written(folder, about)
    model.restore_buffers()
    return model.to(device).eval(), processor


def _check_processor(processor: Processor, config: ModelConfig, about: Mapping[str, str], folder: Path) -> None:
    """Raises UserError where tokenizers, vocabulary and model are not of one run."""
    vocabulary = processor.vocabulary
    if vocabulary.size != config.vocab_size or about.get("vocabulary") not in (None, vocabulary.digest()):
        raise UserError(
            f"checkpoint {folder}: its vocabulary ({vocabulary.size} ids) is not the one the model was trained with "
            f"({config.vocab_size} ids); vocabulary.json and model.safetensors are of different runs"
        )
    Noises.of(config.noise, vocabulary.modalities)  # of what it has
    for modality, length in processor.canvas.items():
        if length > config.max_length:
            raise UserError(
                f"checkpoint {folder}: canvas.{modality} = {length}, and the model has {config.max_length} positions"
            )


def check_packed(packed: dict[str, Any], device: torch.device, folder: Path) -> tuple[str, torch.dtype]:
    """Scheme and type of a quantized model. Raises UserError for what does not exist, or is packed for another device."""
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    for key, known in (("scheme", SCHEMES), ("dtype", dtypes)):
        if packed.get(key) not in tuple(known):
            raise UserError(f"{folder / QUANTIZED}: {key} {packed.get(key)!r} is not one of {', '.join(known)}")
    check_scheme(packed["scheme"], device, f"{folder / QUANTIZED}: scheme")
    if packed["scheme"] == "int4_weight_only" and packed.get("device") != device.type:
        raise UserError(
            f"checkpoint {folder}: its int4 weights are packed for {packed.get('device')}, not for {device.type}; "
            f"run `mdm run quantize` with device={device.type}"
        )
    return packed["scheme"], dtypes[packed["dtype"]]


def _files(folder: Path) -> list[str]:
    """What was written with the weights and decides what they compute, beside the vocabulary: shapes do not tell it apart."""
    nodes = read_json(folder / "processor.json")["tokenizers"].values()
    return ["config.json", QUANTIZED, *(node["path"] for node in nodes if "path" in node)]


def _check_written(folder: Path, about: Mapping[str, str]) -> None:
    """Raises UserError, naming it, where a file is not the one that was written with the weights (older ones do not say)."""
    if "files" not in about:
        return
    try:
        written = json.loads(about["files"])
        if not isinstance(written, dict):
            raise ValueError("it is no table")
    except (RecursionError, ValueError) as error:
        raise UserError(f"checkpoint {folder}: what model.safetensors says of the other files cannot be read") from error
    with one_line(f"checkpoint {folder}"):
        found = digests(folder, _files(folder))
    for name in sorted(set(written) | set(found)):
        if written.get(name) != found.get(name):
            gone = "is missing, and was" if name not in found else "is not the one that was"
            how = gone if name in written else "was not"
            raise UserError(f"checkpoint {folder}: {name} {how} written with model.safetensors; they are of different runs")
