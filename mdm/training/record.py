"""What a model was trained on: a file beside its weights, which goes wherever they go.

    {"base": null, "trainings": [{"tokens": 3000000, "streams": {"digits": ["text_to_image"], "lines": ["text"]}}]}

A finetuning adds its own entry behind those of the model it began with; `base` is the name of that one where it has no such
file (a model from elsewhere, or from before): then nobody knows all that was learned, and nothing is said to be missing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from components.files import in_one_line, read_json, require, short
from components.tasks import INSTRUCT, find_task, name_of
from mdm.config import UserError, one_line
from mdm.models.folder import model_folder

FILE = "training.json"
MAX_BYTES = 2**20
MOST = 10**18  # tokens: more than anything is trained on


@dataclass(frozen=True)
class Training:
    """tokens: seen by the end of it;  streams: of its mix, each with the tasks that its samples became"""

    tokens: int
    streams: Mapping[str, list[str]]


@dataclass(frozen=True)
class Record:
    """trainings: one after the other;  base: a model that the first of them began with, and that does not say of its own"""

    trainings: list[Training] = field(default_factory=list)
    base: str | None = None

    @property
    def learned(self) -> list[str] | None:
        """The tasks that the model was trained on; None where that is not known."""
        if self.base is not None or not self.trainings:
            return None
        named = [task for training in self.trainings for tasks in training.streams.values() for task in tasks]
        return list(dict.fromkeys(_plain(task) for task in named))

    def line(self) -> str:
        """For a person: tokens, streams and tasks of each training; nothing where nothing is known."""
        parts = [f"{training.tokens / 1e6:,.2f} M tokens of {_listed(training)}" for training in self.trainings]
        began = f"began with {in_one_line(self.base)[:80]}" if self.base else ""
        trained = f"trained on {', then on '.join(parts)}" if parts else ""
        return ", ".join(part for part in (began, trained) if part)

    def warning(self, *tasks: str) -> str | None:
        """What to say of tasks that the model never learned, on one line; None where it did, or is not known to lack any."""
        learned = self.learned or []
        never = [task for task in dict.fromkeys(tasks) if _plain(task) not in learned] if learned else []
        if not never:
            return None
        asked = {frozenset(find_task(_plain(task)).modalities) for task in never}
        joint = [t for t in learned if not find_task(t).given and all(m <= set(find_task(t).modalities) for m in asked)]
        near = f"; {joint[0]} is of the same modalities, so it may answer" if joint else ""
        return f"the model was never trained on {', '.join(never)}{near}. It learned {', '.join(learned)}"


def of(checkpoint: str | Path) -> Record:
    """What a checkpoint's folder says of its training: nothing, where it has no such file.

    Raises UserError, naming the file, where it holds something else.
    """
    path = model_folder(checkpoint) / FILE
    if not path.is_file():
        return Record()
    with one_line(str(path)):
        found = read_json(path, MAX_BYTES)
        require(found, path, trainings=list, base=(str, type(None)))
        return Record([_training(entry, path) for entry in found["trainings"]], found["base"])


def write(folder: Path, cfg: Any, tokens: int) -> None:
    """Beside the model of a run whose settings are `cfg`, after so many tokens; of a finetuning, behind its checkpoint's."""
    checkpoint = getattr(cfg, "checkpoint", None)
    before = Record() if checkpoint is None else of(checkpoint)
    base = str(checkpoint) if checkpoint is not None and not before.trainings else before.base
    streams = {name: [task for task, share in stream.tasks.items() if share] for name, stream in cfg.data.items()}
    record = Record([*before.trainings, Training(tokens, streams)], base)
    try:
        (folder / FILE).write_text(json.dumps(asdict(record), indent=1))
    except OSError as error:
        raise UserError(f"{folder / FILE} cannot be written ({error.strerror or error})") from error


def warn(checkpoint: str | Path, tasks: Iterable[str], say: Callable[[str], Any] = print) -> None:
    """Says which of these tasks a checkpoint never learned, where there are any."""
    if (line := of(checkpoint).warning(*tasks)) is not None:
        say(f"Warning: {line}")


def carry(checkpoint: str | Path, folder: Path) -> None:
    """The file of a checkpoint to the model that was made from it."""
    path = model_folder(checkpoint) / FILE
    if path.is_file():
        shutil.copyfile(path, folder / FILE)
    else:
        (folder / FILE).unlink(missing_ok=True)  # of another model that lay here


def _training(entry: Any, path: Path) -> Training:
    """Raises ValueError for what is no training."""
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: a training must hold keys and values, got {type(entry).__name__}")
    require(entry, path, tokens=int, streams=dict)
    if not 0 <= entry["tokens"] < MOST:
        raise ValueError(f"{path}: tokens must be in 0..{MOST:,}")
    for name, tasks in entry["streams"].items():
        named = isinstance(tasks, list) and all(isinstance(task, str) for task in tasks)
        if not named or any(task not in (INSTRUCT, name_of(find_task(_plain(task)))) for task in tasks):
            raise ValueError(f"{path}: {short(name)} must hold names of tasks, got {short(tasks)}")
    return Training(entry["tokens"], entry["streams"])


def _plain(task: str) -> str:
    """The task that a model is asked for, of one that it was trained on."""
    return "text" if task == INSTRUCT else task


def _listed(training: Training) -> str:
    """Streams and their tasks; a stream that is called like its one task is named once."""
    shown = []
    for name, tasks in training.streams.items():
        known = ", ".join(task.replace("_", " ") for task in tasks if task != name)
        shown.append(in_one_line(name)[:40] + (f" ({known})" if known else ""))
    return ", ".join(shown)
