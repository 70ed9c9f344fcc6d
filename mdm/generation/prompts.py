"""What a user gives a model, as written on the command line or in a JSONL file -> the raw parts that `generate` takes.

    {"text": "a handwritten seven"}                                      what a task is given: words, or the path of a file
    {"text": "a handwritten seven", "image": "seven.png"}                several
    {"text": "a handwritten seven", "edit": "seven.png", "region": "16,0,32,32"}    and a part of what it generates
    {"prompt": "a handwritten seven"}            the one thing that a task is given; of the task `text`, what it goes on with

A line of a file and the same keys on the command line are one thing. A part is the path of a file where the modality's
tokenizer reads files, and a region is what that tokenizer takes for one: left,top,right,bottom in pixels (an image), start-stop
in seconds (a clip; `start-` goes on to a new end). A text that is edited has its gaps in it: "the [mask:2] statement".
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from components.data.bad import BadSample
from components.data.reading import json_lines
from components.tasks import INSTRUCT, Task, find_task
from components.templates import Templated, fill
from components.tokenizers.modality import Filed, suffix
from components.vocabulary import Vocabulary
from mdm.config import UserError, found_beside
from mdm.config.errors import said
from mdm.config.names import TOKENIZERS, close
from mdm.config.trust import is_listed
from mdm.data.processor import Processor
from mdm.generation.editing import Edit, edit, infill

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


def check_prompt(prompt: Mapping[str, str], task: str, files: Mapping[str, str | None], where: str) -> None:
    """Raises UserError where a prompt lacks what the task is given, has what it is not, or names a file that is not there.

    files: suffixes by modality
    """
    spec = find_task(task)
    for key, value in prompt.items():
        if key not in (*spec.given, "edit", "region", *(("prompt",) if task == "text" else ())):
            given = ", ".join(spec.given) or "nothing"
            raise UserError(f"{where}: {key!r} has no place here; task {task} is given {given} (and may take edit and region)")
        if files.get(key) is not None and not Path(value).is_file():
            raise UserError(f"{where}: {key} file not found: {value}")
    for modality in spec.given:
        if modality not in prompt:
            kind = "a text" if files[modality] is None else "the path of a file"
            key = "prompt" if len(spec.given) == 1 else f"prompt.{modality}"
            how = f"; write {key}=..." if where == "prompt" else ""
            raise UserError(f"{where}: task {task} is given {modality} ({kind}), and there is none{how}")
    if "region" in prompt and "edit" not in prompt:
        raise UserError(f"{where}: a region needs an edit: the file that it is a part of")
    if "edit" in prompt:
        check_edit(prompt, spec, files, where)


def check_edit(prompt: Mapping[str, str], spec: Task, files: Mapping[str, str | None], where: str) -> None:
    """Raises UserError for a region of a text, none of something else, or a file that is not there."""
    region = prompt.get("region")
    if region is None and "text" in spec.generated:
        return
    if region is None or all(files[m] is None for m in spec.generated):
        wanted = " or ".join(f"{'[mask] gaps and no' if files[m] is None else 'a'} region ({m})" for m in spec.generated)
        raise UserError(
            f"{where}: the task generates {' and '.join(spec.generated)}, so an edit takes {wanted}; got region={region}"
        )
    if not Path(prompt["edit"]).is_file():
        raise UserError(f"{where}: edit: file not found: {prompt['edit']}")


def check_task(task: str, vocabulary: Vocabulary, learned: Sequence[str] | None = None) -> None:
    """Raises UserError for a task of a modality that the model lacks, or one that it was made without.

    learned: tasks that the model was trained on, to be named in place of all that it has a token for
    """
    missing = [m for m in find_task(task).modalities if m not in vocabulary.modalities]
    if missing:
        hint = close(task, learned or vocabulary.tasks)
        raise UserError(f"task {task}: the model has no {missing[0]}, only {', '.join(vocabulary.modalities)}{hint}")
    if task not in vocabulary.tasks and (task != "text" or vocabulary.has("begin:text")):
        known = f"learned {', '.join(learned)}" if learned else f"has {', '.join(vocabulary.tasks)}"
        raise UserError(f"task {task}: the model was made before that task, or without it; it {known}")


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
    tokenizer: Any = processor.tokenizers["text"]
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
    check_task(task, processor.vocabulary)
    spec = find_task(task)
    parts = {m: read_part(m, prompt[m], processor, where) for m in spec.given}
    for modality, raw in parts.items():
        try:
            count, canvas = len(processor.encode(modality, raw)), processor.canvas.get(modality)
        except Exception as error:  # of a tokenizer of the user's own any
            no_file = not isinstance(processor.tokenizers[modality], Filed) and os.path.isfile(prompt[modality])
            why = f" ({modality} is given as words: its tokenizer reads no files)" if no_file else ""
            raise UserError(f"{where}: {said(error)}{why}") from error
        if canvas is not None and count > canvas:
            raise UserError(f"{where}: {modality} of {count} tokens does not fit its canvas of {canvas}")
    if "edit" not in prompt and task == "text":
        new = length or (CONTINUED if "prompt" in prompt else room)
        spoken = templated(processor, prompt["prompt"], template, where) if "prompt" in prompt else ""
        return {"text": continuation(processor, spoken, new)}
    if "edit" not in prompt:
        return parts
    try:
        return {**parts, **read_edit(prompt, spec, processor)}
    except Exception as error:
        raise UserError(f"{where}: {said(error)}") from error


def read_edit(prompt: Mapping[str, str], spec: Task, processor: Processor) -> dict[str, Edit]:
    """The edit, by its modality: a text has gaps in it; else the first that is generated whose tokenizer takes file and region.

    Raises ValueError where none does: what each says of it.
    """
    if "region" not in prompt:
        return {"text": infill(processor, prompt["edit"])}
    why = []
    for modality in spec.generated:
        tokenizer = processor.tokenizers[modality]
        try:
            if isinstance(tokenizer, Filed):
                return {modality: edit(processor, modality, tokenizer.read(Path(prompt["edit"])), prompt["region"])}
        except ValueError as error:
            why.append(str(error))
    raise ValueError("; ".join(why))


def continuation(processor: Processor, text: str, new: int) -> Edit:
    """A text and `new` tokens to generate behind it; whatever it holds is text, a `[mask]` too."""
    ids = processor.encode("text", text) if text else torch.zeros(0, dtype=torch.long)
    tokens = torch.cat([ids, torch.full((new,), processor.vocabulary.mask_id)])
    return Edit(tokens, torch.arange(len(tokens)) >= len(ids))


def read_part(modality: str, value: str, processor: Processor, where: str) -> Any:
    """Words as they are; else what the tokenizer reads from the file. Raises UserError."""
    tokenizer = processor.tokenizers[modality]
    try:
        return tokenizer.read(Path(value)) if isinstance(tokenizer, Filed) else value
    except Exception as error:
        why = said(error) if value in str(error) else f"{value}: {said(error)}"
        raise UserError(f"{where}: {why}") from error


def easiest(tasks: Iterable[str]) -> str:
    """Of the tasks that a model was trained on, one that shows most and takes no file; the first where each takes one."""
    every = ["text" if task == INSTRUCT else task for task in tasks]
    return min(every, key=lambda task: (not set(find_task(task).given) <= {"text"}, not find_task(task).given))


def shown(
    data: Mapping[str, Any], sources: Mapping[str, Any], processor: Processor, max_length: int
) -> tuple[str, str | None, int | None, dict[str, str | None]]:
    """What `example` takes, of a training: a task, a text that the model knows, a length that it has room for, and suffixes."""
    files = suffixes(processor)
    task = easiest(t for s in data.values() for t, share in s.tasks.items() if share)
    name = next(n for n, s in data.items() if task in s.tasks or INSTRUCT in s.tasks)
    if task != "text":
        return task, first_text(sources[name], "text", processor) if find_task(task).given == ("text",) else None, None, files
    prompt = first_text(sources[name], "prompt", processor) if INSTRUCT in data[name].tasks else None
    room = max_length - processor.overhead("text") - (0 if prompt is None else len(processor.encode("text", prompt)))
    return (task, prompt, room if room < CONTINUED else None, files) if room > 0 else (task, None, None, files)


def suffixes(processor: Processor) -> dict[str, str | None]:
    """Of the files of each modality; None where a sample is words. Raises UserError where they cannot be read or written."""
    found = {}
    for modality, tokenizer in processor.tokenizers.items():
        try:
            found[modality] = suffix(tokenizer)
        except ValueError as error:
            raise UserError(f"tokenizers.{modality}: {error}") from error
    return found


def first_text(source: Any, part: str, processor: Processor) -> str | None:
    """The text of a source's first sample, where one can be had at once."""
    try:
        text = source[0][part] if hasattr(source, "__getitem__") else None
        return text if text is None or isinstance(text, str) else processor.tokenizers["text"].decode(text)
    except Exception:  # whatever is wrong with it has been said, or will be: this is for show
        return None


