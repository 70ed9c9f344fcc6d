"""What every sampler is, and the loop around its step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.noise import sample_rng
from components.precision import precise
from components.samplers.any_noise.start import check_sampler, pure_noise
from components.samplers.orders.in_order import ranked
from components.samplers.state import MASKS, SamplerState
from components.samplers.state import POSITION as POSITION
from components.samplers.state import TIME as TIME
from components.samplers.state import TOKEN as TOKEN
from components.weightings import Noises

LogitsFn = Callable[[Tensor], Tensor]
"""tokens `[batch, seq]` -> logits `[batch, seq, vocab]`; position i predicts the token at i."""


@runtime_checkable
class Selectable(Protocol):
    """A logits function that knows more of its rows than their tokens (prompts, a cache): finished rows are left out of the
    batch by its `select`."""

    def __call__(self, tokens: Int[Tensor, "rows seq"], /) -> Float[Tensor, "rows seq vocab"]: ...

    def select(self, rows: Int[Tensor, " some"]) -> LogitsFn:
        """The same for some of the rows."""
        ...


PATIENCE = 1000
"""Passes, at the least, that a row is given to unmask one more token before `sample` gives up."""


@runtime_checkable
class Sampler(Protocol):
    """Anything with a step is a sampler. It fills some of the masked positions, and at least one of each row in the end.

    One that needs more may be `Starting`. One that may go on for more than `PATIENCE` passes without filling any offers how
    many as `num_steps` (one around others as `most_passes`); one that leaves nothing to chance says so, `deterministic = True`;
    one that takes noise of other kinds than masks, `any_noise = True`; one that goes on where a constraint has filled the last
    mask, `revises = True`; one that may go on where a block holds no mask, so that no cache can tell where it is,
    `goes_on = True`.
    """

    def step(self, logits: Float[Tensor, "batch seq vocab"], state: SamplerState) -> SamplerState:
        """The state after one forward pass. Pure tensor code: no host synchronisation, one graph when compiled."""
        ...


@runtime_checkable
class Starting(Sampler, Protocol):
    """A sampler that is asked once, before the first step."""

    def start(self, state: SamplerState) -> SamplerState:
        """The state to begin with. May raise ValueError."""
        ...


def deterministic(sampler: object) -> bool:
    """Whether a sampler says that it leaves nothing to chance: all its samples of one prompt are alike."""
    return bool(getattr(sampler, "deterministic", False))


def started(sampler: Sampler, state: SamplerState) -> SamplerState:
    """The state that a sampler begins with."""
    return sampler.start(state) if isinstance(sampler, Starting) else state


def begun(
    sampler: Sampler,
    state: SamplerState,
    allowed: Bool[Tensor, "#batch #seq vocab"] | None,
    seed: int,
    index: Sequence[int],
) -> SamplerState:
    """The state before the first step: pure noise, with the ranks of its order. Raises ValueError as `sample`."""
    check_sampler(sampler, state)
    return started(sampler, ranked(sampler, pure_noise(state, allowed, seed, index), seed, index))


class Sampled(NamedTuple):
    """tokens: finished; confidence: each generated token's probability when it was drawn; forwards: passes of each row."""

    tokens: Int[Tensor, "batch seq"]
    confidence: Float[Tensor, "batch seq"]
    forwards: Int[Tensor, " batch"]


@torch.no_grad()
def sample(
    sampler: Sampler,
    logits_fn: LogitsFn,
    tokens: Int[Tensor, "batch seq"],
    mask_id: int,
    generate: Bool[Tensor, "batch seq"] | None = None,
    allowed: Bool[Tensor, "#batch #seq vocab"] | None = None,
    modality: Int[Tensor, "batch seq"] | None = None,
    constraint: Callable[[SamplerState], SamplerState] | None = None,
    seed: int = 0,
    index: Sequence[int] | None = None,
    on_step: Callable[[SamplerState], None] | None = None,
    noise: Noises = MASKS,
) -> Sampled:
    """Fills the masked positions of `tokens`; the others stay as they are.

    generate:   positions to fill; None: those that hold the mask token
    allowed:    ids that may stand at each position; the mask token never may
    modality:   groups of positions, for samplers and constraints that tell them apart
    constraint: changes the state after each step, e.g. `FillAfterEnd`
    seed, index: a row's noise is a function of (seed, its index, step), so a sample does not depend on its batch
    on_step:    called with the state of the whole batch after each step (progress, films)
    noise:      what the model was trained against (its config says so): where that is no mask at the start, random tokens

    Probabilities are taken in float32 or more; the tensors that `logits_fn` returns are not written to.

    Raises ValueError for an empty batch, where a position to fill is allowed no id, where its logits are NaN, infinite or rule
    out every id, for a sampler that fills nothing more of a row in max(PATIENCE, its num_steps) passes, for one that knows
    masks alone where there are none, and where noise of other kinds needs `allowed`: some ids beside the mask are no tokens.
    """
    generate = tokens == mask_id if generate is None else generate
    index = range(len(tokens)) if index is None else index
    _check(tokens, generate, allowed, mask_id)
    state = begun(sampler, SamplerState.start(tokens, generate, mask_id, modality, noise), allowed, seed, index)
    chance = Chance(generate.cpu().numpy(), seed, index)
    forwards = torch.zeros(len(tokens), dtype=torch.long)
    everything = list(range(len(tokens)))
    active, rows = everything, torch.arange(len(tokens), device=tokens.device)
    active_fn, barred = logits_fn, None
    watch, largest, revising = Watch(sampler, generate, index), None, revises(sampler)
    while True:
        still = watch(state, active, largest)  # the one synchronisation, between steps
        if not still:
            return Sampled(state.tokens, state.confidence, forwards)
        if isinstance(logits_fn, Selectable) and still != active:
            active, rows, barred = still, torch.tensor(still, device=tokens.device), None
            active_fn = logits_fn.select(rows)
        whole = active == everything
        part = state if whole else state.select(rows)
        part = replace(part, uniform=chance(active).to(tokens.device))
        logits = precise(active_fn(part.tokens))
        if allowed is None and not noise.masks_only and logits.shape[-1] != mask_id + 1:
            raise ValueError(
                f"sample: noise may be any of {logits.shape[-1]} ids, of which some are no tokens (the mask is {mask_id}); say "
                "which may stand where: `allowed`"
            )
        if barred is None:  # once for the same rows
            own = allowed if whole or allowed is None or len(allowed) == 1 else allowed[rows]
            barred = ruled_out(own, mask_id, logits)
        logits = logits.masked_fill(barred, float("-inf"))
        largest = logits.amax(dim=-1).masked_fill(~part.masked | part.finished[:, None], 0.0)
        before, part = part.finished, sampler.step(logits, part)
        part = replace(part, finished=part.finished | before)
        if constraint is not None:
            held = constraint(part)
            part = replace(held, finished=part.finished) if revising else held
        state = part if whole else state.merge(rows, part)
        forwards[still] += 1
        if on_step is not None:
            on_step(state)


