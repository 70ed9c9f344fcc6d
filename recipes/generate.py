"""Generate text, images or speech from a trained model, and read images and speech back.

    mdm generate checkpoint=runs/quickstart task=text_to_image prompt="a handwritten seven" count=10
    mdm generate checkpoint=runs/quickstart task=image_to_text prompt=seven.png
    mdm generate checkpoint=runs/quickstart task=text

Writes PNG and WAV files, a grid of the images and `outputs.jsonl` to output_dir, and prints every text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from tqdm import tqdm

from components.data.sources import read_audio, read_image
from components.sequences import TASKS
from mdm.checkpoint import load_model, model_folder
from mdm.cli import run_recipe
from mdm.config import UserError, check, instantiate
from mdm.generation import generate
from mdm.hardware import check_hardware, hardware
from mdm.media import save_outputs
from mdm.run import check_output_dir

CONFIG = "generate"


@dataclass
class Settings:
    """The keys of the config; `recipes/configs/generate.yaml` explains each."""

    checkpoint: str = MISSING
    task: str = MISSING
    output_dir: str = MISSING
    prompt: str | None = None
    count: int = 4
    length: int | None = None
    sampler: dict[str, Any] | None = None
    guidance_scale: float = 0.5
    seed: int = 0
    batch_size: int = 100
    device: str = "auto"
    precision: str = "auto"


def validate(cfg: Settings) -> None:
    """Everything that can be known to be wrong before the model loads. Raises UserError."""
    check_hardware(cfg.device, cfg.precision)
    model_folder(cfg.checkpoint)
    if cfg.task not in TASKS:
        raise UserError(f"task: {cfg.task!r} is not one of {', '.join(TASKS)}")
    if TASKS[cfg.task].given and cfg.prompt is None:
        given = " and ".join(TASKS[cfg.task].given)
        kind = "a text" if given == "text" else "the path of a file"
        raise UserError(f"prompt: task {cfg.task} is given {given}; write prompt=... ({kind})")
    for key in ("count", "batch_size"):
        if getattr(cfg, key) < 1:
            raise UserError(f"{key} must be at least 1, got {getattr(cfg, key)}")
    if cfg.length is not None and cfg.length < 1:
        raise UserError(f"length must be at least 1, got {cfg.length}")
    if cfg.sampler is not None:
        check(cfg.sampler, "sampler")
        instantiate(cfg.sampler, "sampler")
    check_output_dir(cfg.output_dir)


def main(cfg: Settings) -> None:
    with hardware(cfg.device, cfg.precision) as hw:
        model, processor = load_model(cfg.checkpoint, hw.device)
        prompts = [read_prompt(cfg, processor)] * cfg.count
        sampler = instantiate(cfg.sampler, "sampler") if cfg.sampler is not None else None
        guidance = cfg.guidance_scale if TASKS[cfg.task].given else 0.0
        length = cfg.length or (model.config.max_length // 2 if cfg.task == "text" else None)
        with tqdm(total=cfg.count, desc=cfg.task, unit="sample") as bar, hw.autocast():
            try:
                made = generate(
                    model, processor, cfg.task, prompts, sampler, guidance, cfg.seed, cfg.batch_size, length,
                    progress=bar.update,
                )  # fmt: skip
            except ValueError as error:
                raise UserError(str(error)) from error
    rate = getattr(processor.tokenizers.get("audio"), "sample_rate", 0)
    for line in save_outputs(Path(cfg.output_dir), prompts, made.outputs, rate):
        print("  ".join(f"{key}: {value}" for key, value in line.items() if not key.startswith("given_")))
    print(f"Written to {cfg.output_dir}")


def read_prompt(cfg: Settings, processor: Any) -> dict[str, Any]:
    """The prompt as the task's modality: a text, or the file of an image or a clip."""
    given = TASKS[cfg.task].given
    missing = [m for m in (*given, *TASKS[cfg.task].generated) if m not in processor.tokenizers]
    if missing:
        raise UserError(f"task {cfg.task}: the model of {cfg.checkpoint} has no {missing[0]}")
    if not given or given == ("text",):
        return {"text": cfg.prompt} if given else {}
    path = Path(cfg.prompt)
    if not path.is_file():
        raise UserError(f"prompt: file not found: {cfg.prompt}")
    try:
        if given == ("image",):
            return {"image": read_image(path, processor.tokenizers["image"].size)}
        return {"audio": read_audio(path, processor.tokenizers["audio"].sample_rate)}
    except Exception as error:  # decoders of many formats: whatever they say, the file is the user's
        raise UserError(f"prompt: {cfg.prompt} cannot be read as {given[0]}: {error}") from error


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG)
