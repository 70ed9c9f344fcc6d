"""The settings of a run's data: its streams, batch and loss, and all that can be wrong with them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from components.sequences import structure
from components.tasks import INSTRUCT, check_modality, find_task, name_of
from mdm.config import UserError, check, locate

ON_LONG = ("refuse", "skip", "cut")


MASKER_SUPPLIED = ("mask_id", "modalities", "seed", "vocabulary", "horizon")
"""What a run hands to its maskers. horizon: rows of the stream in all of the training."""


@dataclass
class StreamSettings:
    """One entry of a config's `data`.

    train, validation: `_component_` nodes of sources; validation may be absent, train where nothing is trained
    held_out: share of the train source that is for validation, in place of a source of its own
    weight:  share in the mix: rows among the sum of all weights
    tasks:   share of each task among its samples
    pack:    row length for running text; absent for pairs, which stand on canvases
    best_fit: documents that are packed together, each whole where it fits best; null: in their order, cut where a row ends
    masker:  `_component_` node of what masks its rows in training; absent, the run's `masker`
    on_long: what becomes of a sample that does not fit its canvas: "refuse" ends the run, "skip" leaves it out, "cut" shortens
             what may end early to the canvas, without an end token. A sample that is left out or cut is counted
    """

    tasks: dict[str, float]
    weight: int = 1
    train: dict[str, Any] | None = None
    validation: dict[str, Any] | None = None
    held_out: float | None = None
    pack: int | None = None
    best_fit: int | None = None
    masker: dict[str, Any] | None = None
    on_long: str = "refuse"


@dataclass
class BatchSettings:
    """Sequences of an optimizer step; an anti-masking pair is two.

    logical:  where the optimizer's settings were tuned
    physical: of a step as it runs, over all processes; null is logical
    micro:    of one forward pass of one process, at the most
    ramp:     share of the horizon -> the physical batch from there on
    """

    logical: int
    micro: int
    physical: int | None = None
    ramp: dict[float, int] = field(default_factory=dict)

    def at(self, progress: float) -> int:
        """The physical batch after a share of the horizon."""
        begun = [share for share in self.ramp if share <= progress]
        return self.ramp[max(begun)] if begun else self.physical or self.logical

    def validate(self) -> None:
        """Raises UserError."""
        for key in ("logical", "physical", "micro"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"batch.{key} must be at least 1, got {value}")
        for share in self.ramp:
            if not 0 < share < 1:
                raise UserError(f"batch.ramp: {share} is not a share of the horizon in (0, 1)")
            if self.ramp[share] < 1:
                raise UserError(f"batch.ramp.{share} must be at least 1, got {self.ramp[share]}")


@dataclass
class LossSettings:
    """See `components.losses.coefficients`.

    next_token: of a model of blocks that is causal: weight of the autoregressive loss beside the diffusion one
    """

    weighting: str = "nelbo"
    reduction: str = "sequence"
    next_token: float | None = None


def canonical(task: str, key: str) -> str:
    """The name of a task that stands at a key, maybe as an arrow. Raises UserError."""
    try:
        return name_of(find_task(task))
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error


def name_tasks(data: Mapping[str, StreamSettings]) -> None:
    """Calls each task of the streams by its name. Raises UserError where one is none, or stands twice."""
    for name, s in data.items():
        key, named = f"data.{name}.tasks", dict[str, float]()
        for task, share in s.tasks.items():
            known = task if task == INSTRUCT else canonical(task, key)
            if known in named:
                raise UserError(f"{key}: {known} stands twice, once as {task!r}")
            named[known] = share
        s.tasks = named


def hold_out(data: Mapping[str, StreamSettings]) -> None:
    """Makes two sources of each that a share is held out of: what it is to `split`. Raises UserError where it cannot be."""
    for name, s in data.items():
        if s.held_out is None:
            continue
        key, node = f"data.{name}.held_out", s.train
        if s.validation is not None:
            raise UserError(f"{key}: there is a validation source; take out one of them")
        check(node, f"data.{name}.train")
        assert node is not None  # `check` has seen to it
        known = inspect.signature(locate(node["_component_"], f"data.{name}.train")).parameters
        if not {"split", "held_out"} <= set(known):
            theirs = '; split "train[:90%]" and "train[90%:]" are parts of a dataset' if "data_files" in known else ""
            raise UserError(f"{key}: {node['_component_']} cannot be split; name a source at data.{name}.validation{theirs}")
        if not 0 < s.held_out < 1:
            raise UserError(f"{key} must be a share between 0 and 1, got {s.held_out}")
        s.train, s.validation = ({**node, "split": split, "held_out": s.held_out} for split in ("train", "validation"))
        s.held_out = None


def tasks_of(cfg: Any) -> list[str]:
    """The tasks that settings name, the streams' first: those that the vocabulary of a run needs tokens for."""
    named = [task for s in cfg.data.values() for task in s.tasks if task != INSTRUCT]
    for task in getattr(cfg, "judged", {}).values():
        named += [asked for asked in (task.write, task.read, task.complete) if asked]
    return list(dict.fromkeys([*named, *(task.task or name for name, task in getattr(cfg, "crossed", {}).items())]))


