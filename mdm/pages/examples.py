"""A sample of each stream of a run, kept in its folder: what the demo opens with, and what a prompt may look like.

    examples/examples.jsonl    {"tasks": ["text_to_image", "image_to_text"], "text": "a handwritten seven", "image": "0.png"}

They lie beside `model/`, not in it: what is shared or pushed holds nothing of the data.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from components.data.reading import json_lines
from components.files import inside
from components.tasks import find_task
from components.tokenizers.modality import suffix
from mdm.data.processor import Processor
from mdm.models.folder import model_folder
from mdm.pages.media import Written

FOLDER, FILE = "examples", "examples.jsonl"
LONGEST = 1000  # characters of a text that is an example


def write(run: Path, processor: Processor, data: Mapping[str, Any], *sources: Mapping[str, Any]) -> None:
    """The first sample of each stream of pairs into `run/examples`, of the first of the sources that can be asked for it."""
    folder, lines = run / FOLDER, []
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for i, (name, stream) in enumerate(data.items()):
        opened = [some[name] for some in sources if hasattr(some.get(name), "__getitem__")]
        if stream.pack is None and opened:
            with contextlib.suppress(Exception):  # it is for show: whatever is wrong with it has been said
                parts = {m: raw for m, raw in opened[0][0].items() if m in processor.tokenizers}
                raw = {m: processor.tokenizers[m].decode(x) if isinstance(x, Tensor) else x for m, x in parts.items()}
                tasks = [task for task, share in stream.tasks.items() if share]
                lines.append(json.dumps({"tasks": tasks, **Written(folder, str(i), processor).all(raw)}) + "\n")
    (folder / FILE).write_text("".join(lines))


def read(checkpoint: str | Path, processor: Processor) -> dict[str, dict[str, str]]:
    """By task, what it may be given: words, and the paths of files. Nothing where the folder has no examples.

    They may have travelled: what is no example is passed over.
    """
    model = model_folder(checkpoint)
    folder = next((f for f in (model / FOLDER, model.parent / FOLDER) if (f / FILE).is_file()), None)
    found: dict[str, dict[str, str]] = {}
    for _, line in json_lines(folder / FILE) if folder is not None else ():
        if isinstance(line, dict) and isinstance(line.get("tasks"), list):
            for task in filter(lambda task: isinstance(task, str), line["tasks"]):
                with contextlib.suppress(ValueError, KeyError):
                    given = {m: _part(line[m], suffix(processor.tokenizers[m]), folder) for m in find_task(task).given}
                    found.setdefault(task, given)
    return found


def _part(value: Any, ending: str | None, folder: Any) -> str:
    """Raises ValueError for what is neither words nor a file in the folder."""
    if not isinstance(value, str) or len(value) > LONGEST:
        raise ValueError("no example")
    if ending is None:
        return value
    path = inside(folder, value).resolve()
    if not path.is_relative_to(Path(folder).resolve()) or not path.is_file():
        raise ValueError("no file of the folder")
    return str(path)
