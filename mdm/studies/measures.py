"""What a study measures of a run when it has finished, beside its loss: `_component_`s of the config's `measure`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from components.block_diffusion.clipping import clipped
from components.data.digits import WORDS
from components.gradient_variance import GradientVariance
from components.samplers import Ancestral, Confidence, FirstHitting, LeastSureFirst, Sampler, SelfCorrect, Threshold
from components.tasks import find_task
from components.types import NoisyBatch
from components.weightings import Noise
from mdm.data.corruption import horizon, layout_of, maskers
from mdm.data.pipeline import MicroBatch, next_step, open_source, streams, training_loader
from mdm.data.processor import Processor
from mdm.data.validation import validation_batches
from mdm.evaluation.fluency import Fluency
from mdm.evaluation.judges import ImageJudge, Judged, SpeechJudge, coded
from mdm.evaluation.nelbo import forward_loss, weighted_nats
from mdm.generation.generate import Generated, generate
from mdm.hardware import Hardware, hardware
from mdm.models.folder import load_model
from mdm.models.transformer import MaskedDiffusionModel
from mdm.pages.media import save_outputs

TASK = "text_to_image"  # of `ImageQuality`
(CAPTION,), (IMAGE,) = find_task(TASK).given, find_task(TASK).generated
JUDGES = {"image": ImageJudge, "audio": SpeechJudge}
CORRECTED = "+correct"


@dataclass(frozen=True)
class Finished:
    """A run that has finished: its settings (pretrain's), its folder, and that of the first group's run of the same seed."""

    settings: Any
    folder: Path
    first: Path


def training_steps(cfg: Any, model: MaskedDiffusionModel, processor: Processor) -> Iterator[list[MicroBatch]]:
    """Steps as a run draws them for its model; the batches are others than those that it was trained on."""
    seed = cfg.seed + 1_000_003
    sources = {name: open_source(s.train, f"data.{name}.train") for name, s in cfg.data.items()}
    layout, rows = layout_of(model.config, processor.vocabulary), horizon(cfg.data, processor.canvas, cfg.tokens)
    masker = maskers(cfg.data, cfg.masker, processor.vocabulary, seed, layout, rows)
    mix = streams(cfg.data, sources, processor, masker, seed, cfg.prompt_dropout)
    batches = iter(training_loader(mix, masker, processor, cfg.batch.at, cfg.batch.micro, cfg.loss, seed, prefetch=0))
    while True:
        yield next_step(batches)


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
            batches = training_steps(cfg, model, processor)
            for _ in range(self.steps):
                micros = next(batches)
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


@dataclass(frozen=True)
class Scored:
    """A task whose samples are scored.

    Figures of a task with `training` (it is given a caption): accuracy, frechet, distinct;  without (it is given nothing):
    ngram_bits, entropy_bits, distinct;  of both: forwards, the passes that a sample took, since one that is done takes no more.
    MODALITY/FIGURE/real: of held-out samples.

    training: labelled samples that no model saw, for the judge;  test: held-out ones
    length:   tokens of a text;  shown: samples that are kept in the run's samples/
    """

    task: str
    test: Sequence[dict[str, Any]]
    training: Sequence[dict[str, Any]] = ()
    caption: str = "{}"
    samples: int = 200
    length: int | None = None
    shown: int = 5

    def __post_init__(self) -> None:
        name, (generated, *more), given = type(self).__name__, find_task(self.task).generated, find_task(self.task).given
        if more or len(given) != bool(self.training) or (self.training and generated not in JUDGES):
            raise ValueError(
                f"{name}: task {self.task!r} is to be {' or '.join(JUDGES)} of a caption, with `training`, or one of nothing"
            )
        if self.samples < 2:
            raise ValueError(f"{name}: samples are at least 2; got {self.samples}")

    def modality(self) -> str:
        """What is generated."""
        return find_task(self.task).generated[0]

    def scorer(
        self, processor: Processor, modality: str
    ) -> tuple[list[dict[str, Any]], Callable[[Generated], dict[str, float]], dict[str, float]]:
        """Prompts, what scores the samples of them, and the scores of held-out samples."""
        if not self.training:
            fluency = Fluency(self.test, processor, modality)
            return [{}] * self.samples, fluency, fluency.real()
        judge = JUDGES[modality]([*self.training, *coded(self.training, processor, modality)])
        judged, (caption,) = Judged(judge, processor, modality, self.test), find_task(self.task).given
        classes = [i % len(WORDS) for i in range(self.samples)]
        prompts = [{caption: self.caption.format(WORDS[c])} for c in classes]
        return prompts, lambda made: judged(made, classes), judged.real()

    def decoded(
        self, run: Finished, model: MaskedDiffusionModel, processor: Processor, decoders: Mapping[str, Sampler], hw: Hardware
    ) -> dict[str, float]:
        """MODALITY/FIGURE/DECODER: the figures of each, and seconds: of a sample, all of them in one batch.

        At temperature 1, without guidance. Samples of the first one are kept.
        """
        modality, seed = self.modality(), run.settings.seed
        prompts, score, real = self.scorer(processor, modality)
        found = {f"{modality}/{figure}/real": value for figure, value in real.items()}
        for name, sampler in decoders.items():
            with hw.autocast():
                generate(model, processor, self.task, prompts[:2], sampler, 0.0, seed, length=self.length)  # warms up
                began = time.perf_counter()
                made = generate(
                    model, processor, self.task, prompts, sampler, 0.0, seed, batch_size=self.samples, length=self.length
                )
                seconds = (time.perf_counter() - began) / self.samples
            figures = {**score(made), "seconds": seconds}
            found |= {f"{modality}/{figure}/{name}": value for figure, value in figures.items()}
            if name == next(iter(decoders)):
                kept = made.outputs[: self.shown]
                save_outputs(run.folder / "samples" / self.task, processor, prompts[: self.shown], kept)
        return found


@dataclass(frozen=True)
class Passes(Scored):
    """Quality against forward passes. MODALITY/FIGURE/PASSES/SAMPLER is a column, e.g. image/accuracy/8/ancestral+correct.

    Sampled from the model's own distributions (temperature 1, no guidance) by the samplers that its noise goes with: ancestral,
    confidence where noise ends in masks, the least sure first where tokens become others. `+correct`, from 4 passes on: half of
    them draw, and half correct what was drawn.

    correct: tokens that a correcting pass may change; 0 is no correction
    The others: see `Scored`.
    """

    passes: Sequence[int] = (1, 2, 4, 8, 16, 64)
    correct: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.passes or min(self.passes) < 1 or self.correct < 0:
            raise ValueError(f"Passes: passes are at least 1 and correct at least 0; got {list(self.passes)}, {self.correct}")

    def __call__(self, run: Finished) -> dict[str, float]:
        modality = self.modality()
        with hardware(run.settings.device, run.settings.precision) as hw:
            model, processor = load_model(run.folder, hw.device)
            noise = model.config.noise.get(modality, Noise())
            prompts, score, real = self.scorer(processor, modality)
            found = {f"{modality}/{figure}/real": value for figure, value in real.items()}
            for passes, name, sampler in ((n, *own) for n in self.passes for own in self._samplers(n, noise).items()):
                with hw.autocast():
                    made = generate(model, processor, self.task, prompts, sampler, 0.0, run.settings.seed, length=self.length)
                found |= {f"{modality}/{figure}/{passes}/{name}": value for figure, value in score(made).items()}
                if passes == max(self.passes) and name == "ancestral":
                    kept = made.outputs[: self.shown]
                    save_outputs(run.folder / "samples" / self.task, processor, prompts[: self.shown], kept)
        return found

    def _samplers(self, passes: int, noise: Noise) -> dict[str, Sampler]:
        """The samplers of so many passes, by name."""
        kinds: dict[str, Any] = {"ancestral": Ancestral}
        kinds |= {"confidence": Confidence} if noise.kernel.ends_masked else {}
        kinds |= {} if noise.kernel.masks_only else {"least sure": LeastSureFirst}
        found: dict[str, Sampler] = {name: kind(num_steps=passes) for name, kind in kinds.items()}
        if self.correct and passes >= 4:
            half = passes // 2
            for name, kind in kinds.items():
                found[name + CORRECTED] = SelfCorrect(
                    kind(num_steps=half), passes=passes - half, tokens=self.correct, temperature=0.1
                )
        return found


@dataclass(frozen=True)
class Decoders(Scored):
    """Quality, passes and time of the decoders of a model of blocks. MODALITY/FIGURE/DECODER, e.g. audio/seconds/threshold 0.9.

    one a pass: exact (first-hitting);  threshold: all of a block that are as sure. At temperature 1, without guidance; the
    keys and values of finished blocks are kept. seconds: of a sample, all of them in one batch
    """

    thresholds: Sequence[float] = (0.9, 0.7)

    def __call__(self, run: Finished) -> dict[str, float]:
        decoders: dict[str, Sampler] = {"one a pass": FirstHitting()}
        decoders |= {f"threshold {t:g}": Threshold(threshold=t) for t in self.thresholds}
        with hardware(run.settings.device, run.settings.precision) as hw:
            model, processor = load_model(run.folder, hw.device)
            return self.decoded(run, model, processor, decoders, hw)


@dataclass(frozen=True)
class ClippedCounts:
    """clipping/MODALITY/LEAST-MOST: the variance of a block's loss (bits a position, squared) by the shares that are masked.

    Of held-out samples, at the run's own weights; see components/block_diffusion/clipping.py.

    samples: of each task;  repeats: noise of each;  width: of the narrowest range
    """

    samples: int = 128
    repeats: int = 8
    width: float = 0.5

    def __call__(self, run: Finished) -> dict[str, float]:
        cfg, found = run.settings, {}
        with hardware(cfg.device, cfg.precision) as hw:
            model, processor = load_model(run.folder, hw.device)
            sources = {name: open_source(s.validation, f"data.{name}.validation") for name, s in cfg.data.items()}
            plan = validation_batches(
                cfg.data, sources, processor, self.samples, repeats=self.repeats, seed=cfg.seed, model=model.config
            )
            drawn: dict[str, list[Tensor]] = {}
            for batches in plan.values():
                for micro, _ in batches:
                    nats = weighted_nats(model, micro.to(hw.device), processor.vocabulary, hw).cpu()
                    for i, name in enumerate(processor.vocabulary.modalities):
                        drawn.setdefault(name, []).append(block_losses(micro.noisy, nats / math.log(2), i))
        for name, parts in drawn.items():
            masked, length, loss = torch.cat(parts, dim=1)
            if len(loss):
                ranges = clipped(masked.long(), length.long(), loss, self.width)
                found |= {f"clipping/{name}/{c.least:g}-{c.most:g}": c.variance for c in ranges}
        return found


def block_losses(noisy: NoisyBatch, weighted: Float[Tensor, "batch seq"], modality: int) -> Float[Tensor, "three blocks"]:
    """Of each block of a modality: positions that are masked, those that could be, and the mean of the weighted losses."""
    assert noisy.block is not None
    own = noisy.clean.maskable & (noisy.clean.modality == modality)
    row = torch.arange(len(own))[:, None].expand_as(own)
    _, key = (row * (int(noisy.block.max()) + 1) + noisy.block)[own].unique(return_inverse=True)
    masked, length, loss = (torch.bincount(key, v[own].double()) for v in (noisy.mask, torch.ones_like(own), weighted))
    return torch.stack([masked, length, loss / length])
