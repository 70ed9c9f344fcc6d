"""Checkpoints. For resuming: torch.distributed.checkpoint, bit-exact. For sharing: safetensors, config and vocabulary.

    output_dir/
      checkpoints/step_00000200/   weights, optimizer (DCP) and state.json; written under another name, then renamed
      processor/                   the tokenizers and the vocabulary of the run: a resume takes them from here
      model/                       model.safetensors, config.json, vocabulary.json, processor.json and tokenizer files

A checkpoint that was being written when the run was killed still has its other name: it is never the one resumed from. Nor is
one whose files were damaged later: it is set aside, and the one before it is taken.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from components.data.bad import MACHINE
from mdm.config import UserError, check
from mdm.hardware import Hardware
from mdm.model import MaskedDiffusionModel, ModelConfig
from mdm.open_models import find_format, is_open, load_open, open_folder, open_processor
from mdm.optim import EMA
from mdm.processor import Processor
from mdm.quantization import SCHEMES, check_scheme, load_quantized
from mdm.weights import digests, one_line, one_precision, read_json, read_weights, short

QUANTIZED = "quantization.json"
"""Beside a quantized model: its scheme, the type of what is not quantized, and the kind of device it is packed for."""


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What DCP saves (tensors only, so that nothing in it is unpickled on the way back), and the whole optimizer state."""
    whole = get_optimizer_state_dict(model, optimizer)
    trained = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    tensors = {"model": trained, "optimizer": whole["state"], "rng": torch.get_rng_state()}
    if ema is not None:
        tensors["ema"] = ema.average
    return tensors, whole


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    state: dict[str, Any],
    hw: Hardware,
    keep: int = 2,
) -> Path:
    """Writes `folder/step_N` with everything a resume needs, and removes all but the newest `keep`.

    state: JSON-able position of the run (step, tokens, data loader). Raises UserError where it cannot be written; what was
    there before stays.
    """
    final = folder / f"step_{step:08d}"
    partial = folder / f"partial_{step:08d}"
    try:
        if hw.main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        barrier(hw)
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(_tensors(model, optimizer, ema)[0], checkpoint_id=partial, no_dist=hw.world_size == 1)
        if hw.main:
            with open(partial / "state.json", "w") as f:
                json.dump(state, f)
                f.flush()
                os.fsync(f.fileno())
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            for old in complete(folder)[:-keep]:
                shutil.rmtree(old)
    except (OSError, dcp.api.CheckpointException, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = complete(folder)
        last = f"the last complete checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
        raise UserError(f"cannot write the checkpoint {final} ({_reason(error)}); {last}") from error
    barrier(hw)
    return final


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found = [line for line in lines if "Errno" in line or "No space" in line or "Error:" in line]
    return (found or lines or [type(error).__name__])[-1]


def complete(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step_*") if (p / "state.json").is_file())


class Damaged(Exception):
    """A checkpoint that was finished, and whose files are no longer whole; the message says which."""


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state of a finished checkpoint, after a look at its files: each is as long as DCP's metadata says. Raises Damaged."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        if not isinstance(state, dict) or "step" not in state:
            raise ValueError("it holds no state")
    except (OSError, ValueError) as error:
        raise Damaged(f"{checkpoint / 'state.json'}: {error}") from error
    try:
        metadata = dcp.FileSystemReader(checkpoint).read_metadata()
    except Exception as error:  # it is a pickle: a cut one raises anything
        raise Damaged(f"{checkpoint / '.metadata'} cannot be read ({_reason(error)})") from error
    ends: dict[str, int] = {}
    for part in metadata.storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in ends.items():
        size = (checkpoint / name).stat().st_size if (checkpoint / name).is_file() else 0
        if size < end:
            raise Damaged(f"{checkpoint / name} has {size:,} bytes of {end:,}")
    return state


def set_aside(checkpoint: Path) -> Path:
    """Gives a damaged checkpoint another name, under which it is neither resumed from nor counted; nothing is deleted."""
    aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
    if checkpoint.is_dir() and not aside.exists():
        os.replace(checkpoint, aside)
    return aside


def remove_partial(folder: Path) -> None:
    """Removes what a killed run was writing."""
    for partial in folder.glob("partial_*"):
        shutil.rmtree(partial, ignore_errors=True)


def check_space(folder: Path, num_parameters: int, ema: bool, keep: int = 2) -> None:
    """Raises UserError where the disk lacks the room for `keep` + 1 checkpoints (float32 weights and two moments)."""
    folder.mkdir(parents=True, exist_ok=True)
    one = 4 * num_parameters * (3 + ema)
    free = shutil.disk_usage(folder).free
    if free < (keep + 1) * one:
        raise UserError(
            f"output_dir {folder}: {free / 2**20:.0f} MiB free, and {keep + 1} checkpoints of {one / 2**20:.0f} MiB are needed"
        )


def restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None, hw: Hardware) -> None:
    """Loads a checkpoint in place, on any number of ranks.

    Raises UserError where it is of another model, ema or optimizer, or the machine is at fault; Damaged where what it holds
    cannot be read.
    """
    tensors, whole = _tensors(model, optimizer, ema)
    try:
        dcp.load(tensors, checkpoint_id=checkpoint, no_dist=hw.world_size == 1)
    except (Exception, dcp.api.CheckpointException) as error:  # a file of tensors is a zip of pickles: it raises anything
        for cause in [failed for failed, _ in getattr(error, "failures", {}).values()] or [error]:
            if isinstance(cause, (KeyboardInterrupt, SystemExit)):  # which the library wraps: nothing is wrong with the file
                raise cause from None
            if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in MACHINE):
                raise UserError(f"{checkpoint} cannot be read now ({_reason(error)}); it is left as it is") from error
        if any(word in _reason(error) for word in ("Missing key", "Size mismatch")):
            raise UserError(f"{checkpoint} is not a checkpoint of this model: {_reason(error)}") from error
        raise Damaged(f"{checkpoint} cannot be read ({_reason(error)})") from error
    set_optimizer_state_dict(
        model, optimizer, {"state": tensors["optimizer"], "param_groups": whole["param_groups"]}, options=StateDictOptions()
    )
    torch.set_rng_state(tensors["rng"])


