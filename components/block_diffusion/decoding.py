"""Generation block by block, in rows of different lengths that go on at their own pace (BD3-LM, 2503.09573).

Inside a block any sampler of the house works, on that block alone: its steps and counts are the block's, and a pass costs what
a block costs, however long the text. A finished block is computed once more, with the first pass of the next one; with a cache
(components/block_diffusion/cache.py) that is the last time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.noise import sample_rng
from components.precision import precise
from components.samplers.base import PATIENCE, Sampled, Sampler, begun, passes, revises
from components.samplers.constraints import FillAfterEnd
from components.samplers.state import MASKS, SamplerState
from components.types import Movable
from components.weightings import Noises


@runtime_checkable
class BlockLogits(Protocol):
    """Whatever gives the logits of a block, given what is finished before it."""

    def __call__(
        self, tokens: Int[Tensor, "rows seq"], start: Sequence[int], stop: Sequence[int], width: int
    ) -> Float[Tensor, "rows *copies width vocab"]:
        """Logits of the positions from start to stop of each row, and anything behind up to `width`. All before is finished."""
        ...

    def select(self, rows: Int[Tensor, " some"]) -> None:
        """Which of the rows go on: the others are not asked for again."""
        ...


class Finished(NamedTuple):
    """A block that has just been finished: of which row of the batch, its positions, and whether it was the row's last."""

    row: int
    start: int
    stop: int
    last: bool


class Span(NamedTuple):
    """A block that holds positions to fill, and where its canvas ends."""

    start: int
    stop: int
    canvas_stop: int
    modality: int


@dataclass(frozen=True)
class Task(Movable):
    """What is to be filled, on the device.

    tokens:   with anything at the positions to `generate`
    block:    of each position, rising from left to right
    modality: of each position
    kind:     what may stand at each position: a row of `allowed`
    ids:      the token that each of the logits is of, the mask token last
    end_id:   a canvas (a run of one modality) that holds it is over, and filled up with it; None: nothing ends early
    """

    tokens: Int[Tensor, "batch seq"]
    generate: Bool[Tensor, "batch seq"]
    block: Int[Tensor, "batch seq"]
    modality: Int[Tensor, "batch seq"]
    kind: Int[Tensor, "batch seq"]
    allowed: Bool[Tensor, "kinds vocab"]
    ids: Int[Tensor, " vocab"]
    end_id: int | None = None


@torch.no_grad()
def sample_blocks(
    samplers: Sequence[Sampler],
    logits_fn: BlockLogits,
    task: Task,
    seed: int = 0,
    index: Sequence[int] | None = None,
    on_step: Callable[[Int[Tensor, "batch seq"], Float[Tensor, "batch seq"]], None] | None = None,
    on_block: Callable[[Int[Tensor, "batch seq"], Finished], None] | None = None,
    noise: Noises = MASKS,
) -> Sampled:
    """Fills what is to be generated, block after block; all else stays as it is.

    samplers:    of each modality
    seed, index: a row's noise is a function of (seed, its index, its passes), so a sample does not depend on its batch
    on_step:     called with tokens and confidence, first and after each pass;  on_block: with the tokens, for a finished block
    noise:       what the model was trained against

    Raises ValueError for an empty batch, where a position may hold no id, where logits are NaN, infinite or rule out every id,
    and for a sampler that fills nothing more of a block in max(PATIENCE, its num_steps) passes.
    """
    if len(task.tokens) == 0:
        raise ValueError("sample: the batch is empty")
    run = _Run(samplers, logits_fn, task, seed, range(len(task.tokens)) if index is None else index, noise)
    if on_step is not None:
        on_step(run.tokens.clone(), run.confidence.clone())
    while run.rows:
        run.step()
        if on_step is not None:
            on_step(run.tokens.clone(), run.confidence.clone())
        for block in run.advance():
            if on_block is not None:
                on_block(run.tokens, block)
    return Sampled(run.tokens, run.confidence, run.forwards)


class _Row:
    """The blocks that a row has still to fill, the current one first; and since when it has filled nothing."""

    def __init__(self, place: int, index: int, seed: int, spans: list[Span]) -> None:
        self.place, self.index, self.spans = place, index, spans
        self.chance: np.random.Generator = sample_rng(seed, "sample", index)
        self.least, self.idle = 2**40, 0


