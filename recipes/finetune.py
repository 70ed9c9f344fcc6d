"""Finetune a model on new data: all of it, LoRA or QLoRA; with new modalities if you like.

    mdm run finetune --config quickstart_lora checkpoint=runs/quickstart          the digit after the one that is named
    mdm run finetune --config quickstart_speech checkpoint=runs/quickstart_seen   adds speech to a model of text and images
    mdm run finetune --config finetune_instruct checkpoint=hub:GSAI-ML/LLaDA-8B-Base   instructions, loss on responses alone
    mdm run finetune --config adapt checkpoint=hub:Qwen/Qwen3-0.6B               an autoregressive or a masked model into blocks

The loop is pretrain's; what differs is where the model comes from and what of it is trained. What the model could do is scored
before and after, on the same inputs with the same noise. Writes adapter/ (what was trained), model/ (merged) and metrics.json.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from omegaconf import MISSING

from components.parameterization import CompleteP
from components.progress import working
from components.tasks import find_task
from mdm.config import UserError, at_least_one
from mdm.data.corruption import layout_of
from mdm.data.pipeline import corpus, tokenizers
from mdm.data.processor import Processor
from mdm.data.settings import tasks_of
from mdm.hardware import Hardware, hardware, number_of_processes
from mdm.models.adapters import LoraSettings, adapter_state, add_lora, merged, num_bytes
from mdm.models.folder import QUANTIZED, export, load_config, load_model, load_processor, model_folder
from mdm.models.shape import gone_on
from mdm.models.transformer import MaskedDiffusionModel, ModelConfig
from mdm.recipe import load_recipe, run_recipe
from mdm.training.run import check_run

CONFIG = "finetune"
METHODS = ("full", "lora", "qlora")

pretrain = load_recipe("pretrain")
evaluate = load_recipe("evaluate")


@dataclass
class Settings(pretrain.Settings):
    """Those of pretrain, without a model, and of evaluate; `recipes/configs/finetune.yaml` explains each."""

    checkpoint: str = MISSING
    trust: bool = False
    method: str = "lora"
    lora: LoraSettings = field(default_factory=LoraSettings)
    max_length: int | None = None
    blocks: dict[str, int] | None = None
    causal: bool | None = None
    orders: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    tokenizers: dict[str, dict[str, Any]] = field(default_factory=dict)
    canvas: dict[str, int | None] = field(default_factory=dict)
    judged: dict[str, evaluate.JudgedTask] = field(default_factory=dict)  # pyright: ignore[reportInvalidTypeForm] (a recipe is loaded as it runs)
    crossed: dict[str, evaluate.CrossedTask] = field(default_factory=dict)  # pyright: ignore[reportInvalidTypeForm] (a recipe is loaded as it runs)
    samples: int = 1000
    nelbo_repeats: int = 1


def validate(cfg: Settings) -> None:
    """Everything that can be known to be wrong before data loads. Raises UserError."""
    if cfg.method not in METHODS:
        raise UserError(f"method: {cfg.method!r} is not one of {', '.join(METHODS)}")
    if cfg.model:
        raise UserError("model: it comes from checkpoint; only max_length may be set")
    if cfg.method == "qlora" and cfg.ema is not None:
        raise UserError("ema: an average of quantized weights makes no sense; set method=lora, or ema=null")
    if cfg.method == "qlora" and number_of_processes() > 1:
        raise UserError(
            "method: qlora is for one process, whose GPU holds all of 4 bits; several shard the base of method=lora"
        )
    if cfg.causal is not None and cfg.blocks is None:
        raise UserError(f"causal={cfg.causal} is of finished blocks: set blocks, e.g. blocks={{text: 32}}")
    if cfg.orders is not None and (cfg.orders != "two_streams" or cfg.blocks is not None):
        raise UserError(f"orders={cfg.orders}: a checkpoint goes on with two_streams alone, and not in blocks (blocks=null)")
    cfg.lora.validate()
    at_least_one(cfg, "max_length", "samples", "nelbo_repeats")
    folder = model_folder(cfg.checkpoint)
    if (folder / QUANTIZED).is_file():
        raise UserError(f"checkpoint={cfg.checkpoint} is quantized, and cannot be trained; give the model it was made from")
    check_run(cfg, *what_is_trained(cfg))
    evaluate.validate_judged(cfg)


def what_is_trained(cfg: Settings) -> tuple[ModelConfig, list[str]]:
    """The checkpoint's shape, in blocks or two streams where it goes on so, and its modalities then. Raises UserError."""
    shape, vocabulary = load_config(cfg.checkpoint), load_processor(cfg.checkpoint).vocabulary
    modalities = [*vocabulary.modalities, *(m for m in cfg.tokenizers if m not in vocabulary.modalities)]
    if cfg.blocks is None:
        return gone_on(shape, vocabulary, None, None, cfg.orders), modalities
    if not cfg.blocks or set(cfg.blocks) - set(modalities):
        raise UserError(f"blocks: {cfg.blocks} must name some of {', '.join(modalities)}, e.g. blocks={{{modalities[0]}: 32}}")
    try:
        shape = gone_on(shape, vocabulary, cfg.blocks, cfg.causal, None)
    except ValueError as error:
        raise UserError(str(error)) from error
    if set(cfg.blocks) <= set(vocabulary.modalities):
        layout_of(shape, vocabulary)  # a new tokenizer's frames are known when it is built
    return shape, modalities


