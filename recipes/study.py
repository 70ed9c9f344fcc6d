"""Ask one question of the design space: run its cells, record them in one table, draw the figure, say what it shows.

    mdm run study --config scaling_cpu            parameters against tokens, and masked diffusion against next-token prediction
    mdm run study --config mixing_cpu             the shares of digits, speech and text
    mdm run study --config schedules_cpu          noise schedules, time samplers, anti-masking, loss weights
    mdm run study --config corruption_cpu         masks, uniform noise, both: samples by forward passes, self-correction
    mdm run study --config blocks_cpu             block sizes, from autoregressive to masked diffusion: bounds, samples, time
    mdm run study --config orders_cpu             orders of generation: in two streams, from left to right, learned
    mdm run study --config batch_cpu              the batch, scaled by the SDE rule and not
    mdm run study --config inference_cpu checkpoint=runs/quickstart         samplers, steps, guidance

Every cell is a run of `pretrain`, here (a process for each core or GPU) or on a Ray cluster (`ray=auto`); `batch` and
`inference` are what `sweep_batch` and `sweep_inference` run. Writes runs.parquet (its columns: mdm/studies/table.py),
summary.json, figure.png, finding.md and study.html. A cell that crashes or diverges is recorded and left out. Run it again to
go on: a finished cell is never repeated, one that crashed is tried again. `rebuild=true` concludes and draws again from the
table alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

import torch
from omegaconf import MISSING

from components.tasks import INSTRUCT
from mdm.config import UserError, check, instantiate
from mdm.config.component import looked_for
from mdm.config.names import close
from mdm.config.protocols import lacking
from mdm.config.trust import trust_saved
from mdm.data.settings import row_length
from mdm.models.transformer import MaskedDiffusionModel
from mdm.recipe import load_recipe, run_recipe
from mdm.studies.grid import Cell, combinations, drawn
from mdm.studies.page import write_page
from mdm.studies.runs import settings_of, write_results
from mdm.studies.table import claim, measure_cells, read_table, run_cells, write_table
from mdm.training.output import check_output_dir, output_folder
from mdm.training.reach import Trial
from mdm.training.trial import try_out

CONFIG = "scaling_cpu"
QUESTIONS = ("scaling", "mixing", "schedules", "corruption", "blocks", "orders", "batch", "inference")
SWEEPS = {"batch": "sweep_batch", "inference": "sweep_inference"}  # the recipes that make the rows of these

pretrain = load_recipe("pretrain")


@dataclass
class Group:
    """Cells of a study.

    set:     what all of them change
    grid:    key -> its values: every combination is a cell;  points: or the cells themselves, keys and values of each;
    search:  or key -> [low, high] or [low, high, step]: `draws` cells, log-uniformly between
    budgets: FLOPs of a run, from which its tokens follow
    min_steps: of a run of a budget: its physical batch is halved until it takes as many (S_crit of `sweep_batch`), since with
             fewer it is the batch that decides; the SDE rule carries the settings
    """

    grid: dict[str, list[Any]] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)
    search: dict[str, list[float]] = field(default_factory=dict)
    draws: int = 16
    set: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    budgets: list[float] = field(default_factory=list)
    min_steps: int = 0


@dataclass
class Settings:
    """The keys of the config; `recipes/configs/scaling_cpu.yaml` explains each."""

    output_dir: str = MISSING
    question: str = MISSING
    run: str = MISSING
    set: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    measure: dict[str, dict[str, Any]] = field(default_factory=dict)
    checkpoint: str | None = None
    workers: int | None = None
    ray: str | None = None
    rebuild: bool = False


def validate(cfg: Settings) -> None:
    """Everything that can be known to be wrong before the first run. Raises UserError."""
    answers(cfg.question)
    check_output_dir(cfg.output_dir)
    if cfg.rebuild:
        return
    if cfg.question in SWEEPS:
        for key in ("groups", "measure", "ray"):
            if getattr(cfg, key):
                raise UserError(f"{key}: question {cfg.question} has none, its cells are those of {SWEEPS[cfg.question]}")
        load_recipe(SWEEPS[cfg.question]).validate(sweep_settings(cfg))
        return
    if cfg.ray is not None and importlib.util.find_spec("ray") is None:
        raise UserError("ray: Ray is not installed; pip install 'trimodal-mdm[scale]', or set ray=null")
    if not cfg.groups:
        raise UserError("groups: it is empty; name at least one group of cells")
    for name, group in cfg.groups.items():
        if not group.seeds or len(set(group.seeds)) < len(group.seeds):
            raise UserError(f"groups.{name}.seeds: each once, and at least one; got {group.seeds}")
    for name, node in cfg.measure.items():
        check(node, f"measure.{name}")
    for cell in cells(cfg):
        pretrain.validate(run_settings(cfg, cell))


def trial(cfg: Settings) -> Trial:
    """What `mdm validate` does after all keys, for the study's first cell."""
    if cfg.rebuild:
        return Trial()
    if cfg.question in SWEEPS:
        sweep, own = load_recipe(SWEEPS[cfg.question]), sweep_settings(cfg)
        return getattr(sweep, "trial", try_out)(own)
    return try_out(run_settings(cfg, cells(cfg)[0]))


