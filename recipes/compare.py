"""Compare runs: their figures as a table, and a page with learning curves and samples of the same prompts side by side.

    mdm run compare runs='[runs/evaluate, runs/evaluate_lora]'

A run is any folder with a metrics.json (evaluate, quickstart and finetune write one). Writes compare.html and compare.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from mdm.config import UserError
from mdm.pages.comparison import figures, markdown, page, table
from mdm.recipe import run_recipe
from mdm.training.output import check_output_dir, in_place_of, output_folder

CONFIG = "compare"


@dataclass
class Settings:
    """The keys of the config; `recipes/configs/compare.yaml` explains each."""

    output_dir: str = MISSING
    runs: list[str] = field(default_factory=list)


def named(runs: list[str]) -> dict[str, Path]:
    """The runs by the names of their folders, or by their whole paths where those are not unique."""
    folders = [Path(run) for run in runs]
    unique = len({folder.name for folder in folders}) == len(folders)
    return {folder.name if unique else str(folder): folder for folder in folders}


def validate(cfg: Settings) -> None:
    """Raises UserError."""
    if len(cfg.runs) < 2 or len(set(cfg.runs)) < len(cfg.runs):
        raise UserError(f"runs: name two folders or more, each once, e.g. runs='[runs/a, runs/b]'; got {cfg.runs}")
    figures(named(cfg.runs))
    check_output_dir(cfg.output_dir)


def main(cfg: Settings) -> None:
    runs, folder = named(cfg.runs), output_folder(cfg.output_dir)
    text = markdown(*table(figures(runs)))
    replaced = in_place_of(folder / "compare.html")
    (folder / "compare.md").write_text(text)
    page(folder / "compare.html", " and ".join(runs), runs)
    print(text)
    print(f"Page: {(folder / 'compare.html').resolve()}{replaced}")


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG)