def main(cfg: Settings) -> None:
    folder = Path(cfg.output_dir)
    with hardware(cfg.device, cfg.precision, cfg.mesh) as hw:
        with working("reading the data and the checkpoint", hw.main):
            run = Finetune(cfg, hw)  # first: it finds what is wrong with the data
        run.say_noise()
        before = score_base(cfg, hw, folder, run.resumed is not None)
        started = time.perf_counter()
        run.train()
        seconds = time.perf_counter() - started
        if not hw.main:
            return
        after = {}
        if cfg.judged or cfg.crossed:
            model, processor = load_model(folder, hw.device)
            after = evaluate.evaluate(cfg, model, processor, hw).metrics
    metrics = {**compare(before, after), "seconds": seconds, **run.sizes(), "before": before, "after": after}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    for name, value in metrics.items():
        if not isinstance(value, dict):
            print(f"{name:<32}{value:,.4g}")
    for name in sorted(set(before) | set(after)):
        print(f"  {name:<30}{before.get(name, float('nan')):>10.4f} -> {after.get(name, float('nan')):.4f}")
    print(f"Written to {folder / 'metrics.json'}")


def score_base(cfg: Settings, hw: Hardware, folder: Path, resumed: bool) -> dict[str, float]:
    """What the model can do before: of `judged`, all that its modalities allow. Kept in before.json for a resumed run."""
    path = folder / "before.json"
    if resumed and path.is_file():
        return json.loads(path.read_text())
    if not cfg.judged or not hw.main:
        return {}
    model, processor = load_model(cfg.checkpoint, hw.device)

    def able(*tasks: str | None) -> bool:
        return all(set(find_task(t).modalities) <= set(processor.tokenizers) for t in tasks if t)

    known = {name: task for name, task in cfg.judged.items() if able(task.write, task.read, task.complete)}
    data = {name: stream for name, stream in cfg.data.items() if able(*stream.tasks)}
    metrics = evaluate.evaluate(replace(cfg, judged=known, crossed={}, data=data), model, processor, hw).metrics
    path.write_text(json.dumps(metrics, indent=1))
    return metrics


def compare(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """The least accuracy among what it could not do before, and the most that any accuracy of before has lost."""
    found = {}
    scored = [k for k in after if k.endswith("_accuracy") and "judge" not in k]
    new = [after[k] for k in scored if k not in before]
    if new:
        found["task_accuracy"] = min(new)
    drops = [before[k] - after[k] for k in scored if k in before]
    if drops:
        found["largest_base_accuracy_drop"] = max(drops)
    return found


class Finetune(pretrain.Pretrain):
    """Pretraining that starts from a checkpoint, with what its method trains."""

    @functools.cached_property
    def base(self) -> tuple[MaskedDiffusionModel, Processor]:
        """The checkpoint's model, which becomes this run's, and its processor."""
        return load_model(self.cfg.checkpoint)

    def make_processor(self, sources: Mapping[str, Any]) -> Processor:
        """The checkpoint's tokenizers and ids, and those of new modalities and tasks behind them."""
        new = tokenizers(self.cfg.tokenizers, lambda modality: corpus(sources, modality))
        return self.base[1].grown(new, self.cfg.canvas, tasks_of(self.cfg))

    def make_model(self) -> tuple[MaskedDiffusionModel, CompleteP]:
        """The checkpoint's weights, the vocabulary's new rows, and LoRA's matrices.

        All in float32; what QLoRA freezes stays in bfloat16 where it is so, and the run multiplies bfloat16.
        """
        cfg, (model, _) = self.cfg, self.base
        self.undone = model.config.noise
        self.kept = model.embedding.weight.dtype
        quantize = cfg.method == "qlora"  # layer by layer, so that there is never a whole model in float32
        if not quantize:
            model.float()
        generator = torch.Generator().manual_seed(cfg.seed)
        model.grow(self.vocabulary.size, cfg.max_length, generator)
        if cfg.blocks is not None or cfg.orders is not None:
            model.change(gone_on(model.config, self.vocabulary, cfg.blocks, cfg.causal, cfg.orders))
        if cfg.method != "full":
            dtype = torch.bfloat16 if quantize and self.hw.bf16 and self.kept == torch.bfloat16 else torch.float32
            add_lora(model, cfg.lora, quantize, dtype, generator)
        return model.train(), CompleteP()

    def export(self) -> None:
        """Writes adapter/, and the merged model, which anything loads."""
        if self.cfg.method == "full":
            return super().export()
        trained = adapter_state(self.model)
        if self.hw.main:
            adapter = self.folder / "adapter"
            adapter.mkdir(exist_ok=True)
            safetensors.torch.save_file(trained, adapter / "adapter.safetensors")
            about = {"checkpoint": self.cfg.checkpoint, "method": self.cfg.method, **vars(self.cfg.lora)}
            (adapter / "adapter.json").write_text(json.dumps(about, indent=1))
        weights = merged(self.model, self.cfg.lora)
        export(self.folder / "model", self.model, self.processor, self.hw, weights)
        if self.kept != torch.float32:
            kept = str(self.kept).removeprefix("torch.")
            self.hw.say(f"The base is in {kept}; model/ is in float32, so that nothing of what was learned is rounded away")

    def say_noise(self) -> None:
        """Says where the base was trained to undo other noise than this run's masker makes."""
        now = self.model.config.noise
        for modality in {**self.undone, **now}:
            before, after = (str(noise[modality].kernel) if modality in noise else "masks" for noise in (self.undone, now))
            if before != after:
                self.hw.say(f"The checkpoint undoes {before} of {modality}; here it learns to undo {after} (see masker).")

    def sizes(self) -> dict[str, float]:
        """Trained parameters, and the memory of weights, gradients and AdamW's moments."""
        every = list(self.model.parameters())
        trained = [p for p in every if p.requires_grad]
        return {
            "trained_parameters": sum(p.numel() for p in trained),
            "weights_mib": num_bytes(every) / 2**20,
            "gradients_and_moments_mib": 3 * num_bytes(trained) / 2**20,
        }


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG, again="goes on from the last checkpoint, where one was written")
