"""What a user gives a model, as written on the command line or in a JSONL file -> the raw parts that `generate` takes.

    {"text": "a handwritten seven"}                                      what a task is given: a text, or the path of a file
    {"text": "a handwritten seven", "image": "seven.png"}                several
    {"text": "a handwritten seven", "edit": "seven.png", "region": "4,0,8,8"}    and a part of what it generates
    {"prompt": "a handwritten seven"}            the one thing that a task is given; of the task `text`, what it goes on with

A line of a file and the same keys on the command line are one thing. A region is left,top,right,bottom in pixels (an image),
or start-stop in seconds (a clip; `start-` goes on to a new end).
A text that is edited has its gaps in it: "the [mask:2] statement".
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from components.data.bad import BadSample
from components.data.reading import json_lines, read_audio, read_image
from components.sequences import INSTRUCT, TASKS, Task, find_task
from components.templates import Templated, fill
from mdm.config import UserError
from mdm.data.processor import Processor
from mdm.generation.editing import Edit, infill, inpaint, respeak

CONTINUED = 64  # tokens that go on with a text
CHAT = "chat"  # the checkpoint's own template


def read_jsonl(path: str | Path) -> list[tuple[int, dict[str, str]]]:
    """One prompt a line, with its number. Raises UserError naming the line that is none."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"prompts: file not found: {path}")
    prompts = []
    for number, prompt in json_lines(path):
        if isinstance(prompt, BadSample):
            raise UserError(f"prompts: line {number} of {path}: {prompt.why}")
        if not isinstance(prompt, dict) or not all(isinstance(v, str) for v in prompt.values()):
            raise UserError(f'prompts: line {number} of {path} must be like {{"text": "..."}}, got {json.dumps(prompt)}')
        prompts.append((number, prompt))
    if not prompts:
        raise UserError(f"prompts: {path} holds no line")
    return prompts


def spelled_out(prompt: Mapping[str, str], task: str, where: str) -> dict[str, str]:
    """`prompt` is the one thing that a task is given; of a text, which is given nothing, what it goes on with.

    Raises UserError where it is not one thing, or given twice.
    """
    spec, rest = find_task(task), {key: value for key, value in prompt.items() if key != "prompt"}
    if "prompt" not in prompt or (task == "text" and "edit" not in prompt):
        return dict(prompt)
    if len(spec.given) != 1 or spec.given[0] in prompt:
        parts = " ".join(f"prompt.{m}=..." for m in spec.given) or "no prompt"
        raise UserError(f"{where}: task {task} is given {' and '.join(spec.given) or 'nothing'}; write {parts}")
    return {spec.given[0]: prompt["prompt"], **rest}


def check_prompt(prompt: Mapping[str, str], task: str, where: str) -> None:
    """Raises UserError where a prompt lacks what the task is given, has what it is not, or names a file that is not there."""
    spec = find_task(task)
    for key, value in prompt.items():
        if key not in (*spec.given, "edit", "region", *(("prompt",) if task == "text" else ())):
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
        seconds = (float(start or 0), float(stop)) if stop else (float(start or 0),)
        if not all(0 <= s < 1e9 for s in seconds):  # nan, inf
            raise ValueError
        return seconds
    except ValueError:
        raise UserError(
            f"{where}: region {region!r} is neither left,top,right,bottom in pixels nor start-stop in seconds"
        ) from None


def check_template(template: str | None, task: str) -> None:
    """Raises UserError for a template that has no place for the prompt, or no prompt to take."""
    if template is None:
        return
    if task != "text":
        raise UserError(f"template: it is for a prompt of the task text, which is gone on with; the task is {task}")
    if template != CHAT and "{}" not in template:
        raise UserError(f"template: {template!r} must hold {{}}, where the prompt stands, or be {CHAT}")


def templated(processor: Processor, prompt: str, template: str | None, where: str) -> str:
    """The prompt in a template, whose control tokens are control tokens, or in the checkpoint's own chat template.

    Raises UserError where the checkpoint has none.
    """
    if template is None:
        return prompt
    if template != CHAT:
        return fill(template, prompt)
    tokenizer = processor.tokenizers["text"]
    try:
        if not hasattr(tokenizer, "chat"):
            raise ValueError("the model's text tokenizer has no chat template")
        return tokenizer.chat([{"role": "user", "content": prompt}])
    except ValueError as error:
        raise UserError(f"{where}: template={CHAT}: {error}") from error


