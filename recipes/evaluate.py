"""Evaluate a trained model on held-out data: NELBO per task, judges' accuracy of what it generates and reads, and scorers.

    mdm run evaluate checkpoint=runs/quickstart
    mdm run evaluate --config evaluate_scored checkpoint=runs/mine      FID, CLIP score, GenEval, WER, speaker similarity

What is written (text to image, text to speech, ...): samples of each class's caption, classified by judges trained on real data
that the model never saw. What is read: held-out samples, the class word found in the text. Scorers take any task.
Writes metrics.json, samples/, and gallery.html to look at; `mdm run compare` lays several side by side.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from omegaconf import MISSING

from components.data.bad import usable
from components.data.digits import WORDS
from components.progress import Bar, working
from components.samplers import Sampler
from components.samplers.guidance import Scale
from components.tasks import find_task
from mdm.config import UserError, at_least, at_least_one, check
from mdm.data.pipeline import open_source
from mdm.data.processor import Processor
from mdm.data.settings import StreamSettings, canonical, hold_out, name_tasks, tasks_of
from mdm.data.validation import validation_batches
from mdm.evaluation.fluency import Fluency
from mdm.evaluation.judges import accuracy, class_in_text, coded, distance, train_judge
from mdm.evaluation.nelbo import bound_figures, nelbo
from mdm.evaluation.order_likelihood import left_to_right_figures
from mdm.evaluation.scored import ScoredTask, build_scorers, check_scored, prompts_of, score, shuffled
from mdm.generation.defaults import Defaults
from mdm.generation.editing import second_half
from mdm.generation.generate import generate
from mdm.hardware import Hardware, check_hardware, hardware
from mdm.models.folder import load_model, model_folder
from mdm.models.transformer import MaskedDiffusionModel
from mdm.pages.comparison import page
from mdm.pages.media import save_outputs
from mdm.recipe import run_recipe
from mdm.training import record
from mdm.training.output import check_output_dir, in_place_of, output_folder

CONFIG = "evaluate"


@dataclass
class JudgedTask:
    """A modality that judges score: the one that `write` generates, whatever the entry is called.

    judge:    `_component_` of a judge, trained on its `samples`
    test:     held-out samples with a `label`
    caption:  the prompt for a class word
    write:    the task that generates the modality from the caption
    read:     the task that reads it back as text
    complete: the task that generates it with its caption, from the first half of a held-out item; null is not scored
    """

    judge: dict[str, Any] = MISSING
    test: dict[str, Any] = MISSING
    caption: str = MISSING
    write: str = MISSING
    read: str = MISSING
    complete: str | None = None


@dataclass
class CrossedTask:
    """A further task that generates a judged modality: from prompts of `test`, with that modality's judge.

    task: null is the name that it stands under; the figure is called NAME_accuracy
    """

    judged: str = MISSING
    test: dict[str, Any] = MISSING
    task: str | None = None


@dataclass
class Settings:
    """The keys of the config; `recipes/configs/evaluate.yaml` explains each."""

    checkpoint: str = MISSING
    trust: bool = False
    output_dir: str = MISSING
    data: dict[str, StreamSettings] = MISSING
    judged: dict[str, JudgedTask] = MISSING
    crossed: dict[str, CrossedTask] = field(default_factory=dict)
    scored: dict[str, ScoredTask] = field(default_factory=dict)
    samples: int = 200
    shown: int = 20
    nelbo_repeats: int = 4
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"


@dataclass
class Results:
    """metrics.json, and what was generated and read, for whoever wants to look.

    written, read: of the judged modalities, with their labels;  samples: by name, the prompts of every task and its outputs
    """

    metrics: dict[str, float] = field(default_factory=dict)
    written: dict[str, list[dict]] = field(default_factory=dict)
    read: dict[str, list[dict]] = field(default_factory=dict)
    samples: dict[str, tuple[list[dict], list[dict]]] = field(default_factory=dict)


def validate(cfg: Settings) -> None:
    """Everything that can be known to be wrong before the model loads. Raises UserError."""
    check_hardware(cfg.device, cfg.precision)
    model_folder(cfg.checkpoint)
    name_tasks(cfg.data)
    hold_out(cfg.data)
    validate_judged(cfg)
    check_scored(cfg.scored)
    if cfg.shown < 0:
        raise UserError(f"shown must be at least 0, got {cfg.shown}")
    check_output_dir(cfg.output_dir)


def validate_judged(cfg: Any) -> None:
    """The part that does not need a checkpoint yet: `quickstart` checks it before it trains."""
    for name, task in cfg.judged.items():
        check(task.judge, f"judged.{name}.judge")
        check(task.test, f"judged.{name}.test")
        for key in ("write", "read", "complete"):
            if getattr(task, key) is not None:
                setattr(task, key, canonical(getattr(task, key), f"judged.{name}.{key}"))
        write, read = find_task(task.write), find_task(task.read)
        if len(write.given) != 1 or len(write.generated) != 1:
            raise UserError(f"judged.{name}.write: {task.write} is not of one modality, from a caption")
        if read.given != write.generated or read.generated != write.given:
            raise UserError(f"judged.{name}.read: {task.read} does not read back what {task.write} makes")
        if task.complete is not None and write.generated[0] not in find_task(task.complete).generated:
            raise UserError(f"judged.{name}.complete: {task.complete} does not complete what {task.write} makes")
    for name, task in cfg.crossed.items():
        check(task.test, f"crossed.{name}.test")
        task.task = canonical(task.task or name, f"crossed.{name}")
        if task.judged not in cfg.judged:
            raise UserError(f"crossed.{name}.judged: {task.judged!r} is not one of {', '.join(cfg.judged)}")
        if find_task(task.task).generated != find_task(cfg.judged[task.judged].write).generated:
            raise UserError(f"crossed.{name}: {task.task} makes something else than judged.{task.judged} looks at")
    at_least_one(cfg, "samples", "nelbo_repeats")
    at_least(0, cfg, "seed")


def main(cfg: Settings) -> None:
    scorers = build_scorers(cfg.scored)  # first, for what they may refuse
    with hardware(cfg.device, cfg.precision) as hw:
        record.warn(cfg.checkpoint, [*tasks_of(cfg), *(task.task or name for name, task in cfg.scored.items())], hw.say)
        model, processor = load_model(cfg.checkpoint, hw.device)
        require(processor.tokenizers, {f"scored.{name}": [task.task or name] for name, task in cfg.scored.items()})
        results = evaluate(cfg, model, processor, hw)
        for name, task in cfg.scored.items():
            given, made, figures = score(name, task, scorers[name], model, processor, hw, cfg.samples, cfg.seed)
            results.samples[name] = given, made
            results.metrics |= {f"{name}_{figure}": value for figure, value in figures.items()}
    folder = output_folder(cfg.output_dir)
    path = folder / "metrics.json"
    replaced = in_place_of(path)
    path.write_text(json.dumps(results.metrics, indent=1))
    for name, value in results.metrics.items():
        print(f"{name:<40}{value:.4f}")
    print(f"Written to {path}{replaced}")
    shutil.rmtree(folder / "samples", ignore_errors=True)  # of an evaluation that these figures replace
    for name, (given, made) in results.samples.items():
        save_outputs(folder / "samples" / name, processor, given[: cfg.shown], made[: cfg.shown])
    page(folder / "gallery.html", f"What {cfg.checkpoint} generates", {folder.name: folder})
    print(f"Gallery: {(folder / 'gallery.html').resolve()}")


def evaluate(cfg: Any, model: MaskedDiffusionModel, processor: Processor, hw: Hardware) -> Results:
    """NELBO of every stream, then each judged modality, with one progress bar over all of it. Raises UserError."""
    try:
        return figures(cfg, model, processor, hw)
    except ValueError as error:  # a held-out sample that is refused, a model that gives nothing to draw from
        raise UserError(str(error)) from error


def figures(cfg: Any, model: MaskedDiffusionModel, processor: Processor, hw: Hardware) -> Results:
    """What `evaluate` returns."""
    check_modalities(cfg, processor.tokenizers)
    with working("reading what was held out"):
        held_out = {n: open_source(s.validation, f"data.{n}.validation") for n, s in cfg.data.items() if s.validation}
        plan = validation_batches(cfg.data, held_out, processor, 1024, repeats=cfg.nelbo_repeats, model=model.config)
    work = sum(len(batches) for batches in plan.values()) + cfg.samples * (
        ("text" in plan) + 2 * len(cfg.judged) + len(cfg.crossed) + sum(t.complete is not None for t in cfg.judged.values())
    )
    with Bar(total=work, desc="evaluating") as bar:
        nats = nelbo(model, plan, processor.vocabulary, hw, bar.update)
        results = Results(bound_figures(nats, plan, processor, model.config.noise))
        results.metrics |= left_to_right_figures(cfg.data, held_out, processor, model, hw, samples=1024)
        if "text" in plan:
            results.metrics |= written(cfg, held_out, model, processor, hw, bar.update)
        for name, task in cfg.judged.items():
            judge = judged(cfg, name, task, model, processor, hw, results, bar.update)
            if task.complete is not None:
                complete(cfg, name, task, judge, model, processor, hw, results, bar.update)
            for crossing in [c for c, crossed in cfg.crossed.items() if crossed.judged == name]:
                cross(cfg, crossing, judge, model, processor, hw, results, bar.update)
    return results


def check_modalities(cfg: Any, modalities: Collection[str]) -> None:
    """Raises UserError where the model lacks a modality that is to be evaluated."""
    asked = {f"data.{name}": list(s.tasks) for name, s in cfg.data.items()}
    asked |= {f"judged.{name}": [t for t in (task.write, task.read, task.complete) if t] for name, task in cfg.judged.items()}
    asked |= {f"crossed.{name}": [crossed.task or name] for name, crossed in cfg.crossed.items()}
    require(modalities, asked)


def require(modalities: Collection[str], asked: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError where the model lacks a modality of the tasks that a key of the config asks for."""
    for key, tasks in asked.items():
        for modality in {m: None for t in tasks for m in find_task(t).modalities}:
            if modality not in modalities:
                known = ", ".join(modalities)
                raise UserError(f"{key}: the model has no {modality}, only {known}; take {key} out of the config")


