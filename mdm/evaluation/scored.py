"""Tasks of an evaluation whose outputs scorers look at: what is asked for, what is generated, what it scores."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from omegaconf import MISSING

from components.data.bad import usable
from components.metrics.scorers import Scorer, missing
from components.progress import Bar, working
from components.tasks import find_task
from mdm.config import UserError, check, instantiate
from mdm.data.pipeline import open_source
from mdm.data.processor import Processor
from mdm.data.settings import canonical
from mdm.generation.generate import generate
from mdm.hardware import Hardware
from mdm.models.transformer import MaskedDiffusionModel


@dataclass
class ScoredTask:
    """A task whose outputs scorers look at.

    test:    held-out samples: their parts are the prompts, and what they hold of the generated modality the references
    scorers: `_component_`s of scorers (components/metrics/scorers.py); their figures are called NAME_FIGURE
    task:    null is the name that it stands under
    """

    test: dict[str, Any] = MISSING
    scorers: dict[str, dict[str, Any]] = MISSING
    task: str | None = None


def check_scored(scored: Mapping[str, ScoredTask]) -> None:
    """Names, tests and scorers of a config's `scored`, before anything is built. Raises UserError."""
    for name, task in scored.items():
        check(task.test, f"scored.{name}.test")
        task.task = canonical(task.task or name, f"scored.{name}")
        for scorer, node in task.scorers.items():
            check(node, f"scored.{name}.scorers.{scorer}")


def build_scorers(scored: Mapping[str, ScoredTask]) -> dict[str, dict[str, Scorer]]:
    """The scorers of each task, by name. Raises UserError where one refuses its settings, or its network cannot be loaded."""
    return {
        name: {key: instantiate(node, f"scored.{name}.scorers.{key}") for key, node in task.scorers.items()}
        for name, task in scored.items()
    }


def score(
    name: str,
    task: ScoredTask,
    scorers: Mapping[str, Scorer],
    model: MaskedDiffusionModel,
    processor: Processor,
    hw: Hardware,
    samples: int,
    seed: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, float]]:
    """Generates from the parts of held-out samples, and lets each scorer look at it: prompts, outputs and figures."""
    spec = task.task or name
    chosen = shuffled(open_source(task.test, f"scored.{name}.test"), samples, seed)
    for key, scorer in scorers.items():
        if lacks := missing(scorer, find_task(spec).generated, chosen):
            raise UserError(f"scored.{name}.scorers.{key}: {lacks}")
    try:
        with Bar(total=len(chosen), desc=name) as bar, hw.autocast():
            made = generate(model, processor, spec, chosen, seed=seed, batch_size=50, progress=bar.update).outputs
    except ValueError as error:
        raise UserError(f"scored.{name}: {error}") from error
    rates = [getattr(processor.tokenizers[m], "sample_rate", None) for m in find_task(spec).generated]
    rate = next(filter(None, rates), None)
    heard = made if rate is None else [{**m, "sample_rate": rate} for m in made]
    figures: dict[str, float] = {}
    for key, scorer in scorers.items():
        try:
            with working(f"{name}: {key}"):
                figures |= scorer(heard, chosen)
        except ValueError as error:
            raise UserError(f"scored.{name}.scorers.{key}: {error}") from error
    return prompts_of(spec, chosen), made, figures


def prompts_of(task: str, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What of the samples the task was given."""
    return [{m: s[m] for m in find_task(task).given} for s in samples]


def shuffled(samples: Sequence[dict], count: int, seed: int) -> list[dict]:
    """`count` samples in an order drawn from the seed; where there are fewer, again from the first (with other noise).

    Raises UserError where none can be used.
    """
    order = np.random.default_rng(seed).permutation(len(samples))
    kept = list(itertools.islice(usable(samples, order), count))
    if not kept:
        raise UserError("none of the held-out samples can be used")
    return [kept[i % len(kept)] for i in range(count)]
