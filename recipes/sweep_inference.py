"""Sweep inference settings on a trained model: steps x temperature x guidance x schedule x sampler, for each modality.

    mdm run sweep_inference checkpoint=runs/quickstart output_dir=runs/sweep

Every setting generates the same prompts with the same noise. Samples are scored by judges that never saw the model's data:
accuracy, Frechet distance to held-out samples, and the share of distinct ones, since accuracy alone is won by one prototype for
each class. What has no judge (text) is scored by a 3-gram model of held-out samples, beside its own entropy.

Writes cells.csv, summary.json (one token a step, the fewest forwards as good, the untuned setting), plots of quality against
forward passes and of guidance and temperature, findings.md, and defaults.yaml, put beside the model for `mdm generate`.
Run it again to go on behind the last finished setting.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from components.data.bad import usable
from components.data.digits import WORDS
from components.progress import Bar
from components.tasks import find_task
from mdm.config import UserError, at_least, check, instantiate
from mdm.config.names import in_full
from mdm.config.spelling import spelled
from mdm.data.pipeline import open_source
from mdm.data.settings import canonical
from mdm.evaluation.fluency import Fluency
from mdm.evaluation.judges import Judged, train_judge
from mdm.generation.defaults import build_scale
from mdm.generation.generate import Generated, generate
from mdm.hardware import COMPILING, check_compile, check_hardware, compile_blocks, hardware
from mdm.models.folder import load_model, model_folder
from mdm.recipe import run_recipe
from mdm.studies.grid import alternatives
from mdm.studies.inference import figures, sweep
from mdm.studies.inference import question as study
from mdm.studies.runs import write_csv
from mdm.training import record
from mdm.training.output import check_output_dir, output_folder

CONFIG = "sweep_inference"


@dataclass
class Swept:
    """A modality of the sweep.

    task:         what is generated: from a caption, or, without a judge, from nothing
    test:         held-out samples: the reference of the Frechet distance, or of the 3-gram
    judge, caption: `_component_` of a judge and the caption of a class word; null is a 3-gram
    length:       tokens of a text
    untuned, one_per_step, grid: settings (sampler, guidance_scale, stop_at_end); a list anywhere inside is swept
    """

    task: str = MISSING
    test: dict[str, Any] = MISSING
    judge: dict[str, Any] | None = None
    caption: str = ""
    length: int | None = None
    untuned: dict[str, Any] = MISSING
    one_per_step: list[dict[str, Any]] = MISSING
    grid: list[dict[str, Any]] = MISSING


@dataclass
class Settings:
    """The keys of the config; `recipes/configs/sweep_inference.yaml` explains each."""

    checkpoint: str = MISSING
    trust: bool = False
    output_dir: str = MISSING
    modalities: dict[str, Swept] = MISSING
    samples: int = 1000
    batch_size: int = 100
    install: bool = True
    fixed: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    compile: str = "auto"


def validate(cfg: Settings) -> None:
    """Everything that can be known to be wrong before the model loads. Raises UserError."""
    check_hardware(cfg.device, cfg.precision)
    check_compile(cfg.compile, cfg.device)
    model_folder(cfg.checkpoint)
    check_output_dir(cfg.output_dir)
    at_least(0, cfg, "seed")
    if cfg.samples < 2:
        raise UserError(f"samples must be at least 2, got {cfg.samples}")
    for name, swept in cfg.modalities.items():
        swept.task = canonical(swept.task, f"modalities.{name}.task")
        if find_task(swept.task).generated != (name,):
            raise UserError(f"modalities.{name}.task: {swept.task!r} does not generate {name} alone")
        check(swept.test, f"modalities.{name}.test")
        given = len(find_task(swept.task).given)
        if given != (swept.judge is not None):
            wanted = "one caption" if swept.judge else "nothing (there is no judge)"
            raise UserError(f"modalities.{name}.task: {swept.task} is given {given} modalities; it is to be given {wanted}")
        if swept.judge is not None:
            check(swept.judge, f"modalities.{name}.judge")
        for part, key, setting in settings_of(swept):
            if set(setting) - {"sampler", "guidance_scale", "stop_at_end"}:
                raise UserError(
                    f"modalities.{name}.{part}: a setting has sampler, guidance_scale, stop_at_end; got {', '.join(setting)}"
                )
            sampler: Any = setting.get("sampler")
            instantiate(sampler, f"modalities.{name}.{part}{key}.sampler")
            build_scale(setting.get("guidance_scale"), f"modalities.{name}.{part}{key}")


def settings_of(swept: Swept) -> list[tuple[str, str, dict[str, Any]]]:
    """Every single setting of a modality: where it stands in the config, and itself, with what is written in short in full."""
    found = [("untuned", "", swept.untuned)]
    for part in ("one_per_step", "grid"):
        found += [(part, f"[{i}]", one) for i, entry in enumerate(getattr(swept, part)) for one in alternatives(entry)]
    return [(part, at, spelled({k: in_full(v) for k, v in one.items()}, Any, part)) for part, at, one in found]


def main(cfg: Settings) -> None:
    folder, rows = output_folder(cfg.output_dir), table(cfg)
    summary, finding = study.conclude(rows)
    write_csv(folder / "cells.csv", [{**r, "setting": r["cell"]} for r in rows if r["part"] != "real"])
    for name, parts in study.cells(rows).items():
        every, own = [*parts["one_per_step"], *parts["grid"]], summary[name]
        pareto = figures.pareto_figure(every, own["one_per_step"], own["best"], name, cfg.samples)
        (folder / f"pareto_{name}.png").write_bytes(pareto)
        effects = figures.effects_figure(every, name)
        if effects is not None:
            (folder / f"effects_{name}.png").write_bytes(effects)
    write_defaults(cfg, folder, summary)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    (folder / "findings.md").write_text(f"# Inference settings\n\n{finding}")
    print(finding)
    print(f"Written to {folder}")


def table(cfg: Settings) -> list[dict[str, Any]]:
    """A row for each setting, and one of each modality's held-out samples: see mdm/studies/inference/question.py."""
    cells = sweep.Cells(
        output_folder(cfg.output_dir),
        {"checkpoint": str(model_folder(cfg.checkpoint).resolve()), "samples": cfg.samples, "seed": cfg.seed},
    )
    rows: list[dict[str, Any]] = []
    same = {"status": "finished", "samples": cfg.samples, "seed": cfg.seed}
    with hardware(cfg.device, cfg.precision) as hw:
        record.warn(cfg.checkpoint, [swept.task for swept in cfg.modalities.values()], hw.say)
        model, processor = load_model(cfg.checkpoint, hw.device)
        if compile_blocks(model, cfg.compile, hw):
            hw.say(COMPILING)
        missing = [m for m in cfg.modalities if m not in processor.tokenizers]
        if missing:
            raise UserError(
                f"modalities.{missing[0]}: the model has {', '.join(processor.tokenizers)}; take it out of the config"
            )
        total = sum(len(settings_of(s)) for s in cfg.modalities.values())
        with Bar(total=total, unit="setting") as bar:
            for name, swept in cfg.modalities.items():
                prompts, measure, real = scorer(cfg, name, swept, processor)
                for part, _, setting in settings_of(swept):
                    bar.set_description(f"{name} {sweep.label(setting['sampler'])}")
                    cell = cells.get(name, setting)
                    if cell is None:
                        with hw.autocast():
                            made = run(cfg, name, swept, setting, prompts, model, processor)
                        cell = cells.add(name, setting, measure(made))
                    own = {"cell": sweep.describe(setting), "group": name, "part": part, "setting": json.dumps(setting)}
                    rows.append({**same, **own, **{k: v for k, v in cell.items() if k in study.FIGURES}})
                    bar.update(1)
                rows.append({**same, "cell": f"real {name}", "group": name, "part": "real", **real})
    return rows


