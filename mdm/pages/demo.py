"""A page to watch a model unmask: every token appears in its pass, coloured by the confidence it was drawn with."""

from __future__ import annotations

import html
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from components.data.reading import read_audio, read_image
from components.samplers import Ancestral, Confidence, EntropyBounded, FirstHitting, ReMDM, Sampler, Threshold
from components.sequences import TASKS
from components.types import Batch
from mdm.data.processor import Processor
from mdm.generation.defaults import Defaults
from mdm.generation.editing import infill, inpaint, respeak
from mdm.generation.generate import Generated, Step, generate
from mdm.hardware import Hardware
from mdm.models.transformer import MaskedDiffusionModel
from mdm.pages.film import partial_image

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

STYLE = """
.canvas{display:inline-block;margin:.3rem .6rem .3rem 0;vertical-align:top}
.canvas table{border-collapse:collapse!important;width:auto!important;table-layout:fixed;margin:0!important}
.canvas td{width:20px;height:20px;min-width:20px;padding:0!important;border:1px solid #fff!important;line-height:0;font-size:0}
.canvas small{color:#666;display:block}.canvas.text{display:block}
.words{font-size:1.05rem;line-height:1.9;white-space:pre-wrap;font-family:ui-monospace,monospace;color:#111}
.words span{border-radius:3px;padding:1px 0}.masked{background:#78aad7!important;color:#78aad7!important}
"""


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
        scale = options["guidance_scale"] if TASKS[task].given else 0.0
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


def canvas(processor: Processor, batch: Batch, step: Step, row: int) -> str:
    """What a row has generated so far, every modality of it, as HTML."""
    parts = []
    for i in batch.modality[row][batch.maskable[row]].unique().tolist():
        name = processor.vocabulary.modalities[i]
        own = batch.modality[row] == i
        draw = {"text": words, "image": patches, "audio": frames}[name]
        parts.append(draw(processor, step.tokens[row][own], step.confidence[row][own]))
    return "".join(parts)


def words(processor: Processor, ids: torch.Tensor, confidence: torch.Tensor) -> str:
    """A text, a span for each token."""
    vocabulary, spans = processor.vocabulary, []
    for token, sure in zip(ids.tolist(), confidence.tolist(), strict=True):
        if token == vocabulary.mask_id:
            spans.append('<span class="masked">____</span> ')
        elif token != vocabulary.end_id:
            piece = html.escape(processor.decode("text", torch.tensor([token])))
            spans.append(f'<span style="background:{heat(sure)}" title="{tip(sure)}">{piece}</span>')
    return f'<div class="canvas text"><div class="words">{"".join(spans)}</div></div>'


def patches(processor: Processor, ids: torch.Tensor, confidence: torch.Tensor) -> str:
    """An image, and beside it the confidence of each of its tokens."""
    tokenizer, masked = processor.tokenizers["image"], ids == processor.vocabulary.mask_id
    picture, hidden = partial_image(processor, ids)
    grey = np.asarray(picture.convert("L"))
    side, patch = tokenizer.size // tokenizer.patch, tokenizer.patch
    pixels = [
        [
            '<td class="masked"></td>' if hidden[y, x] else f'<td style="background:rgb({g},{g},{g})"></td>'
            for x, g in enumerate(line)
        ]
        for y, line in enumerate(grey.tolist())
    ]
    size = f"width:{20 * patch}px;height:{20 * patch}px"
    cells = [
        f'<td class="masked" style="{size}"></td>' if m else f'<td style="{size};background:{heat(c)}" title="{tip(c)}"></td>'
        for m, c in zip(masked.tolist(), confidence.tolist(), strict=True)
    ]
    sure = [cells[i : i + side] for i in range(0, len(cells), side)]
    return table(pixels, "image") + table(sure, "confidence")


