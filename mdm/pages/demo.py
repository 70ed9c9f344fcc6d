"""What the demo's page does: a model is watched while it unmasks, and each task that it learned has a tab."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.data.bad import BadSample
from components.samplers import deterministic
from components.tasks import SPOKEN, Task, find_task
from components.tokenizers.modality import Drawn, Edited, Filed, Played, is_words
from components.types import Batch
from mdm.data.processor import Processor
from mdm.generation.defaults import Defaults
from mdm.generation.editing import edit, infill
from mdm.generation.generate import Generated, Step, generate
from mdm.generation.prompts import CONTINUED, continuation
from mdm.hardware import Hardware
from mdm.models.transformer import MaskedDiffusionModel
from mdm.pages import live, sliders
from mdm.training.record import Record

LARGEST = {"count": 8, "num_steps": sliders.MOST_STEPS}
"""What one request may ask for: the page's sliders end there, and its API too."""
MAX_UPLOAD, MAX_SECONDS, MAX_CHARACTERS = "20mb", 60, 2000
"""What may be brought: the size of a file, the length of a clip and of a text."""
FROM_NOTHING = 256
"""Tokens of a text from nothing, where the model has room."""


@dataclass(frozen=True)
class Replay:
    """What has been watched: the canvas before the first pass and after each."""

    batch: Batch
    steps: list[Step]

    def page(self, processor: Processor, i: int) -> str:
        """The canvas after so many passes, as HTML."""
        i = min(max(int(i), 0), len(self.steps) - 1)
        return live.page(processor, self.batch, self.steps[i]) + f"<p>Pass {i} of {len(self.steps) - 1}</p>"


@dataclass(frozen=True)
class Model:
    """What the page speaks to.  examples: by task, what it may be given;  record: what it was trained on"""

    model: MaskedDiffusionModel
    processor: Processor
    hw: Hardware
    defaults: Defaults
    examples: Mapping[str, Mapping[str, str]]
    record: Record

    def tuned(self, task: str) -> Any:
        """The sampler and the scale of a task."""
        model = self.model.config
        return self.defaults.of(task, self.processor.vocabulary.modalities, model.noise, model.learned_orders)

    def watch(
        self, task: str, prompt: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Iterator[tuple[str, tuple[Generated, Replay] | None]]:
        """The canvas as HTML before the first pass and after each, and at the end what was made, and how."""
        count, seed = int(options["count"]), int(options["seed"])
        for name, largest in LARGEST.items():
            if not 1 <= options[name] <= largest:
                raise ValueError(f"{name} must be in 1..{largest}, got {options[name]}")
        if any(isinstance(part, str) and len(part) > MAX_CHARACTERS for part in prompt.values()):
            raise ValueError(f"a text has at most {MAX_CHARACTERS} characters here")
        moved = {**options, "num_steps": int(options["num_steps"])}
        sampler = sliders.chosen(options["sampler"], self.tuned(task).sampler, moved)
        greedy = count > 1 and deterministic(sampler)
        prompts = [prompt] * (1 if greedy else count)
        scale = self.tuned(task).guidance_scale
        if options["guidance_scale"] != sliders.number(scale):
            scale = options["guidance_scale"]
        scale = scale if find_task(task).given else 0.0
        seen: queue.Queue[Any] = queue.Queue()

        def work() -> None:
            try:
                with self.hw.autocast():
                    made = generate(
                        self.model, self.processor, task, prompts, sampler, scale, seed,
                        length=options.get("length"), watch=lambda step, batch: seen.put((step, batch)),
                    )  # fmt: skip
                seen.put(made)
            except Exception as error:  # shown on the page, by whoever reads the queue
                seen.put(error)

        threading.Thread(target=work, daemon=True).start()
        steps, page = list[Step](), ""
        while True:
            item = seen.get()
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Generated):
                mean = item.forwards.double().mean().item()
                why = " It is sampled greedily, so all samples would be alike: one is shown." if greedy else ""
                page += f"<p>Done in {len(steps) - 1} passes ({mean:.1f} a sample).{why}</p>"
                yield page, (item, Replay(item.batch, steps))
                return
            steps.append(item[0])
            page = live.page(self.processor, item[1], item[0])
            yield page + f"<p>Pass {len(steps) - 1}</p>", None


