"""Token shards: samples tokenized once, read back as if they were tokenized on the fly.

    folder/
      index.json                  tokenizers' codebooks, samples, and each shard's file, count and SHA-256
      shard_00000.safetensors     for each modality: codes (one after the other), offsets [count + 1], present [count]
      processor.json, ...         the tokenizers

A sample of a shard holds codes where the source's holds raw parts; `mdm.data.processor.Processor` takes either.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from components.data.bad import BadSample
from components.data.indexed import Indexed
from components.files import inside, read_json, require
from components.progress import Bar

INDEX = "index.json"
KINDS: dict[str, tuple[str, ...]] = {"codes": ("I32", "I64", "I16", "U8"), "offsets": ("I64", "I32"), "present": ("BOOL",)}


def write_shard(path: Path, samples: Sequence[Mapping[str, Tensor]], modalities: Sequence[str]) -> str:
    """Writes samples of codes; a reader never sees half a file. Returns its SHA-256."""
    tensors = {}
    for modality in modalities:
        parts = [s.get(modality, torch.zeros(0, dtype=torch.long)) for s in samples]
        tensors[f"{modality}.codes"] = torch.cat([*parts, torch.zeros(0, dtype=torch.long)]).to(torch.int32)
        tensors[f"{modality}.offsets"] = torch.tensor([0, *accumulate(len(p) for p in parts)])
        tensors[f"{modality}.present"] = torch.tensor([modality in s for s in samples], dtype=torch.bool)
    partial = path.with_suffix(".partial")
    safetensors.torch.save_file(tensors, partial)
    digest = sha256(partial)
    os.replace(partial, path)
    return digest


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenShards(Indexed[dict[str, Tensor]]):
    """The samples of a folder that `mdm run tokenize_data` wrote, in their order, read when they are drawn.

    path:  the folder
    check: compare every file with its checksum first; the sizes are compared in any case

    Raises FileNotFoundError and ValueError, naming the file, for what is missing, truncated or of another checksum.
    """

    def __init__(self, path: str, check: bool = True) -> None:
        self.folder: Path = Path(path)
        if not (self.folder / INDEX).is_file():
            raise FileNotFoundError(f"{path} holds no {INDEX}: `mdm run tokenize_data` has not finished there")
        index = read_json(self.folder / INDEX)
        require(index, self.folder / INDEX, codebooks=dict, shards=list)
        require(index["codebooks"], self.folder / INDEX, **dict.fromkeys(index["codebooks"], list))
        self.codebooks: dict[str, tuple[int, ...]] = {modality: tuple(sizes) for modality, sizes in index["codebooks"].items()}
        for modality, sizes in self.codebooks.items():
            if not sizes or not all(type(size) is int and 1 <= size < 2**31 for size in sizes):
                raise ValueError(f"{self.folder / INDEX}: the codebooks of {modality} must be sizes, got {sizes}")
        for shard in index["shards"]:
            require(shard, self.folder / INDEX, file=str, count=int, bytes=int, sha256=str)
            if not 0 <= shard["count"] <= shard["bytes"]:  # a sample takes more than a byte
                raise ValueError(
                    f"{self.folder / INDEX}: {shard['count']} samples in {shard['bytes']} bytes of {shard['file']}"
                )
        self.files: list[Path] = [inside(self.folder, shard["file"]) for shard in index["shards"]]
        for file, shard in Bar(
            list(zip(self.files, index["shards"], strict=True)), desc=f"checking {path}", disable=len(self.files) < 100
        ):
            if not file.is_file():
                raise FileNotFoundError(f"token shard not found: {file}")
            if file.stat().st_size != shard["bytes"]:
                raise ValueError(f"token shard {file} has {file.stat().st_size} bytes, and {INDEX} says {shard['bytes']}")
            if check and sha256(file) != shard["sha256"]:
                raise ValueError(f"token shard {file} has another checksum than {INDEX} says; write it again")
        self._ends = list(accumulate(shard["count"] for shard in index["shards"]))
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def name_of(self, place: int) -> str:
        return f"{self.folder}, sample {place}"

    def read(self, place: int) -> dict[str, Tensor]:
        if not 0 <= place < len(self):
            raise IndexError(f"token shards: sample {place} of {len(self)}")
        shard = bisect_right(self._ends, place)
        row = place - (self._ends[shard - 1] if shard else 0)
        file = self._file(shard)
        sample = {}
        for modality in self.codebooks:
            if bool(file.get_slice(f"{modality}.present")[row : row + 1]):
                start, stop = file.get_slice(f"{modality}.offsets")[row : row + 2].tolist()
                sample[modality] = self._codes(shard, modality, file.get_slice(f"{modality}.codes"), start, stop)
        return sample

    def _codes(self, shard: int, modality: str, codes: Any, start: int, stop: int) -> Tensor:
        """A sample's codes. Raises BadSample for offsets that lie outside, or a code that its codebook does not have."""
        where = f"{self.files[shard]}, {modality} from {start} to {stop}"
        if not 0 <= start <= stop <= codes.get_shape()[0]:
            raise BadSample(where, f"the shard holds {codes.get_shape()[0]} codes")
        found = codes[start:stop].long()
        sizes = torch.tensor(self.codebooks[modality])[torch.arange(len(found)) % len(self.codebooks[modality])]
        if bool(((found < 0) | (found >= sizes)).any()):
            raise BadSample(where, f"a code is outside its codebook of {self.codebooks[modality]}")
        return found

    def _file(self, shard: int) -> Any:
        if shard not in self._open:
            try:
                self._open[shard] = self._fitting(safetensors.safe_open(self.files[shard], framework="pt"), shard)
            except SafetensorError as error:
                raise ValueError(f"token shard {self.files[shard]}: {error}") from error
        return self._open[shard]

    def _fitting(self, file: Any, shard: int) -> Any:
        """The file, if it holds what the index says. Raises ValueError, naming it."""
        count = self._ends[shard] - (self._ends[shard - 1] if shard else 0)
        for modality in self.codebooks:
            for name, shape in (("codes", None), ("offsets", [count + 1]), ("present", [count])):
                found = file.get_slice(f"{modality}.{name}")
                own = found.get_shape()
                if (len(own) != 1 if shape is None else own != shape) or found.get_dtype() not in KINDS[name]:
                    raise ValueError(
                        f"token shard {self.files[shard]}: {modality}.{name} is {found.get_dtype()} of shape {own}, and "
                        f"{INDEX} says {count} samples"
                    )
        return file