def frames(processor: Processor, ids: torch.Tensor, confidence: torch.Tensor) -> str:
    """A clip as its codes, a column for each frame, coloured by confidence; what lies behind the end is white."""
    vocabulary, books = processor.vocabulary, len(processor.tokenizers["audio"].codebooks)
    cells = []
    for token, sure in zip(ids.tolist(), confidence.tolist(), strict=True):
        if token == vocabulary.mask_id:
            cells.append('<td class="masked"></td>')
        elif token == vocabulary.end_id:
            cells.append('<td title="end"></td>')
        else:
            cells.append(f'<td style="background:{heat(sure)}" title="{tip(sure)}"></td>')
    return table([cells[book::books] for book in range(books)], "codes of the clip, a column each 40 ms, by confidence")


def table(rows: Sequence[Sequence[str]], caption: str) -> str:
    body = "".join("<tr>" + "".join(row) + "</tr>" for row in rows)
    return f'<div class="canvas"><table>{body}</table><small>{caption}</small></div>'


def heat(confidence: float) -> str:
    """Unsure is orange, sure is green; what was given (0) is grey."""
    return "#ddd" if confidence == 0 else f"hsl({30 + 100 * confidence:.0f} 70% {80 - 15 * confidence:.0f}%)"


def tip(confidence: float) -> str:
    return "given" if confidence == 0 else f"confidence {confidence:.2f}"


