"""GenEval (2310.11513): does an image hold the objects that its prompt names, so many, in these colours, on this side?

    scored:
      geneval:
        task: text_to_image
        test: {_component_: geneval_prompts, path: evaluation_metadata.jsonl}
        scorers:
          geneval: {_component_: GenEval, detector: {_component_: Detector, model: ...}}

A prompt's `include` clauses must all hold, none of its `exclude` clauses may; a class counts by its surest detections, and
colour and place are judged on those. Thresholds are the paper's code's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image

from components.data.bad import BadSample
from components.data.reading import json_lines
from components.metrics.scorers import Sample, loaded

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
MAX_OBJECTS = 16  # of a class


@dataclass(frozen=True)
class Found:
    """A detected object. box: left, top, right, bottom in pixels;  mask: where it is, or None for all of its box."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: Image.Image | None = None


@runtime_checkable
class ObjectDetector(Protocol):
    """images, and the classes that may be in them -> what is found in each."""

    def __call__(self, images: Sequence[Image.Image], classes: Sequence[str]) -> list[list[Found]]: ...


@runtime_checkable
class ColourClassifier(Protocol):
    """A crop of an object, and the object's class -> one of COLOURS."""

    def __call__(self, crop: Image.Image, label: str) -> str: ...


def prompts(path: str) -> list[dict[str, Any]]:
    """GenEval's evaluation_metadata.jsonl, or lines like it: `prompt`, `tag`, `include`, `exclude`.

    Raises FileNotFoundError, and ValueError that names the line for one without them.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"file not found: {path}")
    samples = []
    for number, row in json_lines(file):
        if isinstance(row, BadSample):
            raise row
        if not isinstance(row, dict):
            raise BadSample(f"{path}, line {number}", f"it must hold keys and values, got {type(row).__name__}")
        missing = [key for key in ("prompt", "tag", "include") if key not in row]
        if missing:
            raise ValueError(f"{path}, line {number} has no {missing[0]!r}; it has {', '.join(row)}")
        samples.append({"text": row["prompt"], **row})
    return samples


class GenEval:
    """The share of images that hold what their prompt asks for: of each tag, and the mean over tags (GenEval's score).

    detector:  an `ObjectDetector`, e.g. `Detector`
    colours:   a `ColourClassifier`, e.g. `ClipColours`; needed where a prompt names a colour
    threshold, counting_threshold: detections below are left out; the second where the tag is "counting"
    """

    generated: str = "image"
    reference: tuple[str, ...] = ("tag", "include")

    def __init__(
        self,
        detector: ObjectDetector,
        colours: ColourClassifier | None = None,
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
    ) -> None:
        self.detector = detector
        self.colours = colours
        self.threshold = threshold
        self.counting_threshold = counting_threshold

    def __call__(self, made: Sequence[Sample], given: Sequence[Sample]) -> dict[str, float]:
        images = [m["image"] for m in made]
        clauses = [c for s in given for c in (*s["include"], *s.get("exclude", ()))]
        if self.colours is None and any("color" in c for c in clauses):
            raise ValueError("a prompt names a colour: GenEval needs `colours`, e.g. components.metrics.geneval.ClipColours")
        classes = sorted({c["class"] for c in clauses})
        by_tag: dict[str, list[bool]] = {}
        for image, prompt, found in zip(images, given, self.detector(images, classes), strict=True):
            least = self.counting_threshold if prompt["tag"] == "counting" else self.threshold
            by_tag.setdefault(prompt["tag"], []).append(self.holds(image, prompt, surest(found, least)))
        rates = {tag: float(np.mean(right)) for tag, right in by_tag.items()}
        return {"score": float(np.mean(list(rates.values()))), **rates}

    def holds(self, image: Image.Image, prompt: Mapping[str, Any], found: Mapping[str, Sequence[Found]]) -> bool:
        """Whether an image holds what its prompt asks for."""
        groups: list[Sequence[Found] | None] = []
        for clause in prompt["include"]:
            group = found.get(clause["class"], ())[: clause["count"]]
            right = len(group) == clause["count"] and self._coloured(image, clause, group) and _placed(clause, group, groups)
            groups.append(group if right else None)
        excluded = any(len(found.get(c["class"], ())) >= c["count"] for c in prompt.get("exclude", ()))
        return None not in groups and not excluded

    def _coloured(self, image: Image.Image, clause: Mapping[str, Any], group: Sequence[Found]) -> bool:
        if "color" not in clause:
            return True
        assert self.colours is not None  # said before anything is detected
        return all(self.colours(crop(image, f), clause["class"]) == clause["color"] for f in group)


def surest(found: Sequence[Found], threshold: float) -> dict[str, list[Found]]:
    """Detections above a threshold by class, the surest first."""
    by_class: dict[str, list[Found]] = {}
    for one in sorted(found, key=lambda f: -f.score):
        kept = by_class.setdefault(one.label, [])
        if one.score > threshold and len(kept) < MAX_OBJECTS:
            kept.append(one)
    return by_class


def _placed(clause: Mapping[str, Any], group: Sequence[Found], groups: Sequence[Sequence[Found] | None]) -> bool:
    if "position" not in clause:
        return True
    side, target = clause["position"]
    others = groups[target]
    return others is not None and all(side in relations(one.box, other.box) for one in group for other in others)


def relations(box: Sequence[float], other: Sequence[float], margin: float = 0.1) -> set[str]:
    """Where a box lies from another: of left of, right of, above, below.

    The offset of their centres, shortened by `margin` times the sum of their sizes, must be over half its own length.
    """
    a, b = (np.asarray(x, dtype=float).reshape(2, 2) for x in (box, other))
    offset = a.mean(axis=0) - b.mean(axis=0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    beyond = np.maximum(np.abs(offset) - margin * sizes, 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    x, y = beyond / np.linalg.norm(offset)
    sides = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {side for side, holds in sides.items() if holds}


def crop(image: Image.Image, found: Found) -> Image.Image:
    """An object alone: its box, what is not of its mask in grey."""
    image = image.convert("RGB")
    if found.mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "#999"), found.mask.convert("L"))
    left, top, right, bottom = (round(edge) for edge in found.box)
    return image.crop((left, top, right, bottom))


class Detector:
    """A detector of transformers, on the hub or in a folder.

    task: image-segmentation (masks and their boxes: Mask2Former, as the paper's code), object-detection (DETR, YOLOS; classes
          are the model's own), or zero-shot-object-detection (OWLv2, Grounding DINO; any classes)
    """

    TASKS = ("image-segmentation", "object-detection", "zero-shot-object-detection")

    def __init__(self, model: str, task: str = "object-detection", batch_size: int = 8) -> None:
        from transformers import pipeline

        if task not in self.TASKS:
            raise ValueError(f"task {task!r} is not one of {', '.join(self.TASKS)}")
        self.pipeline: Any = loaded(lambda m: pipeline(task, model=m), model)
        self.task = task
        self.batch_size = batch_size

    def __call__(self, images: Sequence[Image.Image], classes: Sequence[str]) -> list[list[Found]]:
        rgb = [image.convert("RGB") for image in images]
        if self.task == "zero-shot-object-detection":
            results = [self.pipeline(i, candidate_labels=list(classes), threshold=0.0) for i in rgb]
        elif self.task == "object-detection":
            results = self.pipeline(rgb, threshold=0.0, batch_size=self.batch_size)
        else:
            results = [self.pipeline(i, subtask="instance", threshold=0.0) for i in rgb]
        return [[f for one in result if (f := self._found(one)) is not None] for result in results]

    @staticmethod
    def _found(one: Mapping[str, Any]) -> Found | None:
        if "mask" not in one:
            box = one["box"]
            return Found(one["label"], one["score"], (box["xmin"], box["ymin"], box["xmax"], box["ymax"]))
        box = one["mask"].getbbox()
        return None if box is None else Found(one["label"], one["score"], box, one["mask"])


class ClipColours:
    """The colour whose prompts' mean CLIP feature is the closest to the crop's. model: a CLIP model of transformers."""

    def __init__(self, model: str) -> None:
        from transformers import CLIPModel, CLIPProcessor

        self.model: Any = loaded(CLIPModel, model).eval()
        self.processor: Any = loaded(CLIPProcessor, model)
        self.features: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, crop: Image.Image, label: str) -> str:
        if label not in self.features:
            texts = [t.replace("{}", colour, 1).replace("{}", label) for colour in COLOURS for t in TEMPLATES]
            tokens = self.processor(text=texts, return_tensors="pt", padding=True)
            each = torch.nn.functional.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)
            mean = each.unflatten(0, (len(COLOURS), len(TEMPLATES))).mean(dim=1)
            self.features[label] = torch.nn.functional.normalize(mean, dim=-1)
        pixels = self.processor(images=crop, return_tensors="pt")
        image = self.model.get_image_features(**pixels).pooler_output[0]
        return COLOURS[int((self.features[label] @ image).argmax())]
