"""Ask one question of the design space: run a grid of trainings, record them in one table, draw the figure, say what it shows.

    mdm run study --config scaling_cpu            parameters against tokens, and masked diffusion against next-token prediction
    mdm run study --config schedules_cpu          noise schedules, time samplers, anti-masking, loss weights
    mdm run study --config mixing_cpu             the shares of digits, speech and text

Every cell is a run of `pretrain`, here (a process for each core or GPU) or on a Ray cluster (`ray=auto`). Writes runs.parquet
(its columns are described in mdm/study.py), summary.json, figure.png and finding.md. Run it again to go on: a finished cell is
never repeated, one that crashes or diverges is recorded and left out. `rebuild=true` draws again from the table alone.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING

from mdm.cli import load_recipe, run_recipe
from mdm.config import UserError
from mdm.model import MaskedDiffusionModel
from mdm.run import check_output_dir
from mdm.runs import settings_of
from mdm.study import Cell, expand, read_table, run_cells, write_table

CONFIG = "scaling_cpu"
QUESTIONS = ("scaling", "schedules", "mixing")

pretrain = load_recipe("pretrain")


@dataclass
class Group:
    """Cells of a study.

    set:     what all of them change
    grid:    key -> its values: every combination is a cell;  points: or the cells themselves, keys and values of each
    budgets: FLOPs of a run, from which its tokens follow
    """

    grid: dict[str, list[Any]] = field(default_factory=dict)
    set: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    budgets: list[float] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Settings:
    """The keys of the config; `recipes/configs/scaling_cpu.yaml` explains each."""

    output_dir: str = MISSING
    question: str = MISSING
    run: str = MISSING
    set: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Group] = MISSING
    workers: int | None = None
    ray: str | None = None
    rebuild: bool = False


def validate(cfg: Settings) -> None:
    """Everything that can be known to be wrong before the first run. Raises UserError."""
    if cfg.question not in QUESTIONS:
        raise UserError(f"question: {cfg.question!r} is not one of {', '.join(QUESTIONS)}")
    if not cfg.groups:
        raise UserError("groups: it is empty; name at least one group of cells")
    check_output_dir(cfg.output_dir)
    if cfg.rebuild:
        return
    for name, group in cfg.groups.items():
        if not group.seeds or len(set(group.seeds)) < len(group.seeds):
            raise UserError(f"groups.{name}.seeds: each once, and at least one; got {group.seeds}")
    for cell in cells(cfg):
        pretrain.validate(settings_of(pretrain.Settings, cfg.run, {**cfg.set, **cell.changes, "output_dir": cfg.output_dir}))


def main(cfg: Settings) -> None:
    folder = Path(cfg.output_dir)
    question = importlib.import_module(f"mdm.studies.{cfg.question}")
    if cfg.rebuild:
        rows = read_table(folder / "runs.parquet")
    else:
        planned = cells(cfg)
        rows = run_cells(folder, cfg.run, cfg.set, planned, cfg.workers, cfg.ray)
        rows = [{**row, **cost(cfg, cell, row)} for row, cell in zip(rows, planned, strict=True)]
        write_table(folder / "runs.parquet", rows)
    summary, finding = question.conclude(rows)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    (folder / "figure.png").write_bytes(question.draw(rows, summary))
    (folder / "finding.md").write_text(f"# {cfg.question}\n\n{finding}\n")
    print(finding)
    print(f"Written to {folder}")


def cells(cfg: Settings) -> list[Cell]:
    """All cells of the study; those of a budget train for as many tokens as it pays for."""
    found: list[Cell] = []
    for name, group in cfg.groups.items():
        if group.points:
            one_by_one = [{key: [value] for key, value in point.items()} for point in group.points]
            found += [cell for point in one_by_one for cell in expand(point, group.seeds, name, group.set)]
            continue
        if not group.budgets:
            found += expand(group.grid, group.seeds, name, group.set)
            continue
        for budget in group.budgets:
            for cell in expand(group.grid, group.seeds, name, group.set):
                tokens = round(budget / model_of(cfg, cell)[1])
                changes = {**cell.changes, "tokens": tokens}
                found.append(Cell(f"{cell.name}_{budget:.3g}", cell.seed, changes, name))
    return found


def model_of(cfg: Settings, cell: Cell) -> tuple[MaskedDiffusionModel, float]:
    """The cell's model, without weights and with a vocabulary of one, and its FLOPs for a token of a pair's canvases."""
    settings = settings_of(pretrain.Settings, cfg.run, {**cfg.set, **cell.changes, "output_dir": cfg.output_dir})
    with torch.device("meta"):
        model = MaskedDiffusionModel(pretrain.model_shape(settings))
    return model, model.flops_per_token(1 + sum(n + 2 for n in settings.canvas.values() if n is not None))


def cost(cfg: Settings, cell: Cell, row: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters without embeddings, FLOPs of the whole run, and the budget that the cell belongs to."""
    model, flops_per_token = model_of(cfg, cell)
    flops = flops_per_token * (row.get("tokens") or 0)
    budgets = cfg.groups[cell.group].budgets
    closest = min(budgets, key=lambda b: abs(b - flops)) if budgets and flops else None
    return {"parameters": model.num_parameters(embeddings=False), "flops": flops, "budget": closest}


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG)
