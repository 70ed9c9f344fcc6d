"""Whose turn comes when: a rank for every position that is generated. Lower is earlier; those of one rank are a group.

    log p(x) = sum_k sum_{i in G_k} log p(x_i | x_{G_1}, ..., x_{G_{k-1}}),    G_k the positions of rank k

With groups of one that is exact, in any order; the tokens of a larger group are taken to be independent given those before it.
The mean over all orders of groups of one is masked diffusion's bound (2110.02037; A3, 2601.13228; ARMD, 2601.16971).

A model of two streams (mdm/models/two_stream.py) says all terms in one pass, and learns from what `OrderMasker` makes. In
sampling `components.samplers.InOrder` follows an order; other samplers make one on their way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int

from components.maskers import documents
from components.noise import sample_rng
from components.types import Batch, NoisyBatch

ROW = (1 << 40) - 1
"""The bits of a document's index that count the rows of its stream (see components/data/nodes.py)."""
TRIED = 64
"""Rows at the start of a stream with which all stages of a curriculum are tried: what does not fit is said before long work."""


@runtime_checkable
class Order(Protocol):
    """lengths: positions that are generated of each canvas of a document; rng: of the document. A rank for each, from 0."""

    def __call__(self, lengths: Sequence[int], rng: np.random.Generator) -> Int[np.ndarray, " positions"]: ...


@dataclass(frozen=True)
class Sequential:
    """As they stand, `group` at a time: an autoregressive model, or blocks whose tokens come at once."""

    group: int = 1

    def __post_init__(self) -> None:
        _check_group(type(self).__name__, self.group)

    def __call__(self, lengths: Sequence[int], rng: np.random.Generator) -> Int[np.ndarray, " positions"]:
        return np.arange(sum(lengths)) // self.group


@dataclass(frozen=True)
class Permuted:
    """A permutation of all, `group` at a time; the last group is what is left."""

    group: int = 1

    def __post_init__(self) -> None:
        _check_group(type(self).__name__, self.group)

    def __call__(self, lengths: Sequence[int], rng: np.random.Generator) -> Int[np.ndarray, " positions"]:
        return rng.permutation(sum(lengths)) // self.group


@dataclass(frozen=True)
class ByBlock:
    """Blocks of `size` of each canvas, from left to right; inside a block in the order `inside`."""

    size: int
    inside: Order = field(default_factory=Permuted)

    def __post_init__(self) -> None:
        _check_group(type(self).__name__, self.size, "size")
        check_order("ByBlock: inside", self.inside, Curriculum)

    def __call__(self, lengths: Sequence[int], rng: np.random.Generator) -> Int[np.ndarray, " positions"]:
        sizes = [min(self.size, length - start) for length in lengths for start in range(0, length, self.size)]
        return one_after_another([self.inside([size], rng) for size in sizes])


