"""What a model folder holds, whoever wrote it: JSON files, and the one set of weights that is meant.

    model.safetensors.index.json    names the shards, and the tensors of each; nothing else is read
    one .safetensors file           where there is no index

A weights file that is neither is refused by its name: which of two models was meant, only its owner knows. What the index
names lies in the folder itself (as a link, in the hub's cache, where the content lies among the blobs).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor

from components.files import short
from mdm.config import UserError, read_json

WEIGHT_INDEX = "model.safetensors.index.json"
BIAS = ".expert_bias"  # of a router: it decides among scores that nearly tie, and keeps its precision
KEPT = (".scale", BIAS)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names in a sentence, the first of them where there are many."""
    ordered = sorted(names)
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")


def weight_files(folder: Path) -> Mapping[str, set[str] | None]:
    """The weights files that are meant -> the tensors that the index says each holds; None where there is no index.

    Raises UserError, naming the files, where some are missing, or lie there beside those that are meant.
    """
    found = {p.name for p in folder.glob("*.safetensors")}
    if not (folder / WEIGHT_INDEX).is_file():
        if not found:
            raise UserError(f"checkpoint {folder}: no .safetensors file there")
        if len(found) > 1:
            raise UserError(
                f"checkpoint {folder}: {listed(found)} lie there, and no {WEIGHT_INDEX} says which of them are the model; "
                "remove what does not belong to it"
            )
        return {found.pop(): None}
    shards = _shards(folder / WEIGHT_INDEX)
    missing, more = set(shards) - found, found - set(shards)
    if missing:
        raise UserError(f"checkpoint {folder}: {WEIGHT_INDEX} names {listed(missing)}, not there; is the download complete?")
    if more:
        raise UserError(
            f"checkpoint {folder}: {listed(more)} lie there too, and {WEIGHT_INDEX} does not name them; remove what does not "
            "belong to the model"
        )
    return shards


def _shards(index: Path) -> dict[str, set[str]]:
    """The index: shard -> its tensors."""
    shards: dict[str, set[str]] = {}
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise UserError(f"{index} has no weight_map of tensors and files")
    for tensor, file in named.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file or "\\" in file:
            raise UserError(f"{index}: {tensor} lies in {short(file)}, which is not the name of a .safetensors file beside it")
        shards.setdefault(file, set()).add(tensor)
    return shards


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a folder, and what its files say of themselves. Raises UserError, naming what is missing or too much."""
    state: dict[str, Tensor] = {}
    about: dict[str, str] = {}
    for name, expected in weight_files(folder).items():
        try:
            with safetensors.safe_open(folder / name, framework="pt") as file:
                own = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
                about |= file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise UserError(f"checkpoint {folder / name}: {error}; is the download complete?") from error
        expected = set(own) if expected is None else expected
        for what, some in (("lacks", expected - set(own)), ("has", set(own) - expected)):
            if some:
                raise UserError(f"checkpoint {folder / name} {what} {listed(some)}, and {WEIGHT_INDEX} says otherwise")
        state |= own
    return state, about


def one_precision(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Our tensors in one type, the widest among them (which is exact); gains and biases of routers keep theirs.

    A norm computes in float32, and so does a router's choice.

    Raises UserError, naming it, for a tensor that is no floating-point one.
    """
    for name, value in state.items():
        if value.dtype not in FLOATS:
            kind = str(value.dtype).removeprefix("torch.")
            raise UserError(f"{where}: {name} is of {kind}, not of floating-point numbers; is the model quantized?")
    kinds = {value.dtype for name, value in state.items() if not name.endswith(KEPT)}
    if len(kinds) < 2:
        return dict(state)
    widest = torch.float32 if torch.float64 not in kinds else torch.float64
    return {name: value if name.endswith(KEPT) else value.to(widest) for name, value in state.items()}


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """A checksum of each of these files, and of those inside a sub-folder; what is not there is left out."""
    files = [file for name in names for file in (folder / name, *sorted((folder / name).rglob("*"))) if file.is_file()]
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}
