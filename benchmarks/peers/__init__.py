"""The code of others beside ours, from checkouts that you name: equal shapes, equal tokens, equal weights where they can be.

    mdm bench peers --checkouts FOLDER

FOLDER holds any of these, as `git clone` names them; what is missing, or cannot be imported here, is listed as not measured:

    LLaDA      github.com/ML-GSAI/LLaDA        generate.py: the reference decoding
    Fast-dLLM  github.com/NVlabs/Fast-dLLM     llada/model: LLaDA's modelling code, its training step with the loss of LLaDA's
                                               guidelines; llada/generate.py: prefix and dual caches
    dllm       github.com/ZHZisZZ/dllm         its copy of LLaDA's modelling code, trained by its MDLMTrainer; its block decoder
                                               (BD3LMSampler) in `mdm bench sample --preset blocks`
    mdlm       github.com/kuleshov-group/mdlm  models/dit.py: model and training
    unidisc    github.com/alexanderswerdlow/unidisc  models/dit.py: model and training, with PyTorch's attention

One environment runs them all: transformers 4.57.0, tokenizers 0.22.1, huggingface_hub 0.36.0, diffusers 0.35.2, datasets 4.2.0,
accelerate 1.11.0, peft 0.17.1 and einops.

Stated differences: MDLM's model has a time input and adaptive norms (more parameters), and like UniDisc's GELU and dropout;
ours has QK-norm and SwiGLU. Without flash-attn, PyTorch's attention stands in for MDLM's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mdm.config import UserError

from ..measure import Result, Row, interleaved, peak_memory, rows
from . import dit, llada
from .checkouts import Suite

LLADA_CPU = {"d_model": 256, "n_heads": 4, "n_layers": 4, "mlp_hidden_size": 768, "vocab_size": 2_000}
LLADA_768 = {"d_model": 768, "n_heads": 12, "n_layers": 12, "mlp_hidden_size": 2048, "vocab_size": 50_000}
LLADA_8B = {"d_model": 4096, "n_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288, "vocab_size": 126_464}
DIT_CPU = {"width": 256, "num_layers": 4, "vocab": 50_000}
DIT_768 = {"width": 768, "num_layers": 12, "vocab": 50_000}
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "sampled": {**LLADA_CPU, "d_model": 64, "n_layers": 2},
        "prompt": 16,
        "new": 16,
        "block": 8,
        "trained": {**LLADA_CPU, "d_model": 64, "n_layers": 2},
        "dit": {"width": 64, "num_layers": 2, "vocab": 500},
        "length": 32,
        "rows": 8,
        "warmup": 1,
        "repeats": 2,
    },
    "cpu": {
        "sampled": LLADA_CPU,
        "prompt": 64,
        "new": 64,
        "block": 32,
        "trained": LLADA_CPU,
        "dit": DIT_CPU,
        "length": 128,
        "rows": 16,
        "warmup": 1,
        "repeats": 9,
    },
    "gpu": {
        "sampled": LLADA_8B,
        "prompt": 128,
        "new": 256,
        "block": 32,
        "trained": LLADA_768,
        "dit": DIT_768,
        "length": 1024,
        "rows": 32,
        "warmup": 2,
        "repeats": 5,
    },
}
SUITES = {
    "sampling, LLaDA and Fast-dLLM": llada.sampling,
    "training, LLaDA": llada.training,
    "training, dLLM": llada.dllm_training,
    "training, MDLM": dit.mdlm_training,
    "training, UniDisc": dit.unidisc_training,
}


def run(preset: str, checkouts: str | None = None) -> Result:
    if checkouts is None or not Path(checkouts).is_dir():
        raise UserError("peers: --checkouts FOLDER, with LLaDA, Fast-dLLM, dllm, mdlm or unidisc in it")
    p, folder = PRESETS[preset], Path(checkouts)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: list[Row] = []
    figures: dict[str, float] = {}
    unmeasured: list[str] = []
    for name, suite in SUITES.items():
        try:
            own, agreement = compare(name, suite, p, folder, device)
        except (ImportError, FileNotFoundError, AttributeError, torch.OutOfMemoryError) as error:
            unmeasured.append(f"{name}: {error}")
            continue
        found += own
        figures |= agreement
    if not found:
        raise UserError("peers: nothing could be measured\n" + "\n".join(unmeasured))
    return Result("peers", preset, "tokens/s", p, found, figures, unmeasured)


def compare(
    name: str, suite: Callable[..., Suite], p: dict[str, Any], folder: Path, device: torch.device
) -> tuple[list[Row], dict[str, float]]:
    """A group of rows, and in what their outcomes agree. Its models are gone afterwards."""
    variants, work, agreement = suite(p, folder, device)
    timings = interleaved(variants, p["warmup"], p["repeats"])
    memory = {n: {"GiB": peak_memory(call)} for n, call in variants.items()} if device.type == "cuda" else {}
    return rows(timings, work, memory, name), agreement()
