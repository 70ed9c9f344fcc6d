"""Sampling text in blocks: key/value caches, torch.compile, and samplers that take as many tokens a pass as are sure enough.

Random weights: what an adaptive sampler gains depends on how sure a trained model is (docs/inference.md), so here it is only
shown with the passes that it took. The presets `blocks` and `smoke_blocks` are of long texts, see benchmarks/blocks.py.
"""

from __future__ import annotations

from typing import Any

import torch

from components.samplers import Blocks, Confidence, Threshold
from mdm.data.processor import Processor
from mdm.generation.editing import Edit
from mdm.generation.generate import generate
from mdm.models import builders

from . import blocks
from .measure import Result, interleaved, rows
from .train import ways

PRESETS = {
    "smoke": {"width": 64, "num_layers": 2, "prompt": 16, "new": 16, "block": 8, "rows": 1, "warmup": 1, "repeats": 2},
    "cpu": {"width": 256, "num_layers": 6, "prompt": 192, "new": 64, "block": 32, "rows": 1, "warmup": 1, "repeats": 5},
    "blocks": {"width": 256, "ffn_width": 768, "num_layers": 4, "vocab": 2_000, "prompt": 64, "new": 512, "block": 32,
               "steps": 8, "trained": 256, "warmup": 1, "repeats": 3},
    "smoke_blocks": {"width": 64, "ffn_width": 192, "num_layers": 2, "vocab": 500, "prompt": 16, "new": 32, "block": 8,
                     "steps": 2, "trained": 32, "warmup": 1, "repeats": 2},
    "gpu": {"width": 4096, "num_layers": 32, "prompt": 128, "new": 256, "block": 32, "rows": 1, "warmup": 2, "repeats": 5},
}  # fmt: skip


def run(preset: str, checkouts: str | None = None) -> Result:
    from components.tokenizers.text import TextTokenizer

    p = PRESETS[preset]
    if "steps" in p:
        return blocks.run(preset, p, checkouts)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = Processor.build({"text": TextTokenizer.train(["the text of a prompt"], vocab_size=300)}, {})
    length = p["prompt"] + p["new"] + 8
    model = builders.model(processor.vocabulary.size, length, p["width"], p["num_layers"], p["width"] // 64)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    ids = torch.randint(0, 256, (p["prompt"] + p["new"],), generator=torch.Generator().manual_seed(0))
    prompts = [{"text": Edit(ids, torch.arange(len(ids)) >= p["prompt"])}] * p["rows"]
    one_a_pass = Blocks(Confidence(num_steps=p["block"], temperature=0.0), p["block"])
    models = ways(model, device, sampling=True)
    made: dict[str, Any] = {}

    def call(name: str, own: Any, sampler: Any, cache: str) -> Any:
        def run_once() -> None:
            made[name] = generate(own, processor, "text", prompts, sampler, 0.0, cache=cache, stop_at_end=False)

        return run_once

    variants = {
        f"cache {cache}, {how}": call(f"cache {cache}, {how}", own, one_a_pass, cache)
        for cache in ("off", "prefix", "dual")
        for how, own in models.items()
    }
    how = list(models)[-1]
    adaptive = f"threshold 0.9, cache dual, {how}"
    variants[adaptive] = call(adaptive, models[how], Blocks(Threshold(threshold=0.9, temperature=0.0), p["block"]), "dual")
    timings = interleaved(variants, p["warmup"], p["repeats"])
    more = {name: {"passes": float(made[name].forwards.double().mean())} for name in variants}
    figures = {}
    for name in list(models)[1:]:
        same = made[f"cache off, {name}"].tokens == made["cache off, eager"].tokens
        figures[f"{name}_same_tokens"] = float(same.double().mean())
        figures[f"{name}_speedup"] = timings["cache off, eager"].median / timings[f"cache off, {name}"].median
    figures["dual_cache_speedup"] = timings["cache off, eager"].median / timings[f"cache dual, {how}"].median
    return Result("sample", preset, "new tokens/s", p, rows(timings, p["rows"] * p["new"], more), figures)
