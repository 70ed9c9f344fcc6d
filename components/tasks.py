"""A task says which modalities a sequence is given and which it generates; its name follows from theirs.

    text_pen_to_image         given a text and a pen, an image
    joint_text_pen            given nothing, both
    pen                       given nothing, a pen
    "text, pen -> image"      the same as an arrow: in quotes, since a shell makes a file of what follows an unquoted >

A modality is named by its key in `tokenizers`; in tasks audio is called speech.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

KNOWN = (
    "text",
    "text_to_image",
    "text_to_speech",
    "image_to_text",
    "speech_to_text",
    "image_to_speech",
    "speech_to_image",
    "text_image_to_speech",
    "text_speech_to_image",
    "image_speech_to_text",
    "joint_text_image",
    "joint_text_speech",
)
"""Tasks that every vocabulary whose modalities form them has a token for, in this order: ids stay what they always were."""

INSTRUCT = "instruct"
"""The task of instruction data: running text whose first part is given; what is generated is the rest."""

SPOKEN = {"audio": "speech"}
"""What a modality is called in the names of tasks, where that is not its own name."""

LONGEST = 1000  # characters of a name: far more than any task's

RESERVED = ("to", "joint", INSTRUCT, *SPOKEN.values())


@dataclass(frozen=True)
class Task:
    """Which modalities a sequence is given, and which it generates, in the order of their canvases.

    Raises ValueError where it generates nothing, or a modality stands twice, or has no name that a task can be made of.
    """

    given: tuple[str, ...]
    generated: tuple[str, ...]

    def __post_init__(self) -> None:
        for modality in self.modalities:
            check_modality(modality)
        twice = next((m for m in self.modalities if self.modalities.count(m) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} stands twice")
        if not self.generated:
            raise ValueError("it generates nothing")

    @property
    def modalities(self) -> tuple[str, ...]:
        """All of them, in the order of their canvases."""
        return self.given + self.generated


def check_modality(name: str) -> None:
    """Raises ValueError for a name that the names of tasks could not be made of."""
    if not name.isidentifier() or "_" in name or name in RESERVED:
        words = f"{', '.join(RESERVED[:-1])} or {RESERVED[-1]}"
        raise ValueError(f"a modality's name is letters and digits, and not {words}; got {name!r}")


@functools.lru_cache(maxsize=1024)
def find_task(name: str) -> Task:
    """The task of a name, or of an arrow. Raises ValueError where it is none."""
    if len(name) > LONGEST:
        raise ValueError(f"{name[:40]!r}... is no task: it has {len(name):,} characters")
    try:
        return Task(*(tuple(_modality(m) for m in side) for side in _sides(name)))
    except ValueError as error:
        raise ValueError(f"{name!r} is no task: {error}") from error


def name_of(task: Task) -> str:
    """The name of a task: `find_task` finds the task by it."""
    given, generated = ("_".join(SPOKEN.get(m, m) for m in side) for side in (task.given, task.generated))
    if given:
        return f"{given}_to_{generated}"
    return generated if len(task.generated) == 1 else f"joint_{generated}"


def formed(modalities: Iterable[str], further: Iterable[str] = ()) -> list[str]:
    """Names of the tasks that these modalities form: of the known ones, then of further ones, each once."""
    tasks = {name_of(task): task for task in map(find_task, (*KNOWN, *further))}
    known = set(modalities)
    return [name for name, task in tasks.items() if set(task.modalities) <= known]


def _modality(word: str) -> str:
    """What a word of a task's name stands for."""
    return {spoken: m for m, spoken in SPOKEN.items()}.get(word, word)


def _sides(name: str) -> tuple[list[str], list[str]]:
    """The words of what is given, and of what is generated."""
    given, arrow, generated = name.partition("->")
    if arrow:
        return _listed(given), _listed(generated)
    if "-" in name or ">" in name:
        raise ValueError(
            'write an arrow in quotes ("text->image"); without, the shell makes a file of what follows >: it may be there now'
        )
    words = name.split("_")
    if "to" in words:
        at = words.index("to")
        if not 0 < at < len(words) - 1:
            raise ValueError(f"nothing stands {'before' if at == 0 else 'behind'} to")
        return words[:at], words[at + 1 :]
    if words[0] == "joint" and len(words) > 2:
        return [], words[1:]
    if len(words) > 1:
        raise ValueError("write GIVEN_to_GENERATED (text_to_image), joint_A_B (joint_text_image), or one modality (text)")
    return [], words


def _listed(side: str) -> list[str]:
    return [word.strip() for word in side.split(",")] if side.strip() else []
