"""A page to watch a model unmask: every token appears in its pass, coloured by the confidence it was drawn with."""

from __future__ import annotations

import functools
import html
import inspect
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components.data.bad import BadSample
from components.samplers import Ancestral, Confidence, EntropyBounded, FirstHitting, ReMDM, Sampler, Threshold
from components.tasks import Task, find_task
from components.tokenizers.modality import HALF, Drawn, Edited, Filed, Played, is_words, suffix
from mdm.data.processor import Processor
from mdm.generation.defaults import Defaults
from mdm.generation.editing import edit, infill
from mdm.generation.generate import Generated, generate
from mdm.hardware import Hardware
from mdm.models.transformer import MaskedDiffusionModel
from mdm.pages.film import is_spelled
from mdm.pages.live import STYLE, canvas
from mdm.pages.media import enlarged, kind_of

SAMPLERS: dict[str, Callable[[int, float, float], Sampler | None]] = {
    "default of the modality": lambda steps, temperature, top_p: None,
    "first-hitting (one token a pass)": lambda n, t, p: FirstHitting(temperature=t, top_p=p),
    "ancestral": lambda n, t, p: Ancestral(num_steps=n, temperature=t, top_p=p),
    "confidence": lambda n, t, p: Confidence(num_steps=n, temperature=t, top_p=p),
    "margin": lambda n, t, p: Confidence(num_steps=n, rank_by="margin", temperature=t, top_p=p),
    "entropy": lambda n, t, p: Confidence(num_steps=n, rank_by="entropy", temperature=t, top_p=p),
    "confidence threshold 0.9": lambda n, t, p: Threshold(threshold=0.9, temperature=t, top_p=p),
    "entropy-bounded": lambda n, t, p: EntropyBounded(gamma=1.0, temperature=t, top_p=p),
    "ReMDM (masks again)": lambda n, t, p: ReMDM(num_steps=n, variant="rescale", eta=0.2, temperature=t, top_p=p),
}

LARGEST = {"count": 8, "steps": 64}
"""What one request may ask for: the page's sliders end there, and its API too."""
MAX_UPLOAD, MAX_SECONDS, MAX_CHARACTERS = "20mb", 60, 2000
"""What may be brought: the size of a file, the length of a clip and of a text."""
PLAYERS = 4
"""So many samples of a request can be heard."""


@dataclass(frozen=True)
class Model:
    """What the page speaks to."""

    model: MaskedDiffusionModel
    processor: Processor
    hw: Hardware
    defaults: Defaults

    def watch(self, task: str, prompt: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[tuple[str, Generated | None]]:
        """The canvas as HTML before the first pass and after each, and at the end what was made."""
        count, seed = int(options["count"]), int(options["seed"])
        for name, largest in LARGEST.items():
            if not 1 <= options[name] <= largest:
                raise ValueError(f"{name} must be in 1..{largest}, got {options[name]}")
        if any(isinstance(part, str) and len(part) > MAX_CHARACTERS for part in prompt.values()):
            raise ValueError(f"a text has at most {MAX_CHARACTERS} characters here")
        chosen = self.defaults.of(task, self.processor.vocabulary.modalities)
        sampler = (
            SAMPLERS[options["sampler"]](int(options["steps"]), options["temperature"], options["top_p"]) or chosen.sampler
        )
        scale = options["guidance_scale"] if find_task(task).given else 0.0
        seen: queue.Queue[Any] = queue.Queue()

        def work() -> None:
            try:
                with self.hw.autocast():
                    made = generate(
                        self.model, self.processor, task, [prompt] * count, sampler, scale, seed,
                        length=options.get("length"), watch=lambda step, batch: seen.put((step, batch)),
                    )  # fmt: skip
                seen.put(made)
            except Exception as error:  # shown on the page, by whoever reads the queue
                seen.put(error)

        threading.Thread(target=work, daemon=True).start()
        passes, page = 0, ""
        while True:
            item = seen.get()
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Generated):
                mean = item.forwards.double().mean().item()
                yield page + f"<p>Done in {passes - 1} passes ({mean:.1f} a sample).</p>", item
                return
            page = "".join(canvas(self.processor, item[1], item[0], row) for row in range(count))
            passes += 1
            yield page + f"<p>Pass {passes - 1}</p>", None


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


