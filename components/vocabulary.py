"""One id space for any number of modalities.

    [ text | image | audio codebook 0 | audio codebook 1 | ... | mask pad end | tasks | boundaries ]

Each id range is contiguous, so ruling out all other ids at a position is a slice of the unembedding. Special tokens follow
the ranges. `end` is the one token that closes canvases of variable length and fills them up.

A model from elsewhere keeps the ids it was trained with: its mask and end tokens may lie inside its text range, and it may know
no task or boundary tokens; then sequences have none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.files import read_json, require
from components.tasks import check_modality, find_task


@dataclass(frozen=True)
class IdRange:
    """Ids `start .. start + size - 1` of one modality, or of one of its codebooks; `may_end`: the end token is allowed too."""

    name: str
    modality: str
    start: int
    size: int
    may_end: bool

    @property
    def stop(self) -> int:
        return self.start + self.size


@dataclass(frozen=True)
class Vocabulary:
    """The id ranges in order, and the names of the special tokens that follow them, or lie at `special_ids`.

    Build one with `Vocabulary.build`, or `Vocabulary.of_text` for a text model from elsewhere.
    """

    ranges: tuple[IdRange, ...]
    specials: tuple[str, ...]
    special_ids: tuple[int, ...] | None = None

    @classmethod
    def build(cls, codebooks: Mapping[str, Sequence[int]], may_end: Collection[str], tasks: Sequence[str] = ()) -> Vocabulary:
        """A vocabulary from the codebook sizes of each modality, e.g. `{"text": (2048,), "audio": (512, 512, 16, 64)}`.

        may_end: modalities of variable length, whose canvases end with (and are filled with) the end token
        tasks:   task names, one token each

        Raises ValueError for an empty modality, a size that is not positive, a name that no task can be made of.
        """
        ranges: list[IdRange] = []
        start = 0
        for modality, sizes in codebooks.items():
            check_modality(modality)
            if not sizes or min(sizes) < 1:
                raise ValueError(f"vocabulary: {modality} needs codebook sizes of at least 1, got {tuple(sizes)}")
            for k, size in enumerate(sizes):
                name = modality if len(sizes) == 1 else f"{modality}.{k}"
                ranges.append(IdRange(name, modality, start, int(size), modality in may_end))
                start += size
        boundaries = [f"{edge}:{modality}" for modality in codebooks for edge in ("begin", "close")]
        return cls(tuple(ranges), ("mask", "pad", "end", *(f"task:{t}" for t in tasks), *boundaries))

    @classmethod
    def of_text(cls, size: int, mask: int, pad: int, end: int) -> Vocabulary:
        """The vocabulary of a text model with these ids of its own. Raises ValueError for one outside 0..size - 1."""
        for name, value in (("mask", mask), ("pad", pad), ("end", end)):
            if not 0 <= value < size:
                raise ValueError(f"vocabulary: the {name} token {value} is not one of the {size} ids")
        return cls((IdRange("text", "text", 0, size, True),), ("mask", "pad", "end"), (mask, pad, end))

    def grown(self, codebooks: Mapping[str, Sequence[int]], may_end: Collection[str], tasks: Sequence[str] = ()) -> Vocabulary:
        """This vocabulary with further modalities and task tokens: every id of it stays what it is, the new ones follow.

        Raises ValueError for a modality that it has.
        """
        for modality in codebooks:
            if modality in self.modalities:
                raise ValueError(f"vocabulary: it has {modality} already; its ids cannot change")
        added = Vocabulary.build(codebooks, may_end, tasks)
        ranges = [replace(r, start=r.start + self.size) for r in added.ranges]
        names = [n for n in added.specials if n not in self.specials]
        first = self.size + sum(r.size for r in ranges)
        ids = [*self._ids.values(), *range(first, first + len(names))]
        return Vocabulary((*self.ranges, *ranges), (*self.specials, *names), tuple(ids))

    @cached_property
    def modalities(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r.modality for r in self.ranges))

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that there is a token for."""
        return tuple(n.removeprefix("task:") for n in self.specials if n.startswith("task:"))

    @cached_property
    def _ids(self) -> dict[str, int]:
        ids = self.special_ids or range(self.ranges[-1].stop, self.ranges[-1].stop + len(self.specials))
        return dict(zip(self.specials, ids, strict=True))

    @property
    def size(self) -> int:
        return max(self.ranges[-1].stop, *(i + 1 for i in self._ids.values()))

    @property
    def structured(self) -> bool:
        """Whether sequences hold tokens of tasks and boundaries; those of a text model from elsewhere are text alone."""
        return len(self.specials) > 3

    def has(self, name: str) -> bool:
        """Whether there is such a special token."""
        return name in self._ids

    def special(self, name: str) -> int:
        """Id of a special token: "mask", "pad", "end", "task:NAME", "begin:MODALITY", "close:MODALITY"."""
        if name not in self._ids:
            raise ValueError(f"vocabulary: no special token {name!r}; it has {', '.join(self.specials)}")
        return self._ids[name]

    @property
    def mask_id(self) -> int:
        return self._ids["mask"]

    @property
    def pad_id(self) -> int:
        return self._ids["pad"]

    @property
    def end_id(self) -> int:
        return self._ids["end"]

    def ranges_of(self, modality: str) -> tuple[int, ...]:
        """Indices of a modality's id ranges, one per codebook."""
        found = tuple(i for i, r in enumerate(self.ranges) if r.modality == modality)
        if not found:
            raise ValueError(f"vocabulary: no modality {modality!r}; it has {', '.join(self.modalities)}")
        return found

    def may_end(self, modality: str) -> bool:
        """Whether the end token is allowed in a modality's canvas."""
        return self.ranges[self.ranges_of(modality)[0]].may_end

    def id_ranges(self, modality: str, length: int) -> Int[Tensor, " length"]:
        """The id range of each position of a canvas: codebooks take turns, frame by frame."""
        own = torch.tensor(self.ranges_of(modality))
        return own[torch.arange(length) % len(own)]

    def check_codes(self, modality: str, codes: Any) -> None:
        """Raises ValueError for what are no codes [n] of a modality: whole frames, each code smaller than its codebook."""
        if not isinstance(codes, Tensor) or codes.dim() != 1 or codes.is_floating_point() or codes.dtype == torch.bool:
            shape = f"{codes.dtype} {list(codes.shape)}" if isinstance(codes, Tensor) else type(codes).__name__
            raise ValueError(f"{modality}: codes are a tensor [n] of whole numbers, got {shape}")
        sizes = torch.tensor([self.ranges[i].size for i in self.ranges_of(modality)])
        if len(codes) % len(sizes):
            raise ValueError(f"{modality}: {len(codes)} codes are no whole frames of {len(sizes)}")
        wrong = (codes < 0) | (codes >= sizes.repeat(len(codes) // len(sizes)))
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise ValueError(f"{modality}: code {int(codes[at])} at {at} is not in 0..{int(sizes[at % len(sizes)]) - 1}")

    def to_global(self, modality: str, codes: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """A tokenizer's codes (interleaved frame by frame) as ids of the shared space."""
        starts = torch.tensor([self.ranges[i].start for i in self.ranges_of(modality)])
        return codes + starts[torch.arange(len(codes)) % len(starts)]

    def to_codes(self, modality: str, ids: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The inverse of `to_global`."""
        starts = torch.tensor([self.ranges[i].start for i in self.ranges_of(modality)])
        return ids - starts[torch.arange(len(ids)) % len(starts)]

    @cached_property
    def _allowed_table(self) -> Bool[Tensor, "ranges vocab"]:
        table = torch.zeros(len(self.ranges) + 1, self.size, dtype=torch.bool)
        for i, r in enumerate(self.ranges):
            table[i, r.start : r.stop] = True
            table[i, self.end_id] = r.may_end
        table[-1] = True  # STRUCTURE (-1) indexes the last row: nothing is ruled out where nothing is predicted
        table[:, self.mask_id] = False
        return table

    def allowed(self, id_range: Int[Tensor, "*shape"]) -> Bool[Tensor, "*shape vocab"]:
        """Which ids may stand at each position: its range, and the end token where the range may end."""
        return self._allowed_table.to(id_range.device)[id_range]

    def restrict(self, logits: Float[Tensor, "*shape vocab"], id_range: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape vocab"]:
        """Logits with every id that may not stand at its position (the mask token always) set to -inf."""
        return logits.masked_fill(~self.allowed(id_range), float("-inf"))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        plain = json.loads(json.dumps(asdict(self)))
        return {key: value for key, value in plain.items() if value is not None}

    def digest(self) -> str:
        """A short fingerprint: two vocabularies share it where every id means the same."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Reads what `save` wrote. Raises ValueError, naming the file, where it is not a vocabulary."""
        try:
            raw = read_json(path)
            require(raw, path, ranges=list, specials=list)
            ranges = []
            for r in raw["ranges"]:
                require(r, path, name=str, modality=str, start=int, size=int, may_end=bool)
                ranges.append(IdRange(**r))
            own = raw.get("special_ids")
            loaded = cls(tuple(ranges), tuple(raw["specials"]), own if own is None else tuple(own))
            loaded._check()
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a vocabulary written by Vocabulary.save: {error}") from error
        return loaded

    def _check(self) -> None:
        """Raises ValueError where ids overlap, a special token lacks or stands twice, or a modality or task is none."""
        if not self.ranges:
            raise ValueError("it has no id range")
        stop = 0
        for r in self.ranges:
            if r.start < stop or r.size < 1:
                raise ValueError(f"the range {r.name} of {r.size} ids starts at {r.start}, and {stop} ids lie before it")
            stop = r.stop
        for modality in self.modalities:
            check_modality(modality)
        names = list(self.specials)
        if (
            not all(isinstance(n, str) for n in names)
            or len(set(names)) < len(names)
            or not {"mask", "pad", "end"} <= set(names)
        ):
            raise ValueError(f"special tokens must be names, each once, mask, pad and end among them; got {names}")
        for task in self.tasks:
            if absent := set(find_task(task).modalities) - set(self.modalities):
                raise ValueError(f"task {task} is of {absent.pop()}, and it has {', '.join(self.modalities)}")
        ids = self.special_ids
        if ids is not None and not (len(ids) == len(names) and all(isinstance(i, int) and i >= 0 for i in ids)):
            raise ValueError(f"special_ids must be an id for each of {len(names)} special tokens, got {list(ids)}")
