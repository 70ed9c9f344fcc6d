"""A study: many runs of one recipe over a grid, recorded in one table.

folder/runs/            the runs, as in mdm/runs.py: a finished cell is never repeated, one that fails is recorded
folder/runs.parquet     a row for each cell and seed; its columns:

    cell, seed          what was run; `status`: finished, diverged (loss not finite) or crashed; `error` says why
    <changed keys>      dotted, as in the config
    parameters          N, without embeddings;  flops: of the whole run, forward and backward
    tokens, steps, seconds
    loss                mean over tasks of the held-out NELBO, bits a token;  bits/<task>: of each task
    squared_grad_norm   mean in the second half of training
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mdm.config import UserError
from mdm.runs import Runs, run_one


@dataclass(frozen=True)
class Cell:
    """One run of a study: its name, seed, what it changes in the config, and a label of the group it belongs to."""

    name: str
    seed: int
    changes: dict[str, Any]
    group: str = "grid"


def expand(
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


def drawn(search: Mapping[str, Sequence[float]], count: int, seed: int = 0) -> list[dict[str, int]]:
    """`count` cells of whole numbers drawn log-uniformly between each key's two ends."""
    rng = np.random.default_rng(seed)
    return [
        {key: round(float(np.exp(rng.uniform(np.log(low), np.log(high))))) for key, (low, high) in search.items()}
        for _ in range(count)
    ]


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("_component_", value)).rsplit(".", 1)[-1]
    return str(value)


def run_cells(
    folder: Path, config: str, base: Mapping[str, Any], cells: Sequence[Cell], workers: int | None, ray: str | None
) -> list[dict[str, Any]]:
    """Runs what has not finished yet, here or on a Ray cluster; returns a row for each cell."""
    runs = Runs(folder, config, base, workers, tolerant=True)
    changes = {cell.name: cell.changes for cell in cells}
    if ray is not None:
        _on_ray(runs, {name: {**base, **c} for name, c in changes.items() if runs.outcome(name) is None}, ray)
    found = runs.run(changes)
    runs.close()
    return [_row(cell, found[cell.name]) for cell in cells]


def _on_ray(runs: Runs, changes: Mapping[str, Mapping[str, Any]], address: str) -> None:
    """The missing cells as trials of Ray Tune: it places them on the cluster and runs as many at a time as fit."""
    import ray
    from ray import tune

    if not changes:
        return
    ray.init(address=None if address == "local" else address, ignore_reinit_error=True, log_to_driver=False)
    folder, config, gpu = str(runs.folder.resolve()), runs.config, float(torch.cuda.is_available())

    def trial(space: dict[str, Any]) -> dict[str, float]:
        outcome = run_one(Path(folder), space["name"], config, changes[space["name"]], {"OMP_NUM_THREADS": "1"}, True)
        return {"loss": float(outcome["loss"])}

    resources = {"cpu": 1, **({"gpu": gpu} if gpu else {})}
    where = tune.RunConfig(name="ray", storage_path=folder, verbose=0)
    tuner = tune.Tuner(
        tune.with_resources(trial, resources), param_space={"name": tune.grid_search(list(changes))}, run_config=where
    )
    tuner.fit()
    ray.shutdown()


def _row(cell: Cell, outcome: Mapping[str, Any]) -> dict[str, Any]:
    loss = float(outcome["loss"])
    status = "finished" if np.isfinite(loss) else "diverged" if np.isinf(loss) else "crashed"
    changed = {key: json.dumps(v) if isinstance(v, (Mapping, list)) else v for key, v in cell.changes.items()}
    return {
        "cell": cell.name,
        "group": cell.group,
        "status": status,
        **changed,
        **{k: v for k, v in outcome.items() if k != "name"},
    }


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as parquet; a figure that a row lacks is null."""
    import pyarrow
    from pyarrow import parquet

    columns = list(dict.fromkeys(key for row in rows for key in row))
    parquet.write_table(pyarrow.table({c: [row.get(c) for row in rows] for c in columns}), path)


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a study's runs.parquet. Raises UserError where there is none."""
    from pyarrow import parquet

    if not path.is_file():
        raise UserError(f"{path}: no table of a study; mdm run study writes one")
    return parquet.read_table(path).to_pylist()