def ruled_out(
    allowed: Bool[Tensor, "#batch #seq vocab"] | None, mask_id: int, logits: Float[Tensor, "batch seq vocab"]
) -> Bool[Tensor, "#batch #seq vocab"]:
    """The ids that may not stand at each position: those that are not allowed, and the mask token."""
    mask = torch.arange(logits.shape[-1], device=logits.device) == mask_id
    return mask[None, None] if allowed is None else ~allowed | mask


class Watch:
    """The rows that need a further pass, and the errors that else would be an endless loop, or a sample of mask tokens."""

    def __init__(self, sampler: Sampler, generate: Bool[Tensor, "batch seq"], index: Sequence[int]) -> None:
        self.index = index  # what a row is called
        self.name: str = type(sampler).__name__
        self.patience: int = max(PATIENCE, passes(sampler))
        self.least: list[int] = [generate.shape[1] + 1] * len(generate)  # masked tokens of each row, when there were fewest
        self.idle: list[int] = [0] * len(generate)  # passes since

    def __call__(self, state: SamplerState, active: Sequence[int], largest: Float[Tensor, "rows seq"] | None) -> list[int]:
        """What is still to be done, by one transfer to the host. largest: logit of each position to fill of the active rows."""
        broken = torch.zeros(1, device=state.tokens.device) if largest is None else ~largest.isfinite().all()
        masked = state.masked.sum(dim=1).masked_fill(state.finished, -1)
        *rows, broken = torch.cat([masked, broken.long().view(1)]).tolist()
        if broken and largest is not None:
            row, position = (~largest.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"sample: nothing can be drawn at position {position} of row {self.index[active[row]]}: the largest of its "
                f"logits is {largest[row, position].item()} "
                "(nan, inf: broken weights, or a float16 overflow; -inf: no id is left)"
            )
        still = [row for row, left in enumerate(rows) if left >= 0]
        for row in still:
            self.idle[row] = 0 if rows[row] < self.least[row] else self.idle[row] + 1
            self.least[row] = min(rows[row], self.least[row])
            if self.idle[row] > self.patience:
                raise ValueError(
                    f"sample: {self.name} has unmasked nothing of row {self.index[row]} in {self.patience} passes; "
                    f"{rows[row]} are left"
                )
        return still


def passes(sampler: object) -> int:
    """How many passes a sampler, or one that it is made of, may take by its settings."""
    own = getattr(sampler, "most_passes", None), getattr(sampler, "num_steps", None) or 0
    return own[0] or max([own[1], *map(passes, parts(sampler))])


def revises(sampler: object) -> bool:
    """Whether a sampler, or one that it is made of, says that it has more to do where no mask is left."""
    return bool(getattr(sampler, "revises", False)) or any(map(revises, parts(sampler)))


def parts(sampler: object) -> list[object]:
    """The samplers that one is made of."""
    inner = getattr(sampler, "sampler", None)
    return [*([] if inner is None else [inner]), *(getattr(sampler, "samplers", None) or ())]


class Chance:
    """The random numbers of each step, `[rows, 3, seq]`: every row from a generator of its own, for its own positions."""

    def __init__(self, generate: np.ndarray, seed: int, index: Sequence[int]) -> None:
        self.positions: list[np.ndarray] = [np.flatnonzero(row) for row in generate]
        self.generators: list[np.random.Generator] = [sample_rng(seed, "sample", i) for i in index]
        self.length: int = generate.shape[1]

    def __call__(self, rows: Sequence[int]) -> Float[Tensor, "rows 3 seq"]:
        drawn = np.zeros((len(rows), 3, self.length))
        for i, row in enumerate(rows):
            drawn[i][:, self.positions[row]] = self.generators[row].random((3, len(self.positions[row])))
        return torch.from_numpy(drawn)


def _check(tokens: Tensor, generate: Tensor, allowed: Tensor | None, mask_id: int) -> None:
    if len(tokens) == 0:
        raise ValueError("sample: the batch is empty")
    if allowed is None:
        return
    ids = torch.arange(allowed.shape[-1], device=allowed.device) != mask_id
    nothing = generate & ~(allowed & ids).any(dim=-1)
    if bool(nothing.any()):
        row, position = nothing.nonzero()[0].tolist()
        raise ValueError(f"sample: no id is allowed at position {position} of row {row}, which is to be generated")