def build(own: Model, name: str) -> Any:
    """The page: a tab for each modality that the model generates, and one to edit."""
    import gradio as gr

    tokenizers = own.processor.tokenizers
    rate = getattr(tokenizers.get("audio"), "sample_rate", 0)

    def settings(task: str, count: int) -> dict[str, Any]:
        """The widgets of a tab's settings."""
        scale = own.defaults.of(task, own.processor.vocabulary.modalities).guidance_scale if TASKS[task].given else 0.0
        with gr.Accordion("Settings", open=False):
            return {
                "sampler": gr.Dropdown(list(SAMPLERS), value=next(iter(SAMPLERS)), label="sampler"),
                "steps": gr.Slider(
                    1, LARGEST["steps"], 8, step=1, label="steps (ancestral, confidence, margin, entropy, ReMDM)"
                ),
                "temperature": gr.Slider(0, 2, 1.0, step=0.05, label="temperature (0 is greedy)"),
                "top_p": gr.Slider(0.05, 1, 0.9, step=0.05, label="top-p"),
                "guidance_scale": gr.Slider(0, 5, scale, step=0.25, label="guidance_scale", visible=bool(TASKS[task].given)),
                "count": gr.Slider(1, LARGEST["count"], count, step=1, label="samples"),
                "seed": gr.Number(0, precision=0, label="seed"),
            }

    def tab(
        task: str, inputs: Mapping[str, Any], prompt_of: Callable[..., Mapping[str, Any]], count: int, **fixed: Any
    ) -> None:
        """Settings, a button, the live canvas and the results of a task."""
        widgets = settings(task, count)
        button = gr.Button("Generate", variant="primary", elem_id=f"go-{task}{'-edit' if fixed.get('editing') else ''}")
        live = gr.HTML(label="canvas", elem_classes="live")
        made = TASKS[task].generated
        results = []
        if "image" in made:
            results.append(gr.Gallery(label="images", columns=8, height=160, elem_classes="made-image"))
        if "audio" in made:
            results += [gr.Audio(label=f"clip {i + 1}", elem_classes="made-audio", visible=i < count) for i in range(4)]

        def go(*values: Any) -> Iterator[list[Any]]:
            given, rest = values[: len(inputs)], dict(zip(widgets, values[len(inputs) :], strict=True))
            try:
                prompt = prompt_of(*given)
                for page, finished in own.watch(task, prompt, {**rest, "length": fixed.get("length")}):
                    shown: list[Any] = [gr.skip()] * len(results)
                    if finished is not None:
                        shown = []
                        if "image" in made:
                            shown.append([o["image"].resize((128, 128), Image.Resampling.NEAREST) for o in finished.outputs])
                        if "audio" in made:
                            clips = [(rate, (o["audio"] * 32767).astype(np.int16)) for o in finished.outputs[:4]]
                            shown += [gr.Audio(c, visible=True) for c in clips]
                            shown += [gr.Audio(None, visible=False)] * (4 - len(clips))
                    yield [page, *shown]
            except ValueError as error:
                raise gr.Error(html.escape(str(error))) from error

        button.click(go, [*inputs.values(), *widgets.values()], [live, *results], api_name=button.elem_id)

    def caption(text: str) -> dict[str, Any]:
        return {"text": text}

    with gr.Blocks(title="Masked diffusion") as page:
        gr.HTML(f"<style>{STYLE}</style>")
        gr.Markdown(
            f"## Masked diffusion, token by token\nModel: `{html.escape(name)}`. Blue is still masked; orange was drawn "
            "unsurely, green surely; grey was given. Point at a token for its confidence."
        )
        if "text" in tokenizers:
            with gr.Tab("Text"):
                length = own.model.config.max_length // 2
                tab("text", {}, dict, 2, length=length)
        if {"text", "image"} <= set(tokenizers):
            with gr.Tab("Image"):
                box = gr.Textbox("a handwritten seven", label="caption", max_length=MAX_CHARACTERS)
                tab("text_to_image", {"text": box}, caption, 4)
        if {"text", "audio"} <= set(tokenizers):
            with gr.Tab("Speech"):
                box = gr.Textbox("a spoken seven", label="what to say", max_length=MAX_CHARACTERS)
                tab("text_to_speech", {"text": box}, caption, 2)
        with gr.Tab("Editing"):
            if "text" in tokenizers:
                with gr.Tab("Text with gaps"):
                    box = gr.Textbox(
                        "The [mask:6] statement is",
                        label="text; [mask] is a token to fill, [mask:6] are six",
                        max_length=MAX_CHARACTERS,
                    )
                    tab("text", {"text": box}, lambda text: {"text": infill(own.processor, text)}, 2, editing=True)
            if {"text", "image"} <= set(tokenizers):
                with gr.Tab("Part of an image"):
                    size = tokenizers["image"].size
                    with gr.Row():
                        picture = gr.Image(image_mode=None, type="filepath", label="image", height=200)
                        box = gr.Textbox("a handwritten nine", label="caption", max_length=MAX_CHARACTERS)
                    with gr.Row():
                        edges = {
                            edge: gr.Slider(0, size, value, step=1, label=f"{edge} (pixels)")
                            for edge, value in (("left", 0), ("top", size // 2), ("right", size), ("bottom", size))
                        }

                    def painted(text: str, image: str | None, *box: float) -> dict[str, Any]:
                        if image is None:
                            raise ValueError("choose an image first")
                        small = read_image(image, size, "image")
                        return {"text": text, "image": inpaint(own.processor, small, tuple(int(b) for b in box))}

                    tab("text_to_image", {"text": box, "image": picture, **edges}, painted, 4, editing=True)
            if {"text", "audio"} <= set(tokenizers):
                with gr.Tab("Part of a clip"):
                    clip = gr.Audio(type="filepath", label="clip")
                    box = gr.Textbox("a spoken seven", label="what it says", max_length=MAX_CHARACTERS)
                    with gr.Row():
                        start = gr.Number(0.2, label="from (seconds)")
                        stop = gr.Number(None, label="to (empty: to a new end)")

                    def spoken(text: str, clip: str | None, start: float, stop: float | None) -> dict[str, Any]:
                        if clip is None:
                            raise ValueError("choose a clip first")
                        wave = read_audio(clip, rate, "clip")
                        if len(wave) > MAX_SECONDS * rate:
                            raise ValueError(f"the clip has {len(wave) / rate:.0f} seconds; at most {MAX_SECONDS} are taken")
                        return {"text": text, "audio": respeak(own.processor, wave, start, stop or None)}

                    tab("text_to_speech", {"text": box, "clip": clip, "start": start, "stop": stop}, spoken, 2, editing=True)
    return page
