"""Quantized models: speed and memory of a forward pass, and what a trained model loses.

Speed is of random weights in the preset's shape. With `--checkpoint runs/quickstart` the trained model is quantized too: its
NELBO, the share of greedy tokens that stay the same, and the judges' accuracy, each against the same model unquantized.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from benchmarks.measure import Result, interleaved, rows
from benchmarks.train import compiled, precisions
from components.data.digits import WORDS
from components.samplers import Confidence
from mdm.config import UserError, find_config, load
from mdm.generation.generate import generate
from mdm.hardware import Hardware, can_compile, compile_blocks, fast_bf16
from mdm.models import builders
from mdm.models.folder import load_model
from mdm.models.quantization import SCHEMES, check_scheme, dequantize, in_dtype, num_bytes, quantize
from mdm.models.transformer import MaskedDiffusionModel
from mdm.recipe import load_recipe

PRESETS = {
    "smoke": {"width": 64, "num_layers": 2, "length": 32, "rows": 2, "warmup": 1, "repeats": 3, "samples": 10},
    "cpu": {"width": 512, "num_layers": 8, "length": 64, "rows": 4, "warmup": 1, "repeats": 9, "samples": 40},
    "gpu": {"width": 4096, "num_layers": 32, "length": 32, "rows": 1, "warmup": 5, "repeats": 20, "samples": 1000},
}


def run(preset: str, checkpoint: str | None = None) -> Result:
    p = PRESETS[preset]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    schemes, unmeasured = [], []
    for scheme in SCHEMES:
        try:
            check_scheme(scheme, device)
            schemes.append(scheme)
        except UserError as error:
            unmeasured.append(str(error))
    whole = model_of(p)
    bf16 = in_dtype(copy.deepcopy(whole), torch.bfloat16).to(device)
    reference = num_bytes(bf16)
    plain = {name: {"float32": whole, "bf16": bf16}[name] for name in precisions(device)}
    if "bf16" not in plain:
        unmeasured.append("bf16: this processor does not multiply it; the schemes below compute in float32")
    models = {f"{name}, eager": model for name, model in plain.items()}
    how = "compiled" if can_compile(device) else "eager"
    if how == "compiled":
        models |= {f"{name}, compiled": compiled(model, device) for name, model in plain.items()}
    memory = {name: {"of bf16": num_bytes(model) / reference} for name, model in models.items()}
    for scheme in schemes:  # int8 products on a CPU take float32 activations best
        base = bf16 if "bf16" in plain and not (scheme == "int8_dynamic" and device.type == "cpu") else whole
        model = copy.deepcopy(base)
        quantize(model, scheme)
        packed = model
        if base is not bf16:  # memory is of bfloat16 scales, whatever is computed in
            packed = copy.deepcopy(bf16)
            quantize(packed, scheme)
        memory[f"{scheme}, {how}"] = {"of bf16": num_bytes(packed) / reference}
        if how == "compiled":
            compile_blocks(model, "true", Hardware(device, 0, 1, False))
        models[f"{scheme}, {how}"] = model
    variants = {name: forward(model, p, device) for name, model in models.items()}
    timings = interleaved(variants, p["warmup"], p["repeats"])
    first, figures = next(iter(timings.values())), {}
    for name in [*plain, *schemes]:
        figures[f"{name}_speedup"] = first.median / timings[f"{name}, {how}"].median
        figures[f"{name}_memory"] = memory[f"{name}, {how}"]["of bf16"]
    if checkpoint is None:
        unmeasured.append("quality: name a trained quickstart, --checkpoint runs/quickstart")
    else:
        slow = device.type == "cpu" and not torch.cpu._is_vnni_supported()
        if slow:
            unmeasured.append("quality of int8_dynamic: this processor has no VNNI, and takes seconds for a pass")
        figures |= quality(checkpoint, [s for s in schemes if not (slow and s == "int8_dynamic")], p["samples"], device)
    return Result("quantize", preset, "tokens/s", p, rows(timings, p["rows"] * p["length"], memory), figures, unmeasured)


def model_of(p: dict[str, int]) -> MaskedDiffusionModel:
    model = builders.model(256, p["length"], p["width"], p["num_layers"], p["width"] // 64)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


def forward(model: MaskedDiffusionModel, p: dict[str, int], device: torch.device) -> Any:
    tokens = torch.randint(0, 256, (p["rows"], p["length"]), generator=torch.Generator().manual_seed(0)).to(device)

    @torch.no_grad()
    def call() -> None:
        model.hidden(tokens)

    return call


def quality(checkpoint: str, schemes: list[str], samples: int, device: torch.device) -> dict[str, float]:
    """What each scheme changes in a trained quickstart, against itself: in bfloat16 where the hardware multiplies it.

    Memory is of bfloat16 scales, whatever is computed in.
    """
    evaluate = load_recipe("evaluate")
    cfg = load(
        evaluate.Settings, find_config("evaluate"), [f"checkpoint={checkpoint}", f"samples={samples}", "nelbo_repeats=2"]
    )
    for task in cfg.judged.values():
        task.complete = None
    hw = Hardware(device, 0, 1, False)
    found: dict[str, float] = {}
    base: dict[str, float] = {}
    tokens = torch.empty(0)  # and of the model itself
    for scheme in (None, *schemes):
        model, processor = load_model(checkpoint, device)
        packed = in_dtype(copy.deepcopy(model), torch.bfloat16)
        before = num_bytes(packed)
        model = in_dtype(model, torch.bfloat16) if fast_bf16(device.type == "cuda") else model
        if scheme is not None:
            quantize(model, scheme)
            quantize(packed, scheme)
            if device.type == "cpu" and scheme != "int8_dynamic":
                dequantize(model)  # the same numbers, sooner
        metrics = evaluate.evaluate(cfg, model, processor, hw).metrics
        prompts = [{"text": f"a handwritten {WORDS[i % len(WORDS)]}"} for i in range(samples)]
        greedy = generate(model, processor, "text_to_image", prompts, Confidence(num_steps=8, temperature=0.0), 0.0).tokens
        if scheme is None:
            base, tokens = metrics, greedy
            continue
        bits = [k for k in metrics if k.endswith("bits_per_token") and "unigram" not in k]
        found[f"quickstart_{scheme}_memory"] = num_bytes(packed) / before
        found[f"quickstart_{scheme}_nelbo"] = math.exp(sum(math.log(metrics[k] / base[k]) for k in bits) / len(bits)) - 1
        found[f"quickstart_{scheme}_worst_nelbo"] = max(metrics[k] / base[k] for k in bits) - 1
        drops = [base[k] - metrics[k] for k in metrics if k.endswith("_accuracy") and "judge" not in k]
        found[f"quickstart_{scheme}_largest_accuracy_drop"] = max(drops)
        found[f"quickstart_{scheme}_same_greedy_tokens"] = float((greedy == tokens).float().mean())
    return found
