"""A trial of a config: what no look at its keys can tell, found in seconds and before long work.

It builds the tokenizers, opens every source, tokenizes a few samples of each, makes one batch with the masker, and asks every
part of the user's own for what its protocol wants. What cannot be reached (a hub offline) is named and left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from omegaconf import MISSING

from components.data.bad import BadSample, Refused, name_of
from components.maskers import Masker
from components.samplers import Sampler
from components.tasks import INSTRUCT, find_task
from components.tokenizers import Tokenizer
from components.vocabulary import Vocabulary
from mdm.config import UserError, instantiate, locate
from mdm.config.protocols import conforming, require_members
from mdm.data.corruption import check_pairs, horizon, layout_of, maskers
from mdm.data.pipeline import corpus, next_step, open_source, streams, tokenizers, training_loader
from mdm.data.processor import Processor
from mdm.data.settings import tasks_of
from mdm.data.validation import validation_batches
from mdm.models.folder import load_config, load_processor
from mdm.models.shape import gone_on
from mdm.models.transformer import ModelConfig
from mdm.training.output import check_output_dir
from mdm.training.reach import Trial, said, told_at_once, unreachable
from mdm.training.run import check_shared

SAMPLES = 8  # of each source
SECONDS = 20.0  # that drawing them from one source may take
CHARACTERS = 5_000_000  # that a tokenizer is trained on
LOGGER = ["log_dict", "close"]
JUDGE = ["classify", "features"]


@told_at_once()
def try_out(cfg: Any, own: Mapping[str, Tokenizer] | None = None) -> Trial:
    """Tries whatever a recipe's settings name. own: the tokenizers of a recipe that makes them itself

    Raises UserError for what would end the work later.
    """
    trial = Trial()
    drawn, opened = dict[str, Any](), dict[str, Any]()
    for key, node in sources(cfg).items():
        source = trial.reach(key, lambda node=node, key=key: open_source(node, key, key.endswith(".train")))
        samples = None if source is None else trial.reach(key, lambda source=source, key=key: draw(source, key))
        if samples is not None and samples.bad and not samples:
            raise UserError(f"{key}: none of {len(samples.bad)} samples can be used; the first: {samples.bad[0]}")
        if source is not None and samples is not None:
            opened[key], drawn[key] = source, samples
            of = f" of {len(source):,}" if hasattr(source, "__len__") else ""
            bad = f", {len(samples.bad)} more cannot be used ({samples.bad[0]})" if samples.bad else ""
            trial.tried.append(f"{len(samples)}{of} samples of {key}{bad}")
    if (folder := getattr(cfg, "checkpoint_dir", None)) is not None:
        trial.reach("checkpoint_dir", lambda: check_output_dir(folder, far=True, key="checkpoint_dir"))
    processor = build(cfg, own, opened, trial)
    data = getattr(cfg, "data", None) or {}
    usable = {name: s for name, s in data.items() if processor is not None and _has_tokenizers(s, name, processor, trial)}
    trial.drawn, trial.processor = drawn, processor
    if processor is not None and usable:
        rows(cfg, usable, drawn, processor, trial)
    if processor is not None and not data:
        for key, samples in drawn.items():
            encoded(samples, key, processor)
    if isinstance(getattr(cfg, "sampler", None), Mapping):
        conforming(cfg.sampler, "sampler", Sampler)
    for key, node, names in static(cfg):
        component = locate(node["_component_"], key)
        if isinstance(component, type):
            require_members(component, node, key, names)
    return trial


def sources(cfg: Any) -> dict[str, Mapping[str, Any]]:
    """The sources that settings name, by their keys."""
    found: dict[str, Any] = {}
    for name, stream in (getattr(cfg, "data", None) or {}).items():
        found |= {f"data.{name}.train": stream.train, f"data.{name}.validation": stream.validation}
    found |= {key: getattr(cfg, key, None) for key in ("source", "train", "validation")}
    for table in ("judged", "crossed", "scored", "modalities"):
        found |= {f"{table}.{name}.test": task.test for name, task in (getattr(cfg, table, None) or {}).items()}
    return {key: node for key, node in found.items() if isinstance(node, Mapping) and "_component_" in node}


def static(cfg: Any) -> Iterator[tuple[str, Mapping[str, Any], list[str]]]:
    """Parts that are not built for a trial, since they are slow or write files, and what they have to have."""
    if isinstance(getattr(cfg, "metric_logger", None), Mapping):
        yield "metric_logger", cfg.metric_logger, LOGGER
    for name, task in (getattr(cfg, "judged", None) or {}).items():
        yield f"judged.{name}.judge", task.judge, JUDGE


class Drawn(list):
    """Samples that were drawn from a source, with the names that they have there; `bad`: why others cannot be used."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.bad: list[str] = []

    def name_of(self, index: int) -> str:
        return self.names[index]