def barrier(hw: Hardware) -> None:
    """Waits for all ranks."""
    if hw.world_size > 1:
        dist.barrier()


def export(
    folder: Path,
    model: nn.Module,
    processor: Processor,
    hw: Hardware,
    weights: dict[str, Any] | None = None,
    quantization: dict[str, str] | None = None,
) -> None:
    """Writes the model for sharing. All ranks take part; the main one writes.

    weights: others than the model's own;  quantization: how they are packed (see mdm/quantization.py)
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_model_state_dict(model, options=options) if weights is None else weights
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
        safetensors.torch.save_file({k: v.contiguous() for k, v in full.items()}, partial, metadata=tag)
        os.replace(partial, folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the model to {folder} ({_reason(error)})") from error


def model_folder(checkpoint: str | Path) -> Path:
    """The `model/` of a recipe's output_dir, or the folder itself; `hub:OWNER/NAME` is fetched. Raises UserError."""
    checkpoint = open_folder(checkpoint)
    for folder in (checkpoint / "model", checkpoint):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"checkpoint={checkpoint}: no model there; give a recipe's output_dir or its model/ folder")


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
    for name, value in raw.items():  # `check` would import what a table in it names
        if isinstance(value, (dict, list)):
            raise UserError(f"checkpoint {folder}: config.json: {name} must be a number or a word, got {short(value)}")
    check({**raw, "_component_": "mdm.model.ModelConfig"}, f"checkpoint {folder}: config.json")
    try:
        return ModelConfig(**raw)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from error


def load_model(
    checkpoint: str | Path, device: str | torch.device = "cpu", trust: bool = False
) -> tuple[MaskedDiffusionModel, Processor]:
    """Model and processor from what `export` wrote, or from an open model's folder (see mdm/open_models.py).

    trust: build whatever tokenizers the folder names; otherwise the library's own alone (see mdm/trust.py)

    Raises UserError where the folder is no model, or vocabulary, config and weights do not match.
    """
    folder = model_folder(checkpoint)
    if is_open(read_json(folder / "config.json")):
        return load_open(folder, device)
    config = load_config(folder)
    weights, about = read_weights(folder)
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
        raise UserError(f"checkpoint {folder}: weights and config.json do not match: {' '.join(str(error).split())}") from error
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
