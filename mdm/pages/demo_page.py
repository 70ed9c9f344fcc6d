"""A page to watch a model unmask: every token appears in its pass, coloured by the confidence it was drawn with."""

from __future__ import annotations

import functools
import html
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from components.tokenizers.modality import HALF, Drawn, Filed, Played, is_words, suffix
from mdm.pages import live, sliders
from mdm.pages.demo import LARGEST, MAX_CHARACTERS, Model, Replay, Tab, asked, tabs
from mdm.pages.film import is_spelled
from mdm.pages.media import kind_of
from mdm.pages.sheet import fitted

PLAYERS = 4
"""So many samples of a request can be heard."""
PICTURE = 512
"""Pixels of a finished picture, where it is small."""
SLOW, WHOLE = 1.0, 15.0
"""Seconds of a pass in a replay, and of all of it, at the most."""
STYLE = """
.made img,.made button{border-radius:0!important}.made .thumbnail-item{border:1px solid #b0b0b0;overflow:visible}
.made .grid-wrap{min-height:0!important;height:auto!important;overflow:visible}
.brought .image-frame,.brought .image-frame img{width:100%!important;height:100%!important;object-fit:contain}
.brought img{image-rendering:pixelated}.made .caption-label{right:auto!important;left:0!important;font-size:.75rem!important}
"""