def draw(source: Any, key: str, count: int = SAMPLES, seconds: float = SECONDS) -> Drawn:
    """A few samples, from the first to the last, or the first ones of a stream.

    Raises UserError where one is refused, or is no mapping of parts.
    """
    started, kept = time.perf_counter(), Drawn()
    found = None if hasattr(source, "__len__") else iter(source)
    places = range(count) if found else np.unique(np.linspace(0, len(source) - 1, count).round().astype(int)).tolist()
    for place in places:
        if kept and time.perf_counter() - started > seconds:
            break
        name = name_of(source, place)
        try:
            sample = next(found, None) if found else source[place]
            if found and sample is None:
                break
        except Exception as error:
            if unreachable(error):
                raise
            if isinstance(error, Refused):  # it would end the work
                raise UserError(f"{key}: {error}") from error
            sample = error if isinstance(error, BadSample) else BadSample(name, said(error))
        if isinstance(sample, BadSample):
            kept.bad.append(str(sample))
        elif not isinstance(sample, Mapping):
            raise UserError(f"{key}: {name} is of type {type(sample).__name__}, and it has to be a mapping of its parts")
        else:
            kept.append(sample)
            kept.names.append(name)
    return kept


def glance(
    cfg: Any, opened: Mapping[str, Any], processor: Processor, by: Mapping[str, Masker], max_length: int, processes: int = 1
) -> None:
    """A training's own look, before long work, at sources that are read as they are drawn: rows are made of a few samples.

    What a stream leaves out and counts is no reason to end. Raises UserError, or ValueError, for what would end it later.
    """
    check_pairs(cfg.batch, by)
    check_shared(cfg.batch, 1 + any(m.pairs for m in by.values()), processes)
    lazy = {n: s for n, s in opened.items() if hasattr(s, "__len__") and not isinstance(s, list)}
    few = {name: draw(source, f"data.{name}.train", 4, 5.0) for name, source in lazy.items()}
    few = {name: drawn for name, drawn in few.items() if drawn and getattr(cfg.data[name], "on_long", "refuse") != "skip"}
    streams({name: cfg.data[name] for name in few}, few, processor, by, cfg.seed, cfg.prompt_dropout, max_length)


def build(cfg: Any, own: Mapping[str, Tokenizer] | None, opened: Mapping[str, Any], trial: Trial) -> Processor | None:
    """The processor of a run: its checkpoint's tokenizers, and those of the config; None where there is none."""
    base, canvas = None, {m: n for m, n in (getattr(cfg, "canvas", None) or {}).items() if n is not None}
    nodes = getattr(cfg, "tokenizers", None) or {}
    named = getattr(cfg, "checkpoint", None)
    if isinstance(named, str) and named != MISSING:
        base = trial.reach("checkpoint", lambda: load_processor(named))
        if base is None:
            return None
    texts = {key: source for key, source in opened.items() if key.endswith(".train") or key == "source"}
    seen = [0]

    def limited(modality: str) -> Iterator[str]:
        seen[0] = 0
        for text in corpus(texts, modality, CHARACTERS):
            seen[0] += len(text)
            yield text

    built = dict(own or {})
    for modality, node in nodes.items():
        tokenizer = trial.reach(f"tokenizers.{modality}", lambda m=modality, n=node: tokenizers({m: n}, limited)[m])
        if tokenizer is None:
            continue
        built[modality] = tokenizer
        trial.tried.append(f"tokenizers.{modality}")
        if seen[0] > CHARACTERS and modality in canvas:
            trial.skipped[f"canvas.{modality}"] = (
                f"its tokenizer was trained on the first {CHARACTERS:,} characters alone, and other lengths may come of all"
            )
            canvas.pop(modality)
    if not built and base is None:
        return None
    canvas = {m: length for m, length in canvas.items() if m in built or (base is not None and m in base.tokenizers)}
    tasks = tasks_of(cfg) if hasattr(cfg, "data") else []
    make = Processor.build if base is None else base.grown
    return trial.reach("canvas", lambda: make(built, canvas, tasks))


def _modalities(stream: Any) -> set[str]:
    return {m for t in stream.tasks if t != INSTRUCT for m in find_task(t).modalities}


def _has_tokenizers(stream: Any, name: str, processor: Processor, trial: Trial) -> bool:
    for modality in _modalities(stream):
        if modality not in processor.tokenizers and f"tokenizers.{modality}" in trial.skipped:
            trial.skipped[f"data.{name}"] = f"it needs tokenizers.{modality}"
            return False
    return True


