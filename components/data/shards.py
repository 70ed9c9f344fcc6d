"""Token shards: samples tokenized once, read back as if they were tokenized on the fly.

    folder/                       of a disk, or a URL
      index.json                  tokenizers' codebooks, samples, and each shard's file, count, tokens, bytes and SHA-256
      shard_00000.safetensors     for each modality: codes (one after the other), offsets [count + 1], present [count]
      processor.json, ...         the tokenizers

A sample of a shard holds codes where the source's holds raw parts; `mdm.data.processor.Processor` takes either. A shard is
opened, and held against its checksum, when a sample of it is drawn first, by the process that draws it; from then on it is read
where it lies, or where its copy does.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from components.copies import fetched, forget
from components.data.bad import BadSample, Refused
from components.data.indexed import Indexed
from components.files import inside, read_json, require
from components.places import AT_START, AnyPath, exists, place, publish, read_bytes

INDEX = "index.json"
KINDS: dict[str, tuple[str, ...]] = {"codes": ("I32", "I64", "I16", "U8"), "offsets": ("I64", "I32"), "present": ("BOOL",)}
KEPT_OPEN = 4096  # shards of a source; each is a file that is mapped, and holds no handle


def write_shard(path: AnyPath, samples: Sequence[Mapping[str, Tensor]], modalities: Sequence[str]) -> tuple[str, int]:
    """Writes samples of codes; a reader never sees half a file. Returns its SHA-256 and its size in bytes."""
    tensors = {}
    for modality in modalities:
        parts = [s.get(modality, torch.zeros(0, dtype=torch.long)) for s in samples]
        tensors[f"{modality}.codes"] = torch.cat([*parts, torch.zeros(0, dtype=torch.long)]).to(torch.int32)
        tensors[f"{modality}.offsets"] = torch.tensor([0, *accumulate(len(p) for p in parts)])
        tensors[f"{modality}.present"] = torch.tensor([modality in s for s in samples], dtype=torch.bool)
    with tempfile.TemporaryDirectory() as elsewhere:
        partial = path.with_suffix(".partial") if isinstance(path, Path) else Path(elsewhere) / "shard"
        safetensors.torch.save_file(tensors, partial)
        written = sha256(partial), partial.stat().st_size
        publish(path, partial)
    return written


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_index(folder: AnyPath) -> dict[str, Any]:
    """What index.json says, after a look at each of its entries. Raises FileNotFoundError, ValueError, Unreachable."""
    path = folder / INDEX
    if not exists(path, AT_START):
        raise FileNotFoundError(f"{folder} holds no {INDEX}: no such folder, or `mdm run tokenize_data` has not finished there")
    index = read_json(path, content=read_bytes(path, AT_START))
    require(index, path, codebooks=dict, shards=list)
    require(index["codebooks"], path, **dict.fromkeys(index["codebooks"], list))
    for modality, sizes in index["codebooks"].items():
        if not sizes or not all(type(size) is int and 1 <= size < 2**31 for size in sizes):
            raise ValueError(f"{path}: the codebooks of {modality} must be sizes, got {tuple(sizes)}")
    for shard in index["shards"]:
        require(shard, path, file=str, count=int, bytes=int, sha256=str)
        inside(str(folder), shard["file"])
        if not 0 <= shard["count"] <= shard["bytes"]:  # a sample takes more than a byte
            raise ValueError(f"{path}: {shard['count']} samples in {shard['bytes']} bytes of {shard['file']}")
    return index


class Shard:
    """One file of token shards, opened: its samples by their row.

    path, about: where it lies, and its entry of index.json
    file:        of this machine: itself, or its copy
    check:       hold it against its checksum; its size is looked at in any case

    Raises Refused, naming the file, for what is missing, of another size or checksum, or does not hold what the index says: it
    was not written whole, or has changed since.
    """

    def __init__(
        self, path: AnyPath, file: Path, about: Mapping[str, Any], codebooks: Mapping[str, Sequence[int]], check: bool
    ) -> None:
        self.path = path
        self.count: int = about["count"]
        self.codebooks = codebooks
        size = file.stat().st_size
        if size != about["bytes"]:
            self._refuse(file, f"has {size} bytes, and {INDEX} says {about['bytes']}")
        if check and sha256(file) != about["sha256"]:
            self._refuse(file, f"has another checksum than {INDEX} says; write it again")
        try:
            self._file: Any = safetensors.safe_open(file, framework="pt")
            self._tensors = {m: {name: self._file.get_slice(f"{m}.{name}") for name in KINDS} for m in codebooks}
        except SafetensorError as error:
            raise Refused(f"token shard {path}: {error}") from error
        for modality, own in self._tensors.items():
            for name, shape in (("codes", None), ("offsets", [self.count + 1]), ("present", [self.count])):
                has, kind = own[name].get_shape(), own[name].get_dtype()
                if (len(has) != 1 if shape is None else has != shape) or kind not in KINDS[name]:
                    what = f"{modality}.{name} is {kind} of shape {has}"
                    self._refuse(file, f"is of other samples: {what}, and {INDEX} says {self.count} samples")

    def _refuse(self, file: Path, why: str) -> None:
        if file != self.path:
            forget(file)
        raise Refused(f"token shard {self.path} {why}")

    def spans(self, row: int) -> dict[str, Codes]:
        """The codes that a sample has of each modality, not read yet."""
        found = {}
        for modality, own in self._tensors.items():
            if bool(own["present"][row : row + 1]):
                start, stop = own["offsets"][row : row + 2].tolist()
                where = f"{self.path}, {modality} from {start} to {stop}"
                if not 0 <= start <= stop <= own["codes"].get_shape()[0]:
                    raise BadSample(where, f"the shard holds {own['codes'].get_shape()[0]} codes")
                found[modality] = Codes(own["codes"], start, stop, self.codebooks[modality], where)
        return found


class Codes:
    """The codes of a part of a sample, read when a span of them is asked for."""

    def __init__(self, codes: Any, start: int, stop: int, codebooks: Sequence[int], where: str) -> None:
        self.codes: Any = codes
        self.start: int = start
        self.stop: int = stop
        self.codebooks: Sequence[int] = codebooks
        self.where: str = where

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, span: slice) -> Tensor:
        """Raises BadSample for a code that its codebook does not have."""
        first, last, _ = span.indices(len(self))
        found = self.codes[self.start + first : self.start + max(first, last)].long()
        sizes = torch.tensor(self.codebooks)[torch.arange(first, first + len(found)) % len(self.codebooks)]
        if bool(((found < 0) | (found >= sizes)).any()):
            raise BadSample(self.where, f"a code is outside its codebook of {tuple(self.codebooks)}")
        return found


class TokenShards(Indexed[dict[str, Any]]):
    """The samples of a folder that `mdm run tokenize_data` wrote, read when they are drawn.

    path:        the folder, or its URL: then a shard that is opened is copied to the local cache (`components.copies`)
    check:       hold a shard against its checksum when it is opened; all of them at once: `mdm run check_shards`
    open_shards: shards that each lane reads from at a time; null: any sample may come at any time, as it would from the raw
                 data. Set it where data lie far away, or do not fit the machine's memory; what it costs in randomness says
                 `components.data.draws.order.ShardOrder`

    Raises FileNotFoundError and ValueError for an index that is missing or none; when it is opened, Refused for a shard that is
    missing, truncated, or of another checksum.
    """

    def __init__(self, path: str, check: bool = True, open_shards: int | None = None) -> None:
        if open_shards is not None and open_shards < 1:
            raise ValueError(f"open_shards must be at least 1, got {open_shards}")
        self.check: bool = check
        self.open_shards: int | None = open_shards
        self.lazy: bool = False
        self.folder: AnyPath = place(path)
        index = read_index(self.folder)
        self.codebooks: dict[str, tuple[int, ...]] = {modality: tuple(sizes) for modality, sizes in index["codebooks"].items()}
        self.shards: list[dict[str, Any]] = index["shards"]
        self.shard_sizes: list[int] = [shard["count"] for shard in self.shards]
        self._ends = list(accumulate(self.shard_sizes))
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self.checked: dict[int, tuple[int, int]] = {}  # shards that were opened, and how they were then

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def lazily(self) -> TokenShards:
        """The same, whose parts are `Codes`, of which spans are read. Neither the index nor a shard is looked at again."""
        other = copy.copy(self)
        other.lazy, other._open = True, OrderedDict()
        return other

    def name_of(self, place: int) -> str:
        return f"{self.folder}, sample {place}"

    def read(self, place: int) -> dict[str, Any]:
        if not 0 <= place < len(self):
            raise IndexError(f"token shards: sample {place} of {len(self)}")
        shard = bisect_right(self._ends, place)
        spans = self.opened(shard).spans(place - (self._ends[shard - 1] if shard else 0))
        return dict(spans) if self.lazy else {modality: codes[:] for modality, codes in spans.items()}

    def file(self, shard: int) -> AnyPath:
        """Where a shard lies."""
        return self.folder / self.shards[shard]["file"]

    def opened(self, shard: int) -> Shard:
        """A shard, kept open. Raises Refused."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        self._open[shard] = self.open_shard(shard)
        if len(self._open) > KEPT_OPEN:
            self._open.popitem(last=False)
        return self._open[shard]

    def open_shard(self, shard: int) -> Shard:
        """Opens a shard, and checks it where that is to be done and was not done since it changed. Raises Refused."""
        path, about = self.file(shard), self.shards[shard]
        for tries_left in (2, 1, 0):
            try:
                file = fetched(path, about["sha256"])
                state = (file.stat().st_size, file.stat().st_mtime_ns)
                opened = Shard(path, file, about, self.codebooks, self.check and self.checked.get(shard) != state)
            except FileNotFoundError as error:  # or another process took the copy out of a full cache meanwhile
                if not tries_left:
                    raise Refused(f"token shard not found: {path}") from error
            else:
                self.checked[shard] = state
                return opened
        raise AssertionError("the last try returns or raises")
