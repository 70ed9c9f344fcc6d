"""Generate whatever a trained model knows (text, images, speech, ...), from whatever it takes, and edit any of it.

    mdm generate checkpoint=runs/quickstart task=text_to_image prompt="a handwritten seven" count=10
    mdm generate checkpoint=runs/quickstart task=text_to_image prompt="a handwritten seven" --film
    mdm generate checkpoint=runs/quickstart task=image_to_text prompt=seven.png
    mdm generate checkpoint=runs/quickstart task=text_to_image prompt="a handwritten nine" edit=seven.png region=0,16,32,32
    mdm generate checkpoint=runs/quickstart task=text edit="The [mask:6] statement is"
    mdm generate checkpoint=runs/quickstart task=text_to_speech prompts=many.jsonl
    mdm generate checkpoint=runs/quickstart_blocks task=text_to_speech prompt="a spoken nine" stream=nine.wav
    mdm generate checkpoint=hub:GSAI-ML/LLaDA-8B-Base task=text prompt="The capital of France is" length=32

Writes a file for each sample (PNG, WAV, or what the modality's tokenizer writes), `samples.png` to look at, and
`outputs.jsonl` to output_dir, and prints every text; what an earlier command wrote there stays, the numbers go on. A prompt of
several parts is written prompt.text=... prompt.image=FILE; a line of a JSONL file holds the same keys.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from components.progress import Bar
from components.samplers import Blocks, Sampler, deterministic
from components.samplers.guidance import Scale
from components.tasks import find_task
from mdm.config import WORDS, UserError, at_least, at_least_one, check
from mdm.config.errors import said
from mdm.config.protocols import conforming
from mdm.data.processor import Processor
from mdm.data.settings import canonical
from mdm.generation.checks import check_settings, edits_unlearned
from mdm.generation.defaults import Defaults, build_scale
from mdm.generation.generate import generate
from mdm.generation.prompts import (
    check_prompt,
    check_task,
    check_template,
    easiest,
    read_jsonl,
    read_prompt,
    spelled_out,
    suffixes,
)
from mdm.hardware import check_compile, check_hardware, compile_blocks, hardware
from mdm.models.folder import load_config, load_model, load_processor
from mdm.pages import film
from mdm.pages.media import next_number, save_outputs, sheet_name
from mdm.pages.streaming import TERMINAL, Stream, check_stream
from mdm.recipe import run_recipe
from mdm.training import record
from mdm.training.output import check_output_dir
from mdm.training.reach import Trial
from mdm.training.trial import try_out

CONFIG = "generate"


@dataclass
class Settings:
    """The keys of the config; `recipes/configs/generate.yaml` explains each."""

    checkpoint: str = MISSING
    trust: bool = False
    task: str = ""
    output_dir: str = MISSING
    prompt: Any = field(default=None, metadata=WORDS)
    edit: str | None = None
    region: str | None = None
    prompts: str | None = None
    template: str | None = None
    count: int | None = None
    length: int | None = None
    sampler: dict[str, Any] | None = None
    guidance_scale: Any = None
    defaults: str | None = None
    cache: str = "auto"
    refresh_every: int | None = None
    stop_at_end: bool = True
    film: bool = False
    stream: str | None = None
    seed: int = 0
    batch_size: int = 100
    device: str = "auto"
    precision: str = "auto"
    compile: str = "false"


def validate(cfg: Settings) -> None:
    """Everything that can be known to be wrong before the model loads. Raises UserError."""
    check_hardware(cfg.device, cfg.precision)
    check_compile(cfg.compile, cfg.device)
    cfg.cache = "off" if cfg.cache.lower() == "false" else cfg.cache  # YAML reads a bare `off` so
    processor, learned = load_processor(cfg.checkpoint), record.of(cfg.checkpoint).learned
    if not cfg.task:
        known = (
            f"the model learned {', '.join(learned)}"
            if learned
            else f"it has {', '.join(processor.vocabulary.tasks) or 'text'}"
        )
        raise UserError(f"task: name one, e.g. task={easiest(learned or processor.vocabulary.tasks or ['text'])}; {known}")
    cfg.task = canonical(cfg.task, "task")
    check_task(cfg.task, processor.vocabulary, learned)
    at_least_one(cfg, "count", "batch_size", "length", "refresh_every")
    at_least(0, cfg, "seed")
    if cfg.sampler is not None:
        check(cfg.sampler, "sampler")
    if cfg.guidance_scale and not find_task(cfg.task).given:
        raise UserError(f"guidance_scale={cfg.guidance_scale}: task {cfg.task} is given nothing that could be left out")
    sampler, scale = choose(cfg, processor)
    try:
        check_settings(cfg.task, [{}], cfg.batch_size, cfg.cache, sampler, scale, load_config(cfg.checkpoint))
    except ValueError as error:
        raise UserError(str(error)) from error
    check_template(cfg.template, cfg.task)
    files = suffixes(processor)
    for prompt, where in asked(cfg):
        check_prompt(prompt, cfg.task, files, where)
        check_length(cfg, processor, prompt, where)
    check_output_dir(cfg.output_dir)
    if cfg.stream is not None:
        check_stream(cfg.stream, find_task(cfg.task).generated, processor, bool(load_config(cfg.checkpoint).blocks))
        if len(asked(cfg)) > 1 or (cfg.count or 1) > 1:
            raise UserError(f"stream={cfg.stream}: one sample is streamed; take one prompt, and count=1")


def trial(cfg: Settings) -> Trial:
    """What `mdm validate` does after all keys: the prompts are read, by the model's own tokenizers."""
    found = try_out(cfg)
    processor = load_processor(cfg.checkpoint)
    for prompt, where in asked(cfg):
        read_prompt(prompt, cfg.task, processor, where, cfg.length, template=cfg.template)
    found.tried.append("the prompts")
    return found


