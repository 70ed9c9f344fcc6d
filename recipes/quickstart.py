"""Train one model on text, images and speech in minutes, evaluate it on held-out data, and write a report to look at.

    mdm run quickstart
    mdm run quickstart output_dir=runs/mine tokens=2_000_000

Real data, all of it from installed packages: scanned digits, words spoken by espeak-ng, and CPython's language reference.
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
from components.samplers import Confidence
from mdm.config import UserError
from mdm.generation.generate import generate
from mdm.generation.prompts import example
from mdm.hardware import Hardware, can_compile, cpu_name, hardware
from mdm.models.folder import load_model
from mdm.pages import film, report
from mdm.pages.media import image_grid
from mdm.pages.report import Section
from mdm.recipe import load_recipe, run_recipe
from mdm.training.history import read_history

CONFIG = "quickstart"
NEEDS = {"sklearn": "scikit-learn", "pycodec2": "pycodec2", "espeakng_loader": "espeakng-loader", "matplotlib": "matplotlib"}

pretrain = load_recipe("pretrain")
evaluate = load_recipe("evaluate")


@dataclass
class Settings(pretrain.Settings):
    """Those of pretrain and of evaluate; `recipes/configs/quickstart.yaml` explains each."""

    judged: dict[str, evaluate.JudgedTask] = MISSING
    crossed: dict[str, evaluate.CrossedTask] = field(default_factory=dict)
    samples: int = 200
    nelbo_repeats: int = 4


def validate(cfg: Settings) -> None:
    """Everything that can be known to be wrong before data loads. Raises UserError."""
    missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"the quickstart needs {', '.join(missing)}; install them with: pip install -e '.[quickstart]'")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("the quickstart is one process; for several run pretrain, then evaluate")
    pretrain.validate(cfg)
    evaluate.validate_judged(cfg)


def main(cfg: Settings) -> None:
    started = time.perf_counter()
    folder = Path(cfg.output_dir)
    pretrain.main(cfg)
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
        sections = [
            metrics_section(results),
            curves_section(history, results),
            images_section(cfg, results),
            film_section(model, processor, hw, folder),
            speech_section(cfg, results, processor),
            reading_section(results),
            text_section(cfg, model, processor, hw),
            settings_section(cfg, hw),
        ]
        write_overview(cfg, results, processor, folder)
    minutes, millions = results.metrics["seconds"] / 60, trained[-1]["tokens"] / 1e6
    lead = (
        f"One masked diffusion model of {model.num_parameters() / 1e6:.1f} M parameters, trained on {millions:.1f} M tokens of "
        f"scanned digits, spoken words and English, in {minutes:.1f} minutes with its evaluation."
    )
    path = folder / "report.html"
    report.write_report(path, "What the model learned", lead, sections)
    for name in (*TARGETS, *(f"{task}_accuracy" for task in cfg.crossed)):
        print(f"  {name:<30}{results.metrics[name]:.3f}")
    print(f"\nReport: {path.resolve()}\nGo on with:")
    for task in cfg.judged.values():
        print(f"  {example(folder, task.write, task.caption.format('seven'))}")
    print("  mdm cp pretrain my.py      # then edit my.py and my.yaml, and: mdm run my.py --config my.yaml")


TARGETS = (
    "text_to_image_accuracy",
    "text_to_speech_accuracy",
    "image_to_text_accuracy",
    "speech_to_text_accuracy",
    "image_judge_accuracy",
    "speech_judge_accuracy",
    "text_bits_per_token",
    "text_unigram_bits_per_token",
    "tokens_per_second",
    "seconds",
)


def metrics_section(results: Any) -> Section:
    rows = [(name.replace("_", " "), value) for name, value in results.metrics.items()]
    text = "Everything is measured on data held out from training; the judges learned on a third, separate part."
    return Section("Figures", text, report.table(rows, ("measure", "value")))


def curves_section(history: list[dict], results: Any) -> Section:
    body = report.picture(report.loss_curves(history, results.metrics.get("text_unigram_bits_per_token")))
    text = (
        "Left, all tokens of a modality, captions among the text; right, what is generated, given its caption. Text under the "
        "grey line is predicted better than from word frequencies alone."
    )
    return Section("Learning", text, body)


def images_section(cfg: Settings, results: Any) -> Section:
    """Generated digits beside real ones, a row for each caption."""
    made = [w for label in range(10) for w in [w for w in results.written["image"] if w["label"] == label][:8]]
    test = results.read["image"]
    real = [s for label in range(10) for s in [s for s in test if s["label"] == label][:8]]
    columns = min(8, max(1, len(made) // 10))
    left = report.picture(image_grid([m["image"] for m in made], columns, scale=5), "generated, one row for each digit")
    right = report.picture(image_grid([r["image"] for r in real], columns, scale=5), "real, held out")
    caption = cfg.judged["image"].caption
    return Section(
        "Text to image",
        f"Captions: “{caption.format('zero')}” to “{caption.format('nine')}”.",
        f'<div class="pair">{left}{right}</div>',
    )


def film_section(model: Any, processor: Any, hw: Hardware, folder: Path) -> Section:
    """Ten digits, from all masks to the finished images."""
    prompts = [{"text": f"a handwritten {word}"} for word in WORDS]
    with hw.autocast():
        made = generate(model, processor, "text_to_image", prompts, Confidence(num_steps=8), 1.0, seed=1, film=True)
    frames = [film.frame(processor, made.batch, step.tokens) for step in made.steps]
    still = film.strip(frames)
    still.save(folder / "film.png")
    moving = film.gif(frames)
    (folder / "film.gif").write_bytes(moving)
    body = report.picture(moving, "the unmasking; what is still masked is blue", "gif")
    body += report.picture(still, "the same, a row for each step")
    return Section("How an image is made", "From all masks, the most confident patches first, in eight steps.", body)


def write_overview(cfg: Settings, results: Any, processor: Any, folder: Path) -> None:
    """overview.png: generated digits (a column for each), the unmasking, and generated speech."""
    by_label = [[w for w in results.written["image"] if w["label"] == label] for label in range(10)]
    rows = min(4, *map(len, by_label))
    if rows == 0:
        return
    grid = image_grid([by_label[label][row]["image"] for row in range(rows) for label in range(10)], 10, scale=6)
    spoken = [next(w["audio"] for w in results.written["speech"] if w["label"] == c) for c in range(10)]
    speech = report.spectrograms({"generated": spoken}, WORDS, processor.tokenizers["audio"].sample_rate)
    panels = {
        f"text to image: “{cfg.judged['image'].caption.format('zero')}” … “nine”": grid,
        "from all masks to images, every other step": film.every_other(Image.open(folder / "film.png"), steps=9),
        f"text to speech: “{cfg.judged['speech'].caption.format('zero')}” … “nine”": Image.open(io.BytesIO(speech)),
    }
    shown = ("text_to_image", "text_to_speech", "image_to_text", "speech_to_text")
    line = "accuracy: " + ", ".join(f"{n.replace('_', ' ')} {results.metrics[f'{n}_accuracy']:.2f}" for n in shown)
    (folder / "overview.png").write_bytes(report.overview(panels, line))


def speech_section(cfg: Settings, results: Any, processor: Any) -> Section:
    """Players and spectrograms of generated words beside espeak-ng's."""
    rate = processor.tokenizers["audio"].sample_rate
    made = [next((w for w in results.written["speech"] if w["label"] == c), None) for c in range(10)]
    real = [next((s for s in results.read["speech"] if s["label"] == c), None) for c in range(10)]
    kept = [c for c in range(10) if made[c] is not None and real[c] is not None]
    rows = {"generated": [made[c]["audio"] for c in kept], "espeak-ng": [real[c]["audio"] for c in kept]}
    body = ""
    if kept:
        body = report.picture(report.spectrograms(rows, [WORDS[c] for c in kept], rate))
        for name, clips in rows.items():
            body += "<div>" + "".join(
                report.player(clip, rate, f"{name}: {WORDS[c]}") for c, clip in zip(kept, clips, strict=True)
            ) + "</div>"  # fmt: skip
    return Section("Text to speech", "Words the model speaks, beside real clips of voices it never heard.", body)


def reading_section(results: Any) -> Section:
    """Captions read back from held-out images and speech."""
    images = results.read["image"][:10]
    grid = report.picture(image_grid([s["image"] for s in images], len(images), scale=8))
    rows = [(s["text"], s["read"]) for s in images]
    spoken = [(f"{s['text']} ({s['voice']})", s["read"]) for s in results.read["speech"][:10]]
    tables = report.table(rows, ("image of", "the model reads")) + report.table(spoken, ("clip of", "the model hears"))
    body = f'{grid}<div class="pair">{tables}</div>'
    return Section("Image and speech to text", "The first held-out samples, not chosen.", body)


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