def tabs(processor: Processor) -> tuple[list[Tab], list[Tab]]:
    """A tab for each modality that the model generates, from words if it can; and one for each of those that can be edited."""
    tokenizers = processor.tokenizers
    tasks = processor.vocabulary.tasks or ("text",)  # a text model from elsewhere has none
    found: dict[str, str] = {}
    for task in sorted(tasks, key=lambda task: (not all(is_words(tokenizers[m]) for m in find_task(task).given),)):
        made = find_task(task).generated
        if len(made) == 1 and (made[0] not in found or (made[0] == "text" and task == "text")):
            found[made[0]] = task
    shown = [Tab(task.rpartition("_")[2].capitalize(), task) for m in tokenizers if (task := found.get(m))]
    editing = [Tab("Text with gaps", tab.task, "text") for tab in shown if tab.task == "text"]
    for tab in shown:
        (made,) = tab.spec.generated
        if isinstance(tokenizers[made], Edited) and isinstance(tokenizers[made], Filed):
            editing.append(Tab(f"Part of the {tab.title.lower()}", tab.task, made))
    return shown, editing


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


def build(own: Model, name: str, captions: Mapping[str, str]) -> Any:
    """The page: a tab for each modality that the model generates, and one to edit. captions: by task, to begin with."""
    import gradio as gr

    processor = own.processor
    tokenizers: Mapping[str, Any] = processor.tokenizers

    def settings(task: str, count: int) -> dict[str, Any]:
        """The widgets of a tab's settings."""
        given = bool(find_task(task).given)
        scale = own.defaults.of(task, processor.vocabulary.modalities).guidance_scale if given else 0.0
        with gr.Accordion("Settings", open=False):
            return {
                "sampler": gr.Dropdown(list(SAMPLERS), value=next(iter(SAMPLERS)), label="sampler"),
                "steps": gr.Slider(
                    1, LARGEST["steps"], 8, step=1, label="steps (ancestral, confidence, margin, entropy, ReMDM)"
                ),
                "temperature": gr.Slider(0, 2, 1.0, step=0.05, label="temperature (0 is greedy)"),
                "top_p": gr.Slider(0.05, 1, 0.9, step=0.05, label="top-p"),
                "guidance_scale": gr.Slider(0, 5, scale, step=0.25, label="guidance_scale", visible=given),
                "count": gr.Slider(1, LARGEST["count"], count, step=1, label="samples"),
                "seed": gr.Number(0, precision=0, label="seed"),
            }

    def asked(modality: str, task: str) -> Any:
        """Where a modality is typed, or brought as a file."""
        ending = suffix(tokenizers[modality])
        if ending is None:
            return gr.Textbox(captions.get(task, ""), label=modality, max_length=MAX_CHARACTERS)
        kind = kind_of(f"file{ending}") if ending != ".svg" else None  # gr.Image takes pixels
        if kind == "audio":
            return gr.Audio(type="filepath", label=modality)
        if kind == "image":
            return gr.Image(image_mode=None, type="filepath", label=modality, height=200)
        return gr.File(label=modality)

    def fill(tab: Tab) -> None:
        """A tab: what is given, settings, a button, the live canvas and the results."""
        inputs: dict[str, Any] = {}
        with gr.Row():
            for modality in tab.spec.given:
                inputs[modality] = asked(modality, tab.task)
            if tab.edited == "text":
                gaps = "text; [mask] is a token to fill, [mask:6] are six"
                inputs["edit"] = gr.Textbox("The [mask:6] statement is", label=gaps, max_length=MAX_CHARACTERS)
            elif tab.edited:
                inputs["edit"] = asked(tab.edited, tab.task)
                part = (inspect.getdoc(tokenizers[tab.edited].region) or "").partition("\n")[0]
                inputs["region"] = gr.Textbox(HALF, label="part", info=part, max_length=MAX_CHARACTERS)
        count = 2 if isinstance(tokenizers[tab.spec.generated[0]], Played) or tab.task == "text" else 4
        widgets = settings(tab.task, count)
        button = gr.Button("Generate", variant="primary", elem_id=tab.name)
        live = gr.HTML(label="canvas", elem_classes="live")
        results = [(m, kind, shown) for m in tab.spec.generated for kind, shown in outlets(m, count)]

        def go(*values: Any) -> Iterator[list[Any]]:
            given, rest = dict(zip(inputs, values, strict=False)), dict(zip(widgets, values[len(inputs) :], strict=True))
            try:
                prompt = {m: bring(processor, m, given[m]) for m in tab.spec.given}
                if tab.edited == "text":
                    prompt["text"] = infill(processor, given["edit"])
                elif tab.edited:
                    prompt[tab.edited] = edit(
                        processor, tab.edited, bring(processor, tab.edited, given["edit"]), given["region"]
                    )
                length = own.model.config.max_length // 2 if tab.task == "text" and not tab.edited else None
                for page, finished in own.watch(tab.task, prompt, {**rest, "length": length}):
                    yield [page, *(gr.skip() if finished is None else let(finished.outputs) for _, let, _ in results)]
            except ValueError as error:
                raise gr.Error(html.escape(str(error))) from error

        button.click(go, [*inputs.values(), *widgets.values()], [live, *(shown for _, _, shown in results)], api_name=tab.name)

    def outlets(modality: str, count: int) -> list[tuple[Callable[[Sequence[Mapping[str, Any]]], Any], Any]]:
        """Where finished samples are shown, each with what it shows of them: pictures, players; words are on the canvas."""
        tokenizer, found = tokenizers[modality], []
        if isinstance(tokenizer, Drawn):
            gallery = gr.Gallery(label=modality, columns=8, height=160, elem_classes=f"made-{modality}")
            found.append((lambda outputs: [enlarged(tokenizer.draw(o[modality]), 16) for o in outputs], gallery))
        if isinstance(tokenizer, Played):
            for i in range(PLAYERS):
                player = gr.Audio(label=f"{modality} {i + 1}", elem_classes=f"made-{modality}", visible=i < count)
                found.append((functools.partial(heard, tokenizer, modality, i), player))
        if not found and not is_spelled(tokenizers[modality]):
            found.append((lambda outputs: [str(o[modality]) for o in outputs], gr.JSON(label=modality)))
        return found

    def heard(tokenizer: Played, modality: str, i: int, outputs: Sequence[Mapping[str, Any]]) -> Any:
        """The i-th sample in its player; none where there are fewer."""
        if i >= len(outputs):
            return gr.Audio(None, visible=False)
        wave, rate = tokenizer.play(outputs[i][modality])
        return gr.Audio((rate, (np.clip(wave, -1, 1) * 32767).astype(np.int16)), visible=True)

    making, editing = tabs(processor)
    with gr.Blocks(title="Masked diffusion") as page:
        gr.HTML(f"<style>{STYLE}</style>")
        gr.Markdown(
            f"## Masked diffusion, token by token\nModel: `{html.escape(name)}`. Blue is still masked; orange was drawn "
            "unsurely, green surely; grey was given. Point at a token for its confidence."
        )
        for tab in making:
            with gr.Tab(tab.title):
                fill(tab)
        if editing:
            with gr.Tab("Editing"):
                for tab in editing:
                    with gr.Tab(tab.title):
                        fill(tab)
    return page
