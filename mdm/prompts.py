"""What a user gives a model, as written on the command line or in a JSONL file -> the raw parts that `generate` takes.

    {"text": "a handwritten seven"}                                      what a task is given: a text, or the path of a file
    {"text": "a handwritten seven", "image": "seven.png"}                several
    {"text": "a handwritten seven", "edit": "seven.png", "region": "4,0,8,8"}    and a part of what it generates

A region is left,top,right,bottom in pixels (an image), or start-stop in seconds (a clip; `start-` goes on to a new end).
A text that is edited has its gaps in it: "the [mask:2] statement".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.data.bad import BadSample
from components.data.reading import json_lines, read_audio, read_image
from components.sequences import Task, find_task
from mdm.config import UserError
from mdm.editing import infill, inpaint, respeak
from mdm.processor import Processor


def read_jsonl(path: str | Path) -> list[dict[str, str]]:
    """One prompt a line. Raises UserError naming the line that is none."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"prompts: file not found: {path}")
    prompts = []
    for number, prompt in json_lines(path):
        if isinstance(prompt, BadSample):
            raise UserError(f"prompts: line {number} of {path}: {prompt.why}")
        if not isinstance(prompt, dict) or not all(isinstance(v, str) for v in prompt.values()):
            raise UserError(f'prompts: line {number} of {path} must be like {{"text": "..."}}, got {json.dumps(prompt)}')
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"prompts: {path} holds no line")
    return prompts


def check_prompt(prompt: Mapping[str, str], task: str, where: str) -> None:
    """Raises UserError where a prompt lacks what the task is given, has what it is not, or names a file that is not there."""
    spec = find_task(task)
    for key, value in prompt.items():
        if key not in (*spec.given, "edit", "region"):
            given = ", ".join(spec.given) or "nothing"
            raise UserError(f"{where}: {key!r} has no place here; task {task} is given {given} (and may take edit and region)")
        if key in ("image", "audio") and not Path(value).is_file():
            raise UserError(f"{where}: {key} file not found: {value}")
    for modality in spec.given:
        if modality not in prompt:
            kind = "a text" if modality == "text" else "the path of a file"
            raise UserError(f"{where}: task {task} is given {modality} ({kind}), and there is none")
    if "region" in prompt and "edit" not in prompt:
        raise UserError(f"{where}: a region needs an edit: the image or clip that it is a part of")
    if "edit" in prompt:
        edited = edited_modality(prompt, spec, where)
        if edited != "text" and not Path(prompt["edit"]).is_file():
            raise UserError(f"{where}: edit: file not found: {prompt['edit']}")
        if edited != "text":
            parse_region(prompt["region"], where)


def edited_modality(prompt: Mapping[str, str], spec: Task, where: str) -> str:
    """Which modality an edit is of: the form of its region says so."""
    region = prompt.get("region")
    modality = "text" if region is None else "image" if "," in region else "audio"
    if modality not in spec.generated:
        hint = {"text": "[mask] gaps and no region", "image": "a region left,top,right,bottom", "audio": "a region start-stop"}
        wanted = " or ".join(f"{hint[m]} ({m})" for m in spec.generated)
        raise UserError(
            f"{where}: the task generates {' and '.join(spec.generated)}, so an edit takes {wanted}; got region={region}"
        )
    return modality


def parse_region(region: str, where: str) -> tuple[int | float, ...]:
    """The numbers of a region. Raises UserError where it is not one."""
    try:
        if "," in region:
            left, top, right, bottom = (int(n) for n in region.split(","))
            return left, top, right, bottom
        start, stop = region.split("-")
        return (float(start or 0), float(stop)) if stop else (float(start or 0),)
    except ValueError:
        raise UserError(
            f"{where}: region {region!r} is neither left,top,right,bottom in pixels nor start-stop in seconds"
        ) from None


def read_prompt(prompt: Mapping[str, str], task: str, processor: Processor, where: str) -> dict[str, Any]:
    """The raw parts: files are read, edits made. Raises UserError where one cannot be."""
    spec = find_task(task)
    missing = [m for m in (*spec.given, *spec.generated) if m not in processor.tokenizers]
    if missing:
        raise UserError(f"task {task}: the model has no {missing[0]}, only {', '.join(processor.tokenizers)}")
    if not processor.vocabulary.has(f"task:{task}") and (task != "text" or processor.vocabulary.has("begin:text")):
        known = [s.removeprefix("task:") for s in processor.vocabulary.specials if s.startswith("task:")]
        raise UserError(f"task {task}: the model was made before that task, or without it; it has {', '.join(known)}")
    parts = {m: read_part(m, prompt[m], processor, where) for m in spec.given}
    if "edit" not in prompt:
        return parts
    modality = edited_modality(prompt, spec, where)
    try:
        if modality == "text":
            return {**parts, "text": infill(processor, prompt["edit"])}
        raw = read_part(modality, prompt["edit"], processor, where)
        region = parse_region(prompt["region"], where)
        edit = inpaint(processor, raw, region) if modality == "image" else respeak(processor, raw, *region)
        return {**parts, modality: edit}
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def read_part(modality: str, value: str, processor: Processor, where: str) -> Any:
    """A text as it is; an image or a clip from its file, at the tokenizer's size or rate."""
    try:
        if modality == "image":
            return read_image(Path(value), processor.tokenizers["image"].size)
        return read_audio(Path(value), processor.tokenizers["audio"].sample_rate) if modality == "audio" else value
    except BadSample as bad:
        raise UserError(f"{where}: {bad}") from bad