def written(
    cfg: Any, held_out: Mapping[str, Any], model: Any, processor: Processor, hw: Hardware, progress: Callable[[int], Any]
) -> dict[str, float]:
    """Writes `samples` running texts, and scores how they read: what models with different bounds can be compared by."""
    name, prompts = next(n for n in held_out if "text" in cfg.data[n].tasks), [{}] * cfg.samples
    length, how = processor.text_room(cfg.data[name].pack), inference(cfg, "text", processor, model.config)
    with hw.autocast():
        made = generate(model, processor, "text", prompts, *how, cfg.seed, 50, length, progress=progress)
    return Fluency(usable(held_out[name]), processor).beside_real(made)


def judged(
    cfg: Any, name: str, task: JudgedTask, model: Any, processor: Processor, hw: Hardware, results: Results,
    progress: Callable[[int], Any],
) -> Any:  # fmt: skip
    """Writes `samples` items from captions and reads as many held-out ones; scores both, and the judge, which it returns."""
    (caption,), (modality,) = find_task(task.write).given, find_task(task.write).generated
    judge = train_judge(task.judge, f"judged.{name}.judge", processor, modality)
    test = list(usable(open_source(task.test, f"judged.{name}.test")))
    labels = [s["label"] for s in test]
    real = [s[modality] for s in coded(test, processor, modality)]
    results.metrics[f"{name}_judge_accuracy"] = accuracy(judge.classify(real), labels)
    classes = [i % len(WORDS) for i in range(cfg.samples)]
    prompts = [{caption: task.caption.format(WORDS[c])} for c in classes]
    with hw.autocast():
        made = generated(cfg, model, processor, task.write, prompts, progress)
        judgement = judge.classify([m[modality] for m in made])
        results.metrics[f"text_to_{name}_accuracy"] = accuracy(judgement, classes)
        shown = distance(judge, [m[modality] for m in made], real)
        results.metrics |= {f"text_to_{name}_{k}": v for k, v in shown.items()}
        results.written[name] = [{**m, "label": c, "judged": int(j)} for m, c, j in zip(made, classes, judgement, strict=True)]
        results.samples[task.write] = prompts, made
        chosen = shuffled(test, cfg.samples, cfg.seed)
        texts = generated(cfg, model, processor, task.read, chosen, progress)
    read = np.array([class_in_text(t[caption], WORDS) for t in texts])
    results.metrics[f"{name}_to_text_accuracy"] = accuracy(read, [s["label"] for s in chosen])
    results.read[name] = [{**s, "read": t[caption]} for s, t in zip(chosen, texts, strict=True)]
    results.samples[task.read] = prompts_of(task.read, chosen), texts
    return judge