def example(
    checkpoint: str | Path,
    task: str,
    text: str | None = None,
    length: int | None = None,
    files: Mapping[str, str | None] | None = None,
    foreign: Sequence[Any] = (),
) -> str:
    """A command that generates, ready to be pasted. A file is for the user to name.

    text:  one that a template made is taken apart into what the user says, and the template
    files: suffixes by modality; of one that is not there, but for text, the kind of file is not said
    foreign: the tokenizers that are not the library's own: they want trust, and their folder
    """
    places = sorted({os.path.relpath(folder) for tokenizer in foreign if (folder := found_beside(tokenizer))})
    template = None
    if isinstance(text, Templated):
        (start, stop), *_ = text.plain or ((0, len(text)),)
        template = str(text[:start]) + "{}" + str(text[stop:])
        text = str(text[start:stop])
    given, kinds = find_task(task).given, {"text": None, **(files or {})}
    values = {m: f"FILE{kinds.get(m, '')}" if kinds.get(m, "") is not None else text or "..." for m in ("text", *given)}
    words = [f"checkpoint={checkpoint}", f"task={task}"]
    if len(given) == 1 or (text and not given):
        words.append(f"prompt={values[given[0] if given else 'text']}")
    else:
        words += [f"prompt.{m}={values[m]}" for m in given]
    words += [] if template in (None, "{}") else [f"template={template}"]
    words += [] if length is None else [f"length={length}"]
    words += ["trust=true"] if foreign else []
    path = [f"PYTHONPATH={shlex.quote(os.pathsep.join(places))}"] if places else []
    return " ".join([*path, "mdm generate", *map(shlex.quote, words)])


def example_of(run: Any, sources: Mapping[str, Any]) -> str:
    """A command that tries the model of a training run, which has these sources."""
    foreign = [tokenizer for tokenizer in run.processor.tokenizers.values() if not is_listed(tokenizer, TOKENIZERS)]
    shows = shown(run.cfg.data, sources, run.processor, run.model.config.max_length)
    return example(run.folder, *shows, foreign=foreign)