def read_prompt(
    prompt: Mapping[str, str],
    task: str,
    processor: Processor,
    where: str,
    length: int | None = None,
    room: int = CONTINUED,
    template: str | None = None,
) -> dict[str, Any]:
    """The raw parts: files are read, edits made. Raises UserError where one cannot be, or is longer than its canvas.

    length:   new tokens of the task `text`; None is 64 behind a prompt and `room` where there is none
    template: what is made of a prompt that is gone on with
    """
    spec = find_task(task)
    missing = [m for m in (*spec.given, *spec.generated) if m not in processor.tokenizers]
    if missing:
        raise UserError(f"task {task}: the model has no {missing[0]}, only {', '.join(processor.tokenizers)}")
    if not processor.vocabulary.has(f"task:{task}") and (task != "text" or processor.vocabulary.has("begin:text")):
        known = [s.removeprefix("task:") for s in processor.vocabulary.specials if s.startswith("task:")]
        raise UserError(f"task {task}: the model was made before that task, or without it; it has {', '.join(known)}")
    parts = {m: read_part(m, prompt[m], processor, where) for m in spec.given}
    for modality, raw in parts.items():
        try:
            count, canvas = len(processor.encode(modality, raw)), processor.canvas.get(modality)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        if canvas is not None and count > canvas:
            raise UserError(f"{where}: {modality} of {count} tokens does not fit its canvas of {canvas}")
    if "edit" not in prompt and task == "text":
        new = length or (CONTINUED if "prompt" in prompt else room)
        said = templated(processor, prompt["prompt"], template, where) if "prompt" in prompt else ""
        return {"text": continuation(processor, said, new)}
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


def continuation(processor: Processor, text: str, new: int) -> Edit:
    """A text and `new` tokens to generate behind it; whatever it holds is text, a `[mask]` too."""
    ids = processor.encode("text", text) if text else torch.zeros(0, dtype=torch.long)
    tokens = torch.cat([ids, torch.full((new,), processor.vocabulary.mask_id)])
    return Edit(tokens, torch.arange(len(tokens)) >= len(ids))


def read_part(modality: str, value: str, processor: Processor, where: str) -> Any:
    """A text as it is; an image or a clip from its file, at the tokenizer's size or rate."""
    try:
        if modality == "image":
            return read_image(Path(value), processor.tokenizers["image"].size)
        return read_audio(Path(value), processor.tokenizers["audio"].sample_rate) if modality == "audio" else value
    except BadSample as bad:
        raise UserError(f"{where}: {bad}") from bad


def easiest(tasks: Iterable[str]) -> str:
    """Of the tasks that a model was trained on, one that shows most and takes no file; the first where each takes one."""
    every = ["text" if task == INSTRUCT else task for task in tasks]
    return min(every, key=lambda task: (not set(TASKS[task].given) <= {"text"}, not TASKS[task].given))


def shown(
    data: Mapping[str, Any], sources: Mapping[str, Any], processor: Processor, max_length: int
) -> tuple[str, str | None, int | None]:
    """What `example` takes, of a training: a task, a text that the model knows, and a length that it has room for."""
    task = easiest(t for s in data.values() for t, share in s.tasks.items() if share)
    name = next(n for n, s in data.items() if task in s.tasks or INSTRUCT in s.tasks)
    if task != "text":
        return task, first_text(sources[name], "text", processor) if TASKS[task].given == ("text",) else None, None
    prompt = first_text(sources[name], "prompt", processor) if INSTRUCT in data[name].tasks else None
    room = max_length - processor.overhead("text") - (0 if prompt is None else len(processor.encode("text", prompt)))
    return (task, prompt, room if room < CONTINUED else None) if room > 0 else (task, None, None)


def first_text(source: Any, part: str, processor: Processor) -> str | None:
    """The text of a source's first sample, where one can be had at once."""
    try:
        text = source[0][part] if hasattr(source, "__getitem__") else None
        return text if text is None or isinstance(text, str) else processor.tokenizers["text"].decode(text)
    except Exception:  # whatever is wrong with it has been said, or will be: this is for show
        return None


def example(checkpoint: str | Path, task: str, text: str | None = None, length: int | None = None, trust: bool = False) -> str:
    """A command that generates, ready to be pasted. A picture or a clip is for the user to name.

    text:  one that a template made is taken apart into what the user says, and the template
    trust: the checkpoint has a tokenizer that is not the library's own
    """
    template = None
    if isinstance(text, Templated):
        (start, stop), *_ = text.plain or ((0, len(text)),)
        template = str(text[:start]) + "{}" + str(text[stop:])
        text = str(text[start:stop])
    values = {"text": text or "...", "image": "PICTURE.png", "audio": "CLIP.wav"}
    given = TASKS[task].given
    words = [f"checkpoint={checkpoint}", f"task={task}"]
    if len(given) == 1 or (text and not given):
        words.append(f"prompt={values[given[0] if given else 'text']}")
    else:
        words += [f"prompt.{m}={values[m]}" for m in given]
    words += [] if template in (None, "{}") else [f"template={template}"]
    words += [] if length is None else [f"length={length}"]
    words += ["trust=true"] if trust else []
    return " ".join(["mdm generate", *map(shlex.quote, words)])
