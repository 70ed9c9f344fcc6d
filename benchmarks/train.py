"""A training step's variants: logits at masked positions only against logits everywhere, bf16, torch.compile.

Random tokens, Bernoulli masks of mean rate 0.5 (drawn once), forward and backward; no optimizer, no data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import as_dict, interleaved, machine
from components.losses import coefficients, loss_from_logits
from components.maskers import BernoulliMasker
from components.sequences import collate, task_sequence
from components.vocabulary import Vocabulary
from mdm import builders
from mdm.data import LossSettings, micro_batch
from mdm.evaluation import forward_loss
from mdm.hardware import Hardware, can_compile, compile_blocks

PRESETS = {
    "smoke": {"width": 64, "num_layers": 2, "vocab": 2_000, "length": 64, "rows": 8, "warmup": 1, "repeats": 3},
    "cpu": {"width": 256, "num_layers": 4, "vocab": 50_000, "length": 128, "rows": 16, "warmup": 2, "repeats": 7},
    "gpu": {"width": 768, "num_layers": 12, "vocab": 50_000, "length": 1024, "rows": 32, "warmup": 5, "repeats": 20},
}


def run(preset: str) -> dict[str, Any]:
    """Tokens per second of each variant, and the ratios between them."""
    p = PRESETS[preset]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocabulary = Vocabulary.build({"text": (p["vocab"],)}, tasks=("text",))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, p["vocab"], (p["rows"], p["length"] - 3), generator=generator)
    rows = [[task_sequence(vocabulary, "text", {"text": row}, {})] for row in ids]
    batch = collate(rows, [[i] for i in range(len(rows))], vocabulary.pad_id)
    micro = micro_batch(batch, BernoulliMasker(vocabulary.mask_id), LossSettings(), len(vocabulary.ranges))
    coefficient = coefficients(micro.noisy)[0].to(device)
    micro = micro.to(device)

    def build(compiled: bool) -> Any:
        model = builders.model(vocabulary.size, p["length"], p["width"], p["num_layers"], p["width"] // 64)
        model.init_weights(torch.Generator().manual_seed(0))
        model.to(device)
        if compiled:
            compile_blocks(model, "auto", Hardware(device, 0, 1, False))
        return model

    def masked_only(model: Any, bf16: bool) -> Callable[[], None]:
        hw = Hardware(device, 0, 1, bf16)

        def step() -> None:
            model.zero_grad()
            forward_loss(model, micro, vocabulary, hw).loss.backward()

        return step

    def everywhere(model: Any, bf16: bool) -> Callable[[], None]:
        hw = Hardware(device, 0, 1, bf16)

        def step() -> None:
            model.zero_grad()
            with hw.autocast():
                logits = model(micro.noisy.noisy)
            loss_from_logits(logits, micro.noisy.clean.tokens, micro.noisy.mask, coefficient).backward()

        return step

    eager = build(compiled=False)
    variants = {
        "all logits, float32": everywhere(eager, False),
        "masked only, float32": masked_only(eager, False),
        "masked only, bf16": masked_only(eager, True),
    }
    if can_compile(device):
        variants["masked only, bf16, compiled"] = masked_only(build(compiled=True), True)
    timings = interleaved(variants, p["warmup"], p["repeats"])
    tokens = p["rows"] * p["length"]
    base = timings["all logits, float32"].median
    return {
        "suite": "train",
        "preset": preset,
        "settings": p,
        "machine": machine(),
        "seconds": as_dict(timings),
        "tokens_per_second": {name: tokens / t.median for name, t in timings.items()},
        "speedup_over_all_logits_float32": {name: base / t.median for name, t in timings.items()},
        "masked_only_speedup": base / timings["masked only, float32"].median,
    }