def generated(
    cfg: Any, model: Any, processor: Processor, task: str, prompts: Sequence[dict], progress: Callable[[int], Any]
) -> list[dict]:
    """What the model makes of prompts, sampled as `mdm generate` does it."""
    how = inference(cfg, task, processor, model.config)
    return generate(model, processor, task, prompts, *how, seed=cfg.seed, batch_size=50, progress=progress).outputs


def inference(cfg: Any, task: str, processor: Processor, model: Any) -> tuple[Sampler, Scale]:
    """The sampler and the guidance scale of a task: those beside the model (its config), else the packaged ones."""
    own = Defaults.beside(getattr(cfg, "checkpoint", cfg.output_dir))
    own = own.of(task, processor.vocabulary.modalities, model.noise, model.learned_orders)
    return own.sampler, own.guidance_scale if find_task(task).given else 0.0


def complete(
    cfg: Any, name: str, task: JudgedTask, judge: Any, model: Any, processor: Processor, hw: Hardware, results: Results,
    progress: Callable[[int], Any],
) -> None:  # fmt: skip
    """Completes held-out items from their first half, without a caption; scores how many still show their class."""
    modality = find_task(task.write).generated[0]
    assert task.complete is not None  # else there is nothing to do
    chosen = shuffled(open_source(task.test, f"judged.{name}.test"), cfg.samples, cfg.seed)
    with hw.autocast():
        prompts = [{modality: second_half(processor, modality, s[modality])} for s in chosen]
        made = generated(cfg, model, processor, task.complete, prompts, progress)
    judgement = judge.classify([m[modality] for m in made])
    results.metrics[f"{name}_completed_accuracy"] = accuracy(judgement, [s["label"] for s in chosen])


def cross(
    cfg: Any, name: str, judge: Any, model: Any, processor: Processor, hw: Hardware, results: Results,
    progress: Callable[[int], Any],
) -> None:  # fmt: skip
    """Generates from held-out parts, e.g. an image from speech, and scores how many show the class of what was given."""
    task = cfg.crossed[name].task or name
    (modality,) = find_task(task).generated
    chosen = shuffled(open_source(cfg.crossed[name].test, f"crossed.{name}.test"), cfg.samples, cfg.seed)
    with hw.autocast():
        made = generated(cfg, model, processor, task, chosen, progress)
    judgement = judge.classify([m[modality] for m in made])
    results.metrics[f"{name}_accuracy"] = accuracy(judgement, [s["label"] for s in chosen])
    results.samples[name] = prompts_of(task, chosen), made
    results.written[name] = [
        {**m, "label": s["label"], "judged": int(j), "given": s} for m, s, j in zip(made, chosen, judgement, strict=True)
    ]


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG)
