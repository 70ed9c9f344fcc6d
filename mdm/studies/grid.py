"""A grid becomes cells: one run each, named by what it changes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mdm.config import UserError


@dataclass(frozen=True)
class Cell:
    """One run of a study: its name, seed, what it changes in the config, and a label of the group it belongs to."""

    name: str
    seed: int
    changes: dict[str, Any]
    group: str = "grid"


def combinations(
    grid: Mapping[str, Sequence[Any]], seeds: Sequence[int], group: str = "grid", fixed: Mapping[str, Any] | None = None
) -> list[Cell]:
    """Every combination of a grid's values, with every seed. Raises UserError for an empty grid or list."""
    if not grid:
        raise UserError("grid: it is empty; name at least one key with its values")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"grid.{key}: a list of values, got {values!r}")
    cells = []
    for values in itertools.product(*grid.values()):
        own = dict(zip(grid, values, strict=True))
        name = "_".join(f"{key.rsplit('.', 1)[-1]}{_short(value)}" for key, value in own.items())
        cells += [Cell(f"{group}_{name}_seed{s}", s, {**(fixed or {}), **own, "seed": s}, group) for s in seeds]
    return cells


def drawn(search: Mapping[str, Sequence[float]], count: int, seed: int = 0) -> list[dict[str, float]]:
    """`count` points, each key drawn log-uniformly between its two ends; `[low, high, step]` gives multiples of the step.

    The n-th point is a function of (search, seed, n): more draws leave the first ones as they are. Raises UserError.
    """
    for key, ends in search.items():
        if len(ends) not in (2, 3) or not 0 < ends[0] < ends[1]:
            raise UserError(f"search.{key}: [low, high] or [low, high, step], both positive and low first; got {list(ends)}")
    if count < 1:
        raise UserError(f"draws must be at least 1, got {count}")
    return [
        {key: _log_uniform(np.random.default_rng([seed, n, k]), *ends) for k, (key, ends) in enumerate(search.items())}
        for n in range(count)
    ]


def _log_uniform(rng: np.random.Generator, low: float, high: float, step: float | None = None) -> float:
    value = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    return float(f"{value:.4g}") if step is None else round(value / step) * step


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("_component_", value)).rsplit(".", 1)[-1]
    return str(value).replace("/", "-")  # it is part of a file's name


def alternatives(node: Any) -> Iterator[Any]:
    """Every combination of the lists in a grid entry: {a: [1, 2], b: {c: [3, 4]}} is four."""
    if isinstance(node, Mapping):
        for values in itertools.product(*(list(alternatives(v)) for v in node.values())):
            yield dict(zip(node, values, strict=True))
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for value in node:
            yield from alternatives(value)
    else:
        yield node