def check_tokenizers(nodes: Mapping[str, Mapping[str, Any]]) -> None:
    """Names and nodes of a config's `tokenizers`. Raises UserError."""
    for modality, node in nodes.items():
        try:
            check_modality(modality)
        except ValueError as error:
            raise UserError(f"tokenizers: {error}") from error
        check(node, f"tokenizers.{modality}", supplied=("corpus",))


def check_streams(data: Mapping[str, StreamSettings]) -> None:
    """Names, weights, tasks and sources of a config's `data`, before anything is built. Raises UserError."""
    if not data:
        raise UserError("data: name at least one source")
    name_tasks(data)
    hold_out(data)
    for name, s in data.items():
        if s.weight < 1:
            raise UserError(f"data.{name}.weight must be at least 1, got {s.weight}")
        if not s.tasks:
            raise UserError(f"data.{name}.tasks: name at least one, e.g. text_to_image")
        for task, share in s.tasks.items():
            if share < 0 or sum(s.tasks.values()) <= 0:
                raise UserError(f"data.{name}.tasks.{task}: shares are at least 0, not all of them 0; got {share}")
        if INSTRUCT in s.tasks and len(s.tasks) > 1:
            raise UserError(f"data.{name}.tasks: {INSTRUCT} stands alone; give other tasks an entry of their own")
        if ("text" in s.tasks) != (s.pack is not None) or ("text" in s.tasks and len(s.tasks) > 1):
            raise UserError(f"data.{name}: `pack` (a row length) goes with the one task `text`, and that task with `pack`")
        if s.on_long not in ON_LONG:
            raise UserError(f"data.{name}.on_long: {s.on_long!r} is not one of {', '.join(ON_LONG)}")
        if s.best_fit is not None and (s.best_fit < 1 or s.pack is None):
            raise UserError(
                f"data.{name}.best_fit = {s.best_fit}: a number of documents, of a stream with `pack`; null is none"
            )
        if s.pack is not None and s.on_long != "refuse":
            raise UserError(f"data.{name}.on_long: packed text has no canvas, and a long text goes on in the next row")
        if s.train is None:
            raise UserError(f"data.{name}.train: no source; write _component_: components.data... (see mdm cp pretrain)")
        check(s.train, f"data.{name}.train")
        if s.validation is not None:
            check(s.validation, f"data.{name}.validation")
        if s.masker is not None:
            check(s.masker, f"data.{name}.masker", supplied=MASKER_SUPPLIED)


def row_length(stream: StreamSettings, task: str, canvas: Mapping[str, int | None]) -> int:
    """Positions of a row: of the pack, or of a pair's canvases with their boundaries and the task's token."""
    if stream.pack is not None:
        return stream.pack
    if task == INSTRUCT:  # as long as its prompt
        return canvas.get("text") or 0
    return len(structure(task)) + sum(canvas.get(m) or 0 for m in find_task(task).modalities)


def lacking(task: str, name: str, tokenizers: Mapping[str, Any]) -> str | None:
    """What to say where a task of a stream has a modality without a tokenizer."""
    lacks = next((m for m in find_task(task).modalities if m not in tokenizers), None)
    return lacks and f"task {task} of data.{name} needs tokenizers.{lacks}; there are {', '.join(tokenizers) or 'none'}"


def check_tasks(
    data: Mapping[str, StreamSettings], tokenizers: Mapping[str, Any], canvas: Mapping[str, int], max_length: int
) -> None:
    """Every task has its tokenizers and canvases, and every row fits the model. Raises UserError."""
    for name, s in data.items():
        if s.pack is not None and s.pack > max_length:
            raise UserError(f"data.{name}.pack = {s.pack} is longer than the model: model.max_length is {max_length}")
        for task in s.tasks if INSTRUCT not in s.tasks else ():  # its rows have the length of their prompt
            used = find_task(task).modalities
            if why := lacking(task, name, tokenizers):
                raise UserError(why)
            for modality in used:
                if s.pack is None and modality not in canvas:
                    raise UserError(f"task {task} of data.{name} needs canvas.{modality}, its length in tokens")
            if s.pack is None:
                length = row_length(s, task, canvas)
                if length > max_length:
                    parts = ", ".join(f"{m} {canvas[m]}" for m in used)
                    raise UserError(
                        f"task {task} of data.{name} takes {length} positions (canvases: {parts}; and boundaries); "
                        f"model.max_length is {max_length}"
                    )


def check_data(data: Mapping[str, StreamSettings], masker: Mapping[str, Any], loss: LossSettings, batch: BatchSettings) -> None:
    """All of a run's settings that are about its batches, before anything is built. Raises UserError."""
    check_streams(data)
    check(masker, "masker", supplied=MASKER_SUPPLIED)
    batch.validate()
    if batch.ramp and (name := next((n for n, s in data.items() if INSTRUCT in s.tasks), None)):
        raise UserError(f"batch.ramp: rows of data.{name} are as long as their prompts, so the horizon's shares are not known")
    for key, known in (("weighting", ("nelbo", "plain")), ("reduction", ("sequence", "token"))):
        if getattr(loss, key) not in known:
            raise UserError(f"loss.{key}: {getattr(loss, key)!r} is not one of {', '.join(known)}")
    if loss.next_token is not None and loss.next_token < 0:
        raise UserError(f"loss.next_token must be at least 0, or null, which is off; got {loss.next_token}")