class _Run:
    """The rows that are not done, and the states of their current blocks."""

    def __init__(
        self, samplers: Sequence[Sampler], logits_fn: BlockLogits, task: Task, seed: int, index: Sequence[int], noise: Noises
    ) -> None:
        self.samplers, self.logits_fn, self.task, self.seed, self.noise = samplers, logits_fn, task, seed, noise
        self.mask_id, self.device = len(task.ids) - 1, task.tokens.device
        self.forwards: Tensor = torch.zeros(len(task.tokens), dtype=torch.long)
        self.allowed: Tensor = task.allowed & (torch.arange(len(task.ids), device=self.device) < self.mask_id)
        self.constraint = None if task.end_id is None else FillAfterEnd(task.end_id)
        found = spans(task.generate.cpu().numpy(), task.block.cpu().numpy(), task.modality.cpu().numpy())
        every = [_Row(i, index[i], seed, own) for i, own in enumerate(found)]
        self.rows: list[_Row] = [row for row in every if row.spans]
        self.width: int = max((s.stop - s.start for row in every for s in row.spans), default=0)
        room = (0, self.width)  # a block may be longer than what is left
        self._tokens: Tensor = torch.nn.functional.pad(torch.where(task.generate, task.ids[-1], task.tokens), room)
        self._confidence: Tensor = torch.zeros(self._tokens.shape, dtype=torch.float64, device=self.device)
        if self.rows and len(self.rows) < len(every):
            logits_fn.select(self._tensor([row.place for row in self.rows]))
        if self.rows:
            self.state = self._begun(self.rows)
            self._place()

    @property
    def tokens(self) -> Int[Tensor, "batch seq"]:
        """What stands where."""
        return self._tokens[:, : self.task.tokens.shape[1]]

    @property
    def confidence(self) -> Float[Tensor, "batch seq"]:
        """The probability of each generated token when it was drawn."""
        return self._confidence[:, : self.task.tokens.shape[1]]

    def step(self) -> None:
        """A forward pass, and a step of each row's sampler in its block."""
        where, rows = self.where, self.rows
        start, stop = [row.spans[0].start for row in rows], [row.spans[0].stop for row in rows]
        logits = precise(self.logits_fn(self.tokens[where], start, stop, self.width))
        copies = logits.ndim == 4  # of a sampler that judges drafts: the finished copy, then noisy ones
        logits = logits.masked_fill(self.barred[:, None] if copies else self.barred, float("-inf"))
        largest = logits.amax(dim=-1)
        largest = largest.amax(dim=1) if copies else largest  # nan and inf of any copy
        self.largest: Tensor = largest.masked_fill(~self.state.masked | self.state.finished[:, None], 0.0)
        drawn = np.zeros((len(rows), 3, self.width))
        for own, row, generate in zip(drawn, rows, self.generate, strict=True):
            own[:, generate] = row.chance.random((3, int(generate.sum())))
        state = replace(self.state, uniform=torch.from_numpy(drawn).to(self.device))
        kinds = [row.spans[0].modality for row in rows]
        for kind in sorted(set(kinds)):
            some = None if len(set(kinds)) == 1 else self._tensor([i for i, k in enumerate(kinds) if k == kind])
            before = state if some is None else state.select(some)
            after = self.samplers[kind].step(logits if some is None else logits[some], before)
            after = replace(after, finished=after.finished | before.finished)
            if self.constraint is not None:
                held = self.constraint(after)
                after = replace(held, finished=after.finished) if revises(self.samplers[kind]) else held
            state = after if some is None else state.merge(some, after)
        self.state = state
        self.forwards[[row.place for row in rows]] += 1
        self._show()

    def _show(self) -> None:
        """Puts what the samplers have into the rows: of a block that begins, pure noise."""
        state, at = self.state, (self.where[:, None], self.places)
        self._tokens[at] = torch.where(state.generate, self.task.ids[state.tokens], self._tokens[at])
        self._confidence[at] = torch.where(state.generate, state.confidence, self._confidence[at])

    def advance(self) -> list[Finished]:
        """Goes on to the next block of the rows whose current one is finished, by one transfer to the host a pass."""
        state, end = self.state, self.task.end_id
        ended = torch.zeros_like(state.finished) if end is None else ((state.tokens == end) & state.generate).any(dim=1)
        left = state.masked.sum(dim=1).masked_fill(state.finished, -1)
        broken = ~self.largest.isfinite().all()
        *found, broken = torch.cat([left, ended.long(), broken.long().view(1)]).tolist()
        if broken:
            self._broken()
        left, ended = found[: len(self.rows)], found[len(self.rows) :]
        done: list[Finished] = []
        for row, masked, over in zip(self.rows, left, ended, strict=True):
            if masked >= 0:
                self._watch(row, masked)
                continue
            span = row.spans.pop(0)
            if over:
                behind = (row.place, slice(span.stop, span.canvas_stop))
                self._tokens[behind] = torch.where(self.task.generate[behind], self.task.ids[end], self._tokens[behind])
                self._confidence[behind] = torch.where(self.task.generate[behind], 1.0, self._confidence[behind])
                row.spans = [s for s in row.spans if s.start >= span.canvas_stop]
            row.least, row.idle = 2**40, 0
            done.append(Finished(row.place, span.start, span.stop, not row.spans))
        if done:
            self._renew({block.row for block in done})
        return done

    def _renew(self, places: set[int]) -> None:
        """Leaves out the rows that are done, and begins the next blocks of those that are not."""
        keep = [i for i, row in enumerate(self.rows) if row.spans]
        if len(keep) < len(self.rows):
            self.rows = [self.rows[i] for i in keep]
            if not keep:
                return
            self.logits_fn.select(self._tensor(keep))
            self.state = self.state.select(self._tensor(keep))
        new = [i for i, row in enumerate(self.rows) if row.place in places]
        if new:
            self.state = self.state.merge(self._tensor(new), self._begun([self.rows[i] for i in new]))
        self._place()

    def _place(self) -> None:
        """Where the current blocks are, and what may stand there."""
        self.where, self.places, _ = self._at(self.rows)
        self.generate: np.ndarray = self.state.generate.cpu().numpy()
        self.barred: Tensor = ~self._allowed(self.where, self.places)
        self._show()

    def _at(self, rows: Sequence[_Row]) -> tuple[Tensor, Tensor, Tensor]:
        """Of the current blocks: the rows in the batch, the positions, and which of those are inside."""
        offset = torch.arange(self.width, device=self.device)
        start, stop = (self._tensor([getattr(row.spans[0], edge) for row in rows])[:, None] for edge in ("start", "stop"))
        return self._tensor([row.place for row in rows]), start + offset, start + offset < stop

    def _allowed(self, where: Int[Tensor, " rows"], places: Int[Tensor, "rows width"]) -> Bool[Tensor, "rows width vocab"]:
        return self.allowed[self.task.kind[where[:, None], places.clamp(max=self.task.tokens.shape[1] - 1)]]

    def _begun(self, rows: Sequence[_Row]) -> SamplerState:
        """The states that the samplers begin the rows' current blocks with. Raises ValueError where no id is allowed."""
        where, places, inside = self._at(rows)
        at = (where[:, None], places.clamp(max=self.task.tokens.shape[1] - 1))
        generate, allowed = self.task.generate[at] & inside, self._allowed(where, places)
        _check_allowed(generate & ~allowed.any(dim=-1), rows)
        local = torch.zeros_like(places)  # what is given inside a block is the model's to see, not the sampler's
        state = SamplerState.start(local, generate, self.mask_id, self.task.modality[at], self.noise)
        if any(getattr(sampler, "drafts", False) for sampler in self.samplers):
            state = replace(state, draft=torch.zeros(*local.shape, len(self.task.ids), dtype=torch.float64, device=self.device))
        keys = [row.index + (row.spans[0].start << 40) for row in rows]
        kinds = [row.spans[0].modality for row in rows]
        for kind in set(kinds):
            some = self._tensor([i for i, k in enumerate(kinds) if k == kind])
            own = state.select(some)
            index = [key for key, k in zip(keys, kinds, strict=True) if k == kind]
            state = state.merge(some, begun(self.samplers[kind], own, allowed[some], self.seed, index))
        return state

    def _watch(self, row: _Row, masked: int) -> None:
        sampler = self.samplers[row.spans[0].modality]
        row.idle = 0 if masked < row.least else row.idle + 1
        row.least = min(masked, row.least)
        if row.idle > (patience := max(PATIENCE, passes(sampler))):
            name = type(sampler).__name__
            raise ValueError(f"sample: {name} has unmasked nothing of row {row.index} in {patience} passes; {masked} are left")

    def _broken(self) -> None:
        row, position = (~self.largest.isfinite()).nonzero()[0].tolist()
        own = self.rows[row]
        raise ValueError(
            f"sample: nothing can be drawn at position {own.spans[0].start + position} of row {own.index}: the largest of its "
            f"logits is {self.largest[row, position].item()} (nan, inf: broken weights, or a float16 overflow; -inf: no id is "
            "left)"
        )

    def _tensor(self, values: Sequence[int]) -> Int[Tensor, " n"]:
        return torch.tensor(values, device=self.device)


def spans(generate: np.ndarray, block: np.ndarray, modality: np.ndarray) -> list[list[Span]]:
    """Of each row, the blocks in which anything is to be filled, from left to right."""
    found = []
    for fill, own, kind in zip(generate, block, modality, strict=True):
        edges = [0, *(np.flatnonzero(np.diff(own)) + 1).tolist(), len(own)]
        canvas = np.append(np.flatnonzero(np.diff(kind)) + 1, len(own))
        row = []
        for start, stop in pairwise(edges):
            inside = np.flatnonzero(fill[start:stop])
            if len(inside):
                first = start + int(inside[0])
                row.append(Span(start, stop, int(canvas[np.searchsorted(canvas, first, side="right")]), int(kind[first])))
        found.append(row)
    return found


def _check_allowed(nothing: Bool[Tensor, "rows width"], rows: Sequence[_Row]) -> None:
    if bool(nothing.any()):
        row, offset = nothing.nonzero()[0].tolist()
        raise ValueError(
            f"sample: no id is allowed at position {rows[row].spans[0].start + offset} of row {rows[row].index}, "
            "which is to be generated"
        )