def build(own: Model, name: str, captions: Mapping[str, str]) -> Any:
    """The page: a tab for each task of the model, and one to edit. captions: by task, to begin with."""
    import gradio as gr

    processor = own.processor
    tokenizers: Mapping[str, Any] = processor.tokenizers

    def begins(modality: str, task: str) -> str | None:
        """What stands there to begin with: words, or the path of a file."""
        if is_words(tokenizers[modality]) and task in captions:
            return captions[task]
        every = [own.examples.get(task, {}), *(own.examples.values() if isinstance(tokenizers[modality], Filed) else ())]
        return next((given[modality] for given in every if modality in given), None)

    def box(modality: str, task: str) -> Any:
        """Where a modality is typed, or brought as a file."""
        ending, value = suffix(tokenizers[modality]), begins(modality, task)
        if ending is None:
            hint = "worded as what the model was trained on"
            return gr.Textbox(value or "", label=modality, placeholder=hint, max_length=MAX_CHARACTERS)
        kind = kind_of(f"file{ending}") if ending != ".svg" else None  # gr.Image takes pixels
        if kind == "audio":
            return gr.Audio(value, type="filepath", label=modality)
        if kind == "image":
            return gr.Image(value, image_mode=None, type="filepath", label=modality, height=240, elem_classes="brought")
        return gr.File(value, label=modality)

    def inputs_of(tab: Tab) -> dict[str, Any]:
        """The widgets of what a tab is given, and of what it edits."""
        inputs = {modality: box(modality, tab.task) for modality in tab.spec.given}
        if tab.edited == "text":
            gaps = "text; [mask] is a token to fill, [mask:6] are six"
            inputs["edit"] = gr.Textbox("The [mask:6] statement is", label=gaps, max_length=MAX_CHARACTERS)
        elif tab.edited:
            inputs["edit"] = box(tab.edited, tab.task)
            part = (inspect.getdoc(tokenizers[tab.edited].region) or "").partition("\n")[0]
            inputs["region"] = gr.Textbox(HALF, label="part", info=part, max_length=MAX_CHARACTERS)
        elif tab.task == "text":
            inputs["prompt"] = gr.Textbox(
                captions.get("text", ""), label="beginning (may be empty)", lines=2, max_length=MAX_CHARACTERS
            )
        return inputs

    def settings(tab: Tab, count: int) -> dict[str, Any]:
        """The widgets of a tab's settings."""
        tuned, given = own.tuned(tab.task), bool(tab.spec.given)
        begin, fixed = sliders.settings(tuned.sampler), sliders.fixed_passes(tuned.sampler)
        scale = sliders.number(tuned.guidance_scale)
        passes = "of the sampler" if fixed else "of samplers that fix them (see Settings)"
        number = gr.Slider(1, LARGEST["count"], count, step=1, label="samples")
        most = LARGEST["num_steps"]
        steps = gr.Slider(1, most, begin["num_steps"], step=1, label="passes (num_steps)", info=passes)
        with gr.Accordion("Settings", open=False):
            names = [sliders.TUNED, *sliders.SAMPLERS]
            return {
                "sampler": gr.Dropdown(names, value=names[0], label="sampler"),
                "num_steps": steps,
                "temperature": gr.Slider(0, 2, begin["temperature"], step=0.05, label="temperature (0 is greedy)"),
                "top_p": gr.Slider(0.05, 1, begin["top_p"], step=0.05, label="top-p"),
                "guidance_scale": gr.Slider(0, 5, scale, step=0.25, label="guidance_scale", visible=given),
                "count": number,
                "seed": gr.Number(0, precision=0, label="seed"),
            }

    def fill(tab: Tab) -> Callable[[], Any]:
        """A tab: what is given, settings, a button, the live canvas and the results. Returns what lets it run by itself."""
        count = 2 if isinstance(tokenizers[tab.spec.generated[0]], Played) or tab.task == "text" else 4
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                inputs = inputs_of(tab)
                button = gr.Button("Generate", variant="primary", elem_id=tab.name)
                widgets = settings(tab, count)
            with gr.Column(scale=8, min_width=320):
                shown = gr.HTML(label="canvas", elem_classes="live")
                with gr.Row(visible=False, elem_classes="replay") as again:
                    at = gr.Slider(0, 1, 1, step=1, label="pass", scale=5)
                    slowly = gr.Button("Replay slowly", scale=1, min_width=150, size="md")
                results = [(m, let, out) for m in tab.spec.generated for let, out in outlets(m, count)]
        kept = gr.State(None)

        def go(*values: Any) -> Iterator[list[Any]]:
            given, rest = dict(zip(inputs, values, strict=False)), dict(zip(widgets, values[len(inputs) :], strict=True))
            try:
                prompt, length = asked(own, tab, given)
                for page, finished in own.watch(tab.task, prompt, {**rest, "length": length}):
                    if finished is None:
                        yield [page, *[gr.skip()] * len(results), gr.skip(), gr.Row(visible=False), None]
                        continue
                    made, replay = finished
                    last = len(replay.steps) - 1
                    after = gr.Slider(maximum=last, value=last), gr.Row(visible=True), replay
                    yield [page, *(let(made.outputs) for _, let, _ in results), *after]
            except ValueError as error:
                raise gr.Error(html.escape(str(error))) from error

        def look(replay: Replay | None, i: float) -> Any:
            return gr.skip() if replay is None else replay.page(processor, int(i))

        def slow(replay: Replay | None) -> Iterator[Any]:
            for i in range(len(replay.steps) if replay is not None else 0):
                assert replay is not None
                yield replay.page(processor, i), i
                time.sleep(min(SLOW, WHOLE / len(replay.steps)))

        outputs = [shown, *(out for _, _, out in results), at, again, kept]
        asks = [*inputs.values(), *widgets.values()]
        replaying = slowly.click(slow, kept, [shown, at], api_name=f"replay-{tab.name}", show_progress="hidden")
        at.input(look, [kept, at], shown, api_name=f"pass-{tab.name}", show_progress="hidden", cancels=[replaying])
        button.click(go, asks, outputs, api_name=tab.name, cancels=[replaying])
        ready = all(widget.value for widget in inputs.values())
        return lambda: page.load(go, asks, outputs, api_name=f"open-{tab.name}") if ready else None

    def outlets(modality: str, count: int) -> list[tuple[Callable[[Sequence[Mapping[str, Any]]], Any], Any]]:
        """Where finished samples are shown, each with what it shows of them: pictures, players; words are on the canvas."""
        tokenizer, found = tokenizers[modality], []
        if isinstance(tokenizer, Drawn):
            gallery = gr.Gallery(
                label=modality, show_label=False, columns=4, height="auto", object_fit="contain", format="png",
                elem_classes=["made", f"made-{modality}"],
            )  # fmt: skip
            found.append((functools.partial(pictures, tokenizer, modality), gallery))
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

    def pictures(tokenizer: Drawn, modality: str, outputs: Sequence[Mapping[str, Any]]) -> Any:
        """Finished samples, whole and numbered."""
        return [(fitted(tokenizer.draw(o[modality]), PICTURE), str(i)) for i, o in enumerate(outputs, 1)]

    making, editing = tabs(processor, own.record.learned)
    with gr.Blocks(title="Masked diffusion", fill_width=True) as page:
        gr.HTML(f"<style>{live.STYLE}{STYLE}</style>")
        gr.Markdown("## Masked diffusion, token by token")
        gr.HTML(f"<p>{about(own, name)}</p><p>{live.legend()}</p>")
        runs = []
        for tab in making:
            with gr.Tab(tab.title):
                runs.append(fill(tab))
        if editing:
            with gr.Tab("Editing"):
                for tab in editing:
                    with gr.Tab(tab.title):
                        fill(tab)
        if making and any(isinstance(tokenizers[m], Drawn) for m in making[0].spec.generated):
            runs[0]()
    return page


def about(own: Model, name: str) -> str:
    """The model, its size, and what it was trained on, as HTML."""
    size = f"{own.model.num_parameters() / 1e6:,.1f} M parameters"
    trained = own.record.line() or "it does not say what it was trained on"
    return f"Model <code>{html.escape(name)}</code>: {size}; {html.escape(trained)}."
