"""A trained model on the Hugging Face hub: its `model/` folder, with a card written from the run.

`checkpoint=hub:OWNER/NAME` loads it back. The one that comes with the library is written here too.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from components.tasks import Task, name_of
from components.vocabulary import Vocabulary
from mdm.config import UserError
from mdm.generation.defaults import FILE
from mdm.generation.prompts import easiest, example
from mdm.hardware import hardware
from mdm.models.builtin import FOLDER, PREFIX
from mdm.models.folder import export, load_model, model_folder
from mdm.models.quantization import in_dtype
from mdm.pages import examples
from mdm.training import record
from mdm.training.history import read_history

PICTURES = ("overview.png", "film.png")


def run_of(model: Path) -> Path:
    """Where what is told of a model lies: the run that holds it as `model/`, or its own folder."""
    return model.parent if model.name == "model" else model


def model_card(run: str | Path, name: str, license: str, about: str = "") -> str:
    """The README of a model, from what its run left behind: config.yaml, metrics.json, history.jsonl (each may be absent).

    about: a paragraph of yours, e.g. whose data it is and under which licence
    """
    folder = model_folder(run)
    run = run_of(folder)
    shape = json.loads((folder / "config.json").read_text())
    modalities = list(json.loads((folder / "processor.json").read_text())["tokenizers"])
    settings: Any = OmegaConf.to_container(OmegaConf.load(run / "config.yaml")) if (run / "config.yaml").is_file() else {}
    metrics = json.loads((run / "metrics.json").read_text()) if (run / "metrics.json").is_file() else {}
    trained = [task for stream in settings.get("data", {}).values() for task in stream["tasks"]]
    possible = Vocabulary.load(folder / "vocabulary.json").tasks or [name_of(Task((), (m,))) for m in modalities]
    lines = [
        "---",
        f"license: {license}",
        "library_name: trimodal-mdm",
        f"tags: [masked-diffusion, {', '.join(modalities)}]",
        "---",
        f"# {name}",
        "",
        f"A masked diffusion model of {_listed(modalities)}: {shape['num_layers']} layers of width {shape['width']}, "
        f"{shape['num_heads']} heads, {shape['vocab_size']:,} ids, {shape['max_length']} positions.",
        "",
        *([about, ""] if about else []),
        "```bash",
        example(name if name.startswith(PREFIX) else f"hub:{name}", easiest(trained or possible)),
        "```",
        "",
    ]
    if not name.startswith(PREFIX):  # which holds the model alone
        lines += [f"![{picture}]({picture})" for picture in PICTURES if (run / picture).is_file()]
    lines += _data(settings) + _training(settings, run) + _figures(metrics)
    if settings:
        lines += ["## Settings", "", "```yaml", OmegaConf.to_yaml(OmegaConf.create(settings)).strip(), "```"]
    return "\n".join(lines) + "\n"


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _data(settings: dict[str, Any]) -> list[str]:
    """A row for each stream of the mix."""
    if not settings.get("data"):
        return []
    rows = ["## Data", "", "| stream | source | rows in the mix | tasks |", "| --- | --- | --- | --- |"]
    total = sum(s["weight"] for s in settings["data"].values())
    for name, stream in settings["data"].items():
        source = stream["train"] or {}
        given = ", ".join(f"{k}: {v}" for k, v in source.items() if k != "_component_")
        tasks = ", ".join(f"{task} {share:g}" for task, share in stream["tasks"].items())
        rows.append(f"| {name} | `{source.get('_component_', '')}` {given} | {stream['weight'] / total:.0%} | {tasks} |")
    return [*rows, ""]


def _training(settings: dict[str, Any], run: Path) -> list[str]:
    """Tokens, steps and time, from the history."""
    path = run / "history.jsonl"
    trained = [line for line in read_history(path) if "tokens_per_second" in line] if path.is_file() else []
    if not trained:
        return []
    last = trained[-1]
    base = settings.get("checkpoint")
    began = f"Finetuned ({settings.get('method')}) from `{base}`. " if base else ""
    return [
        "## Training",
        "",
        f"{began}{last['tokens']:,} tokens in {last['step']:,} steps, {last['seconds'] / 60:.1f} minutes.",
        "",
    ]


def _figures(metrics: dict[str, Any]) -> list[str]:
    rows = [f"| {key.replace('_', ' ')} | {value:,.4g} |" for key, value in metrics.items() if isinstance(value, (int, float))]
    return ["## Figures", "", "| measure | value |", "| --- | --- |", *rows, ""] if rows else []


def push(
    run: str | Path, name: str, license: str = "apache-2.0", private: bool = True, about: str = "", api: Any = None
) -> str:
    """Uploads a run's model with its card and pictures; returns its address. Raises UserError where the hub refuses.

    api: an `huggingface_hub.HfApi`; None is one with the user's own token
    """
    from huggingface_hub import HfApi

    folder, api = model_folder(run), api or HfApi()
    run = run_of(folder)
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(shutil.copytree(folder, Path(scratch) / "model"))
        (staged / "README.md").write_text(model_card(run, name, license, about))
        for picture in PICTURES:
            if (run / picture).is_file():
                shutil.copy(run / picture, staged)
        try:
            api.create_repo(name, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=name, folder_path=str(staged), commit_message="Model and its card"))
        except Exception as error:  # offline, no token, no right: the hub has an exception for each
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"repo={name}: cannot be pushed ({reason}); `hf auth login` stores a token") from error


def pack(run: str | Path, name: str, license: str = "apache-2.0", about: str = "") -> Path:
    """Writes a run's model to where `checkpoint=builtin:NAME` looks for it: in bfloat16, with its card and its defaults.

    An example of each stream comes along (see mdm/pages/examples.py): the demo opens with it.
    """
    folder, source = FOLDER / name.removeprefix(PREFIX), model_folder(run)
    card = model_card(run, name, license, about)
    with hardware("cpu", "fp32") as hw:
        model, processor = load_model(source)
        shutil.rmtree(folder, ignore_errors=True)
        export(folder, in_dtype(model, torch.bfloat16), processor, hw)
    (folder / "README.md").write_text(card)
    if (source / FILE).is_file():
        shutil.copy(source / FILE, folder)
    record.carry(source, folder)
    if (source.parent / examples.FOLDER).is_dir():
        shutil.copytree(source.parent / examples.FOLDER, folder / examples.FOLDER)
    return folder