def run(cfg: Settings, name: str, swept: Swept, setting: dict, prompts: list[dict], model: Any, processor: Any) -> Generated:
    """The samples of one setting."""
    sampler = instantiate(setting["sampler"], f"modalities.{name}.sampler")
    scale = build_scale(setting.get("guidance_scale"), name)
    try:
        return generate(
            model, processor, swept.task, prompts, sampler, scale, cfg.seed, cfg.batch_size,
            swept.length, stop_at_end=setting.get("stop_at_end", True),
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"modalities.{name}: {sweep.describe(setting)}: {error}") from error


def scorer(
    cfg: Settings, name: str, swept: Swept, processor: Any
) -> tuple[list[dict], Callable[[Generated], dict[str, float]], dict[str, float]]:
    """The prompts, the function that scores what was made of them, and the same figures of real held-out samples."""
    test = list(usable(open_source(swept.test, f"modalities.{name}.test")))
    if swept.judge is None:
        fluency = Fluency(test, processor, name)
        return [{}] * cfg.samples, fluency, fluency.real()

    judged = Judged(train_judge(swept.judge or {}, f"modalities.{name}.judge", processor, name), processor, name, test)
    classes = [i % len(WORDS) for i in range(cfg.samples)]
    (caption,) = find_task(swept.task).given
    return [{caption: swept.caption.format(WORDS[c])} for c in classes], lambda made: judged(made, classes), judged.real()


def write_defaults(cfg: Settings, folder: Path, summary: Mapping[str, Any]) -> None:
    """defaults.yaml, here and beside the model: the best setting of each modality, and the tasks that were not swept."""
    chosen = {n: {k: s["best"]["setting"].get(k, 0.0) for k in ("sampler", "guidance_scale")} for n, s in summary.items()}
    path = folder / "defaults.yaml"
    head = "# Written by sweep_inference: the fewest forward passes at the quality of one token a step.\n"
    path.write_text(head + OmegaConf.to_yaml(OmegaConf.create({**chosen, **cfg.fixed})))
    if cfg.install:
        shutil.copy(path, model_folder(cfg.checkpoint) / "defaults.yaml")


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG, again="goes on, and repeats no finished setting")
