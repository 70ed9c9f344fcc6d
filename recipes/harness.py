"""Evaluate a text model on tasks of lm-evaluation-harness: by likelihood, or by what it generates.

    mdm run harness checkpoint=hub:GSAI-ML/LLaDA-8B-Base tasks=[arc_challenge,piqa] limit=100
    mdm run harness checkpoint=runs/quickstart tasks=[mine] include_path=my_tasks

Needs `pip install 'trimodal-mdm[eval]'`. Writes results.json to output_dir, and prints the harness's table. What did not fit
the model and was cut, and what a task asks for that nothing here understands, is counted by task: `notes`, printed below
the table.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from components.samplers import Sampler
from mdm.config import UserError, at_least, at_least_one, check
from mdm.config.protocols import conforming
from mdm.hardware import check_hardware, hardware
from mdm.models.folder import load_model, model_folder
from mdm.recipe import run_recipe
from mdm.training import record
from mdm.training.output import check_output_dir, in_place_of, output_folder

CONFIG = "harness"


@dataclass
class Settings:
    """The keys of the config; `recipes/configs/harness.yaml` explains each."""

    checkpoint: str = MISSING
    trust: bool = False
    output_dir: str = MISSING
    tasks: list[str] = field(default_factory=list)
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    likelihood: str = "nelbo"
    draws: int = 128
    sampler: dict[str, Any] | None = None
    max_tokens: int = 64
    apply_chat_template: bool = False
    batch_size: int = 32
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"


def validate(cfg: Settings) -> None:
    """Everything that can be known to be wrong before the model loads. Raises UserError."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("the harness is not installed; pip install 'trimodal-mdm[eval]'")
    check_hardware(cfg.device, cfg.precision)
    model_folder(cfg.checkpoint)
    check_output_dir(cfg.output_dir)
    if not cfg.tasks:
        raise UserError("tasks: name at least one, e.g. tasks=[arc_challenge]")
    if cfg.likelihood not in ("nelbo", "left_to_right"):
        raise UserError(f"likelihood: {cfg.likelihood!r} is not one of nelbo, left_to_right")
    if cfg.include_path is not None and not Path(cfg.include_path).is_dir():
        raise UserError(f"include_path: folder not found: {cfg.include_path}")
    at_least(0, cfg, "seed", "num_fewshot")
    at_least_one(cfg, "limit", "max_tokens", "batch_size")
    if cfg.draws < 2:
        raise UserError(f"draws must be at least 2, got {cfg.draws}")
    if cfg.sampler is not None:
        check(cfg.sampler, "sampler")
    unknown = [task for task in cfg.tasks if not task_manager(cfg.include_path).match_tasks([task])]
    if unknown:
        raise UserError(f"tasks: {', '.join(unknown)}: not among the harness's tasks, nor in include_path={cfg.include_path}")


@functools.cache
def task_manager(include_path: str | None) -> Any:
    """The harness's index of its tasks, and of the user's own: it takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def main(cfg: Settings) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table

    from mdm.evaluation.harness import HarnessModel

    sampler = None if cfg.sampler is None else conforming(cfg.sampler, "sampler", Sampler)
    with hardware(cfg.device, cfg.precision) as hw, hw.autocast():
        record.warn(cfg.checkpoint, ["text"], hw.say)
        model, processor = load_model(cfg.checkpoint, hw.device)
        own = HarnessModel(
            model, processor, cfg.likelihood, cfg.draws, cfg.batch_size, sampler, cfg.max_tokens, cfg.seed
        )  # fmt: skip
        evaluate: Any = simple_evaluate  # its decorator hides what it takes
        try:
            results = evaluate(
                own, tasks=cfg.tasks, num_fewshot=cfg.num_fewshot, limit=cfg.limit, task_manager=task_manager(cfg.include_path),
                apply_chat_template=cfg.apply_chat_template, fewshot_as_multiturn=cfg.apply_chat_template,
                random_seed=cfg.seed, numpy_random_seed=cfg.seed, torch_random_seed=cfg.seed, bootstrap_iters=1000,
            )  # fmt: skip
        except StopIteration as error:  # what an empty file is to `datasets`
            raise UserError(f"tasks: of {', '.join(cfg.tasks)}, one has a file without any document") from error
    path = output_folder(cfg.output_dir) / "results.json"
    kept = {key: results[key] for key in ("results", "n-samples", "n-shot", "versions") if key in results}
    asked = {"checkpoint": cfg.checkpoint, "likelihood": cfg.likelihood, "apply_chat_template": cfg.apply_chat_template}
    notes = {task: dict(note) for task, note in own.notes.items() if note}
    replaced = in_place_of(path)
    path.write_text(json.dumps({**asked, **kept, "notes": notes}, indent=1, default=str))
    print(make_table(results))
    for task, note in notes.items():
        print(f"{task}: {', '.join(f'{what} {count}' for what, count in note.items())}")
    print(f"Written to {path}{replaced}")


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG)