@dataclass(frozen=True)
class Strided:
    """ARMD's parallel decoding (2601.16971): each canvas in `streams` pieces. Their first positions come one after the other,
    and then the next one of all pieces at a time. One stream is left to right.

    Raises ValueError where a canvas does not divide into so many.
    """

    streams: int = 1

    def __post_init__(self) -> None:
        _check_group(type(self).__name__, self.streams, "streams")

    def __call__(self, lengths: Sequence[int], rng: np.random.Generator) -> Int[np.ndarray, " positions"]:
        return one_after_another([self._canvas(length) for length in lengths])

    def _canvas(self, length: int) -> Int[np.ndarray, " positions"]:
        if length % self.streams:
            fitting = [n for n in range(1, length + 1) if length % n == 0]
            raise ValueError(
                f"Strided: streams = {self.streams} do not divide a canvas of {length} positions; "
                f"take {', '.join(map(str, fitting[:6]))}"
            )
        stream, place = np.divmod(np.arange(length), max(length // self.streams, 1))
        return np.where(place == 0, stream, self.streams - 1 + place)


@dataclass(frozen=True)
class Explicit:
    """The positions that are generated, by their place among them, in the order in which they come: [2, 0, 1] begins with the
    third.

    Raises ValueError for what is no permutation, or one of another number of positions.
    """

    order: Sequence[int]

    def __post_init__(self) -> None:
        named = np.asarray(self.order)
        if named.ndim != 1 or not np.array_equal(np.sort(named), np.arange(len(named))):
            shown = list(self.order)[:12] if named.ndim else self.order
            raise ValueError(
                f"Explicit: order is no permutation: it has to name each of 0 to {max(named.size, 1) - 1} once, got "
                f"{shown}{' ...' if named.size > 12 else ''}"
            )

    def __call__(self, lengths: Sequence[int], rng: np.random.Generator) -> Int[np.ndarray, " positions"]:
        if sum(lengths) != len(self.order):
            raise ValueError(f"Explicit: order names {len(self.order)} positions, and {sum(lengths)} are generated")
        return np.argsort(np.asarray(self.order))


@dataclass(frozen=True)
class Curriculum:
    """Orders over a training: each from a share of it on (A3: groups that grow in order, and then are permuted).

    blend: between two of them either is drawn, the later one ever more often (ARMD: ever more of the orders are permuted)

    Raises ValueError for no order from the start on, for shares outside [0, 1), and for a stage that is no order.
    """

    stages: Mapping[float, Order]
    blend: bool = False

    def __post_init__(self) -> None:
        shares = list(self.stages) if isinstance(self.stages, Mapping) else [self.stages]
        numbers = all(isinstance(share, (int, float)) and not isinstance(share, bool) for share in shares)
        if not numbers or 0 not in shares or not all(0 <= share < 1 for share in shares):
            raise ValueError(f"Curriculum: stages are shares of a training in [0, 1), the first of them 0; got {shares}")
        for share, order in self.stages.items():
            check_order(f"Curriculum: stages.{share}", order, Curriculum)

    def __call__(self, lengths: Sequence[int], rng: np.random.Generator) -> Int[np.ndarray, " positions"]:
        """The order of the end."""
        return self.stages[max(self.stages)](lengths, rng)

    def at(self, progress: float, rng: np.random.Generator) -> Order:
        """The order of a document after a share of the training."""
        shares = sorted(self.stages)
        now = max(i for i, share in enumerate(shares) if share <= max(progress, 0.0))
        if self.blend and now + 1 < len(shares):
            passed = (progress - shares[now]) / (shares[now + 1] - shares[now])
            now += int(rng.random() < passed)
        return self.stages[shares[now]]


@dataclass(frozen=True)
class OrderMasker:
    """A group and nothing behind it is what predicts it: of every token of a document, all at once, in an order of its own.

    The weight is 1, and the weighted loss the negative log-likelihood in that order, exactly: no time is drawn.

    order:   of all documents, each drawn from (seed, index); or a `Curriculum`
    horizon: rows of its stream until the end of the training, by which a curriculum goes
    """

    mask_id: int
    order: Order = field(default_factory=Permuted)
    seed: int = 0
    horizon: int | None = None
    pairs = False

    def __post_init__(self) -> None:
        check_order("OrderMasker: order", self.order)
        if isinstance(self.order, Curriculum) and (self.horizon or 0) < 1:
            raise ValueError(
                f"OrderMasker: a Curriculum goes by `horizon`, the rows of its stream in the whole training; got {self.horizon}"
            )

    def __call__(self, batch: Batch) -> NoisyBatch:
        maskable, modality = batch.maskable.numpy(), batch.modality.numpy()
        rank = given_ranks(maskable, modality, batch.document.numpy())
        for row, span, index in documents(batch):
            where = span.start + np.flatnonzero(maskable[row, span])
            rank[row, where] = 1 + rank[row, span].max() + self._ranks(canvases(where, modality[row]), index)
        return NoisyBatch(
            clean=batch,
            noisy=batch.tokens.masked_fill(batch.maskable, self.mask_id),
            mask=batch.maskable,
            weight=batch.maskable.float(),
            block=torch.from_numpy(rank),
            apart=True,
        )

    def _ranks(self, lengths: Sequence[int], index: int) -> Int[np.ndarray, " positions"]:
        rng = sample_rng(self.seed, "order", index)
        order, row = self.order, index & ROW
        if isinstance(order, Curriculum):
            for stage in order.stages.values() if row < TRIED else ():
                checked(stage(lengths, sample_rng(self.seed, "order", index)), sum(lengths), stage)
            order = order.at(row / (self.horizon or 1), rng)
        return checked(order(lengths, rng), sum(lengths), order)


def given_ranks(
    generate: Bool[np.ndarray, "batch seq"],
    modality: Int[np.ndarray, "batch seq"],
    document: Int[np.ndarray, "batch seq"],
) -> Int[np.ndarray, "batch seq"]:
    """Of what is given: 0 of structure, and of prompts on canvases of their own; 1 of what is given on one that is generated.

    So structure and prompts do not see what stands on such a canvas, as they never do where all of it is generated.
    """
    begins = np.ones(modality.shape, dtype=bool)
    begins[:, 1:] = (modality[:, 1:] != modality[:, :-1]) | (document[:, 1:] != document[:, :-1])
    canvas = np.cumsum(begins.ravel()).reshape(begins.shape)
    return (~generate & np.isin(canvas, canvas[generate])).astype(np.int64)


def canvases(where: Int[np.ndarray, " generated"], modality: Int[np.ndarray, " seq"]) -> list[int]:
    """How many of the positions `where` each canvas has: a canvas is a run of one modality."""
    if len(where) == 0:
        return []
    run = np.cumsum(np.diff(modality, prepend=modality[:1]) != 0)
    return np.unique(run[where], return_counts=True)[1].tolist()


def one_after_another(ranks: Sequence[np.ndarray]) -> Int[np.ndarray, " all"]:
    """The ranks of parts, each `[positions]`, as those of the whole: all of a part come before the next one."""
    before, found = 0, [np.zeros(0, dtype=np.int64)]
    for own in ranks:
        found.append(own + before)
        before += int(own.max(initial=-1)) + 1
    return np.concatenate(found)


def checked(ranks: object, length: int, order: object) -> Int[np.ndarray, " positions"]:
    """The ranks that an order, which may be a user's own, has given, without gaps. Raises ValueError where they are none."""
    try:
        ranks = np.asarray(ranks)
    except ValueError:  # lists of unlike lengths
        ranks = np.asarray(ranks, dtype=object)
    if ranks.shape != (length,) or not np.issubdtype(ranks.dtype, np.integer) or (length and ranks.min() < 0):
        raise ValueError(
            f"{type(order).__name__} is no order: of {length} positions it has to give as many ranks, whole numbers from 0 on; "
            f"it gave {ranks.dtype} of shape {ranks.shape}"
        )
    return np.unique(ranks, return_inverse=True)[1].reshape(length)


def check_order(where: str, order: object, *others: type) -> None:
    """Raises ValueError for what is no order, or one of the kinds that cannot stand there: only a whole training has stages."""
    if not callable(order) or isinstance(order, (OrderMasker, *others)):
        but = "".join(f", and no {other.__name__}" for other in others)
        raise ValueError(f"{where} must be one of components.orders{but}, or a callable of yours; got {order!r}")


def _check_group(name: str, size: int, key: str = "group") -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{name}: {key} must be a whole number of positions, at least 1; got {size!r}")