@dataclass(frozen=True)
class Tab:
    """What a tab of the page makes, and the modality of which a part is made anew, where it edits."""

    title: str
    task: str
    edited: str | None = None

    @property
    def spec(self) -> Task:
        return find_task(self.task)

    @property
    def name(self) -> str:
        """Of its button, and in the page's API."""
        return f"go-{self.task}{'-edit' if self.edited else ''}"


def tabs(processor: Processor, learned: Sequence[str] | None = None) -> tuple[list[Tab], list[Tab]]:
    """A tab for each task that the model learned, and one for each modality that can be edited.

    The first are those that draw something, from words if they can. Where it is not known what was learned: a tab for each
    modality that can be generated.
    """
    tokenizers = processor.tokenizers
    tasks = learned if learned is not None else processor.vocabulary.tasks or ("text",)  # a text model from elsewhere has none

    def late(task: str) -> tuple[bool, bool, bool]:
        spec = find_task(task)
        drawn = any(isinstance(tokenizers[m], Drawn) for m in spec.generated)
        return not drawn, not all(is_words(tokenizers[m]) for m in spec.given), not spec.given and task != "text"

    tasks = sorted((task for task in tasks if set(find_task(task).modalities) <= set(tokenizers)), key=late)
    alone: dict[str, str] = {}
    for task in tasks:
        made = find_task(task).generated
        if len(made) == 1 and (made[0] not in alone or task == "text"):
            alone[made[0]] = task
    shown = [Tab(title(task), task) for task in tasks if learned is not None or task in alone.values()]
    editing = [Tab("Text with gaps", tab.task, "text") for tab in shown if tab.task == "text"]
    for made, task in alone.items():
        if isinstance(tokenizers[made], Edited) and isinstance(tokenizers[made], Filed):
            editing.append(Tab(f"Part of the {SPOKEN.get(made, made)}", task, made))
    return shown, editing


def title(task: str) -> str:
    """A task as a person reads it."""
    given, made = (" and ".join(SPOKEN.get(m, m) for m in side) for side in (find_task(task).given, find_task(task).generated))
    return (f"{given} to {made}" if given else made).capitalize()


def bring(processor: Processor, name: str, value: Any) -> Any:
    """What was typed or brought for a modality, read as `mdm generate` reads it. Raises ValueError."""
    tokenizer = processor.tokenizers[name]
    if not isinstance(tokenizer, Filed):
        return value
    if value is None:
        raise ValueError(f"choose a file first: {name}")
    try:
        raw = tokenizer.read(Path(value))
    except BadSample as bad:
        raise ValueError(f"{name}: {bad.why}") from bad
    if isinstance(tokenizer, Played):
        wave, rate = tokenizer.play(raw)
        if len(wave) > MAX_SECONDS * rate:
            raise ValueError(f"{name} of {len(wave) / rate:.0f} seconds; at most {MAX_SECONDS} are taken")
    return raw


def asked(own: Model, tab: Tab, given: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """The prompt of what stands in a tab's boxes, and the length of a text that begins with nothing. Raises ValueError."""
    prompt = {m: bring(own.processor, m, given[m]) for m in tab.spec.given}
    if tab.edited == "text":
        prompt["text"] = infill(own.processor, given["edit"])
    elif tab.edited:
        prompt[tab.edited] = edit(own.processor, tab.edited, bring(own.processor, tab.edited, given["edit"]), given["region"])
    elif tab.task == "text":
        room = min(own.model.config.max_length // 2, FROM_NOTHING)
        if not given["prompt"]:
            return prompt, room
        prompt["text"] = continuation(own.processor, given["prompt"], min(room, CONTINUED))
    return prompt, None
