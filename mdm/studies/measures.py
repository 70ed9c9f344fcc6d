"""What a study measures of a run when it has finished, beside its loss: `_component_`s of the config's `measure`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.data.digits import WORDS
from components.gradient_variance import GradientVariance
from components.samplers import FirstHitting
from components.tasks import find_task
from mdm.data.corruption import maskers
from mdm.data.pipeline import next_step, open_source, streams, training_loader
from mdm.evaluation.judges import ImageJudge, Judged, coded
from mdm.evaluation.nelbo import forward_loss
from mdm.generation.generate import generate
from mdm.hardware import hardware
from mdm.models.folder import load_model
from mdm.pages.media import save_outputs

TASK = "text_to_image"  # of `ImageQuality`
(CAPTION,), (IMAGE,) = find_task(TASK).given, find_task(TASK).generated


@dataclass(frozen=True)
class Finished:
    """A run that has finished: its settings (pretrain's), its folder, and that of the first group's run of the same seed."""

    settings: Any
    folder: Path
    first: Path


@dataclass(frozen=True)
class TrainingGradient:
    """gradient_variance, gradient_squared_mean: of a step as the run draws it, at the weights of the *first* group's run.

    At the same weights, settings differ by their noise alone. steps: draws; the batches are others than those of training.
    """

    steps: int = 128

    def __call__(self, run: Finished) -> dict[str, float]:
        cfg, moments = run.settings, GradientVariance()
        with hardware(cfg.device, cfg.precision) as hw:
            model, processor = load_model(run.first, hw.device)
            model.train()
            seed = cfg.seed + 1_000_003
            sources = {name: open_source(s.train, f"data.{name}.train") for name, s in cfg.data.items()}
            masker = maskers(cfg.data, cfg.masker, processor.vocabulary, seed)
            mix = streams(cfg.data, sources, processor, masker, seed, cfg.prompt_dropout)
            batches = iter(training_loader(mix, masker, processor, cfg.batch.at, cfg.batch.micro, cfg.loss, seed, prefetch=0))
            for _ in range(self.steps):
                micros = next_step(batches)
                denominator = max(sum(m.denominator for m in micros), 1.0)
                for micro in micros:
                    (forward_loss(model, micro.to(hw.device), processor.vocabulary, hw).loss / denominator).backward()
                moments.add(p.grad for p in model.parameters())
                model.zero_grad(set_to_none=True)
        return {"gradient_variance": moments.variance, "gradient_squared_mean": moments.squared_mean}


@dataclass(frozen=True)
class ImageQuality:
    """accuracy, frechet, distinct: of images of each class, as a judge sees them.

    Sampled exactly (first-hitting, one token a pass, no guidance), so that the models alone are compared.

    training: labelled images that no model saw, for the judge;  test: held-out ones;  shown: kept in the run's samples/
    """

    training: Sequence[dict[str, Any]]
    test: Sequence[dict[str, Any]]
    caption: str = "{}"
    samples: int = 300
    shown: int = 20

    def __call__(self, run: Finished) -> dict[str, float]:
        with hardware(run.settings.device, run.settings.precision) as hw:
            model, processor = load_model(run.folder, hw.device)
            judge = ImageJudge([*self.training, *coded(self.training, processor, IMAGE)])
            classes = [i % len(WORDS) for i in range(self.samples)]
            prompts = [{CAPTION: self.caption.format(WORDS[c])} for c in classes]
            with hw.autocast():
                made = generate(model, processor, TASK, prompts, FirstHitting(), 0.0, run.settings.seed)
        save_outputs(run.folder / "samples" / TASK, processor, prompts[: self.shown], made.outputs[: self.shown])
        figures = Judged(judge, processor, IMAGE, self.test)(made, classes)
        return {k: figures[k] for k in ("accuracy", "frechet", "distinct")}