def main(cfg: Settings) -> None:
    folder = output_folder(cfg.output_dir)
    question = answers(cfg.question)
    claim(folder, {"question": cfg.question, "run": cfg.run})
    if cfg.rebuild:
        rows = read_table(folder / "runs.parquet")
    elif cfg.question == "inference":
        rows = load_recipe("sweep_inference").table(sweep_settings(cfg))
    elif cfg.question == "batch":
        rows = load_recipe("sweep_batch").table(sweep_settings(cfg), tolerant=True)
    else:
        planned = cells(cfg)
        measures = [instantiate(node, f"measure.{name}") for name, node in cfg.measure.items()]
        rows = run_cells(folder, cfg.run, cfg.set, planned, cfg.workers, cfg.ray)
        rows = [{**row, **cost(cfg, cell, row)} for row, cell in zip(rows, planned, strict=True)]
        for cell in planned if measures else ():  # a study's models are its own: what their configs name is trusted
            trust_saved(asdict(run_settings(cfg, cell)))
        if measures:
            rows = measure_cells(folder, rows, planned, measures, lambda cell: run_settings(cfg, cell), cfg.measure)
    write_table(folder / "runs.parquet", rows)
    summary, finding = question.conclude(rows)
    write_results(folder, summary, question.draw(rows, summary), cfg.question.rsplit(".", 1)[-1].capitalize(), finding)
    print(f"Page: {write_page(folder).resolve()}")


def answers(question: str) -> ModuleType:
    """The module that answers a question: one of ours by name, or the user's own. Raises UserError where it does not."""
    try:
        module = importlib.import_module(f"mdm.studies.{question}" if question in QUESTIONS else question)
    except ImportError as error:
        ours = f"one of {', '.join(QUESTIONS)}{close(question, QUESTIONS)}"
        own = question.partition(".")[0]
        why = f"{error}; {looked_for(own)}" if error.name == own else error
        raise UserError(f"question: {question!r} is neither {ours}, nor a module of yours: {why}") from error
    if lacks := lacking(module, ["conclude", "draw"]):
        raise UserError(f"question: the module {question} lacks {', '.join(lacks)} (see mdm/studies/mixing.py)")
    return module


def run_settings(cfg: Settings, cell: Cell) -> Any:
    """The settings of a cell's run, for `pretrain`. Raises UserError."""
    return settings_of(pretrain.Settings, cfg.run, {**cfg.set, **cell.changes, "output_dir": cfg.output_dir})


def sweep_settings(cfg: Settings) -> Any:
    """The settings of the sweep that answers the question. Raises UserError."""
    sweep = load_recipe(SWEEPS[cfg.question])
    own = {"output_dir": cfg.output_dir, **({"workers": cfg.workers} if cfg.question == "batch" else {})}
    return settings_of(sweep.Settings, cfg.run, {**cfg.set, **own})


def cells(cfg: Settings) -> list[Cell]:
    """All cells of the study; those of a budget train for as many tokens as it pays for."""
    found: list[Cell] = []
    for name, group in cfg.groups.items():
        points = group.points + (drawn(group.search, group.draws) if group.search else [])
        grids = [{key: [value] for key, value in point.items()} for point in points] or [group.grid]
        own = [cell for grid in grids for cell in combinations(grid, group.seeds, name, group.set)]
        for budget in group.budgets:
            for cell in own:
                tokens = round(budget / model_of(cfg, cell)[1])
                changes = {**cell.changes, "tokens": tokens, **smaller_batch(cfg, cell, tokens, group.min_steps)}
                found.append(Cell(f"{cell.name}_{budget:.3g}", cell.seed, changes, name))
        found += own if not group.budgets else []
    names = [cell.name for cell in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"groups: two cells are called {twice}, their values look the same; put them into groups of their own")
    return found


def smaller_batch(cfg: Settings, cell: Cell, tokens: int, min_steps: int) -> dict[str, int]:
    """The physical batch that makes `min_steps` of so many tokens, where the config's own makes fewer; even, for pairs."""
    settings = run_settings(cfg, cell)
    own = batch = settings.batch.at(0.0)
    while batch % 4 == 0 and tokens < min_steps * batch * mean_row(settings):
        batch //= 2
    return {"batch.physical": batch} if batch < own else {}


def row_lengths(settings: Any) -> dict[str, tuple[float, float]]:
    """Stream -> its share of the rows, and their mean length in positions."""
    total, found = sum(s.weight for s in settings.data.values()), {}
    for name, s in settings.data.items():
        tasks = {task: share for task, share in s.tasks.items() if s.pack or task != INSTRUCT}
        length = sum(share * row_length(s, task, settings.canvas) for task, share in tasks.items())
        found[name] = (s.weight / total, length / sum(tasks.values()))
    return found


def mean_row(settings: Any) -> int:
    """Positions of a row of the mix, on average."""
    return round(sum(share * length for share, length in row_lengths(settings).values()))


def model_of(cfg: Settings, cell: Cell) -> tuple[MaskedDiffusionModel, float]:
    """The cell's model, without weights and with a vocabulary of one, and its FLOPs for a token of a row."""
    settings = run_settings(cfg, cell)
    with torch.device("meta"):
        model = MaskedDiffusionModel(pretrain.model_shape(settings))
    return model, model.flops_per_token(mean_row(settings))


def cost(cfg: Settings, cell: Cell, row: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters without embeddings, FLOPs of the whole run, the budget it belongs to, and each stream's share of tokens."""
    model, flops_per_token = model_of(cfg, cell)
    flops = flops_per_token * (row.get("tokens") or 0)
    budgets = cfg.groups[cell.group].budgets
    closest = min(budgets, key=lambda b: abs(b - flops)) if budgets and flops else None
    lengths = row_lengths(run_settings(cfg, cell))
    whole = sum(share * length for share, length in lengths.values())
    shares = {f"share/{name}": share * length / whole for name, (share, length) in lengths.items()}
    return {"parameters": model.num_parameters(embeddings=False), "flops": flops, "budget": closest, **shares}


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG, again="goes on, and repeats no finished cell")