def rows(cfg: Any, data: Mapping[str, Any], drawn: Mapping[str, list], processor: Processor, trial: Trial) -> None:
    """Makes rows of the samples that were drawn: a batch with the masker where it is trained, and what is held out."""
    processor = with_canvases(data, drawn, processor)
    trained = {n: replace(s, weight=1) for n, s in data.items() if f"data.{n}.train" in drawn}
    held_out = {n: drawn[f"data.{n}.validation"] for n in data if f"data.{n}.validation" in drawn}
    if getattr(cfg, "masker", None) is not None and trained:
        masked(cfg, trained, {n: drawn[f"data.{n}.train"] for n in trained}, processor)
        trial.tried.append(f"a batch of {', '.join(trained)} with the masker")
        trial.seen += [lengths(name, stream, drawn[f"data.{name}.train"], processor) for name, stream in trained.items()]
    for name, samples in held_out.items():
        key = f"data.{name}.validation"
        trial.reach(key, lambda n=name, s=samples: validation_batches(data, {n: s}, processor, SAMPLES))


def lengths(name: str, stream: Any, samples: list, processor: Processor) -> str:
    """How many tokens the samples of a stream have, and how many are longer than their canvas."""
    parts = []
    for modality in sorted(_modalities(stream), key=list(processor.tokenizers).index):
        own = [len(processor.encode(modality, s[modality])) for s in samples if modality in s]
        room = None if stream.pack is not None else processor.canvas.get(modality)
        if own:
            many = f"{min(own)} to {max(own)}" if min(own) < max(own) else f"{own[0]}"
            long = sum(n > room for n in own) if room is not None else 0
            over = f", {long} of {len(own)} longer (on_long: {stream.on_long})" if long else ""
            parts.append(f"{modality} {many} tokens" + (f" (canvas.{modality} = {room}{over})" if room is not None else ""))
    return f"data.{name}.train: {'; '.join(parts)}"


def masked(cfg: Any, data: Mapping[str, Any], samples: Mapping[str, list], processor: Processor) -> None:
    """One batch of every stream as training makes it. Raises UserError."""
    try:
        shape = shape_of(cfg, processor.vocabulary)
        layout = layout_of(shape, processor.vocabulary)
        by = maskers(data, cfg.masker, processor.vocabulary, cfg.seed, layout, horizon(data, processor.canvas, cfg.tokens))
        mix = streams(data, samples, processor, by, cfg.seed, cfg.prompt_dropout, shape.max_length)
        size = SAMPLES * len(data) * (1 + any(s.pairs for s in mix))  # every sample that was drawn, where there are no packs
        micros = next_step(iter(training_loader(mix, by, processor, lambda seen: size, size, cfg.loss, cfg.seed, prefetch=0)))
    except ValueError as error:
        raise UserError(str(error)) from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"masker, or a tokenizer: no batch can be made: {said(error)}") from error
    for micro in micros:
        if not math.isfinite(float(micro.noisy.weight.sum())):
            raise UserError("masker: the weights of a batch are not finite")


def shape_of(cfg: Any, vocabulary: Vocabulary) -> ModelConfig:
    """Of the model that is trained: of the config, or of the checkpoint that it starts from and what is changed of it."""
    if cfg.model:
        with torch.device("meta"):
            return instantiate(cfg.model, "model", vocab_size=1, residual_multiplier=1.0).config
    shape = load_config(cfg.checkpoint)
    shape = gone_on(shape, vocabulary, *(getattr(cfg, key, None) for key in ("blocks", "causal", "orders")))
    return shape if cfg.max_length is None else replace(shape, max_length=cfg.max_length)


def with_canvases(data: Mapping[str, Any], drawn: Mapping[str, list], processor: Processor) -> Processor:
    """The processor with a canvas for every modality of a pair: where none can be judged, as long as what was drawn needs."""
    canvas = dict(processor.canvas)
    for name, stream in data.items():
        if stream.pack is not None:
            continue
        for modality in _modalities(stream) - set(processor.canvas):
            own = [s for part in ("train", "validation") for s in drawn.get(f"data.{name}.{part}", ()) if modality in s]
            lengths = [len(processor.encode(modality, s[modality])) for s in own]
            canvas[modality] = max([1, canvas.get(modality, 1), *lengths])
    return replace(processor, canvas=canvas)


def encoded(samples: list[Any], key: str, processor: Processor) -> None:
    """Tokenizes samples. Raises UserError where not one can be."""
    errors = []
    for sample in samples:
        try:
            if not processor.encode_sample(sample):
                raise ValueError(f"it has no {' or '.join(processor.tokenizers)}; it has {', '.join(sample) or 'nothing'}")
            return
        except Exception as error:
            errors.append(error)
    if errors:
        raise UserError(f"{key}: none of {len(samples)} samples can be tokenized; the first: {said(errors[0])}")