def main(cfg: Settings) -> None:
    with hardware(cfg.device, cfg.precision) as hw:
        record.warn(cfg.checkpoint, [cfg.task])
        model, processor = load_model(cfg.checkpoint, hw.device)
        compile_blocks(model, cfg.compile, hw)
        sampler, scale = choose(cfg, processor)
        if (line := edits_unlearned(find_task(cfg.task).generated, sampler, model.config)) is not None:
            print(f"Warning: {line}")
        if (cfg.length or 0) > (trained := model.config.max_length):  # of blocks: others are refused
            print(f"Warning: length={cfg.length}, and the model was trained with up to {trained} positions")
        count = counted(cfg, sampler)
        written = [prompt for prompt, _ in asked(cfg) for _ in range(count)]
        room = min(model.config.max_length // 2, 256)
        read = [read_prompt(prompt, cfg.task, processor, where, cfg.length, room, cfg.template) for prompt, where in asked(cfg)]
        prompts = list(itertools.chain.from_iterable([prompt] * count for prompt in read))
        length = cfg.length if cfg.task != "text" else None  # a text's is that of what was read
        stream = None if cfg.stream is None else Stream(cfg.stream, processor)
        with Bar(total=len(prompts), desc=cfg.task, unit="sample") as bar, hw.autocast():
            try:
                made = generate(
                    model, processor, cfg.task, prompts, sampler, scale, cfg.seed, cfg.batch_size, length, cfg.cache,
                    cfg.refresh_every, cfg.stop_at_end, film=cfg.film, progress=bar.update, stream=stream,
                )  # fmt: skip
            except ValueError as error:
                raise UserError(str(error)) from error
    folder = Path(cfg.output_dir)
    first = next_number(folder)
    lines = told(save_outputs(folder, processor, written, made.outputs, first, prompts), count)
    if stream is not None:
        print(stream.report(), file=sys.stderr)
    for line in lines if cfg.stream != TERMINAL else []:  # else it has been read
        print(line)
    empty = sum(hasattr(v, "__len__") and not isinstance(v, str) and len(v) == 0 for o in made.outputs for v in o.values())
    if empty:
        print(f"{empty} of {len(made.outputs)} samples are empty: the model ended them at once")
    look = [sheet_name(first)]
    if cfg.film:
        shown = min(10, len(made.steps[0].tokens))
        try:
            frames = [film.frame(processor, made.batch, step.tokens[:shown]) for step in made.steps]
        except Exception as error:  # of a tokenizer of the user's own
            raise UserError(f"film: the samples are written, and no film is: {said(error)}") from error
        look.append(f"film_{first:04d}.gif" if first else "film.gif")
        (folder / look[-1]).write_bytes(film.gif(frames))
    before = f", as {first:04d} and on: what was there stays" if first else ""
    there = [str(folder / name) for name in look if (folder / name).is_file()]
    print(
        f"{made.forwards.double().mean():.1f} forward passes a sample. Written to {cfg.output_dir}{before}"
        + (f"\nLook at {' and '.join(there)}" if there else "")
    )


def counted(cfg: Settings, sampler: Sampler) -> int:
    """Samples of each prompt: four, or one where they would be all alike; that is said where more are asked for."""
    if not deterministic(sampler):
        return cfg.count or (4 if cfg.stream is None else 1)
    if cfg.count is not None and cfg.count > 1:
        print(f"{cfg.task} is sampled greedily: the {cfg.count} samples of a prompt are all alike (a temperature draws others)")
    return cfg.count or 1


def told(lines: Sequence[Mapping[str, str]], count: int) -> list[str]:
    """What is printed of the samples: a line each, and one for those of a prompt that are alike, the most frequent first."""
    shown = ["  ".join(f"{key}: {value}" for key, value in line.items() if not key.startswith("given_")) for line in lines]
    alike = [Counter(shown[start : start + count]) for start in range(0, len(shown), count)]
    return [line if n == 1 else f"{line}  (x{n})" for found in alike for line, n in found.most_common()]


def asked(cfg: Settings) -> list[tuple[dict[str, str], str]]:
    """The prompts as they are written, each with where it stands."""
    if cfg.prompts is not None:
        if not cfg.prompt is cfg.edit is cfg.region is None:
            raise UserError("prompts: a file of prompts takes no prompt, edit or region beside it")
        lines = [(prompt, f"prompts: line {number}") for number, prompt in read_jsonl(cfg.prompts)]
        return [(spelled_out(prompt, cfg.task, where), where) for prompt, where in lines]
    parts = cfg.prompt if isinstance(cfg.prompt, dict) else {"prompt": cfg.prompt}
    keys = {**parts, "edit": cfg.edit, "region": cfg.region}
    return [(spelled_out({key: str(value) for key, value in keys.items() if value is not None}, cfg.task, "prompt"), "prompt")]


def check_length(cfg: Settings, processor: Processor, prompt: Mapping[str, str], where: str) -> None:
    """Raises UserError for a length of what has none, or has its own."""
    try:
        processor.stretched(cfg.task, cfg.length)
    except ValueError as error:
        raise UserError(str(error)) from error
    if cfg.length is not None and cfg.task == "text" and "edit" in prompt:
        raise UserError(f"{where}: length={cfg.length} beside an edit, whose length is that of its text and its gaps")


def choose(cfg: Settings, processor: Processor) -> tuple[Sampler, Scale]:
    """The sampler and the guidance scale: those of the config, else the defaults of what is generated."""
    model = load_config(cfg.checkpoint)
    own = (processor.vocabulary.modalities, model.noise, model.learned_orders)
    defaults = Defaults.beside(cfg.checkpoint, cfg.defaults).of(cfg.task, *own)
    sampler = defaults.sampler if cfg.sampler is None else conforming(cfg.sampler, "sampler", Sampler)
    scale = defaults.guidance_scale if cfg.guidance_scale is None else build_scale(cfg.guidance_scale, "generate")
    if (
        cfg.cache in ("prefix", "dual")
        and not isinstance(sampler, Blocks)
        and cfg.sampler is None
        and not (model.blocks or model.two_streams)
    ):
        raise UserError(
            f"cache={cfg.cache}: the default sampler of {cfg.task} does not decode in blocks; set sampler=... to Blocks"
        )
    return sampler, scale if find_task(cfg.task).given else 0.0


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG)
