"""A study: many runs of one recipe over a grid, recorded in one table.

folder/runs/            the runs, as in mdm/studies/runs.py: a finished cell is never repeated, one that failed is recorded
folder/runs.parquet     a row for each cell and seed; its columns:

    cell, seed          what was run; `status`: finished, diverged (loss not finite) or crashed; `error` says why
    <changed keys>      dotted, as in the config
    share/<stream>      of the run's tokens
    parameters          N, without embeddings;  flops: of the whole run, forward and backward
    tokens, steps, seconds
    loss                mean over tasks of the held-out NELBO, bits a token;  bits/<task>: of each task
    squared_grad_norm   mean in the second half of training
    <measured>          what the study's `measure` gives, see mdm/studies/measures.py

The questions that are sweeps (batch, inference) have a row for each run or setting, with columns of their own beside `cell`,
`group` and `status`: see mdm/studies/batch.py and mdm/studies/inference/question.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from components.files import in_one_line
from components.places import publish
from components.progress import Bar
from mdm.config import UserError
from mdm.config.names import close_file, up_to_date
from mdm.studies.grid import Cell
from mdm.studies.measures import Finished
from mdm.studies.runs import Runs, run_one, status_of


def claim(folder: Path, of: Mapping[str, Any]) -> None:
    """Makes the folder this study's. Raises UserError where it holds another one."""
    header, of = folder / "study.json", up_to_date(json.loads(json.dumps(of)))
    held = up_to_date(json.loads(header.read_text())) if header.is_file() else of
    for key, value in of.items():
        if held.get(key) != value:
            raise UserError(
                f"output_dir {folder} holds another study, whose {key} is {held.get(key)!r} and not {value!r}; choose another "
                "folder, or delete it"
            )
    header.write_text(json.dumps(of, indent=1))


def run_cells(
    folder: Path, config: str, base: Mapping[str, Any], cells: Sequence[Cell], workers: int | None, ray: str | None
) -> list[dict[str, Any]]:
    """Runs what has not finished yet, here or on a Ray cluster; returns a row for each cell."""
    runs = Runs(folder, config, base, workers, tolerant=True)
    changes = {cell.name: cell.changes for cell in cells}
    if ray is None:
        runs.run(changes)
    else:
        _on_ray(runs, {name: {**base, **c} for name, c in changes.items() if not runs.finished(name, c)}, ray)
    runs.close()
    lost = {"loss": float("nan"), "error": "the cluster did not run it"}
    return [_row(cell, runs.outcome(cell.name) or lost) for cell in cells]


def measure_cells(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    cells: Sequence[Cell],
    measures: Sequence[Callable[[Finished], dict[str, float]]],
    settings: Callable[[Cell], Any],
    of: Any,
) -> list[dict[str, Any]]:
    """The rows with what the measures say of each finished cell, once each: kept in runs/CELL.measured.json.

    of: the measures as the config has them; what was measured by others is measured again
    """
    runs, group = folder / "runs", cells[0].group
    finished = {cell.name for cell, row in zip(cells, rows, strict=True) if row["status"] == "finished"}
    first = {cell.seed: cell.name for cell in reversed(cells) if cell.group == group and cell.name in finished}
    out = []
    for cell, row in zip(Bar(cells, unit="cell", desc="measuring"), rows, strict=True):
        path = runs / f"{cell.name}.measured.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        if cell.name in finished and cell.seed in first and up_to_date(known.get("of")) != up_to_date(of):
            run, figures = Finished(settings(cell), runs / cell.name, runs / first[cell.seed]), {}
            for measure in measures:
                figures |= measure(run)
            known = {"of": of, "figures": figures}
            publish(path, json.dumps(known))
        out.append({**row, **known.get("figures", {})})
    return out


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
    where = tune.RunConfig(name="ray", storage_path=folder, verbose=1)
    tuner = tune.Tuner(
        tune.with_resources(trial, resources), param_space={"name": tune.grid_search(list(changes))}, run_config=where
    )
    tuner.fit()
    ray.shutdown()


def _row(cell: Cell, outcome: Mapping[str, Any]) -> dict[str, Any]:
    changed = {key: json.dumps(v) if isinstance(v, (Mapping, list)) else v for key, v in cell.changes.items()}
    return {
        "cell": cell.name,
        "group": cell.group,
        "status": status_of(outcome),
        **changed,
        **outcome,
    }


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as parquet; a figure that a row lacks is null."""
    import pyarrow
    from pyarrow import parquet

    columns = list(dict.fromkeys(key for row in rows for key in row))
    partial = path.with_name(f"{path.name}.partial")
    parquet.write_table(pyarrow.table({c: [row.get(c) for row in rows] for c in columns}), partial)
    os.replace(partial, path)


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a study's runs.parquet. Raises UserError where there is none."""
    from pyarrow import parquet

    if not path.is_file():
        near = close_file(path.parent if path.name == "runs.parquet" else path)
        raise UserError(f"{path}: no table of a study; mdm run study writes one{near}")
    try:
        return parquet.read_table(path).to_pylist()
    except Exception as error:  # a damaged file, two columns of one name, a date beyond the calendar
        raise UserError(f"{path} cannot be read: {in_one_line(error)[:300]}") from error
